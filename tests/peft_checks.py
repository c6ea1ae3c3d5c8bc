"""What tests of PEFT's folders share: rows that must hold both ways, spoilt folders, refusals that change nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.peft_parity import BASES, BOUND, LEAST, base_of, measure, peft_writes
from bench.peft_rows import ROWS, Row
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from addenda import AddendaError, attach
from addenda.core.method.catalogue import build
from addenda.core.site.site import site_at
from addenda.core.state.state import find_state
from addenda.exporting.peft.read import read
from addenda.exporting.peft.table import conversion_for
from addenda.exporting.routes import Route

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Blocks:
    """What PEFT's CUDA kernel for BOFT computes: (levels, K, b, b) to block-diagonal matrices (levels, K b, K b)."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*level) for level in blocks])


def kernel_of_boft(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own code of several levels runs, without CUDA: the kernel's definition stands in the kernel's place."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: object())
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", Blocks)


def rows(kind: str) -> Any:
    """The rows of a type of PEFT, as a test's parameter."""
    return pytest.mark.parametrize("row", [pytest.param(r, id=r.name or "plain") for r in ROWS[kind]])


def holds(row: Row, folder: Path) -> None:
    """Every way of a row gives the logits of the one that wrote it, and these are not the base's."""
    for way, found in measure(row, folder).items():
        assert found["moved"] >= LEAST, (way, found)
        assert found["difference"] <= BOUND, (way, found)


def saved(folder: Path, kind: str, base: str = "llama", **options: Any) -> Path:
    """A folder that PEFT has written."""
    peft_writes(Row("", {"peft_type": kind, **options}, base=base), folder)
    return folder


def spoil(folder: Path, tensors: dict[str, Tensor | None] | None = None, **config: Any) -> Path:
    """Change keys of the config; replace tensors, or leave them out (None), by the ends of their keys."""
    given = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(given))
    held = load_file(folder / WEIGHTS)
    for end, new in (tensors or {}).items():
        (key,) = (k for k in held if k.endswith(end))
        held.pop(key)
        if new is not None:
            held[key] = new
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    return folder


def refused(folder: Path, match: str, base: str = "llama") -> None:
    """Reading raises an error that says why, and the model is as it was."""
    model = base_of(Row("", base=base))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(AddendaError, match=match):
        read(folder, model)
    assert find_state(model) is None
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def passes(method: str, path: str, base: str = "llama", model: nn.Module | None = None) -> Route:
    """How PEFT takes a method at a site."""
    root = BASES[base]() if model is None else model
    return conversion_for(build(method), site_at(root, path))[1]


def attached(methods: dict[str, str], base: str = "llama") -> Any:
    """An adapter on a fresh base, its tensors moved."""
    model = base_of(Row("", base=base))
    adapter = attach(model, methods)
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.05 * torch.randn(p.shape)
    return adapter
