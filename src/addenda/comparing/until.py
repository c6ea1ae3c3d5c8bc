"""Until decided: seeds are added, look by look, until the contrasts that matter are decided or more would not decide.

A look is taken when every arm has 3, 5, 8, 12 or 20 seeds, and what may be said there spends its share of the error
(see `spending`). What the whole comparison takes with so many seeds is predicted from measured times, and written down
before the first step: which looks fit `max_minutes` does not follow the clock. All arms go on to the next look, also
one that is beaten, so that seeds stay paired. Where none of the open contrasts is one that a further look could decide,
since the items alone leave too much or the difference is about the margin (`verdicts`), no seeds are added either.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace

from addenda.comparing.entries import LookTaken, Until
from addenda.comparing.record import Record
from addenda.comparing.stats import Comparison, analyse
from addenda.comparing.words import listed, minutes
from addenda.core.base.errors import AddendaError
from addenda.statistics.spending import LOOKS
from addenda.statistics.verdicts import PairedDifference

NO_MORE = "no more were asked for"
SEEDS = 3  # where neither a number nor until= is given


def wanted(
    record: Record | None, seeds: int | None, until: str | None, max_minutes: float | None, within: float | None
) -> tuple[int, str | None, float | None]:
    """Return the seeds to run first, until when more are added, and the minutes allowed, of a call on a record.

    A comparison that has been looked at before it was decided stays one: its errors are spent look by look.
    """
    if until is None and max_minutes is not None:
        raise AddendaError("max_minutes= is read with until='decided' only; within= drops what does not fit a time.")
    if until is not None and (seeds is not None or within is not None):
        other = "seeds= is the number of them" if seeds is not None else "within= drops what does not fit a time"
        raise AddendaError(f"until='decided' adds seeds by itself, within max_minutes=, and {other}: give one.")
    known = None if record is None else record.config
    there = 0 if known is None else len(known.seeds)
    if until is not None:
        first = there if there in LOOKS else _following(LOOKS, there)
        if first is None:
            raise AddendaError(f"The record has {there} seeds, more than the last look of until=: nothing is added.")
        return first, until, max_minutes
    seeds = SEEDS if seeds is None else seeds
    if known is None or known.until is None:
        return seeds, None, None
    if there < seeds <= LOOKS[-1] and seeds not in LOOKS:
        raise AddendaError(
            f"This comparison is looked at with {', '.join(map(str, LOOKS))} seeds, or more than that, since it began "
            f"as one until decided. Give one of these numbers in place of seeds={seeds}."
        )
    return seeds, "decided", known.until.max_minutes


def planned(known: Until | None, seconds: Sequence[float], max_minutes: float | None, first: int | None) -> Until:
    """Return the plan of a comparison, or that of one which has grown. seconds: of all of it with each look's seeds.

    first: seeds that must fit; Raises AddendaError where they do not.
    """
    until = replace(
        known or Until(), looks=LOOKS, seconds=tuple(round(s, 1) for s in seconds), max_minutes=max_minutes,
        stopped=None,
    )  # fmt: skip
    if first is not None and not _fits(until, first):
        raise AddendaError(
            f"The first look, with {first} seeds of every arm, is predicted after {minutes(_seconds(until, first))} in "
            f"all, and max_minutes={max_minutes:g} are allowed. Allow more, or ask for fewer methods, rates= or steps."
        )
    return until


def look(record: Record, of_number: bool, say: Callable[[str], None]) -> Record:
    """Take the look that is due; return the record with it, and with the seeds of the next where there is one.

    of_number: seeds were asked for by their number, so that no more are added.
    """
    config, until, seeds = record.config, record.config.until, len(record.config.seeds)
    if until is None or until.stopped is not None:
        return record
    left = undecided(analyse(record))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    pairs = tuple((p.a, p.b) for p in left)
    before = (taken for taken in until.taken if taken.seeds != seeds)  # one of these seeds and fewer arms or less time
    until = replace(until, taken=(*before, LookTaken(seeds=seeds, when=now, undecided=pairs)))
    until = replace(until, stopped=_stopped(until, seeds, left, of_number))
    more = seeds if until.stopped else _following(until.looks, seeds) or seeds
    say(told(until))
    return record.changed(
        replace(config, until=until, seeds=tuple(range(more)), identity={**(config.identity or {}), "seeds": more})
    )


def undecided(comparison: Comparison) -> list[PairedDifference]:
    """Return the contrasts that matter and are open: of two arms of which neither is worse than another."""
    beaten = {p.b if p.better == p.a else p.a for p in comparison.pairs if p.better}
    return [p for p in comparison.pairs if p.verdict == "undecided" and not {p.a, p.b} & beaten]


def told(until: Until) -> str:
    """Return what was looked at, and how it ended or goes on, in a sentence."""
    if not until.taken:
        return "Not looked at yet."
    last = until.taken[-1]
    looks = f"Looked at with {listed([str(look.seeds) for look in until.taken])} seeds"
    pairs = listed([f"{a} against {b}" for a, b in last.undecided])
    left = f"; undecided: {pairs}" if pairs else ""
    return f"{looks}{f': {until.stopped}' if until.stopped else ', and more are added'}{left}."


def range_of(until: Until) -> tuple[str, str]:
    """Return how many seeds a comparison may take, and how long, in words."""
    looks = [n for n in until.looks if _fits(until, n)]
    least, most = (minutes(_seconds(until, n)) for n in (looks[0], looks[-1]))
    return f"{looks[0]} to {looks[-1]} seeds", f"about {least}, {most} where much stays undecided"


def _stopped(until: Until, seeds: int, left: Sequence[PairedDifference], of_number: bool) -> str | None:
    after = _following(until.looks, seeds)
    if not left:
        return "every contrast that matters is decided"
    if of_number:
        return NO_MORE
    if after is None:
        return "that is the most"
    if not any(pair.seeds_help for pair in left):
        return f"more seeds, up to {until.looks[-1]}, would not decide what is open"
    if not _fits(until, after):
        return f"{after} would take {minutes(_seconds(until, after))}, and {until.max_minutes:g} minutes are allowed"
    return None


def _following(looks: Sequence[int], seeds: int) -> int | None:
    return next((n for n in looks if n > seeds), None)


def _seconds(until: Until, seeds: int) -> float:
    return dict(zip(until.looks, until.seconds, strict=False)).get(seeds, 0.0)


def _fits(until: Until, seeds: int) -> bool:
    return until.max_minutes is None or _seconds(until, seeds) <= until.max_minutes * 60
