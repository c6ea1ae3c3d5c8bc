"""A file whose paths the model lacks: the error has the map, and says whether it is certain."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import addenda as ad
from addenda.core.adapter import moved
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read, write
from shared import EVERY, HIDDEN, attach, stir, where


def call_it(parent: nn.Module, old: str, new: str) -> None:
    parent._modules = {new if name == old else name: m for name, m in parent._modules.items()}


class Renamed(nn.Module):
    """`toys.Tiny` with other names at three places: q_proj, up_proj, score."""

    def __init__(self, tiny: nn.Module):
        super().__init__()
        self.tiny = copy.deepcopy(tiny)
        for block in self.tiny.get_submodule("layers").children():
            call_it(block.self_attn, "q_proj", "query")
            call_it(block, "up_proj", "fc")
            block.self_attn.__class__ = type("Other", (type(block.self_attn),), {"q_proj": property(lambda m: m.query)})
            block.__class__ = type("OtherBlock", (type(block),), {"up_proj": property(lambda m: m.fc)})
        call_it(self.tiny, "score", "classifier")
        self.tiny.__class__ = type("OtherTiny", (type(tiny),), {"score": property(lambda m: m.classifier)})

    def forward(self, ids: Tensor) -> Tensor:
        return self.tiny(ids)


BY_HAND = {"*": "tiny.*", "layers.*.up_proj": "tiny.layers.*.fc"}


def told(error: AddendaError) -> tuple[dict[str, str], str]:
    assert "Did you mean" not in str(error)  # beside a map it would say another path
    found = re.search(r"With rename=(\{.*?\}) it has \d+ of them \((.*?)\)", str(error))
    assert found, error
    return json.loads(found[1]), found[2]


@pytest.mark.parametrize("name", EVERY)
def test_the_map_of_the_error_loads_the_file(name, tiny, ids, tmp_path):
    """And what comes is what was saved: random tensors too, whatever path the model has now, and on the way back."""
    model = copy.deepcopy(tiny).eval()
    adapter = stir(attach(model, name, ids, targets=where(name)))
    adapter.draw(3)
    file, y, held = adapter.save(tmp_path / "a.safetensors"), model(ids), [*_tensors(adapter)]
    trained = model.train()(ids)
    ad.detach(model.eval())
    other = Renamed(tiny).eval()
    with pytest.raises(AddendaError) as error:
        ad.load(other, file)
    rename, how = told(error.value)
    certain = how == "certain: the weights are equal"
    assert certain or name in HIDDEN, how  # of what is inside a module several may be meant: then it is a guess
    by_hand = {k: v for k, v in BY_HAND.items() if k == "*" or "up_proj" in str(adapter_paths(file))}
    moved = ad.load(other, file, rename=rename if certain else by_hand)
    assert torch.equal(other(ids), y)
    assert torch.equal(other.train()(ids), trained)
    assert all(torch.equal(a, b) for a, b in zip(held, _tensors(moved), strict=True))
    again = moved.save(tmp_path / "b.safetensors")
    ad.detach(other.eval())
    third = ad.load(other, again)
    assert torch.equal(other(ids), y)
    assert third.save(tmp_path / "c.safetensors").read_bytes() == again.read_bytes()
    back = ad.load(model, again, rename=_inverse(third, adapter_paths(file)))
    assert torch.equal(model(ids), y)
    assert back.save(tmp_path / "d.safetensors").read_bytes() == file.read_bytes()


def adapter_paths(file: Path) -> list[str]:
    return [s.path for s in read(file)[0].sites]


def _inverse(adapter: ad.Adapter, paths: list[str]) -> dict[str, str]:
    return dict(zip(adapter.methods, paths, strict=True))


def _tensors(adapter: ad.Adapter):
    for _, tensors in adapter.sites():
        yield from tensors.held().values()


def test_a_map_is_as_short_as_it_can_be(tiny, ids, tmp_path):
    file = stir(attach(tiny, ad.LoRA(rank=2), targets=["q_proj", "up_proj"])).save(tmp_path / "a.safetensors")
    ad.detach(tiny)
    with pytest.raises(AddendaError) as error:
        ad.load(Renamed(tiny), file)
    rename, how = told(error.value)
    assert rename == {
        "layers.*.self_attn.q_proj": "tiny.layers.*.self_attn.query",
        "layers.*.up_proj": "tiny.layers.*.fc",
    }
    assert how == "certain: the weights are equal"


def test_equal_shapes_are_told_apart_by_the_weights_and_other_weights_by_names(tiny, ids, tmp_path):
    """Four matrices of one shape: names alone take the wrong one where two have changed places."""
    file = stir(attach(tiny, ad.LoRA(rank=2), targets=["k_proj", "v_proj"])).save(tmp_path / "a.safetensors")
    ad.detach(tiny)
    other = nn.ModuleDict({"m": tiny})
    for block in tiny.layers:
        block.self_attn.k_proj, block.self_attn.v_proj = block.self_attn.v_proj, block.self_attn.k_proj
    with pytest.raises(AddendaError) as error:
        ad.load(other, file)
    rename, how = told(error.value)
    assert rename == {
        "layers.*.self_attn.k_proj": "m.layers.*.self_attn.v_proj",
        "layers.*.self_attn.v_proj": "m.layers.*.self_attn.k_proj",
    }
    assert "certain" in how
    with torch.no_grad():
        for p in tiny.parameters():
            p.mul_(1.1)
    with pytest.raises(AddendaError) as error:
        ad.load(other, file)
    assert told(error.value) == ({"*": "m.*"}, "a guess, by names and shapes")


def test_heads_and_constant_weights_are_guesses(tiny, ids, tmp_path):
    adapter = stir(attach(tiny, ad.LoRA(rank=2), targets="q_proj", also_train=["score"]))
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(tiny)
    other = Renamed(tiny)
    with pytest.raises(AddendaError) as error:
        ad.load(other, file)
    rename, how = told(error.value)
    assert how == "a guess, by names and shapes; the weights are equal at 2 of 4"
    assert ad.load(other, file, rename=rename).methods.keys() == {
        "tiny.layers.0.self_attn.query",
        "tiny.layers.1.self_attn.query",
        "tiny.classifier.weight",
        "tiny.classifier.bias",
    }


def test_nothing_near_says_nothing_and_the_model_stays(tiny, ids, tmp_path):
    file = stir(attach(tiny, ad.LoRA(rank=2), targets="q_proj")).save(tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(AddendaError, match="the model has no layers") as error:
        ad.load(other, file)
    assert "rename" not in str(error.value)
    assert type(other[0]) is nn.Linear


def test_a_checkpoint_of_other_paths_says_where_it_goes(tiny, ids, tmp_path):
    from addenda.train.checkpoint import restore, write

    adapter = stir(ad.attach(tiny, "nola:rank=2,basis=4", targets="q_proj"))
    write(adapter, tmp_path, {"steps": 1})
    ad.detach(tiny)
    other = Renamed(tiny)
    new = ad.attach(other, "nola:rank=2,basis=4", targets="query")
    with pytest.raises(AddendaError, match=r"2 of its 2 sites are not here.*this model has tiny.*query.*rename="):
        restore(new, tmp_path)
    ad.detach(other)
    moved = {"layers.*.self_attn.q_proj": "tiny.layers.*.self_attn.query"}
    loaded = ad.load(other, tmp_path / "adapter.safetensors", rename=moved)
    write(loaded, tmp_path / "new", {"steps": 1})
    assert restore(loaded, tmp_path / "new") == 0
    ad.detach(other)
    new = ad.attach(other, "nola:rank=2,basis=4", targets="query")
    with pytest.raises(AddendaError, match="random tensors were drawn for other paths there at 2 sites"):
        restore(new, tmp_path / "new")


@pytest.mark.parametrize("partial", [False, True])
def test_a_file_that_makes_up_thousands_of_paths_costs_no_more_looks_than_a_bound(
    partial, tiny, ids, tmp_path, monkeypatch
):
    """Each path was compared with every weight of its shape: 36 s for 2,000 paths on 48 layers."""
    header, tensors = read(stir(attach(tiny, "lora", ids, targets="layers.0.up_proj")).save(tmp_path / "a.safetensors"))
    ad.detach(tiny)
    [site] = header.sites
    paths = [site.path, *(f"m{i}.{'ab' * (i % 7)}x{i}.up" for i in range(999))]
    names = [key.rpartition("/")[2] for key in tensors]
    many = replace(header, sites=tuple(replace(site, path=p) for p in paths))
    write(tmp_path / "b.safetensors", many, {f"{p}/{n}": tensors[f"{site.path}/{n}"] for p in paths for n in names})
    looks, see = [], moved.sample
    monkeypatch.setattr(moved, "_LOOKS", 50)
    monkeypatch.setattr(moved, "sample", lambda *given: looks.append(1) or see(*given))
    if partial:
        with pytest.warns(UserWarning, match="999 of 1000 sites"):
            ad.load(tiny, tmp_path / "b.safetensors", allow_partial=True)
    else:
        with pytest.raises(AddendaError, match="999 problems"):
            ad.load(tiny, tmp_path / "b.safetensors")
    assert len(looks) <= 50
