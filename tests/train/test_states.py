"""Optimizers and generators go on from what was written of them, with the same bits and without a pickle."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch

import addenda as ad
from addenda import optim
from addenda.core.adapter.handle import adapters
from addenda.core.base.errors import AddendaError
from addenda.core.file.states import read_state, write_state
from addenda.core.method.catalogue import build
from addenda.optim.registry import known
from addenda.train.states import load_state, random_state, set_random_state, state_of
from addenda.train.tune import tune
from tiny_models import SUMS, make_bert, make_llama, make_tokenizer

METHODS = {
    "adalora": "adalora:rank=4,target_rank=2", "rowwise-adamw": "dylora:rank=4", "partwise-adamw": "mosa:rank=8",
    "pooled-adamw": "vb-lora:rank=2,vectors=5,length=4",
}  # fmt: skip
SPECS = [n for n in known() if "8bit" not in n] + ["lora-pro:mode=efficient", "lora-pro:mode=sgd"]


def moved(adapter, optimizer, steps: int, seed: int) -> None:
    """Steps along random gradients, of which many are 0."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in adapter.parameters():
            drawn = torch.rand(p.shape, generator=rng)
            p.grad = torch.where(drawn > 0.7, drawn - 0.8, 0).to(p.dtype) if p.requires_grad else None
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_every_optimizer_goes_on_with_the_same_bits(spec, dtype, tmp_path):
    name = spec.partition(":")[0]
    if name == "lora-pro" and dtype is torch.bfloat16:
        pytest.skip("lora-pro wants float32")
    model = make_bert() if name == "partwise-adamw" else make_llama()
    adapter = ad.attach(model, build(METHODS.get(name, "lora:rank=4")))
    adapter.model.to(dtype)
    for p in adapter.parameters():
        p.data = p.data.to(dtype)
    made = optim.build(adapter, spec, 1e-2, 0.1, steps=8)
    moved(adapter, made, 5, seed=1)
    write_state(tmp_path / "x.safetensors", state_of(made))
    twin_model = copy.deepcopy(model)
    twin = adapters(twin_model)["default"]
    again = optim.build(twin, spec, 1e-2, 0.1, steps=8)
    load_state(again, read_state(tmp_path / "x.safetensors"), "x")
    for one, other in zip(adapter.parameters(), twin.parameters(), strict=True):
        there, here = made.state[one], again.state[other]
        assert {k: (v.dtype, v.tolist()) for k, v in there.items()} == {
            k: (v.dtype, v.tolist()) for k, v in here.items()
        }
    moved(adapter, made, 3, seed=2)
    moved(twin, again, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), twin.parameters(), strict=True))


def test_a_state_of_another_optimizer_is_refused():
    adapter = ad.attach(make_llama(), ad.LoRA(rank=2))
    made = optim.build(adapter, "adamw")
    moved(adapter, made, 1, 0)
    held = state_of(made)
    other = torch.optim.AdamW(adapter.parameters()[:2])
    for wrong, optimizer, says in [
        (held, other, "groups of"), ({}, made, "KeyError"), (held | {"state": {99: {}}}, made, "in no group"),
        (held | {"param_groups": 3}, made, "TypeError"),
    ]:  # fmt: skip
        with pytest.raises(AddendaError, match=f"X does not fit the optimizer of this run.*{says}"):
            load_state(optimizer, wrong, "X")


def test_generators_go_on(tmp_path):
    def drawn():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(3).tolist(),
            np.random.randn(),
            torch.rand(3).tolist(),
        )

    random.gauss(0, 1), np.random.randn()  # one more is kept by each
    file = tmp_path / "x.safetensors"
    write_state(file, random_state({torch.device("cpu")}))
    first = drawn()
    drawn()
    set_random_state(read_state(file), {torch.device("cpu")}, file)
    assert drawn() == first
    held = read_state(file)
    for wrong in ({}, held | {"torch": 1}, held | {"python": (3, (1,), None)}, held | {"devices": [1]}):
        with pytest.raises(AddendaError, match="does not fit the random generators"):
            set_random_state(wrong, {torch.device("cpu")}, file)


def test_no_pickle_is_written_or_opened(tmp_path, monkeypatch):
    def run(out, progress=False):
        return tune(make_llama(), SUMS, "lora:rank=2,dropout=0.1", tokenizer=make_tokenizer(), out=out, steps=4,
                    batch=8, save_every=2, progress=progress).path.read_bytes()  # fmt: skip

    def killed(event):
        if event.step == 3:
            raise ZeroDivisionError

    whole = run(tmp_path / "a")
    for module, names in ((torch, ("load", "save")), (pickle, ("load", "loads", "dump", "dumps", "Unpickler"))):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a pickle"))
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "b", killed)
    assert run(tmp_path / "b") == whole
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".safetensors", ".json", ".md"}
