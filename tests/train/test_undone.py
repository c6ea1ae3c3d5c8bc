"""A `tune` that is refused, breaks off or is interrupted: the model as before, nothing on disk but checkpoints."""

import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train import checkpoint
from addenda.train.fit import fit
from marks import differences, snapshot
from tiny_models import SUMS, make_llama, make_tokenizer

BASE = {"data": SUMS, "method": "lora:rank=2", "steps": 6, "progress": False, "batch": 8}


def own():
    """A model with an adapter of its own that acts, modes and flags that are not uniform."""
    model = make_llama()
    model.model.layers[0].train()
    model.model.norm.weight.requires_grad_(False)
    adapter = ad.attach(model, "shira:density=0.2", targets="q_proj", name="mine")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    return model


def stops(step, error):
    def tell(event):
        if event.step == step:
            raise error

    return tell


MISTAKES = {
    "batch": {"batch": 0},
    "loss": {"loss": "chunkd"},
    "optimizer": {"optimizer": "adam"},
    "optimizer that cannot": {"optimizer": "lora-pro", "method": "shira"},
    "early stop": {"early_stop": 2},
    "schedule": {"schedule": "sine"},
    "rate": {"rate": float("nan")},
    "accumulate": {"accumulate": 9},
    "attention": {"attention": "fast"},
    "attention of a wrong type": {"attention": 3},
    "method": {"method": "lroa"},
    "rank": {"method": "lora:rank=99"},
    "target": {"targets": "nothing"},
    "consistency": {"consistency": 1.0},
    "head": {"also_train": "nothing"},
    "data": {"data": []},
    "other data": {"data": [{"text": "a", "label": "b"}]},
    "no such file": {"data": "nowhere.jsonl"},
    "too long": {"max_length": 3},
    "eval data": {"eval_data": "nowhere.jsonl"},
    "share": {"eval_data": 1.5},
    "subset": {"subset": "9/clas"},
    "name": {"name": "a b"},
    "optimizer of a wrong type": {"optimizer": 3},
    "passed on": {"parallelism_config": 3},
    "calibration": {"method": "eva:rank=2", "targets": "embedding"},
    "out": {"out": 3},
    "progress": {"progress": stops(2, ZeroDivisionError)},
    "interrupted": {"progress": stops(3, KeyboardInterrupt)},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("make", [own, make_llama])
def test_a_refused_tune_leaves_no_mark(mistake, make, tmp_path):
    model = make()
    before = snapshot(model)
    options = BASE | {"out": tmp_path / "run", "save_every": 10} | MISTAKES[mistake]
    with pytest.raises((AddendaError, ZeroDivisionError, KeyboardInterrupt)):
        ad.tune(model, options.pop("data"), options.pop("method"), tokenizer=make_tokenizer(), **options)
    assert not (found := differences(before, snapshot(model))), found[:5]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [own, make_llama])
def test_a_diverged_tune_leaves_no_mark(make, tmp_path):
    model = make()
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    before = snapshot(model)
    with pytest.raises(AddendaError, match="The loss is nan at step 1"):
        ad.tune(model, SUMS, "lora:rank=2", tokenizer=make_tokenizer(), steps=3, progress=False, out=tmp_path / "run")
    assert not (found := differences(before, snapshot(model))), found[:5]
    assert not list(tmp_path.iterdir())


def test_an_interrupted_tune_says_what_it_kept_and_goes_on(tmp_path):
    def run(**options):
        options = BASE | {"out": tmp_path / "run", "save_every": 2, "dtype": "float32"} | options
        return ad.tune(make_llama(), options.pop("data"), options.pop("method"), tokenizer=make_tokenizer(), **options)

    with pytest.raises(KeyboardInterrupt) as first:
        run(progress=stops(1, KeyboardInterrupt))
    assert "Nothing is kept yet" in first.value.__notes__[0]
    with pytest.raises(KeyboardInterrupt) as second:
        run(progress=stops(5, KeyboardInterrupt))
    assert "Kept: step 4 of the run" in second.value.__notes__[0]
    assert "as it was before the call" in second.value.__notes__[0]
    again = run()
    assert again.resumed_from == 4
    whole = ad.tune(make_llama(), SUMS, "lora:rank=2", tokenizer=make_tokenizer(), steps=6, batch=8, progress=False)
    assert again.losses == whole.losses
    with pytest.raises(KeyboardInterrupt) as third:
        run(progress=stops(1, KeyboardInterrupt), out=None, save_every=None)
    assert "without out= there are no checkpoints" in third.value.__notes__[0]


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 0},
        {"loss": "chunkd"},
        {"early_stop": 1},
        {"optimizer": "adm"},
        {"attention": "fast"},
        {"progress": stops(2, KeyboardInterrupt)},
        {"lean": True, "progress": stops(2, ZeroDivisionError), "checkpointing": True},
    ],
)
def test_a_fit_that_breaks_leaves_all_but_the_adapter_alone(options, tmp_path):
    model = own()
    adapter = ad.attach(model, "lora:rank=2")
    before = snapshot(model)
    train = encode(read(SUMS), make_tokenizer())
    with pytest.raises((AddendaError, ZeroDivisionError, KeyboardInterrupt)):
        fit(model, adapter, train, **{"steps": 3, "batch": 8, "out": tmp_path / "run"} | options)
    kept = {k: v for k, v in before.items() if ".addenda" not in k and "_addenda" not in k}
    after = {k: v for k, v in snapshot(model).items() if k in kept}
    assert not (found := differences(kept, after)), found[:5]
    assert checkpoint.latest(tmp_path / "run") is None


def test_a_fit_that_ends_leaves_the_rest_alone_too():
    model = own()
    adapter = ad.attach(model, "lora:rank=2")
    before = {k: v for k, v in snapshot(model).items() if "addenda" not in k}
    fit(model, adapter, encode(read(SUMS), make_tokenizer()), steps=2, batch=8, lean=True, checkpointing=True)
    after = {k: v for k, v in snapshot(model).items() if k in before}
    assert not (found := differences(before, after)), found[:5]
