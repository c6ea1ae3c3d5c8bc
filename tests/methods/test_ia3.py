"""(IA)³ against diagonal matrices, and against PEFT where a layer has no bias."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.ia3 import IA3


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape, side):
    at = check.make(IA3(side=side), *shape)
    d = torch.diag(at.p["d"].detach())
    torch.testing.assert_close(at.delta.detach(), d @ at.W if side == "out" else at.W @ d, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    want = (check.upstream(at)[1] * at.W).sum(1 if side == "out" else 0)
    for through in ("delta", "apply"):
        torch.testing.assert_close(check.gradients(at, through)["d"], want, rtol=1e-9, atol=1e-9)


def test_start_and_counts(check):
    for side in ("out", "in"):
        check.starts_exactly(IA3(side=side))
        check.starts_exactly(IA3(side=side), 50, 70)
        check.counts(IA3(side=side))
    assert (IA3().trainable(50, 70), IA3(side="in").trainable(50, 70)) == (50, 70)


def test_the_papers_places_in_one_call():
    model = nn.ModuleDict({k: nn.Linear(8, 12) for k in ("k_proj", "v_proj", "down_proj", "q_proj")})
    adapter = attach(model, {"k_proj": "ia3", "v_proj": "ia3", "down_proj": "ia3:side=in"})
    assert {path: len(t.d) for path, t in adapter.sites()} == {"k_proj": 12, "v_proj": 12, "down_proj": 8}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("side", ["out", "in"])
def test_peft_has_the_same_forward_and_gradients(side):
    peft = pytest.importorskip("peft")
    base = nn.ModuleDict({"proj": nn.Linear(20, 12, bias=False)})
    theirs = nn.ModuleDict({"proj": nn.Linear(20, 12, bias=False)})
    theirs.load_state_dict(base.state_dict())
    config = peft.IA3Config(target_modules=["proj"], feedforward_modules=["proj"] if side == "in" else [])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, IA3(side=side), targets="proj").sites())
    with torch.no_grad():
        layer.ia3_l["default"].copy_((1 + tensors.d.normal_()).view_as(layer.ia3_l["default"]))
    x = torch.randn(2, 7, 20)
    got, want = base["proj"](x), layer(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.sum().backward(), want.sum().backward()
    torch.testing.assert_close(tensors.d.grad, layer.ia3_l["default"].grad.flatten(), rtol=1e-4, atol=1e-4)


def test_options_are_checked():
    with pytest.raises(AddendaError, match="side must be one of 'out', 'in'"):
        IA3(side="both")
