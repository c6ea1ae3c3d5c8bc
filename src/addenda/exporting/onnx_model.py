"""A transformers model as an ONNX file for onnxruntime: ids and mask in, logits out, rows and tokens of any number.

It wants the extra "onnx" (onnx, onnxscript; onnxruntime to prove what was written).
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import writing

EXACT = 1e-5  # of the largest logit: the difference that an exact export may make
_NEEDS = ("onnx", "onnxscript", "onnxruntime")


def far(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference as a share of the largest value, at least 1; infinite for other shapes."""
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1.0))


class _Logits(nn.Module):
    """A model that takes tensors in order and returns its logits alone."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).logits


def check_installed() -> None:
    """Raise AddendaError where a package of the extra "onnx" is not installed."""
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise AddendaError(f"An ONNX model wants {', '.join(missing)}: pip install 'addenda[onnx]'.")


@torch.no_grad()
def write_onnx(model: nn.Module, batch: Mapping[str, Tensor], path: Path) -> None:
    """Write a plain model on the CPU as one ONNX file. batch: example inputs (rows, tokens) by the names it takes.

    Raises AddendaError where the extra is not installed, or torch's exporter cannot follow the model.
    """
    check_installed()
    names = tuple(batch)
    two = {k: torch.cat([t, t])[:3].cpu() for k, t in batch.items()}  # a size of 1 or 2 would be taken for a constant
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _silent(), writing(path):
            torch.onnx.export(
                _Logits(model, names).eval(), tuple(two.values()), path, input_names=list(names),
                output_names=["logits"], dynamic_shapes=(tuple(dict(sizes) for _ in names),), dynamo=True,
                external_data=False, verbose=False, optimize=True,
            )  # fmt: skip
    except AddendaError:
        raise
    except Exception as error:  # of whatever class: the exporter follows what others wrote
        line = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise AddendaError(
            f"torch's exporter cannot write this {type(model).__name__} as ONNX ({line}). Leave ONNX out, or load the "
            "model with attn_implementation='eager'."
        ) from error


def run_onnx(path: Path, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits that onnxruntime computes on the CPU, with two threads at most."""
    check_installed()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(2, torch.get_num_threads())
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    (logits,) = session.run(["logits"], {k: t.cpu().numpy() for k, t in batch.items() if k in wanted})
    return torch.from_numpy(logits).float()


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the exporter's warnings and lines to itself."""
    loggers: list[Any] = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
