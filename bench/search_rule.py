"""What the rule that chooses a rate does to the searches on record: by loss, by accuracy, within one standard error.

Of each search the longest runs count, at two rates or more. Where a record has no answers by item, the error of a
difference is that of independent answers, which is above that of paired ones. `lost`: accuracy on validation of the
best rate less that of the rate with the lowest loss, in points. No final run was made at the other rates, so what a
choice is worth on the test split is not known from these records.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from addenda.comparing.entries import TrialRecord
from addenda.comparing.record import Record
from addenda.comparing.search import Score, ranked, score

RECORDS = Path("records")
MATTERS = 2.0  # points


def run(given: Namespace) -> tuple[dict, str]:
    """Return the counts over all records below records/, and a table of them."""
    found = [_judged(tried, items) for tried, items in _searches(RECORDS)]
    lost = [f["lost"] for f in found if f["differ"]]
    counts = {
        "searches": len(found),
        "rates in each, at least": min(f["rates"] for f in found),
        "the lowest loss is not the best accuracy": len(lost),
        f"… and loses {MATTERS:g} points of it or more": sum(x >= MATTERS for x in lost),
        "… and is within one standard error of it": sum(f["within"] for f in found if f["differ"]),
        "the rule takes another rate than the lowest loss": sum(f["rule"] for f in found),
        "the rate of the lowest loss is at an edge": sum(f["edge"] for f in found),
        "the rate that the rule takes is at an edge": sum(f["rule edge"] for f in found),
    }
    table = ["| of the searches on record | |", "|---|--:|", *(f"| {k} | {v} |" for k, v in counts.items())]
    return {"counts": counts, "lost": sorted(lost)}, "\n".join(table)


def _searches(folder: Path) -> Iterator[tuple[dict[float, Score], int]]:
    """The scores by rate of every search, and how many items they are of."""
    for file in sorted(folder.glob("**/config.json")):
        record = Record.read(file.parent)
        for arm in record.config.methods:
            by_rate: dict[float, list[TrialRecord]] = {}
            runs = record.trials_of(arm, "search")
            for t in runs:
                if t.rate is not None and t.steps == max(r.steps or 0 for r in runs if r.rate == t.rate):
                    by_rate.setdefault(t.rate, []).append(t)
            if len(by_rate) > 1:
                yield {rate: score(of) for rate, of in by_rate.items()}, _items(runs, record)


def _items(runs: list[TrialRecord], record: Record) -> int:
    """How many items the validation accuracies are of: the fewest that all of them are whole parts of."""
    right = [t.last_look.accuracy for t in runs if t.last_look and t.last_look.accuracy is not None]
    size = (record.config.data.sizes or {}).get("validation") or 1
    return next((n for n in range(1, size) if all(abs(a * n - round(a * n)) < 1e-6 for a in right)), size)


def _judged(tried: dict[float, Score], items: int) -> dict:
    """What the two rules choose."""
    by_loss = min(tried, key=lambda r: tried[r].loss)
    best = max(tried, key=lambda r: tried[r].accuracy)
    top = tried[best].accuracy

    def within(rate: float) -> bool:
        a = tried[rate].accuracy
        if tried[rate].items is not None:
            return tried[rate].within(tried[best])
        return a > -math.inf and top - a <= math.sqrt((top * (1 - top) + a * (1 - a)) / items)

    kept = all(s.items is not None for s in tried.values())
    chosen = ranked(tried)[0] if kept else min(filter(within, tried), key=lambda r: tried[r].loss)
    edges = {min(tried), max(tried)}
    return {
        "rates": len(tried), "differ": tried[by_loss].accuracy < top, "lost": 100 * (top - tried[by_loss].accuracy),
        "within": within(by_loss), "rule": chosen != by_loss, "edge": by_loss in edges, "rule edge": chosen in edges,
    }  # fmt: skip
