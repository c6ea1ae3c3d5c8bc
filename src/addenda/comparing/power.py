"""What would decide what is undecided: how many more seeds, how long they take, and the command that runs them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from addenda.comparing.commands import more_command
from addenda.comparing.record import Record
from addenda.comparing.stats import PairedDifference
from addenda.comparing.words import about, points

COMMANDS = 3  # that are told: with the most seeds of one, those of the earlier are done


@dataclass(frozen=True)
class Power:
    """What is not decided, and what would decide it, in sentences. command: that runs it."""

    sentence: str
    command: str | None


def powers(record: Record, pairs: Iterable[PairedDifference], titles: Mapping[str, str]) -> list[Power]:
    """Return what would decide those of the pairs that are undecided: the fewest seeds first.

    Seconds are those of the record's own runs, training and judging. Both numbers hold if what was seen stays as it is,
    so they are rough.
    """
    open_ = [p for p in pairs if p.verdict == "undecided"]
    found, second, told = [], seconds_of_a_seed(record), set()
    for pair in sorted(open_, key=lambda p: p.more_seeds or math.inf):
        a, b, more = titles[pair.a], titles[pair.b], pair.more_seeds
        known = pair.low > -1 or pair.high < 1
        seen = f" (difference {points(pair.difference)}: {points(pair.low)} to {points(pair.high)})" if known else ""
        sentence, command = f"{a} and {b} are undecided{seen}", None
        if more:
            time = f", about {about(second * more)}" if second is not None else ""
            sentence += f". To separate them by {pair.margin * 100:g} points: {more} more seed{'s' * (more != 1)}{time}"
            if more in told or len(told) < COMMANDS:
                command = None if more in told else more_command(record, len(record.config.seeds) + more)
                told.add(more)
        else:
            sentence += f": {pair.why}"
        found.append(Power(f"{sentence}.", command))
    return found


def seconds_of_a_seed(record: Record) -> float | None:
    """Return seconds of one more run of every arm, trained and judged; None where the record lacks those of an arm."""
    total = 0.0
    for arm in record.config.methods:
        runs = record.trials_of(arm, "final")
        taken = [t.seconds for t in runs if t.seconds is not None and t.status == "ok"]
        if runs and not taken:
            return None
        total += median(taken) if taken else 0.0
    return total or None
