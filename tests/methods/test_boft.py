"""BOFT against products of permuted Cayley blocks written entry by entry, and against PEFT's own layers."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.core.method.contract import to_float
from addenda.methods.boft import BOFT


def cayley(values, b):
    """(I − Q)(I + Q)⁻¹, Q filled above the diagonal row by row."""
    row, column = torch.triu_indices(b, b, 1)
    Q = torch.zeros(b, b, dtype=values.dtype).index_put((row, column), values)
    Q, eye = Q - Q.T, torch.eye(b, dtype=values.dtype)
    return (eye - Q) @ torch.linalg.inv(eye + Q)


def rotation(skew, b, n):
    """B_f … B_1: on level i, blocks join the j-th b/2 entries of both halves of every chunk of b · 2^i."""
    R = torch.eye(n, dtype=skew.dtype)
    for i, blocks in enumerate(skew):
        B, stride, values = torch.zeros(n, n, dtype=skew.dtype), 2**i, iter(blocks)
        for chunk in range(0, n, b * stride):
            for j in range(stride):
                units = (chunk + j * b // 2, chunk + (stride + j) * b // 2)
                entries = torch.tensor([unit + k for unit in units for k in range(b // 2)])
                B[entries[:, None], entries] = cayley(next(values), b)
        R = B @ R
    return R


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("shape", "b", "levels"), [((15, 8), 2, 3), ((8, 16), 4, 2), ((6, 24), 6, 3), ((9, 8), 4, 1)])
def test_reference(check, shape, b, levels, scale):
    at = check.make(BOFT(block=b, levels=levels, scale=scale), *shape)
    leaves = [t.detach().clone().requires_grad_() for t in at.leaves]
    new = at.W @ rotation(leaves[0], b, shape[1]).T
    new = (1 + leaves[1])[:, None] * new if scale else new
    torch.testing.assert_close((at.W + at.delta).detach(), new.detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    want = torch.autograd.grad((check.upstream(at)[1] * new).sum(), leaves)
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        torch.testing.assert_close([got[k] for k in at.trainable], list(want), rtol=1e-9, atol=1e-9)


def test_one_level_is_oft(check):
    """Blocks side by side, and nothing between them."""
    at = check.make(BOFT(block=4, levels=1), 8, 12)
    R = at.method.effective(torch.eye(12, dtype=torch.float64), at.p).detach().T
    torch.testing.assert_close(R, torch.block_diag(*[cayley(q, 4) for q in at.p["skew"].detach()[0]]))


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_every_level_doubles_what_an_entry_reaches(check, levels):
    at = check.make(BOFT(block=2, levels=levels), 16, 16)
    R = at.method.effective(torch.eye(16, dtype=torch.float64), at.p)
    assert bool(((R != 0).sum(1) == 2**levels).all())
    assert bool(((R != 0).sum(0) == 2**levels).all())


def test_angles_norms_and_spectrum_stay(check):
    at = check.make(BOFT(block=4, levels=3), 15, 16)
    new = (at.W + at.delta).detach()
    torch.testing.assert_close(new @ new.T, at.W @ at.W.T)
    torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(at.W))
    assert (new - at.W).norm() > 0.1 * at.W.norm()


def test_start_and_counts(check):
    for scale in (False, True):
        check.starts_exactly(BOFT(block=8, levels=4, scale=scale))
        check.starts_exactly(BOFT(block=2, levels=1, scale=scale), 50, 70)
        check.counts(BOFT(block=4, levels=3, scale=scale), [(64, 64), (96, 64), (64, 96), (50, 48)])
    assert BOFT(block=8, levels=2).trainable(64, 96) == 2 * 96 * 7 // 2


class Kernel:
    """What PEFT's CUDA kernel does: blocks of every level, put on the diagonal of one matrix."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*level) for level in blocks])]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("b", "levels"), [(4, 1), (4, 3), (2, 4)])
def test_peft_has_the_same_forward_and_merge(monkeypatch, b, levels):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: Kernel)
    base, theirs = nn.ModuleDict({"proj": nn.Linear(16, 12)}), nn.ModuleDict({"proj": nn.Linear(16, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=levels, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, BOFT(block=b, levels=levels, scale=True), targets="proj").sites())
    row, column = torch.triu_indices(b, b, 1)
    x = torch.randn(2, 7, 16)
    with torch.no_grad():
        layer.boft_R["default"][:, :, row, column] = tensors.skew.normal_(std=0.5)
        layer.boft_R["default"][:, :, column, row] = -tensors.skew
        layer.boft_s["default"].copy_(1 + tensors.scale.normal_(std=0.3)[:, None])
        torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-4, atol=1e-4)
        layer.merge()
        new = tensors.method.effective(base["proj"].weight, to_float(tensors.tensors()))
        torch.testing.assert_close(new, layer.base_layer.weight, rtol=1e-4, atol=1e-4)


def test_options_and_shapes_are_checked():
    assert "does not divide" in BOFT(block=4, levels=3).check(50, 72)
    assert BOFT(block=4, levels=2).check(50, 72) is None
    assert "does not divide" in BOFT(levels=20_000).check(8, 8)
    for block in (0, 1, 3):
        with pytest.raises(AddendaError, match="block must be even"):
            BOFT(block=block)
    with pytest.raises(AddendaError, match="levels must be at least 1"):
        BOFT(levels=0)
