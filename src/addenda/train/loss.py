"""The loss, and whether each example is right, computed only where the loss looks.

A causal LM's logits are needed at the few positions that predict a label, and its head is often its largest product
(SmolLM2: 576 × 49,152). So the model is asked for those positions only: by a mask where this version of transformers
takes one, else by the union over the batch of the positions, else for all. `labels=` is never passed along: the model
would compare the chosen logits with labels at other positions, silently.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.modules.wrappers import unwrap
from addenda.data.encoded import IGNORE, TARGETS, Kind, Objective
from addenda.train import chunked
from addenda.train.masked_logits import logits_at


@dataclass(frozen=True)
class Score:
    """The score of one batch of B examples, or groups of rows. total carries the gradient."""

    total: Tensor  # () float32: summed loss over all labels
    count: int  # labels: tokens to predict, or examples, or groups
    sums: Tensor | None  # (B) float32: summed loss of each example, detached; None without logits
    counts: Tensor  # (B) int64: labels of each example
    right: Tensor | None  # (B) bool: right at every label, or a best row on top; None if not asked for, or for values
    logits: Tensor | None = None  # (labels × classes), in the order of the labels; None when not asked for, or values
    totals: tuple[Tensor, ...] = ()  # of each group of rows, where groups were named; they carry the gradient

    @property
    def mean(self) -> Tensor:
        """The mean loss over labels, (): over tokens for a causal LM, over examples for a classifier."""
        return self.total / max(self.count, 1)

    @property
    def means(self) -> Tensor:
        """The mean loss of each example, (B)."""
        assert self.sums is not None
        return self.sums / self.counts.clamp(min=1)


def score(
    model: nn.Module,
    batch: dict[str, Tensor],
    kind: Kind,
    *,
    right: bool = False,
    whole: bool = True,
    keep: bool = False,
    groups: Sequence[int] = (),
    objective: Objective | None = None,
) -> Score:
    """Run the model on a batch of `Encoded` and compare with its labels. right: also judge every example.

    objective: of the data, the loss of a "group" of rows, or of each label of a causal LM, in place of cross-entropy.
    keep: with the logits of all labels. whole: by those logits at once; else by `chunked`, where that is permitted, for
    the total alone. groups: how many rows belong to each of several runs, for their totals.
    Raises AddendaError when the model returns no logits, or logits that do not fit the labels.
    """
    inputs = inputs_of(model, batch)
    labels = batch["labels"]
    if kind == "group":
        return _group(_logits(model(**inputs)), batch, objective, right)
    if kind not in ("causal", "masked"):
        return _classify(_logits(model(**inputs)), labels, kind, right, keep, groups)
    labels = labels if kind == "masked" else labels[:, 1:]  # (B, T-1): position t predicts the label at t+1
    seen = labels != IGNORE
    wanted = labels[seen]  # (N)
    owner = seen.nonzero()[:, 0]  # (N) the example of each label
    own = [int(part.sum()) for part in seen.split(list(groups))] if groups else []  # labels of each group
    if not whole and kind == "causal" and objective is None:
        head = chunked.head_of(model)
        with chunked.without(head):
            h = _at(model, inputs, seen)  # (N, width)
        if groups:
            each = zip(h.split(own), wanted.split(own), strict=True)
            totals = tuple(chunked.total(head, *pair) for pair in each)
            return Score(torch.stack(totals).sum(), len(wanted), None, seen.sum(1), None, totals=totals)
        return Score(chunked.total(head, h, wanted), len(wanted), None, seen.sum(1), None)
    logits = logits_at(model, inputs, seen, batch.get("table")) if kind == "masked" else _at(model, inputs, seen)
    if logits.shape[0] != wanted.shape[0] or int(wanted.max()) >= logits.shape[1]:
        raise AddendaError(
            f"The model's logits have the shape {tuple(logits.shape)} for {wanted.shape[0]} labels up to "
            f"{int(wanted.max())}. Model and tokenizer do not belong together."
        )
    losses = (
        F.cross_entropy(logits.float(), wanted, reduction="none") if objective is None else objective(logits, batch)
    )
    n = labels.shape[0]
    sums = torch.zeros(n, device=losses.device).index_add_(0, owner, losses.detach().float())
    verdict = None
    if right:
        wrong = (logits.detach().argmax(-1) != wanted).long()
        verdict = torch.zeros(n, dtype=torch.long, device=wrong.device).index_add_(0, owner, wrong) == 0
    kept = logits if keep else None
    return Score(losses.sum(), len(wanted), sums, seen.sum(1), verdict, kept, _totals(losses, own))


def _totals(losses: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(part.sum() for part in losses.split(list(sizes))) if sizes else ()


def inputs_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the model is called with: all but what is learned, pixels in the model's own dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    given = {k: t for k, t in batch.items() if k not in TARGETS}
    return {k: t.to(dtype) if k == "pixel_values" else t for k, t in given.items()}


def _at(model: nn.Module, inputs: dict[str, Tensor], seen: Tensor) -> Tensor:
    """Return the logits (N, vocabulary) at the true positions of `seen` (B × T-1), row by row."""
    how = keeps(model)
    if how == "mask":
        mask = F.pad(seen, (0, 1))  # nothing is predicted at the last position
        logits = _logits(model(**inputs, logits_to_keep=mask))
        if logits.dim() == 2:
            return logits
    elif how == "positions":
        positions = seen.any(0).nonzero()[:, 0]
        logits = _logits(model(**inputs, logits_to_keep=positions))
        if logits.shape[1] == len(positions):
            return logits[seen[:, positions]]
    logits = _logits(model(**inputs))
    return logits[:, :-1][seen]


def keeps(model: nn.Module) -> str:
    """Return how a model can be asked for some logits only: by "mask", by "positions", or not at all ("")."""
    forward: Callable = inspect.unwrap(type(unwrap(model)).forward)
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        return ""
    return "mask" if "slice_logits_to_keep" in forward.__globals__ else "positions"


def _logits(output) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise AddendaError(
            f"The model returned {type(output).__name__} without logits. Give a causal LM or a classifier."
        )
    return logits


def _group(logits: Tensor, batch: dict[str, Tensor], objective: Objective | None, right: bool) -> Score:
    """Return the score of groups of rows; one is right where a row with the best label stands above all others."""
    assert objective is not None, "a group has its objective with its data"
    labels, group = batch["labels"], batch["group"]
    if logits.shape != (len(labels), 1):
        raise AddendaError(f"Groups want a model with one output (num_labels=1), this one has {logits.shape[-1]}.")
    scores = logits[:, 0].float()
    losses = objective(scores, batch)
    verdict = None
    if right:
        there, rows = group >= 0, group.clamp(min=0)
        given, wanted = (t.detach()[rows].masked_fill(~there, -torch.inf) for t in (scores, labels))
        best = wanted == wanted.amax(1, keepdim=True)
        top, below = (given.masked_fill(~part, -torch.inf).amax(1) for part in (best, ~best))
        verdict = top > below
    ones = torch.ones(len(group), dtype=torch.long, device=labels.device)
    return Score(losses.sum(), len(group), losses.detach(), ones, verdict)


def _classify(logits: Tensor, labels: Tensor, kind: Kind, right: bool, keep: bool, groups: Sequence[int]) -> Score:
    n = labels.shape[0]
    ones = torch.ones(n, dtype=torch.long, device=labels.device)
    if kind == "value":
        if logits.shape != (n, 1):
            raise AddendaError(f"Values want a model with one output (num_labels=1), this one has {logits.shape[-1]}.")
        losses = (logits[:, 0].float() - labels.float()) ** 2
        return Score(losses.sum(), n, losses.detach(), ones, None, totals=_totals(losses, groups))
    if logits.dim() != 2 or int(labels.max()) >= logits.shape[1]:
        raise AddendaError(
            f"The model gives logits of shape {tuple(logits.shape)}, but there is a label {int(labels.max())}. Load it "
            f"with num_labels of at least {int(labels.max()) + 1}, as a classifier."
        )
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    verdict = (logits.detach().argmax(-1) == labels) if right else None
    return Score(losses.sum(), n, losses.detach(), ones, verdict, logits if keep else None, _totals(losses, groups))
