"""The dry run of a transfer: eight samples through every stage, what that says of the whole, and whether to begin.

Whatever cannot work (a format that nothing passes, a method that does not fit the target, answers without an end)
fails here, in seconds, and not behind an hour of sampling. Predicted times are those of a batch of eight: an upper
bound where the run has larger ones, and as good as eight samples are where few of them pass.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from addenda.core.adapter.attach import detach
from addenda.core.base.errors import AddendaError
from addenda.transferring.bundle import Bundle
from addenda.transferring.distil import distil
from addenda.transferring.label import label
from addenda.transferring.sides import Sides
from addenda.transferring.synthesise import Caps, Sampler, Synthesis, nothing

SAMPLES = 8
MOST = 64  # samples, where the first brought no new line
STEPS = 2  # of training: the first one is slower than those that follow


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run found. seconds: predicted, by stage; wanted: samples that n inputs are likely to take."""

    samples: int
    lines: int
    malformed: int
    new: int
    passed: int
    tokens_per_second: float
    wanted: int
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {_time(s)}" for name, s in self.seconds.items())
        none = "" if self.passed else "; none passed, so that the best by margin would be taken at the cap"
        return (
            f"dry run of {self.samples} samples: {self.lines - self.malformed} of {self.lines} lines of the format, "
            f"{self.new} new, {self.passed} pass the discriminator{none}; {self.tokens_per_second:,.0f} tokens/s. "
            f"Predicted: {self.wanted:,} samples, {_time(self.total)} in all ({stages})"
        )


def rehearse(
    sampler: Sampler,
    sides: Sides,
    bundle: Bundle,
    n: int,
    caps: Caps,
    *,
    threshold: float,
    steps: int,
    batch: int,
    labelling: Mapping[str, Any],
    distilling: Mapping[str, Any],
) -> Rehearsal:
    """Run eight samples through every stage, and leave the models as they were. See `transfer` for the options."""
    made = Synthesis()
    with sides.bare():
        while (done := made.counts.samples) < SAMPLES or (not made.texts and done < MOST):
            made += sampler.more(made, Caps(done - done % SAMPLES + SAMPLES))
    if not made.texts:
        raise nothing(made, sampler.format)
    counts, judge = made.counts, sides.judge
    began = time.perf_counter()
    margins = sides.discriminator.margins(judge.model, judge.tokenizer, made.texts)
    judging = (time.perf_counter() - began) / len(margins)
    passed = sum(m > threshold for m in margins)
    prompts = [bundle.prompt(text) for text in [*made.texts, *bundle.seeds][:SAMPLES]]
    with tempfile.TemporaryDirectory(prefix="addenda-") as folder, sides.teaching():
        labels = label(sides.source.model, sides.source.tokenizer, prompts, folder=folder, **labelling)
        began = time.perf_counter()
        learned = distil(sides.target.model, sides.target.tokenizer, labels, steps=STEPS, batch=batch, **distilling)
        besides = max(time.perf_counter() - began - learned.seconds, 0.0)  # attaching, choosing, putting away
    detach(sides.target.model, learned.adapter.name)
    wanted = caps.tries if not passed else min(caps.tries, max(round(n * counts.samples / passed), 1))
    step = learned.step_seconds * batch / min(batch, learned.examples)
    return Rehearsal(
        counts.samples, counts.lines, counts.malformed, counts.new, passed,
        counts.tokens / max(counts.seconds, 1e-9), wanted,
        {
            "sampling": wanted * counts.seconds / counts.samples,
            "judging": wanted * counts.new / counts.samples * judging,
            "answering": n * labels.seconds / len(labels),
            "distilling": besides + steps * step,
        },
    )  # fmt: skip


def agree(found: Rehearsal, within: float | None, ask: Callable[[str], bool] | None) -> None:
    """Return where a run may begin: it is predicted to end within so many seconds, or who is asked says yes.

    Raises AddendaError where not.
    """
    if within is None or found.total <= within:
        return
    said = f"{found}. That is more than the {_time(within)} of within="
    if ask is None or not ask(f"{said}. Begin all the same?"):
        raise AddendaError(
            f"{said}, and nothing was begun. Raise within=, or make it shorter: fewer inputs or steps=, caps "
            "(tries=, max_minutes=)."
        )


def as_json(found: Rehearsal) -> dict[str, Any]:
    """Return a rehearsal as a report keeps it."""
    return asdict(found) | {"seconds": dict(found.seconds)}


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
