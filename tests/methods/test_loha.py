"""LoHa against entry-wise products, its rank, and PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.loha import LoHa


@pytest.mark.parametrize(("rank", "alpha", "s"), [(3, None, 1), (3, 6.0, 2), (17, None, 1)])
@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape, rank, alpha, s):
    at = check.make(LoHa(rank=rank, alpha=alpha), *shape)
    B1, A1, B2, A2 = (at.p[k].detach() for k in ("B1", "A1", "B2", "A2"))
    first, second = B1 @ A1, B2 @ A2
    torch.testing.assert_close(at.delta.detach(), s * first * second, rtol=1e-10, atol=1e-10)
    assert at.method.has("factors") == (rank <= 16)
    check.forms_agree(at)
    G = s * check.upstream(at)[1]
    want = {
        "B1": (G * second) @ A1.T,
        "A1": B1.T @ (G * second),
        "B2": (G * first) @ A2.T,
        "A2": B2.T @ (G * first),
    }
    for through in ("delta", "apply") if rank <= 16 else ("delta",):
        got = check.gradients(at, through)
        for key, expected in want.items():
            torch.testing.assert_close(got[key], expected, rtol=1e-9, atol=1e-9)


def test_the_rank_is_squared(check):
    at = check.make(LoHa(rank=3), 20, 20)
    assert torch.linalg.matrix_rank(at.delta.detach()) == 9


def test_start_and_counts(check):
    for method in (LoHa(), LoHa(rank=20, alpha=5.0)):
        check.starts_exactly(method)
        check.starts_exactly(method, 50, 70)
        check.counts(method)


@pytest.mark.filterwarnings("default")
def test_peft_has_the_same_forward_and_gradients():
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, LoHa(rank=3, alpha=6.0), targets="proj").sites())
    pairs = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    pairs = {k: (getattr(tensors, k), getattr(layer, name)["default"]) for k, name in pairs.items()}
    with torch.no_grad():
        for mine, their in pairs.values():
            their.copy_(mine.normal_())
    x = torch.randn(2, 7, 20)
    got, want = base["proj"](x), layer(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.sum().backward(), want.sum().backward()
    for mine, their in pairs.values():
        torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-4)


def test_options_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"alpha": 0.0}, "alpha must")):
        with pytest.raises(AddendaError, match=message):
            LoHa(**options)
