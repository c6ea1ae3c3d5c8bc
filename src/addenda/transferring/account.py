"""What a finished transfer has to tell: its student beside its teacher, on real examples where there are any.

The answers that are compared are written anew, greedily; accuracies are those of `evaluate`. The five accuracies that a
verdict on the whole way wants are a recipe's, which has the real data to train on.
"""

from dataclasses import asdict
from typing import Any

from addenda.core.adapter.blocks import disabled
from addenda.core.base.errors import AddendaError
from addenda.core.file.identity import plain, versions
from addenda.data.encode import encode
from addenda.data.limits import within
from addenda.train.evaluate import evaluate
from addenda.train.generate import generate
from addenda.transferring.bundle import Bundle
from addenda.transferring.distil import DistilResult
from addenda.transferring.gather import Gathered
from addenda.transferring.inputs import inputs_of
from addenda.transferring.label import Labels
from addenda.transferring.measures import agreement
from addenda.transferring.report import Report, distances, judged, leaked
from addenda.transferring.sides import Sides

COMPARED = 64  # answers of the student that are compared with the teacher's
MOST = 500  # inputs whose distance to real ones is measured


def account(
    bundle: Bundle,
    sides: Sides,
    settings: dict[str, Any],
    rehearsal: dict[str, Any],
    gathered: Gathered,
    labels: Labels,
    made: DistilResult,
    spent: float,
    real: Any,
    resumed: bool,
) -> Report:
    """Return the report. spent: seconds of distilling; real: examples of the task, or None; resumed: after a kill."""
    counts, target = gathered.made.counts, sides.target
    longest = {"max_new_tokens": settings["max_new_tokens"], "batch": settings["sample_batch"]}
    judging = {} if real is None else _judged(bundle, sides, real, gathered, settings["seed"], longest)
    if not judging:
        first = [i for i, whole in enumerate(labels.whole) if whole][:COMPARED]
        answers = generate(target.model, target.tokenizer, [labels.prompts[i] for i in first], **longest)
        same = agreement(answers, [labels.answers[i] for i in first])
        judging = {"agreement": same, "on": f"{len(first)} of the inputs that were learned"}
    notes = [f"by {made.mode}, {made.steps:,} steps of {settings['batch']}, {made.adapter.trainable:,} numbers trained"]
    if made.unended:
        notes.append(f"{made.unended:,} answers of the teacher's did not end within their tokens and were left out")
    if labels.kept:
        notes.append(f"{labels.kept:.0%} of the teacher's answers were kept from before")
    if resumed:
        notes.append("the run was interrupted: seconds of answering and distilling are those since it went on")
    cost = {
        "sampling": {"seconds": counts.seconds, "tokens": counts.tokens}, "judging": {"seconds": gathered.seconds},
        "answering": {"seconds": labels.seconds, "tokens": labels.tokens},
        "distilling": {"seconds": spent, "tokens": made.tokens},
    }  # fmt: skip
    return Report(
        bundle.name, sides.source.source, target.source, made.adapter.kinds, settings["n"], len(gathered.chosen),
        gathered.filled, asdict(counts), gathered.acceptance(), sides.discriminator.accuracy, sides.discriminator.held,
        leaked(gathered.texts, list(bundle.seeds)), cost=cost, stopped=gathered.made.stopped, notes=notes,
        versions=versions(), examples=gathered.texts[:10], settings=plain(settings), predicted=rehearsal, **judging,
    )  # fmt: skip


def check_judged(bundle: Bundle, sides: Sides, real: Any) -> None:
    """Raise AddendaError for examples to judge by that one of the models cannot read whole."""
    for what, side, chat in (("source", sides.source, bundle.chat), ("target", sides.target, None)):
        limit, lengths = within(None, side.model), encode(real, side.tokenizer, chat=chat).lengths
        long = [i for i, n in enumerate(lengths) if limit is not None and n > limit]
        if long:
            raise AddendaError(
                f"{len(long)} of the {len(real)} examples of eval_data are longer than the {limit:,} tokens that the "
                f"{what} reads, the first in {real.place(long[0])} ({lengths[long[0]]:,}). Leave these out."
            )


def _judged(
    bundle: Bundle, sides: Sides, real: Any, gathered: Gathered, seed: int, longest: dict[str, Any]
) -> dict[str, Any]:
    """Return how source, target and student do on real examples, how alike they answer, and MMD to their inputs."""
    source, target = sides.source, sides.target
    inputs = inputs_of(real)
    prompts = [inputs.prompt(t) for t in inputs.texts[:COMPARED]]
    with sides.teaching():
        items = {"source": evaluate(source.model, source.tokenizer, real, chat=bundle.chat).items}
        answers = generate(source.model, source.tokenizer, prompts, chat=bundle.chat, **longest)
    items["transferred"] = evaluate(target.model, target.tokenizer, real).items
    same = agreement(generate(target.model, target.tokenizer, prompts, **longest), answers)
    there, found = list(inputs.texts[:MOST]), {}
    with disabled(target.model):
        items["base"] = evaluate(target.model, target.tokenizer, real).items
        if min(len(there), len(gathered.texts)) > 1:
            made = gathered.made.texts[:MOST], gathered.texts[:MOST]
            found = {"distance": distances(target.model, target.tokenizer, *made, there)}
    arms = {arm: {seed: right} for arm, right in items.items()}
    return {"agreement": same, "on": f"{len(prompts)} real inputs", "judged": judged(arms), **found}
