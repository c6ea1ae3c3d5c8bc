"""Distilling: a new adapter on a new base learns what a teacher answered, by its words or by its distributions.

    labels = label(teacher, its_tokenizer, prompts)
    made = distil(student, tokenizer, labels, "lora:rank=8", steps=200)                        # any two tokenizers
    made = distil(student, tokenizer, labels, mode="logits", teacher=(teacher, its_tokenizer))   # one vocabulary

By "sequence" the student learns the teacher's greedy answers as it would learn any data: one and the same loop (`fit`),
at the same cost, since the answers are there already. By "logits" it learns the distribution at each of their tokens
(`soft`), which the teacher is run for once. The loss looks at the answers only, never at a token of a prompt.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from addenda.core.adapter.assign import Spec
from addenda.core.adapter.attach import attach
from addenda.core.base.arguments import checked, names_of
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.core.file.tokenizer import mark, template_of
from addenda.core.method.catalogue import build
from addenda.core.site.targets import Target
from addenda.data.encode import encode, end_ids
from addenda.data.encoded import Encoded
from addenda.data.examples import Data
from addenda.data.limits import within
from addenda.models.kinds import task_of
from addenda.train.fit import FitResult, fit
from addenda.train.inputs import context
from addenda.train.left_alone import left_alone
from addenda.train.loss import score
from addenda.train.settings import check_options
from addenda.train.start import attach_start, read_start
from addenda.train.tune import calibration, starting_rate
from addenda.transferring.label import Labels, check_end
from addenda.transferring.soft import soften

Mode = Literal["sequence", "logits"]
FURTHER = names_of(fit, without=("steps", "eval", "eval_every", "begun_with", "tracking", "out", "resume"))


@dataclass(frozen=True)
class DistilResult(FitResult):
    """What `fit` returns. mode: how it was distilled; examples: answers that were learned; unended: those left out."""

    mode: str = "sequence"
    examples: int = 0
    unended: int = 0


@checked(also=FURTHER)
def distil(
    model: nn.Module,
    tokenizer: Any,
    labels: Labels | Data,
    method: Spec | None = None,
    *,
    mode: Mode = "sequence",
    teacher: tuple[Any, Any] | None = None,
    top_k: int | None = None,
    start: str | Path | None = None,
    targets: Target | Iterable[Target] | None = None,
    exclude: Iterable[Target] = (),
    steps: int | None = None,
    epochs: float | None = None,
    batch: int = 16,
    seed: int = 0,
    max_length: int | None = None,
    chat: bool | None = None,
    name: str = "default",
    out: str | Path | None = None,
    resume: bool = False,
    **options,
) -> DistilResult:
    """Attach an adapter to the student and teach it a teacher's answers; it stays on the model and acts.

    labels: of `label`, whose unended answers are left out, or `Data` of answers. method, targets, exclude: as `attach`
    takes them (LoRA unless said); start: an adapter file whose values it begins with, and whose method and places it
    has. mode: "sequence", or "logits" with teacher=(model, tokenizer), the teacher as it acts now; top_k: see `soft`.
    steps, or epochs (1 if neither). out: a folder for checkpoints, from which resume=True goes on. chat, max_length:
    see `encode`. options: those of `fit`; rate is where the catalogue starts a search for the method's unless given.

    Raises AddendaError, and leaves the model as it was, for two vocabularies or chat templates by logits, answers
    that do not fit the student's context, a tokenizer without an end, and what `attach` and `fit` refuse.
    """
    if steps is not None and epochs is not None:
        raise AddendaError(f"Give steps or epochs, not both; got steps={steps} and epochs={epochs}.")
    asked = build(method) if isinstance(method, str) else method
    begun = None if start is None else read_start(start, asked, None if out is None else path_of(out, "out"))
    chosen = begun.method if begun else build("lora") if asked is None else asked
    options |= {"rate": starting_rate(chosen)} if options.get("rate") is None else {}
    check_mode(mode, model, tokenizer, teacher, top_k, options, chat)
    check_options(steps=steps or 1, batch=batch, seed=seed, **options)
    check_end(end_ids(model, tokenizer, chat))
    if not isinstance(labels, Labels | Data):
        raise AddendaError(f"distil takes the Labels that label() returns, or Data, got a {type(labels).__name__}.")
    data = labels.data() if isinstance(labels, Labels) else labels
    limit = within(max_length or context(model, tokenizer), model)
    if mode == "logits":
        assert teacher is not None
        train: Encoded = soften(*teacher, data, top_k=top_k, batch=batch, chat=chat, max_length=limit)
        options["loss"] = "logits"
    else:
        train = encode(data, tokenizer, max_length=limit, chat=chat)
    steps = steps if steps is not None else math.ceil((epochs or 1) * math.ceil(len(train) / batch))
    with left_alone(model):
        if begun:
            adapter = attach_start(
                begun, model, method=asked, targets=targets, exclude=exclude, also_train="auto", head_bits=None,
                labels=(), tokenizer=tokenizer, name=name,
            )  # fmt: skip
        else:
            adapter = attach(
                model, chosen, targets=targets, exclude=exclude, name=name, seed=seed,
                calibration=calibration(model, train, batch, seed),
                loss=lambda m, b: score(m, b, train.kind, objective=train.objective).mean,  # type: ignore[arg-type]
            )  # fmt: skip
        made = fit(
            model, adapter, train, steps=steps, batch=batch, seed=seed, out=out, resume=resume and out is not None,
            begun_with=begun.sha256 if begun else None, **options,
        )  # fmt: skip
    return DistilResult(**vars(made), mode=mode, examples=len(train), unended=len(labels) - len(data))


def check_mode(
    mode: str,
    model: nn.Module,
    tokenizer: Any,
    teacher: tuple[Any, Any] | None,
    top_k: int | None,
    options: dict,
    chat: bool | None = None,
) -> None:
    """Raise AddendaError for a mode that cannot be, such as logits over two vocabularies."""
    if mode not in ("sequence", "logits"):
        raise AddendaError(f"mode must be 'sequence' or 'logits', got {mode!r}.")
    if task_of(model) != "causal":
        raise AddendaError(f"{type(model).__name__} writes no answers, and a student must; give a causal LM.")
    if mode == "sequence":
        given = [n for n, v in (("teacher", teacher), ("top_k", top_k)) if v is not None]
        if given:
            raise AddendaError(f"{given[0]}= is for mode='logits'; by sequence the teacher's answers are all there is.")
        return
    if not (isinstance(teacher, tuple) and len(teacher) == 2 and isinstance(teacher[0], nn.Module)):
        raise AddendaError("mode='logits' asks the teacher for its distributions: give teacher=(model, tokenizer).")
    ours, theirs = mark(tokenizer), mark(teacher[1])
    widths = [getattr(m.config, "vocab_size", None) for m in (model, teacher[0])]
    if ours.sha256 != theirs.sha256 or widths[0] != widths[1]:
        raise AddendaError(
            f"mode='logits' compares distributions over one vocabulary, and these are two: the teacher's tokenizer has "
            f"{theirs.entries:,} tokens and the student's {ours.entries:,}, their models {widths[1]:,} and "
            f"{widths[0]:,} outputs. Take mode='sequence', which goes from any tokenizer to any other."
        )
    if chat is not False and template_of(tokenizer) != template_of(teacher[1]):
        raise AddendaError(
            "mode='logits' compares both models behind the same prompts, and these two tokenizers have different chat "
            "templates. Give both one (tokenizer.chat_template), or take mode='sequence', where each is asked its own "
            "way."
        )
    if options.get("loss", "auto") == "chunked" or options.get("consistency"):
        raise AddendaError(
            "mode='logits' has a loss of its own, which neither loss='chunked' nor consistency= goes with."
        )
