"""LoKr and KronA against blocks that are multiples of one matrix, and against PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.core.method.catalogue import build
from addenda.methods.lokr import LoKr


@pytest.mark.parametrize(
    ("options", "s"),
    [({"rank": 1}, 1), ({"rank": 1, "alpha": 3.0}, 3), ({"rank": 50}, 1), ({"rank": None, "alpha": 2.0}, 2)],
    ids=["thin", "scaled", "full", "krona"],
)
@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (8, 18), (7, 12)])
def test_reference(check, shape, options, s):
    at = check.make(LoKr(**options), *shape)
    C, B = at.p["C"].detach(), at.p["B"].detach()
    second = B @ at.p["A"].detach() if "A" in at.p else B
    assert ("A" in at.p) == (options["rank"] == 1)
    (u, v), (rows, columns) = C.shape, second.shape
    assert (u * rows, v * columns) == shape
    want, G = torch.zeros(shape, dtype=torch.float64), check.upstream(at)[1]
    gC, gsecond = torch.zeros_like(C), torch.zeros_like(second)
    for i in range(u):
        for j in range(v):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            want[part] = s * C[i, j] * second
            gC[i, j] = s * (G[part] * second).sum()
            gsecond += s * C[i, j] * G[part]
    torch.testing.assert_close(at.delta.detach(), want, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close(got["C"], gC, rtol=1e-9, atol=1e-9)
        gB = gsecond @ at.p["A"].detach().T if "A" in at.p else gsecond
        torch.testing.assert_close(got["B"], gB, rtol=1e-9, atol=1e-9)
        if "A" in at.p:
            torch.testing.assert_close(got["A"], B.T @ gsecond, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("width", "factor", "u"), [(128, None, 8), (128, 4, 4), (128, 5, 4), (128, 64, 8), (36, None, 6), (13, None, 1)]
)
def test_the_smaller_factor_is_the_largest_divisor_below_the_root(check, width, factor, u):
    at = check.make(LoKr(rank=1, factor=factor), width, width)
    assert at.p["C"].shape == (u, u)


def test_ranks_multiply(check):
    at = check.make(LoKr(rank=1), 36, 36)
    assert torch.linalg.matrix_rank(at.delta.detach()) == 6


def test_start_and_counts(check):
    for method in (LoKr(), LoKr(rank=2, factor=4), LoKr(rank=1, alpha=4.0), build("krona")):
        check.starts_exactly(method)
        check.starts_exactly(method, 50, 70)
        check.counts(method)
    assert LoKr(rank=8).trainable(1024, 1024) == 32 * 32 + 8 * 64
    assert build("krona").trainable(1024, 1024) == 2 * 32 * 32


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("rank", "factor"), [(1, None), (2, 2), (4, None)])
def test_peft_has_the_same_forward_and_gradients(rank, factor):
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.LoKrConfig(r=rank, alpha=6, decompose_factor=factor or -1, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    method = LoKr(rank=rank, alpha=6.0, factor=factor)
    tensors = next(t for _, t in attach(base, method, targets="proj").sites())
    names = {"C": "lokr_w1", "B": "lokr_w2_a", "A": "lokr_w2_b"} if rank < 4 else {"C": "lokr_w1", "B": "lokr_w2"}
    pairs = [(getattr(tensors, k), getattr(layer, name)["default"]) for k, name in names.items()]
    with torch.no_grad():
        for mine, their in pairs:
            their.copy_(mine.normal_())
    x = torch.randn(2, 7, 20)
    got, want = base["proj"](x), layer(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.sum().backward(), want.sum().backward()
    for mine, their in pairs:
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-4)


def test_options_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"factor": 0}, "factor must"), ({"alpha": 0.0}, "alpha")):
        with pytest.raises(AddendaError, match=message):
            LoKr(**options)
