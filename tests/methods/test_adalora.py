"""AdaLoRA's form against sums of outer products and PEFT; how it is trained is tested in tests/optim."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.core.base.random import Stream
from addenda.methods.adalora import AdaLoRA


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_reference(check, shape, alpha):
    at, s = check.make(AdaLoRA(rank=4, target_rank=2, alpha=alpha), *shape), (alpha or 4) / 4
    A, B, E = (at.p[k].detach() for k in "ABE")
    want = s * sum(E[k] * torch.outer(B[:, k], A[k]) for k in range(4))
    torch.testing.assert_close(at.delta.detach(), want, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    G, got = check.upstream(at)[1], check.gradients(at)
    torch.testing.assert_close(got["A"], s * E[:, None] * (B.T @ G), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got["B"], s * E * (G @ A.T), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got["E"], s * (B.T @ G @ A.T).diagonal(), rtol=1e-10, atol=1e-10)


def test_a_triplet_whose_e_is_0_does_nothing(check):
    at = check.make(AdaLoRA(rank=4, target_rank=2), 8, 8)
    without = at.p | {"E": at.p["E"].detach() * torch.tensor([1.0, 0, 1, 0])}
    kept = {k: (t[:, ::2] if k == "B" else t[::2]) for k, t in at.p.items()}
    same = AdaLoRA(rank=2, target_rank=2).delta(at.W, kept)
    torch.testing.assert_close(at.method.delta(at.W, without), same, rtol=1e-10, atol=1e-10)


def test_start_and_counts(check):
    check.starts_exactly(AdaLoRA())
    check.starts_exactly(AdaLoRA(rank=3, target_rank=3, alpha=7.0), 50, 70)
    check.counts(AdaLoRA())
    own = AdaLoRA(rank=64).init(torch.zeros(300, 200), Stream(0), {})
    assert abs(own["A"].std() / 0.02 - 1) < 0.03 and abs(own["B"].std() / 0.02 - 1) < 0.03
    assert not own["E"].any()


@pytest.mark.filterwarnings("default")
def test_peft_has_the_same_forward_and_gradients():
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=100, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, AdaLoRA(rank=4, target_rank=2, alpha=6), targets="proj").sites())
    with torch.no_grad():
        for mine, other in ((tensors.A, layer.lora_A), (tensors.B, layer.lora_B), (tensors.E, layer.lora_E)):
            other["default"].copy_(mine.normal_().view(other["default"].shape))
    x = torch.randn(2, 5, 20)
    mine, want = base["proj"](x), layer(x)
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)  # PEFT divides by r + 1e-5
    mine.sum().backward(), want.sum().backward()
    for mine, other in ((tensors.A, layer.lora_A), (tensors.B, layer.lora_B), (tensors.E, layer.lora_E)):
        torch.testing.assert_close(mine.grad, other["default"].grad.view(mine.shape), rtol=1e-4, atol=1e-4)


def test_options_are_checked():
    assert AdaLoRA().trained_by == "adalora"
    for options, message in (
        ({"rank": 4}, "target_rank <= rank must hold, got target_rank=8, rank=4"),
        ({"target_rank": 0}, "1 <= target_rank"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be in"),
    ):
        with pytest.raises(AddendaError, match=message):
            AdaLoRA(**options)
    assert "above" in AdaLoRA().check(11, 20)
