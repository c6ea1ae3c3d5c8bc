"""Several runs over one frozen base at once: one forward and backward for a step of all of them.

The rows of a batch are groups, one for each run, each with an adapter of its own (another rate, seed or method); the
loss is the sum of the groups' means. Optimizer, schedule, clipping, drawn values and the stream of dropout are each
run's own, and so are its steps: one that ends or diverges leaves, and the others go on. What a run computes is what
`fit` computes for it alone, up to rounding (float32: losses within 1e-5 over the first steps), since products of other
sizes add in another order. Its checkpoints are those of `fit`: either goes on from what the other has written.

Batches of runs with other seeds have other lengths. Those that would make each other longer go into forwards of their
own (`packed`), so that little is padded.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from addenda.core.adapter.blocks import grouped
from addenda.core.base.errors import AddendaError
from addenda.core.forward.grouped import Groups, Part
from addenda.core.forward.lean import leaner
from addenda.core.modules.borrow import training_mode
from addenda.core.modules.streams import Stream, drops
from addenda.core.state.state import acting_again, apply_active, state_of
from addenda.data.encoded import Encoded
from addenda.models.machine import Peak, device_of, processes, resident
from addenda.train import chunked
from addenda.train.choices import recomputing
from addenda.train.fit import FitResult
from addenda.train.loss import score
from addenda.train.slot import Run, Slot
from addenda.train.trainer import DivergedError

FORWARD = 256  # tokens that a forward of its own may cost, in padding that it saves


def fit_grouped(
    model: nn.Module,
    runs: Sequence[Run],
    train: Encoded,
    *,
    eval: Encoded | None = None,
    memory_floor: int | None = None,
) -> list[FitResult | DivergedError]:
    """Train the adapters of all runs, all of them attached to this model, and nothing else.

    Returns what `fit` would for each, in order; a diverged run's error in its place. Times are a run's share of the
    group's, and the peak of memory is the group's.
    Raises AddendaError for what `fit` raises it, for options that no group has, and where the model cannot tell rows.
    """
    if processes() > 1:
        raise AddendaError("A group of runs is trained in one process; start it without a launcher.")
    if not runs:
        raise AddendaError("There is no run to train.")
    root, state = state_of(model)
    names = [run.adapter.name for run in runs]
    groups, device = Groups(), device_of(model)
    floor = resident(device) if memory_floor is None else memory_floor
    cache = getattr(getattr(model, "config", None), "use_cache", None)
    with acting_again(root, state):
        apply_active(root, state, tuple(names))
        slots = [Slot(model, i, run, train, eval) for i, run in enumerate(runs)]
        first = slots[0].settings
        if other := [k for k in ("checkpointing", "lean") if len({getattr(s.settings, k) for s in slots}) > 1]:
            raise AddendaError(f"The runs of a group are computed alike, and these differ in {' and '.join(other)}.")
        try:
            if cache is not None:
                model.config.use_cache = False  # type: ignore[attr-defined]
            whole = _loss_of(model, slots)
            with (
                grouped(model, names, groups), training_mode(model, True), recomputing(model, first.checkpointing),
                leaner(model, first.lean), Peak(device) as peak,
            ):  # fmt: skip
                for slot in slots:
                    slot.begin(whole)
                _train(model, slots, groups, whole["name"] != "chunked")
        finally:
            if cache is not None:
                model.config.use_cache = cache  # type: ignore[attr-defined]
            for slot in slots:
                for p in slot.adapter.parameters():
                    p.grad = None
    memory = None if peak.bytes is None or floor is None else max(peak.bytes - floor, 0)
    return [slot.result(memory, floor) for slot in slots]


def packed(lengths: Sequence[int], rows: Sequence[int], forward: int = FORWARD) -> list[list[int]]:
    """Return which groups share a forward: the cheapest cut, a forward counted as so many tokens.

    lengths, rows: of the batch of each group. A forward computes its longest row in all of its rows.
    """
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    best: list[tuple[int, int]] = [(0, 0)]  # (tokens, where the last forward begins), of the first 0, 1, … in order
    for end in range(1, len(order) + 1):
        at = [(best[k][0] + forward + lengths[order[k]] * sum(rows[i] for i in order[k:end]), k) for k in range(end)]
        best.append(min(at))
    made, end = [], len(order)
    while end:
        begin = best[end][1]
        made.append(sorted(order[begin:end]))
        end = begin
    return made[::-1]


def _loss_of(model: nn.Module, slots: list[Slot]) -> dict[str, str]:
    """Return how the loss is computed, as `chunked.choose` does for the batches of all runs together."""
    asked = {slot.settings.loss for slot in slots}
    if len(asked) > 1:
        raise AddendaError(
            f"The runs of a group compute their loss alike, and these ask for {', '.join(sorted(asked))}."
        )
    micro = [[p for step in slot.rows for p in step] for slot in slots]
    longest = max(micro, key=len)
    together = [[i for own in micro if k < len(own) for i in own[k]] for k in range(len(longest))]
    return chunked.choose(asked.pop(), model, slots[0].train, together)


def _train(model: nn.Module, slots: list[Slot], groups: Groups, whole: bool) -> None:
    """Take steps until every run has ended or diverged."""
    draws = drops(model) or any(getattr(t.method, "dropout", 0.0) for s in slots for _, t in s.adapter.sites())
    while live := [slot for slot in slots if slot.goes_on]:
        started = time.perf_counter()
        for slot in live:
            slot.next()
        for k in range(max(len(slot.micro) for slot in live)):
            having = [slot for slot in live if k < len(slot.micro)]
            ragged = slots[0].train.ragged
            lengths = [slot.long(k) if ragged else 1 for slot in having]
            for which in packed(lengths, [len(slot.micro[k]) for slot in having]):
                _forward(model, [having[i] for i in which], k, groups, draws, whole)
        for slot in live:
            slot.take()
        seconds = (time.perf_counter() - started) / len(live)
        for slot in live:
            groups.set([Part(slot.index)])
            slot.after(seconds)


def _forward(model: nn.Module, slots: list[Slot], k: int, groups: Groups, draws: bool, whole: bool) -> None:
    """Run the k-th part of a step for some runs in one forward and backward."""
    train, device = slots[0].train, device_of(model)
    batch = {n: t.to(device) for n, t in train.batch([i for slot in slots for i in slot.micro[k]]).items()}
    sizes = [len(slot.micro[k]) for slot in slots]
    lengths = [slot.long(k) if train.ragged else None for slot in slots]
    streams = [Stream(n, slot.generator, m) for slot, n, m in zip(slots, sizes, lengths, strict=True)]
    long = max((n for n in lengths if n is not None), default=None)
    labels = [slot.labels[k] for slot in slots] if train.kind == "causal" else ()
    groups.set([Part(slot.index, s) for slot, s in zip(slots, streams, strict=True)], long, labels)
    with groups.drawn if draws else nullcontext():
        totals = score(model, batch, train.kind, whole=whole, groups=sizes).totals
    losses = [slot.told(total) for slot, total in zip(slots, totals, strict=True)]
    if finite := [loss for loss in losses if loss is not None]:
        torch.stack(finite).sum().backward()
