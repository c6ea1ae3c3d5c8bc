"""Which arm to take: the cheapest of those that are not worse than the best by the margin.

    memory    bytes above the loaded model, at the peak of a run
    size      bytes of the adapter's file
    time      seconds of a run's steps

Only arms that are shown to beat the better base control come into question: the model as it is costs nothing. Full
fine-tuning and a new head alone are controls, and are no answer to the question which method to take. That an arm is
not worse by the margin has to be shown; where nothing is shown of the cheaper arms, the best one is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from addenda.comparing.commands import tune_command
from addenda.comparing.entries import MARGIN
from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.rows import Row, rows_of, titles_of
from addenda.comparing.stats import Comparison, analyse
from addenda.comparing.words import duration, listed, points, size, whole
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of

Cost = Literal["memory", "size", "time"]
COSTS: tuple[Cost, ...] = get_args(Cost)
OF: dict[str, Callable[[Row], float | None]] = {
    "memory": lambda row: row.peak_bytes, "size": lambda row: row.adapter_bytes, "time": lambda row: row.train_seconds,
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The arm to take where one cost counts, and why.

    arm, title, value, command: None where nothing is recommended; `why` says why. value: bytes, or seconds for time.
    best: the arm that the others are held against; not_worse: those that come into question, the cheapest first;
    cheaper: those that cost less than `arm`, and are not shown to be near enough to the best; left_out: all others than
    `not_worse`, each with its reason. command: an `addenda tune` line, None where tune cannot train the arm.
    margin: in percentage points.
    """

    cost: Cost
    arm: str | None
    title: str | None
    value: float | None
    why: str
    best: str | None
    not_worse: tuple[str, ...]
    cheaper: tuple[str, ...]
    left_out: dict[str, str]
    command: str | None
    margin: float

    @property
    def price(self) -> str:
        """The value in words: "310 MB", "2 min 5 s"."""
        return in_words(self.cost, self.value)

    def as_json(self) -> dict[str, Any]:
        """Return the choice as JSON gives it back."""
        return asdict(self) | {"not_worse": list(self.not_worse), "cheaper": list(self.cheaper)}


def choose(record: Record | str | Path, cost: Cost = "memory", comparison: Comparison | None = None) -> Choice:
    """Return the cheapest arm of a record, or of its folder, that is not worse than the best by the margin.

    cost: "memory" (peak bytes above the loaded model), "size" (bytes of the adapter's file) or "time" (seconds of
    training). comparison: the statistics, where they are there already.
    Raises AddendaError for another cost, and for a record without a finished run.
    """
    if cost not in COSTS:
        raise AddendaError(f"A cost is one of {', '.join(COSTS)}, got {cost!r}.")
    record = record if isinstance(record, Record) else Record.read(path_of(record, "record"))
    comparison = comparison or analyse(record)
    margin = MARGIN if record.config.margin is None else record.config.margin
    rows = {r.arm: r for r in rows_of(record, comparison) if not r.control and r.test}
    titles, left_out = titles_of(record), unsound(record, comparison)
    sound = [arm for arm in rows if arm not in left_out]  # the best first
    control = comparison.control
    beating = [a for a in sound if control is None or comparison.beats(a, control)]
    left_out |= {a: f"it is not shown to beat {titles[str(control)]}" for a in sound if a not in beating}
    near = [a for a in beating if comparison.not_worse(a, sound[0])]
    if not near:
        why = _nothing(rows, sound, beating, comparison, titles)
        return Choice(cost, None, None, None, why, None, (), (), left_out, None, margin)
    best, of = sound[0], OF[cost]
    left_out |= {
        a: f"it is not shown to be within {margin:g} points of {titles[best]}" for a in beating if a not in near
    }
    price = {a: v for a in near if (v := of(rows[a])) is not None and v >= 0}
    left_out |= {a: f"its {cost} is not in the record" for a in near if a not in price}
    if not price:
        why = f"The record does not hold the {cost} of any method that is not worse than the best, {titles[best]}."
        return Choice(cost, None, None, None, why, best, (), (), left_out, None, margin)
    order = tuple(sorted(price, key=lambda a: price[a]))
    arm = order[0]
    far = (a for a in beating if a not in near and (v := of(rows[a])) is not None and v < price[arm])
    cheaper = tuple(sorted(far, key=lambda a: of(rows[a]) or 0.0))
    why, command = (
        _why(comparison, arm, best, cost, price, cheaper, left_out, titles, margin),
        tune_command(record, arm),
    )
    return Choice(cost, arm, titles[arm], price[arm], why, best, order, cheaper, left_out, command, margin)


def choices(record: Record, comparison: Comparison | None = None) -> dict[Cost, Choice]:
    """Return the choice for every cost."""
    comparison = comparison or analyse(record)
    return {cost: choose(record, cost, comparison) for cost in COSTS}


def in_words(cost: str, value: float | None) -> str:
    """Return a cost in words."""
    return duration(value) if cost == "time" else size(value)


def unsound(record: Record, comparison: Comparison) -> dict[str, str]:
    """Return the methods that are void or diverged in some run, each with the reason."""
    void = {a: f"it is void, {why}" for a, why in comparison.void.items()}
    diverged = {a: "it diverged in some run" for a in comparison.diverged}
    return {a: why for a, why in (diverged | void).items() if a in record.config.methods and a not in (FULL, HEAD)}


def _nothing(
    rows: dict[str, Row], sound: list[str], beating: list[str], comparison: Comparison, titles: dict[str, str]
) -> str:
    """Return why nothing is recommended."""
    if not rows:
        return "No method has finished yet."
    if not sound:
        return "Every method is void or diverged in some run."
    control, best = str(comparison.control), f"{titles[sound[0]]} ({whole(comparison.test[sound[0]].mean)})"
    rival = f"shown to beat {titles[control]} ({whole(comparison.test[control].mean)})"
    if beating:
        near = f"within {comparison.margin * 100:g} points of it"
        return f"The best, {best}, is not {rival}, and no method that is {rival} is shown to be {near}."
    what = f"{best} is not" if len(sound) == 1 else f"None of the {len(sound)} methods is"
    return f"{what} {rival}, which needs no adapter."


def _why(
    comparison: Comparison, arm: str, best: str, cost: str, price: dict[str, float], cheaper: Sequence[str],
    left_out: dict[str, str], titles: dict[str, str], margin: float,
) -> str:  # fmt: skip
    """Return why an arm is taken, in one sentence or two."""
    score, pair = whole(comparison.test[best].mean), comparison.between(arm, best)
    what = {"memory": "memory", "size": "space", "time": "time"}[cost]
    if arm != best and pair is not None:
        shown = f"is shown not to be worse than it by {margin:g} points (difference {points(pair.difference)})."
        if best in price:
            than = f"{titles[best]} ({in_words(cost, price[best])})"
            why = f"{titles[arm]} takes less {what} than {than} and {shown}"
        else:
            why = f"{titles[best]}, the best ({score}), is left out: {left_out[best]}. {titles[arm]} {shown}"
    elif cheaper:
        names = short([titles[a] for a in cheaper])
        why = f"{titles[arm]} is the best ({score}); {names}, with less {what}, {'is' if len(cheaper) == 1 else 'are'} "
        why += f"not shown to be within {margin:g} points of it."
    else:
        rival = f" that beats {titles[comparison.control]}" if comparison.control else ""
        why = f"{titles[arm]} is the best ({score}), and no other{rival} takes less {what}."
    return " ".join([why, *full_is_better(comparison, arm)])


def full_is_better(comparison: Comparison, arm: str) -> list[str]:
    """Return a sentence about full fine-tuning where it is better than an arm."""
    full = comparison.between(FULL, arm)
    better = full is not None and full.better == FULL
    return [f"Full fine-tuning is better by {full.difference * 100:.1f} points."] if better else []


def short(names: Sequence[str]) -> str:
    """Return names in a sentence, of many the first two."""
    return listed(names if len(names) < 4 else [*names[:2], f"{len(names) - 2} others"])
