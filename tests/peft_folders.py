"""Adapters of PEFT on tiny models, moved at random, saved and loaded: the other side of every test of the PEFT door."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import addenda as ad
from addenda.exporting.install import install
from addenda.exporting.peft.read import read
from addenda.exporting.peft.write import write

CLOSE = 1e-5  # of the largest output
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Make = Callable[[], nn.Module]


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> Tensor:
    """The main output of a model in evaluation mode."""
    model.eval()
    found = model(**batch) if isinstance(batch, dict) else model(batch)
    return getattr(found, "logits", found).double()


def moved(module_or_tensors: Any, size: float = 0.1, seed: int = 1) -> None:
    """Add N(0, size²) to every tensor that is trained."""
    rng = torch.Generator().manual_seed(seed)
    tensors = module_or_tensors.parameters() if hasattr(module_or_tensors, "parameters") else module_or_tensors
    with torch.no_grad():
        for p in tensors:
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=rng) * size)


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of what these tests want (ties, positions, stale names of transformers); ours are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_peft(make: Make, config: Any, folder: Path, batch: Any, size: float = 0.1, change: Any = None) -> Tensor:
    """Save a PEFT adapter with trained tensors moved at random; return its model's outputs. change: done before."""
    from peft import get_peft_model

    with quiet():
        model = get_peft_model(make(), config)
        moved(model, size)
        if change is not None:
            change(model)
        found = outputs(model, batch)
        model.save_pretrained(str(folder))
    return found


def in_peft(make: Make, folder: Path, batch: Any) -> Tensor:
    """The outputs of a fresh base into which PEFT has loaded a folder, every key of which it knew."""
    from peft import PeftModel

    with quiet():
        warnings.filterwarnings("error", message=".*[Ff]ound (missing|unexpected) adapter keys.*")
        return outputs(PeftModel.from_pretrained(make(), str(folder)), batch)


def in_addenda(make: Make, folder: Path, batch: Any) -> tuple[ad.Adapter, Tensor]:
    """The folder's adapter on a fresh base, acting, and the outputs."""
    model = make()
    adapter = take(model, folder)
    return adapter, outputs(model, batch)


def take(model: nn.Module, folder: Path, name: str = "taken") -> ad.Adapter:
    """Attach a folder's adapter."""
    forms = read(folder, model)
    return install(model, forms.sites, name=name, heads=forms.heads, pools=forms.pools, activate=True)


def given(adapter: ad.Adapter, folder: Path) -> Path:
    """Write an adapter as a folder of PEFT."""
    folder.mkdir()
    write(adapter, folder)
    return folder


def same(found: Tensor, wanted: Tensor, base: Tensor, limit: float = CLOSE) -> None:
    """Assert that outputs are those wanted up to rounding, and that these are no base's."""
    size = wanted.abs().max()
    assert (wanted - base).abs().max() >= 0.01 * size, "the adapter moves nothing, so nothing could be seen"
    assert (found - wanted).abs().max() <= limit * size


def edited(folder: Path, config: dict | None = None, tensors: Callable[[dict[str, Tensor]], Any] | None = None) -> Path:
    """Change a saved folder: keys of its config, and its tensors by a function that edits the dict."""
    if config is not None:
        old = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps(old | config), encoding="utf-8")
    if tensors is not None:
        stored = load_file(folder / WEIGHTS)
        tensors(stored)
        save_file({k: t.contiguous() for k, t in stored.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder
