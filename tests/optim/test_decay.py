"""Weight decay pulls no copy of a norm's gain or of a bias to 0, in any optimizer; all else starts from the base."""

import pytest
import torch

import addenda as ad
import toys
from addenda import optim

OPTIMIZERS = [n for n in optim.known() if "8bit" not in n]


def decayed(adapter, name, steps=20):
    """Steps whose gradients are 0: what moves is moved by decay alone."""
    made = optim.build(adapter, name, rate=0.1, weight_decay=0.5, steps=steps)
    for _ in range(steps):
        for p in adapter.parameters():
            p.grad = torch.zeros_like(p)
        made.step()
    return made


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_norm_trained_beside_a_method_is_where_it_was(name):
    method = {"adalora": "adalora:rank=2", "pooled-adamw": "vb-lora:rank=2,length=4", "partwise-adamw": "mosa:width=4"}
    spec = method.get(name, "lora:rank=2")
    model = toys.Tiny()
    try:
        adapter = ad.attach(model, spec, also_train=["layers.0.norm", "score"])
        before = {k: p.detach().clone() for k, p in adapter.named_parameters()}
        decayed(adapter, name)
    except ad.AddendaError as error:
        pytest.skip(str(error))
    now = dict(adapter.named_parameters())
    for path in ("layers.0.norm.weight", "layers.0.norm.bias", "score.bias"):
        assert torch.equal(now[f"{path}/value"], before[f"{path}/value"])
    assert now["score.weight/value"].norm() < 0.9 * before["score.weight/value"].norm()


@pytest.mark.parametrize("method", ["ln-tuning", "bitfit", "full:"])
def test_whole_copies(method):
    model = toys.Tiny()
    adapter = ad.attach(model, method.rstrip(":"), targets="parameters" if method == "full:" else None)
    before = {k: p.detach().clone() for k, p in adapter.named_parameters()}
    decayed(adapter, "adamw")
    for k, p in adapter.named_parameters():
        assert torch.equal(p, before[k]) if p.dim() < 2 else p.norm() < 0.9 * before[k].norm()


def test_without_decay_there_is_one_group():
    adapter = ad.attach(toys.Tiny(), "ln-tuning")
    assert len(optim.build(adapter, "adamw", 0.1, 0.0).param_groups) == 1
