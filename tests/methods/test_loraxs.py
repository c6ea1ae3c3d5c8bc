"""LoRA-XS against the singular value decomposition."""

import pytest
import torch

from addenda import AddendaError
from addenda.methods.loraxs import LoRAXS


@pytest.mark.parametrize(("alpha", "s"), [(None, 1), (6.0, 2)])
@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape, alpha, s):
    at = check.make(LoRAXS(rank=3, alpha=alpha), *shape)
    U, S, Vh = torch.linalg.svd(at.W)
    sign = (U[:, :3] * at.p["B"]).sum(0).sign()  # a pair of vectors is unique up to its sign
    left, right = U[:, :3] * sign, torch.diag(S[:3]) @ torch.diag(sign) @ Vh[:3]
    R = at.p["R"].detach()
    torch.testing.assert_close(at.delta.detach(), s * left @ R @ right, rtol=1e-9, atol=1e-9)
    check.forms_agree(at)
    want = s * left.T @ check.upstream(at)[1] @ right.T
    for through in ("delta", "apply"):
        torch.testing.assert_close(check.gradients(at, through)["R"], want, rtol=1e-8, atol=1e-8)


def test_an_identity_adds_the_principal_part_again(check):
    at = check.make(LoRAXS(rank=4), 15, 10)
    at.p["R"] = torch.eye(4, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(at.W, full_matrices=False)
    torch.testing.assert_close(at.delta, U[:, :4] * S[:4] @ Vh[:4], rtol=1e-9, atol=1e-9)


def test_start_and_counts(check):
    check.starts_exactly(LoRAXS())
    check.starts_exactly(LoRAXS(rank=5, alpha=2.0), 50, 70)
    check.counts(LoRAXS())
    assert LoRAXS().trainable(64, 64) == LoRAXS().trainable(4096, 1024) == 256


def test_options_and_shapes_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"alpha": 0.0}, "alpha must")):
        with pytest.raises(AddendaError, match=message):
            LoRAXS(**options)
    assert "above" in LoRAXS().check(8, 20)
