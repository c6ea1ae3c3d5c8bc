import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train import compiled
from addenda.train.fit import fit
from tiny_models import SUMS, make_bert, make_llama, make_tokenizer

# torch's tracer makes an instance of every autograd function, and looks at every gradient
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def run(model, **options):
    adapter = ad.attach(model, "lora:rank=4", seed=3)
    made = fit(model, adapter, encode(read(SUMS), make_tokenizer()), **{"steps": 6, "batch": 8, "rate": 1e-2} | options)
    return {k: t.clone() for k, t in adapter.state_dict().items()}, made


def test_blocks_are_the_repeated_modules():
    model = make_llama()
    assert compiled.blocks(model) == list(model.model.layers)
    assert compiled.blocks(make_bert())[0].__class__.__name__ == "BertLayer"
    assert compiled.blocks(linear := nn.Linear(2, 2)) == [linear]
    ad.attach(model, "lora")
    assert compiled.blocks(model) == list(model.model.layers)


def test_a_compiled_run_is_the_eager_one_up_to_rounding(monkeypatch):
    compilations = []
    backend = torch._dynamo.lookup_backend("aot_eager")
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, x: compilations.append(graph) or backend(graph, x))
    model = make_llama()
    whole, plain = run(make_llama())
    values, made = run(model, compile=True, eval=encode(read(SUMS), make_tokenizer()))
    assert 0 < len(compilations) <= 3  # with and without padding; not for other layers, lengths and evaluations
    assert [x for _, x in made.losses] == pytest.approx([x for _, x in plain.losses], rel=1e-3)
    assert values.keys() == whole.keys()
    told = made.choices["compile"]
    assert told["seconds"] > 0 and told["eager"] > 0 and told["compiled"] > 0
    assert all(m._compiled_call_impl is None for m in model.modules())
    left = [h for m in model.modules() for h in m._forward_hooks.values()]  # a look at first forwards may stay
    assert all("addenda.core.state.bypass" in (getattr(h, "__module__", ""), type(h).__module__) for h in left)


def test_a_block_that_was_compiled_stays_so(llama):
    block = llama.model.layers[0]
    block.compile(backend="eager")
    own = block._compiled_call_impl
    with compiled.compiled(llama):
        assert block._compiled_call_impl is not own
    assert block._compiled_call_impl is own and llama.model.layers[1]._compiled_call_impl is None


def test_a_compiler_that_fails_is_told(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    model = make_llama()
    with pytest.raises(AddendaError, match="leave compile out"):
        run(model, compile=True)
    assert all(m._compiled_call_impl is None for m in model.modules())


def test_when_it_has_paid():
    assert compiled.Compilation(10.0, 1.5, 1.0).paid == 20
    assert compiled.Compilation(10.0, 1.0, 1.0).paid is None
