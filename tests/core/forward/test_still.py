"""Stand-ins that change nothing: switching adapters off runs the compiled graph of the adapter that acted last."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import addenda as ad
from addenda.core.forward.slots import slots_of
from shared import METHODS, NAMES, attach, stir

pytestmark = pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo's
COMPILES_ONCE = ("bitfit", "full", "ln-tuning", "vb-lora")  # of a matrix: a copy of it, and vectors that are mixed
QUICK = ("dora", "full", "lora", "oft", "shira")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


def two(name: str = "lora", **options) -> nn.Module:
    model = layers()
    for n, seed in (("a", 1), ("b", 2)):
        # a method that looks at data first must see the same, or its frozen tensors have other strides
        adapter = attach(model, name, X, targets="linear", name=n, **options)
        stir(adapter, 0.3, seed).requires_grad_(False)
    return model


@pytest.fixture
def compiled():
    """Give a compiled form of a model, and what counts its compilations."""
    torch._dynamo.reset()

    def made(model: nn.Module):
        count = CompileCounterWithBackend("eager")
        return torch.compile(model, backend=count, fullgraph=True), count

    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES if METHODS[n].bits is None]
)
def test_none_runs_the_graph_of_the_adapter_that_acted_last(name, compiled):
    model = two(name)
    with ad.disabled(model):
        base = model(X)
    with torch.no_grad():
        form, count = compiled(model)
        ad.switch(model, "a")
        changed = form(X)
        assert not torch.equal(changed, base) and count.frame_count == 1
        for which in (None, "a", None):
            ad.switch(model, which)
            assert torch.equal(form(X), base if which is None else changed)
            assert torch.equal(model(X), base) or which is not None
    assert count.frame_count == 1 + (name in COMPILES_ONCE)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_no_switch_among_two_and_none_compiles(name, compiled):
    model = two(name)
    form, count = compiled(model)
    with torch.no_grad():
        form(X)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for which in ("a", None, "b", None, None, "a", "b"):
                ad.switch(model, which)
                torch.testing.assert_close(form(X), model(X))
    assert count.frame_count == 1


def test_several_that_act_have_stand_ins_together(compiled):
    model = two()
    form, count = compiled(model)
    ad.switch(model, ["a", "b"])
    with torch.no_grad():
        both = form(X)
        ad.switch(model, None)
        base = model(X)
        assert torch.equal(form(X), base) and not torch.equal(base, both)
    assert count.frame_count == 1


def test_eager_forwards_and_models_never_compiled_know_of_none(monkeypatch):
    from addenda.core.forward import acting

    monkeypatch.setattr(acting.compiled, "seen", False)
    model = two()
    ad.switch(model, None)
    slots = slots_of(model[0])
    assert slots.traced is slots.own and not any(slots.own.live.values())


def test_modes_and_devices_reach_stand_ins_and_copies_have_none(compiled):
    model = two()
    form, _ = compiled(model)
    with torch.no_grad():
        form(X)
    ad.switch(model, None)
    slots = slots_of(model[0])
    (stand_in,) = slots.traced.live["weight"]
    assert slots.traced is not slots.own and not stand_in.training
    model.train()
    assert stand_in.training
    model.eval()
    assert not stand_in.training
    assert all(p is not stand_in._parameters["A"] for p in model.parameters())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = slots_of(twin[0])
        assert theirs.traced is theirs.own and torch.equal(twin(X), model(X))
    model.double()
    assert slots.traced is slots.own, "zeros of another dtype are no longer theirs"


def test_zeros_are_views_of_one_buffer_and_a_detached_adapter_leaves_none(compiled):
    model = two()
    form, _ = compiled(model)
    with torch.no_grad():
        form(X)
    ad.switch(model, None)
    made = [t for m in (model[0], model[2]) for t in slots_of(m).traced.live["weight"]]
    zeros = [p for t in made for p in t._parameters.values()]
    assert len(zeros) == 4 and not any(bool(p.any()) for p in zeros)
    assert len({p.untyped_storage().data_ptr() for p in zeros}) <= 2
    ad.detach(model, "b")
    assert not any(slots_of(m).traced.live.get("weight") for m in (model[0], model[2]))


def test_training_with_none_acting_leaves_no_gradient_on_a_stand_in(compiled):
    model = two()
    ad.adapters(model)["b"].requires_grad_()
    form, count = compiled(model)
    form(X).sum().backward()
    ad.switch(model, None)
    form(X).square().sum().backward()
    (stand_in,) = slots_of(model[0]).traced.live["weight"]
    assert count.frame_count == 1 and all(p.requires_grad and p.grad is None for p in stand_in._parameters.values())
