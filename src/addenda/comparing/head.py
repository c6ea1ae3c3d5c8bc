"""What a report says first: which method to take, for which cost, with its command; and what speaks for and against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from addenda.comparing.choose import COSTS, Choice, Cost, choices
from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.rows import titles_of
from addenda.comparing.stats import Comparison
from addenda.comparing.words import listed


@dataclass(frozen=True)
class Advice:
    """One arm to take and for which costs. what: in words; why: a sentence for each cost, equal ones once."""

    what: str
    why: tuple[str, ...]
    command: str | None


@dataclass(frozen=True)
class Head:
    """The head of a report. advice: one where all costs agree; verdicts: of the arm taken, or the best, and the others.

    margin: what it means, in a sentence; left_out: arms that cannot be taken, and why.
    """

    choices: Mapping[Cost, Choice]
    advice: tuple[Advice, ...]
    margin: str
    verdicts: tuple[str, ...]
    left_out: tuple[str, ...]


def head_of(record: Record, comparison: Comparison) -> Head:
    """Return the head of the report on a record."""
    titles, found = titles_of(record), choices(record, comparison)
    by_arm: dict[str | None, list[Choice]] = {}
    for cost in COSTS:
        by_arm.setdefault(found[cost].arm, []).append(found[cost])
    margin = f"{found['memory'].margin:g} point" + "s" * (found["memory"].margin != 1)
    gone = {a: why for a, why in found["memory"].left_out.items() if a in comparison.diverged}
    return Head(
        choices=found,
        advice=tuple(_advice(of_arm) for of_arm in by_arm.values()),
        margin=f"A difference of less than {margin} of accuracy counts as none.",
        verdicts=_verdicts(found["memory"], comparison, titles),
        left_out=tuple(f"{titles[a]} is left out: {why}." for a, why in gone.items()),
    )


def _advice(of_arm: Sequence[Choice]) -> Advice:
    """Return the advice of choices of one arm."""
    why = tuple(dict.fromkeys(c.why for c in of_arm))
    first = of_arm[0]
    if first.title is None:
        costs = "" if len(of_arm) == len(COSTS) else f" for {listed(c.cost for c in of_arm)}"
        return Advice(f"No recommendation{costs}", why, None)
    prices = listed(f"{c.cost} ({c.price})" for c in of_arm)
    return Advice(f"{first.title} for {prices}", why, first.command)


def _verdicts(choice: Choice, comparison: Comparison, titles: Mapping[str, str]) -> tuple[str, ...]:
    """Return the verdicts of the arm taken, or the best, against each other arm, or all where there is none."""
    pairs, arm = comparison.pairs, choice.arm or choice.best
    if arm is None:
        methods = [a for a in comparison.letters if a not in (FULL, HEAD)]
        arm = comparison.control or next(iter(methods), None)
    return tuple(p.words(titles) for p in pairs if arm in (p.a, p.b))
