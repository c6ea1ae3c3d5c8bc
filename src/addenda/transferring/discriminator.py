"""A discriminator: a yes/no adapter on the source's frozen base that tells a task's inputs from made ones.

    found = fit_discriminator(model, tokenizer, inputs, negatives, name="sort-numbers")
    margins = found.margins(model, tokenizer, texts)       # logit of yes − logit of no, of each
    [texts[i] for i in kept(margins)]                      # those above 0; kept(margins, None, top=250): the best

It is trained while the task's data is there, beside the source adapter, which does not act, and goes along with it
(`bundle`). Later it judges what another model makes: the filter of Trans-LoRA (arXiv:2405.17258), which keeps x where
p(yes) > p(no). A filter trained until it knows its examples rejects everything, so a part of both sorts is held out,
training stops where their loss no longer falls, and `kept` can take the best of what is there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from addenda.compose.composition import composed
from addenda.compose.stack import Stack
from addenda.core.adapter.attach import attach
from addenda.core.adapter.switch import switch
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import training_mode
from addenda.core.state.cache_length import cache_of
from addenda.core.state.state import find_state
from addenda.core.state.undo import undone
from addenda.data.examples import share
from addenda.models.machine import device_of
from addenda.train.evaluate import evaluate, read_before
from addenda.train.fit import Progress, fit
from addenda.train.loss import score
from addenda.transferring.question import NO, YES, Asked, Wording, asked

ADAPTER = "discriminator"  # its name on a model
LEAST = 4  # different texts of each sort: fewer cannot be split
PAYS = 8  # first tokens that all prompts share: fewer are read again each time, a cache of them costs as much


@dataclass(frozen=True)
class Discriminator:
    """A trained discriminator. adapter: its name on the model; accuracy: on `held` texts that were held out.

    accuracy is the mean over the two sorts, so that a sort with more texts counts no more. steps: after which it was
    at its best; dropped: negatives that were inputs of the task, word for word, and were left out.
    """

    wording: Wording
    adapter: str
    accuracy: float
    held: int
    steps: int
    dropped: int = 0

    @property
    def name(self) -> str:
        """The name of the task, as the question has it."""
        return self.wording.name

    @torch.no_grad()
    def margins(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch: int = 32) -> list[float]:
        """Return the logit of yes minus that of no for each text, in order; the discriminator alone acts.

        model: the source base, with the discriminator on it. Texts of like length are judged together. First tokens
        that all prompts share (a template's) are read once. The batch changes margins by rounding only.
        Raises AddendaError as `question.asked` does, for a model without this adapter, and for logits that are not
        finite.
        """
        if not texts:
            return []
        rows = asked(model, tokenizer, self.wording, texts)
        found, device, shared = [0.0] * len(rows), device_of(model), _shared(rows)
        order = sorted(range(len(rows)), key=lambda i: -rows.lengths[i])
        with training_mode(model, False), composed(model, Stack(self.adapter)):
            cache = None
            if shared >= PAYS and len(rows) > 2:
                first = torch.tensor([rows.ids[0][:shared]], device=device)
                cache = cache_of(model(input_ids=first, use_cache=True))
            if not hasattr(cache, "batch_repeat_interleave"):
                cache, shared = None, 0
            for at in range(0, len(order), batch):
                these = order[at : at + batch]
                tensors = {k: t.to(device) for k, t in rows.batch(these, skip=shared).items()}
                logits = score(model, read_before(model, tensors, cache, shared), rows.kind, keep=True).logits
                assert logits is not None
                for i, pair in zip(these, logits.float().tolist(), strict=True):
                    found[i] = pair[YES] - pair[NO]
        if bad := [i for i, m in enumerate(found) if not math.isfinite(m)]:
            raise AddendaError(
                f"The discriminator's logits are not finite for {len(bad)} of {len(texts)} texts, the first at "
                f"{bad[0]}: they overflow in {next(model.parameters()).dtype}, or its weights are damaged. Load the "
                "model that it was trained on in the dtype of then."
            )
        return found


def _shared(rows: Asked) -> int:
    """Return how many first tokens all prompts share; the last one of each is no part of it."""
    low, high = min(rows.ids), max(rows.ids)
    most = min(rows.lengths) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def kept(margins: Sequence[float], threshold: float | None = 0.0, top: int | None = None) -> list[int]:
    """Return the positions that pass, in order: margins above the threshold, and of those the `top` largest.

    threshold: None takes all, so that `top` alone decides. Of equal margins the earlier goes first. What passes a
    higher threshold passes a lower one, and what was kept is kept again. Raises AddendaError for a margin that is no
    finite number, and for a `top` below 0.
    """
    if bad := [i for i, m in enumerate(margins) if not math.isfinite(m)]:
        raise AddendaError(f"A margin is a finite number; {len(bad)} are none, the first at {bad[0]}.")
    if top is not None and top < 0:
        raise AddendaError(f"top= is how many to keep, 0 or more, got {top}.")
    passed = [i for i, m in enumerate(margins) if threshold is None or m > threshold]
    if top is None or len(passed) <= top:
        return passed
    return sorted(sorted(passed, key=lambda i: (-margins[i], i))[:top])


@checked()
def fit_discriminator(
    model: nn.Module,
    tokenizer: Any,
    inputs: Sequence[str],
    negatives: Sequence[str],
    *,
    name: str,
    method: Any = "lora:rank=8",
    targets: Any = None,
    adapter: str = ADAPTER,
    chat: bool | None = None,
    answers: Sequence[str] = ("yes", "no"),
    steps: int = 200,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
    held_share: float = 0.2,
    early_stop: int = 3,
    progress: Progress | None = None,
) -> Discriminator:
    """Train an adapter on the model that answers yes to a task's inputs and no to the negatives, and return it.

    model: the frozen source base, with or without adapters, which do not act meanwhile and act again afterwards; the
    new one stays on it, under the name `adapter`, and does not act. inputs: of the task; negatives: what the base
    itself makes of the seeds. name: of the task. method, targets: as `attach` takes them. chat, answers: see
    `question.Wording`. steps at most, fewer where the loss on the held-out texts, `held_share` of both sorts by a hash
    of the text and `seed`, has not fallen at `early_stop` looks; the best values are taken.

    Raises AddendaError, and leaves the model as it was, for fewer than four different texts of a sort, texts that do
    not fit, words that are no single tokens, and what `attach` and `fit` refuse.
    """
    wording = Wording.of(tokenizer, name, chat=chat, answers=answers)
    real = list(dict.fromkeys(inputs))
    known = set(real)
    made = [text for text in dict.fromkeys(negatives) if text not in known]
    for texts, what in ((real, "inputs"), (made, "negatives, inputs left out,")):
        if len(texts) < LEAST:
            raise AddendaError(
                f"{len(texts)} different {what} do not make a discriminator: {LEAST} at least. Give more of the task's "
                "data, or negatives= of your own."
            )
    rows = asked(model, tokenizer, wording, [*real, *made], [YES] * len(real) + [NO] * len(made))
    held = [*_held(real, held_share, seed), *(len(real) + i for i in _held(made, held_share, seed))]
    apart = set(held)
    learned, judged = rows.take([i for i in range(len(rows)) if i not in apart]), rows.take(held)
    with undone(model):
        host = find_state(model)
        acted = () if host is None else host.state.active
        made_adapter = attach(model, method, targets=targets, name=adapter, seed=seed)
        done = fit(
            model, made_adapter, learned, steps=steps, eval=judged, early_stop=early_stop,
            batch=min(batch, len(learned)), rate=rate, seed=seed, attention=None, progress=progress,
        )  # fmt: skip
        found = evaluate(model, examples=judged, batch=max(batch, 32))
        made_adapter.requires_grad_(False)
        switch(model, acted)
    right: dict[int, list[int]] = {YES: [], NO: []}
    for item, label in zip(found.items, judged.labels, strict=True):
        right[label].append(item)
    accuracy = sum(sum(items) / len(items) for items in right.values()) / 2
    best = done.steps if done.best_step is None else done.best_step
    return Discriminator(wording, adapter, accuracy, len(held), best, len(set(negatives) & known))


def _held(texts: Sequence[str], part: float, seed: int) -> list[int]:
    """Return the positions of the texts to hold out, at least one and not all: those of the lowest hash."""
    count = min(max(1, round(part * len(texts))), len(texts) - 1)
    return sorted(range(len(texts)), key=lambda i: (share(texts[i], seed), i))[:count]
