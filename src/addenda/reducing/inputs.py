"""Second moments of what layers are given, from any batches that a model takes: one block's at a time where it can."""

import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from addenda.core.merge.outputs import run
from addenda.core.modules.borrow import training_mode
from addenda.core.modules.classes import original_class
from addenda.reducing.moments import Moments
from addenda.reducing.walk import Batch, Walk, Watch


def input_moments(model: nn.Module, batches: Sequence[object], paths: Sequence[str]) -> Iterator[dict[str, Moments]]:
    """Yield the moments of the inputs of these linear layers by path, each once, as the model is, in evaluation mode.

    Batches of named tensors that have a mask (or whose model takes one) run block by block, and padding is left out;
    others run whole, and every row counts. Layers that the batches never reach are in none of what is yielded.
    Raises AddendaError where a batch does not run or a layer gets what is not finite.
    """
    found = [masked(model, batch) for batch in batches]
    known = [batch for batch in found if batch is not None]
    if len(known) == len(batches):
        walk = Walk(model, known, list(paths))
        for piece in walk.pieces:
            if piece.paths:
                found, _ = walk.moments(piece)
                yield {path: m for path, m in found.items() if m.count}
            else:
                walk.pass_by(piece)
        return
    watch = Watch({path: model.get_submodule(path) for path in paths})
    with watch, torch.no_grad(), training_mode(model, False):
        for i, batch in enumerate(batches):
            watch.begin(torch.ones(1), i)
            run(model, batch, called="weigh")
    yield {path: m for path, m in watch.moments.items() if m.count}


def masked(model: nn.Module, batch: object) -> Batch | None:
    """Return a batch of named tensors with the mask of its tokens; None for any other."""
    if not isinstance(batch, Mapping) or not all(isinstance(t, Tensor) for t in batch.values()):
        return None
    if "attention_mask" in batch:
        return dict(batch) if batch["attention_mask"].dim() == 2 else None
    takes = inspect.signature(original_class(model).forward).parameters
    ids = batch.get("input_ids")
    return (
        None
        if ids is None or "attention_mask" not in takes
        else dict(batch) | {"attention_mask": ids.new_ones(ids.shape)}
    )
