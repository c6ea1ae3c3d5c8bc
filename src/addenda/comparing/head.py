"""What a report says first: which method to take, for which cost, with its command; and what speaks for and against."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from addenda.comparing.choose import COSTS, Choice, Cost, choices, full_is_better, short, unsound
from addenda.comparing.entries import LookTaken
from addenda.comparing.power import Power, powers
from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.rows import titles_of
from addenda.comparing.stats import Comparison, PairedDifference
from addenda.comparing.until import told
from addenda.comparing.words import listed, whole


@dataclass(frozen=True)
class Advice:
    """One arm to take and for which costs. what: in words; why: sentences; command: an `addenda tune` line."""

    what: str
    why: tuple[str, ...]
    command: str | None


@dataclass(frozen=True)
class Head:
    """The head of a report. advice: one where all costs agree; verdicts: of the arm taken, or the best, and the others.

    notes: what the margin means, and when the comparison was looked at, in sentences; left_out: arms that cannot be
    taken, and why; power: what would decide more.
    """

    choices: Mapping[Cost, Choice]
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]
    verdicts: tuple[str, ...]
    left_out: tuple[str, ...]
    power: tuple[Power, ...]


def head_of(record: Record, comparison: Comparison) -> Head:
    """Return the head of the report on a record."""
    titles, found = titles_of(record), choices(record, comparison)
    by_arm: dict[str | None, list[Choice]] = {}
    for cost in COSTS:
        by_arm.setdefault(found[cost].arm, []).append(found[cost])
    points = f"{found['memory'].margin:g} point" + "s" * (found["memory"].margin != 1)
    until = record.config.until and replace(record.config.until, taken=_titled(record.config.until.taken, titles))
    pairs = [p for p in _pairs(found["memory"], comparison) if p.verdict != "void"]
    return Head(
        choices=found,
        advice=tuple(_advice(of_arm, comparison, titles) for of_arm in by_arm.values()),
        notes=(f"A difference of less than {points} of accuracy counts as none.", *([told(until)] if until else [])),
        verdicts=tuple(f"{p.words(titles)}." for p in pairs if p.verdict != "undecided"),
        left_out=tuple(f"{titles[a]} is left out: {why}." for a, why in unsound(record, comparison).items()),
        power=tuple(powers(record, pairs, titles)),
    )


def _titled(looks: Iterable[LookTaken], titles: Mapping[str, str]) -> tuple[LookTaken, ...]:
    """Return looks with their arms called as they are in the report."""
    return tuple(
        replace(look, undecided=tuple((titles.get(a, a), titles.get(b, b)) for a, b in look.undecided))
        for look in looks
    )


def _advice(of_arm: Sequence[Choice], comparison: Comparison, titles: Mapping[str, str]) -> Advice:
    """Return the advice of choices of one arm."""
    first, costs = of_arm[0], "" if len(of_arm) == len(COSTS) else f" for {listed(c.cost for c in of_arm)}"
    if first.arm is None or first.title is None:
        return Advice(f"Nothing is recommended{costs}", tuple(dict.fromkeys(c.why for c in of_arm)), None)
    prices = listed(f"{c.cost} ({c.price})" for c in of_arm)
    why = [c.why for c in of_arm] if first.arm != first.best else _best(of_arm, comparison, titles)
    return Advice(f"Recommended: {first.title}, for {prices}", tuple(dict.fromkeys(why)), first.command)


def _best(of_arm: Sequence[Choice], comparison: Comparison, titles: Mapping[str, str]) -> list[str]:
    """Return why the best arm is taken for several costs, all told together."""
    first, costs = of_arm[0], " or ".join(c.cost for c in of_arm)
    assert first.arm is not None
    score = whole(comparison.test[first.arm].mean)
    cheaper = list(dict.fromkeys(a for c in of_arm for a in c.cheaper))
    near = f"is shown to be within {first.margin:g} points of it"
    if cheaper:
        told = f"of what costs less {costs} ({short([titles[a] for a in cheaper])}), none {near}"
    else:
        rival = f" and beats {titles[comparison.control]}" if comparison.control else ""
        told = f"nothing that costs less {costs} {near}{rival}"
    return [f"{first.title} is the best ({score}); {told}.", *full_is_better(comparison, first.arm)]


def _pairs(choice: Choice, comparison: Comparison) -> list[PairedDifference]:
    """Return the arm taken, or the best, against each other arm; the control where there is none."""
    arm = choice.arm or choice.best or comparison.control
    arms = list(comparison.letters)
    if arm is None:
        arm = next((a for a in arms if a not in (FULL, HEAD)), None)
    if arm == comparison.control:
        return [p for a in arms if arm and (p := comparison.between(a, arm))]
    return [p for a in arms if arm and (p := comparison.between(arm, a))]
