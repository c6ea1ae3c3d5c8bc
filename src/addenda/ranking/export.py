"""Writing a reranker for others: merged as a cross-encoder's folder where weights can hold it, else as its parts.

report = export_reranker(reranker, "out")       # report says which of the two, and why
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from addenda.compose.stack import Composition, Stack
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.state.state import state_of
from addenda.exporting.cross_encoder import Activation, CrossEncoderReport, export_cross_encoder, mergeable
from addenda.ranking.folder import Base, FolderReport, save_folder


class Reads(Protocol):
    """A reranker, as `ranking.reranker.Reranker` is one."""

    model: nn.Module
    tokenizer: Any
    composition: Composition | None
    max_length: int | None
    stride: int | None
    batch: int


@checked()
def export_reranker(
    reranker: Reads, out: str | Path, *, activation: Activation = "identity", onnx: bool = False, base: Base = "copy"
) -> CrossEncoderReport | FolderReport:
    """Write a reranker into a folder that is not there yet, and return what was written and why so.

    Changes of weights are merged into a folder for sentence-transformers (activation: what its predict applies to the
    logit; onnx: the ONNX model too). Changes of activations cannot be: base, adapters and composition are written, for
    `Reranker.load` (base: "copy", or "hash" where the folder of the base is at hand anyway). Without a composition what
    acts on the model is exported. A stride is no part of the first, which the report says.

    Raises AddendaError, with nothing written, as the two do; and for ONNX of what cannot be merged.
    """
    composition = reranker.composition
    if composition is None:
        composition = Stack(*(state_of(reranker.model).state.active or (None,)))
    reason = mergeable(reranker.model, composition)
    if reason is None:
        report = export_cross_encoder(
            reranker.model, composition, reranker.tokenizer, out,
            activation=activation, max_length=reranker.max_length, onnx=onnx,
        )  # fmt: skip
        if reranker.stride is None:
            return report
        beginning = "" if reranker.max_length is None else f", up to {reranker.max_length} tokens with the query"
        left = (
            f"Passages (stride {reranker.stride}) are no part of such a folder: of a long document it reads the "
            f"beginning{beginning}."
        )
        return replace(report, left=(left,))
    if onnx:
        raise AddendaError(f"An ONNX model holds weights alone, and here {reason}. Leave onnx out.")
    return save_folder(
        reranker.model, reranker.tokenizer, composition, out,
        base=base, max_length=reranker.max_length, stride=reranker.stride, batch=reranker.batch, reason=reason,
    )  # fmt: skip
