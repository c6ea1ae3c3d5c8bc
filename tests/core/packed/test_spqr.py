"""SpQR's format against a reading of its bytes by hand, its bits against the formula, its sweep against GPTQ's."""

from itertools import pairwise

import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.core.packed.bits import pack, unpack
from addenda.core.packed.spqr import SpQRTensor


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_side_by_side(bits):
    codes = torch.randint(0, 2**bits, (37,), dtype=torch.uint8)
    held = pack(codes, bits)
    assert held.dtype == torch.uint8 and len(held) == -(-37 * bits // 8)
    stream = "".join(f"{b:08b}"[::-1] for b in held.tolist())  # lowest bit first
    assert [int(stream[i * bits : (i + 1) * bits][::-1], 2) for i in range(37)] == codes.tolist()
    assert torch.equal(unpack(held, bits, 37), codes)


def by_hand(held: SpQRTensor) -> torch.Tensor:
    """Every weight from its own bytes, one after the other."""
    m, n = held.shape
    across, down = -(-n // 16), -(-m // 16)
    codes = unpack(held.codes, held.extra[0], m * across * 16).view(m, across * 16)
    scales, zeros = (unpack(t, 3, down * 16 * across).view(-1, across) for t in (held.scales, held.zeros))
    W = torch.empty(m, n, dtype=torch.float64)
    for i in range(m):
        for j in range(n):
            least_s, step_s, least_z, step_z = held.levels[i // 16, j // 16].double()
            s = least_s + step_s * scales[i, j // 16]
            W[i, j] = s * (codes[i, j] - (least_z + step_z * zeros[i, j // 16]))
        for at in range(int(held.rows[i]), int(held.rows[i + 1])):
            W[i, int(held.columns[at]) % (1 << 16)] = held.values[at]
    return W * held.unit.double()


@pytest.mark.parametrize(("m", "n", "bits"), [(32, 48, 3), (21, 37, 3), (16, 16, 4)])
def test_bytes_are_what_the_formula_says(m, n, bits):
    W = torch.randn(m, n) * 1e-3
    held = SpQRTensor.of(W, bits=bits, outliers=0.02)
    torch.testing.assert_close(held.dense().double(), by_hand(held), rtol=1e-5, atol=1e-9)
    out = round(0.02 * m * n)
    assert len(held.values) == int(held.rows[-1]) == out
    M, N = -(-m // 16) * 16, -(-n // 16) * 16
    codes = bits * -(-m * N // 8)
    second = 2 * 3 * -(-M * N // 16 // 8) + 8 * M * N // 256
    assert held.bits * m * n == pytest.approx(8 * (codes + second + 4 * out + 4 * (m + 1) + 4))
    if m % 16 == n % 16 == 0:
        formula = bits + 6 / 16 + 64 / 256 + 32 * out / (m * n) + 32 / n + 64 / (m * n)
        assert held.bits == pytest.approx(formula)


def test_outliers_cost_their_neighbours_nothing_and_bits_buy_precision():
    W = torch.randn(64, 128)
    big = torch.randperm(W.numel())[:81]
    loud = W.clone().flatten().index_fill(0, big, 30.0).view_as(W)
    quiet = torch.ones(W.numel(), dtype=torch.bool).index_fill(0, big, False).view_as(W)

    def error(W, **options):
        return float(((SpQRTensor.of(W, **options).dense() - W)[quiet]).norm() / W[quiet].norm())

    assert error(loud, outliers=0) > 2 * error(W, outliers=0)
    assert error(loud, outliers=0.01) < 1.05 * error(W, outliers=0)
    held = SpQRTensor.of(loud, outliers=0.01)
    torch.testing.assert_close(held.dense().flatten()[big], loud.flatten()[big], rtol=1e-3, atol=0)
    errors = [error(W, bits=b) for b in (2, 3, 4, 6)]
    assert all(a > 1.7 * b for a, b in pairwise(errors))
    assert error(W, bits=3, outliers=0.01) < 0.135
    again = held.again(W)
    assert again.extra == held.extra and len(again.values) == len(held.values)
    assert torch.equal(SpQRTensor.of(torch.zeros(20, 20)).dense(), torch.zeros(20, 20))


def test_the_sweep_is_gptqs_and_spares_what_the_inputs_see():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(600, 40, generator=g, dtype=torch.float64) @ torch.randn(40, 40, generator=g, dtype=torch.float64)
    C, W = X.T @ X / 600, torch.randn(24, 40, generator=g)
    plain, swept = SpQRTensor.of(W, outliers=0), SpQRTensor.of(W, C, outliers=0, damp=0.01)

    def loss(held):
        return float((X @ (held.dense() - W).double().T).square().sum())

    assert loss(swept) < 0.6 * loss(plain)
    # GPTQ as Frantar et al. write it: after column j, W[:, j+1:] −= error H⁻¹[j, j+1:] / H⁻¹[j, j], then j leaves H
    H = C + 0.01 * C.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    w, inverse = W.double().clone(), torch.linalg.inv(H)
    wanted = torch.empty_like(w)
    s, z = (by_columns(swept, k) for k in ("scales", "zeros"))
    for j in range(40):
        u = w[:, j] / swept.unit
        wanted[:, j] = (
            ((u / s[:, j // 16] + z[:, j // 16]).round().clamp(0, 7) - z[:, j // 16]) * s[:, j // 16] * swept.unit
        )
        error = (w[:, j] - wanted[:, j]) / inverse[j, j]
        w = w - error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert float((swept.dense() - wanted).abs().gt(1e-3).double().mean()) < 0.01  # a tie may fall on either side
    noise = SpQRTensor.of(W, torch.eye(40), damp=1.0)
    assert float((noise.dense() - W).norm() / W.norm()) < 0.135  # inputs alike in all directions: nothing to make up


def by_columns(held: SpQRTensor, which: str) -> torch.Tensor:
    m, n = held.shape
    across, down, at = -(-n // 16), -(-m // 16), 2 * (which == "zeros")
    codes = unpack(getattr(held, which), 3, down * 16 * across).view(-1, across)
    table = held.levels.double().repeat_interleave(16, 0)
    return (table[..., at] + table[..., at + 1] * codes)[:m]


def test_what_it_cannot_take_is_refused():
    W = torch.randn(8, 16)
    for bad, why in [
        ({"bits": 1}, "bits in 2"), ({"outliers": 1.0}, "outliers in"), ({"damp": 0.0}, "damp > 0"),
        ({"C": torch.eye(3)}, "C of 16 × 16"),
    ]:  # fmt: skip
        with pytest.raises(AddendaError, match=why):
            SpQRTensor.of(W, **bad)
    with pytest.raises(AddendaError, match="takes matrices"):
        SpQRTensor.of(torch.randn(2, 3, 4))
    W[0, 0] = torch.nan
    with pytest.raises(AddendaError, match="not finite; SpQR"):
        SpQRTensor.of(W)
