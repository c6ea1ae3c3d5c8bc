"""OFT against Cayley blocks computed by inverses, its invariants, and PEFT's exact branch."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.oft import OFT


def filled(values, b):
    """Skew-symmetric, filled above the diagonal row by row."""
    Q, values = torch.zeros(b, b, dtype=values.dtype), iter(values)
    for row in range(b):
        for column in range(row + 1, b):
            Q[row, column] = next(values)
    return Q - Q.T


def rotation(skew, b, n):
    """blockdiag((I − Q)(I + Q)⁻¹)."""
    R = torch.zeros(n, n, dtype=skew.dtype)
    for i in range(n // b):
        Q, eye = filled(skew[i % len(skew)], b), torch.eye(b, dtype=skew.dtype)
        R[i * b : (i + 1) * b, i * b : (i + 1) * b] = (eye - Q) @ torch.linalg.inv(eye + Q)
    return R


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("shape", [(12, 12), (15, 8), (8, 20)])
def test_reference(check, shape, share):
    at = check.make(OFT(block=4, block_share=share), *shape)
    skew = at.p["skew"].detach().clone().requires_grad_()
    R = rotation(skew, 4, shape[1])
    torch.testing.assert_close((at.W + at.delta).detach(), (at.W @ R.T).detach(), rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    (want,) = torch.autograd.grad((check.upstream(at)[1] * (at.W @ R.T)).sum(), skew)
    for through in ("delta", "apply"):
        torch.testing.assert_close(check.gradients(at, through)["skew"], want, rtol=1e-9, atol=1e-9)


def test_angles_norms_and_spectrum_stay(check):
    at = check.make(OFT(block=4), 15, 12)
    new = (at.W + at.delta).detach()
    torch.testing.assert_close(new @ new.T, at.W @ at.W.T)
    torch.testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(at.W))
    assert (new - at.W).norm() > 0.1 * at.W.norm()


def test_first_gradient(check):
    """At Q = 0, R = I − 2Q + …, so ∂L/∂Q = −2 skew(GᵀW) in every block."""
    at = check.make(OFT(block=4), 15, 12)
    at.p["skew"] = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    M = at.W.T @ check.upstream(at)[1]  # W' = W Rᵀ = W (I + 2Q): dL = 2⟨WᵀG, Q⟩
    got = check.gradients(at)["skew"]
    for i in range(3):
        block = M[4 * i : 4 * i + 4, 4 * i : 4 * i + 4]
        row, column = torch.triu_indices(4, 4, 1)
        torch.testing.assert_close(got[i], 2 * (block - block.T)[row, column])


def test_start_and_counts(check):
    for share in (False, True):
        check.starts_exactly(OFT(block=16, block_share=share))
        check.starts_exactly(OFT(block=10, block_share=share), 50, 70)
        check.counts(OFT(block=16, block_share=share), [(64, 64), (96, 64), (64, 96)])
        check.counts(OFT(block=10, block_share=share), [(50, 70)])
    check.starts_exactly(OFT(block=16, terms=5))
    assert OFT(block=16).trainable(64, 96) == 96 * 15 // 2


def test_more_terms_come_to_the_exact_rotation(check):
    """What k terms leave out is R (−Q)^(k−1): the exact rotation is the limit, not its transpose."""
    at = check.make(OFT(block=4), 6, 8)
    skew = at.p["skew"].detach() / 2
    exact, Q = OFT(block=4)._rotation({"skew": skew}), torch.stack([filled(s, 4) for s in skew])
    assert torch.linalg.matrix_norm(Q, 2).max() < 1
    for k in (3, 4, 5, 9, 60):
        series = OFT(block=4, terms=k)._rotation({"skew": skew})
        torch.testing.assert_close(exact - series, exact @ torch.matrix_power(-Q, k - 1))
    torch.testing.assert_close(series, exact)
    assert (series - exact.mT).norm() > 0.5


def test_a_series_has_the_same_forms_and_gradients(check):
    at = check.make(OFT(block=4, terms=5), 15, 8)
    check.forms_agree(at)
    skew = at.p["skew"].detach().clone().requires_grad_()
    R = torch.block_diag(*[
        torch.eye(4) - 2 * Q + 2 * Q @ Q - 2 * Q @ Q @ Q + Q @ Q @ Q @ Q for Q in (filled(s, 4) for s in skew)
    ])  # fmt: skip
    torch.testing.assert_close(at.method.effective(at.W, at.p).detach(), (at.W @ R.T).detach())
    (want,) = torch.autograd.grad((check.upstream(at)[1] * (at.W @ R.T)).sum(), skew)
    for through in ("delta", "apply"):
        torch.testing.assert_close(check.gradients(at, through)["skew"], want, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("share", [False, True])
def test_pefts_exact_branch_has_the_same_forward(share):
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.OFTConfig(oft_block_size=4, block_share=share, use_cayley_neumann=False, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, OFT(block=4, block_share=share), targets="proj").sites())
    with torch.no_grad():
        layer.oft_R["default"].weight.copy_(tensors.skew.normal_())
    x = torch.randn(2, 7, 20)
    torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("default")
def test_pefts_default_is_the_series_of_the_transposed_rotation():
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.OFTConfig(oft_block_size=4, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, OFT(block=4, terms=5), targets="proj").sites())
    x = torch.randn(2, 7, 20)
    with torch.no_grad():
        layer.oft_R["default"].weight.copy_(-tensors.skew.normal_(std=0.3))
        torch.testing.assert_close(base["proj"](x), layer(x), rtol=1e-4, atol=1e-4)
        layer.oft_R["default"].weight.copy_(tensors.skew)
        assert (base["proj"](x) - layer(x)).norm() > 0.1 * layer(x).norm()


def test_options_and_shapes_are_checked():
    assert "does not divide" in OFT(block=32).check(50, 70)
    with pytest.raises(AddendaError, match="block must be at least 2"):
        OFT(block=1)
    for terms in (-1, 1, 2):
        with pytest.raises(AddendaError, match="terms must be 0"):
            OFT(terms=terms)
