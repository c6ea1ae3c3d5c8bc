"""Every method attached, saved, loaded and merged on a pretended GPU: what mixes devices raises there.

The meta device finds that in forward and backward (`test_meta.py`); here are values, which attaching wants.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from tests.core.site.test_site import Raw
from torch import Tensor, nn

import addenda as ad
import toys
from addenda.core.adapter.build import build_tensors
from addenda.core.method.contract import WeightMethod
from addenda.core.site.site import site_at
from pretended import PLACE, Pretended, There, moved
from shared import EVERY, METHODS, NAMES, stir, where

DRAWN = [n for n in EVERY if METHODS[n].calibration is None]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """The mode is one thread's, and nothing asks for a gradient."""
    monkeypatch.setattr("addenda.core.adapter.build.side_by_side", lambda count: nullcontext(map))
    with Pretended(), torch.no_grad():
        yield


@pytest.fixture
def there() -> toys.Tiny:
    return moved(toys.Tiny())  # pyright: ignore[reportReturnType]


@pytest.fixture
def batch() -> Tensor:
    return There(torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB)


@pytest.mark.parametrize("name", DRAWN)
def test_attach_files_and_merge(name, there, batch, tmp_path):
    adapter = stir(ad.attach(there, METHODS[name], targets=where(name)), 0.1)
    assert all(p.device == PLACE for p in adapter.parameters())
    adapter.draw(1)
    y = there(batch)
    assert y.device == PLACE
    files = [adapter.save(tmp_path / f"{basis}.safetensors", basis=basis) for basis in (False, True)]
    if name in NAMES:
        ad.merge(there)
        ad.unmerge(there)
    there.eval()
    y = there(batch)
    for file in files:
        ad.detach(there)
        ad.load(there, file)
        assert torch.equal(there(batch), y)


@pytest.mark.parametrize("name", [n for n in DRAWN if n in NAMES])
def test_raw_matrices_and_stacks(name):
    model = moved(Raw())
    adapter = stir(ad.attach(model, METHODS[name], targets=["flat", "stack"]))
    adapter.draw(1)
    assert model(There(torch.randn(4, 8))).device == PLACE


@pytest.mark.parametrize("name", [n for n in EVERY if n not in DRAWN] + ["shira:mask=gradient", "shira:mask=snip"])
def test_what_was_calibrated_there(name):
    method = METHODS[name] if name in METHODS else ad.core.method.catalogue.build(name)
    site = site_at(moved(nn.Sequential(nn.Linear(8, 16))), "0")
    seen = There(torch.eye(8) if method.calibration == "input" else torch.randn(16, 8))
    (tensors,) = build_tensors([(site, method)], 0, seen={"0": seen}).values()
    assert all(t.device == PLACE for t in tensors.held().values())


def test_examples_with_adapters_of_their_own(there, batch):
    for name, spec in (("a", "lora:rank=2"), ("b", "lora:rank=2"), ("c", "houlsby:rank=2")):
        stir(ad.attach(there, spec, name=name))
    for names in (["a", "b"], ["a", "c"], [None, "b"]):
        with ad.per_example(there, names):
            assert there(batch).device == PLACE


@dataclass(frozen=True)
class Mixes(WeightMethod):
    """Draws on the CPU and multiplies by W where that is."""

    def init(self, W, rng, p):
        return {"a": nn.Parameter(W * rng.normal(*W.shape))}


def test_the_pretended_one_tells(there):
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        ad.attach(there, Mixes(), targets="linear")
    x = There(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).device == x.device == torch.zeros(2, device=PLACE).device == PLACE
    assert x.cpu().device == x.to("cpu").device == torch.device("cpu")
    assert torch.equal(x.cpu(), torch.ones(2, 3))
