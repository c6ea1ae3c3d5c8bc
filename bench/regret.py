"""How much worse what `choose` takes is than the best: on records with seeds left out, and on planted differences.

kept: every record here with final runs of three seeds or more. It chooses on some of its seeds, at least two, and is
judged on the others, in all ways to part them; the regret is the best held-out accuracy minus that of the arm taken.
The held-out best is the highest of several noisy means, so this regret is too large rather than too small.

planted: arms of known accuracy p = Φ(t). An item is answered rightly where a sum of normal parts, of variance 1 in all,
stays below t: of the item (half), of item and arm, of the seed, of seed and arm, and what is left. The regret is exact.

Only where arms differ by more than twice the margin. The regret of a record is the largest over the three costs; one
that recommends nothing is counted, and has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from addenda.comparing.choose import choices
from addenda.comparing.entries import (
    BudgetRecord,
    Config,
    DataRecord,
    MethodRecord,
    ModelRecord,
    SplitResult,
    TrialRecord,
)
from addenda.comparing.record import FULL, HEAD, Record
from addenda.core.base.errors import AddendaError

RECORDS = Path(__file__).parents[1] / "records"
MARGIN = 2.0  # points
GAPS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0)  # points below the best, of which each arm but it draws one
SEEDS, ITEMS, SHARED, SCATTER = (3, 5, 8), (500, 1600, 4800), (0.0, 0.65), (0.5, 1.5, 4.0)
DRAWS = 8  # of each setting


@dataclass
class Tally:
    """The worst regret over the three costs, in points, of every record that differed and recommended something.

    none: records that recommend nothing for some cost.
    """

    regrets: list[float]
    none: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.regrets + other.regrets, self.none + other.none)

    def as_row(self, name: str) -> dict[str, Any]:
        found = np.array(self.regrets)
        row = {"what": name, "records": len(found) + self.none, "nothing": self.none, "chosen": len(found)}
        if not len(found):
            return row
        within = int((found <= MARGIN + 1e-9).sum())
        return row | {"within": within, "mean": float(found.mean()), "most": float(found.max())}


def tally(record: Record, truth: dict[str, float]) -> Tally:
    """Judge the choices of a record by accuracies in points, where they differ by more than two margins."""
    if len(truth) < 2 or max(truth.values()) - min(truth.values()) <= 2 * MARGIN:
        return Tally([])
    taken = [choice.arm for choice in choices(record).values()]
    if None in taken:
        return Tally([], 1)
    return Tally([max(max(truth.values()) - truth[arm] for arm in taken if arm is not None)])


def kept() -> Iterator[tuple[str, Record]]:
    """Yield the committed records that hold what a choice needs."""
    for file in sorted(RECORDS.rglob("config.json")):
        try:
            record = Record.read(file.parent)
        except AddendaError:  # of another kind
            continue
        costs = (t.peak_bytes or t.adapter_bytes or t.step_seconds for t in record.trials_of(stage="final"))
        if len(record.config.seeds) > 2 and any(costs):
            yield str(file.parent.relative_to(RECORDS)), record


def parted(record: Record) -> Iterator[tuple[Record, dict[str, float]]]:
    """Yield a record with some of its seeds, and the accuracies of its methods over the others, in points."""
    seeds = record.config.seeds
    for count in range(2, len(seeds)):
        for some in combinations(seeds, count):
            few = tuple(t for t in record.trials if t.stage != "final" or t.seed in some)
            rest = [t for t in record.trials_of(stage="final") if t.seed not in some and t.test and t.status == "ok"]
            methods = [m for m in record.config.methods if m not in (FULL, HEAD)]
            held = {m: [t.test.accuracy for t in rest if t.method == m and t.test] for m in methods}
            truth = {m: 100 * float(np.mean(found)) for m, found in held.items() if found}
            yield replace(record, trials=few, config=replace(record.config, seeds=some)), truth


def planted(rng: np.random.Generator, seeds: int, items: int, shared: float, scatter: float) -> tuple[Record, dict]:
    """Return a record of four methods and a base, and what is true of the methods, in points."""
    best = rng.uniform(40, 80)
    truth = {"m0": best} | {f"m{i}": best - rng.choice(GAPS) for i in (1, 2, 3)}
    base = min(truth.values()) - rng.choice(GAPS)
    spread = scatter / 100 / norm.pdf(norm.ppf(best / 100))  # of seeds' means, as the parts count
    parts = {"item": 0.5, "arm": 0.1, "seed": shared * spread**2, "own": (1 - shared) * spread**2}
    left = 1 - sum(parts.values())
    of_item, of_seed = rng.normal(size=items) * parts["item"] ** 0.5, rng.normal(size=seeds) * parts["seed"] ** 0.5
    trials = []

    def answers(accuracy: float, seed: float, of_arm: np.ndarray) -> SplitResult:
        total = of_item + of_arm + seed + rng.normal(size=items) * left**0.5
        right = total < norm.ppf(accuracy / 100)
        return SplitResult(accuracy=float(right.mean()), items="".join(map(str, right.astype(int))))

    for arm, accuracy in truth.items():
        memory, size, pace = np.exp(rng.normal(size=3))
        of_arm = rng.normal(size=items) * parts["arm"] ** 0.5
        trials += [
            TrialRecord(
                method=arm, seed=s, stage="final", rate=1e-3, steps=10, status="ok", peak_bytes=int(1e6 * memory),
                adapter_bytes=int(1e6 * size), step_seconds=float(pace),
                test=answers(accuracy, of_seed[s] + rng.normal() * parts["own"] ** 0.5, of_arm),
            )
            for s in range(seeds)
        ]  # fmt: skip
    of_base = rng.normal(size=items) * (parts["arm"] + parts["seed"] + parts["own"]) ** 0.5
    trials.append(TrialRecord(method="base", stage="control", status="ok", test=answers(base, 0.0, of_base)))
    config = Config(
        title="planted", model=ModelRecord(), data=DataRecord(), budget=BudgetRecord(kind="steps", value=10, steps=10),
        methods={arm: MethodRecord(title=arm) for arm in truth}, seeds=tuple(range(seeds)), margin=MARGIN,
    )  # fmt: skip
    return Record(Path("planted"), config, tuple(trials)), truth


def run(given: Any) -> tuple[list[dict], str]:
    """Measure; return the rows and the table."""
    rows, whole = [], Tally([])
    for name, record in kept():
        record = replace(record, config=replace(record.config, margin=MARGIN))
        of_record = sum((tally(*part) for part in parted(record)), Tally([]))
        if of_record.as_row(name)["records"]:
            rows.append(of_record.as_row(f"kept: {name}"))
        whole += of_record
    rows.append(whole.as_row("kept, all"))
    rng, every = np.random.default_rng(18), Tally([])
    for seeds, items in product(SEEDS, ITEMS):
        settings = product(SHARED, SCATTER, range(DRAWS))
        drawn = (planted(rng, seeds, items, shared, scatter) for shared, scatter, _ in settings)
        of_setting = sum((tally(*one) for one in drawn), Tally([]))
        rows.append(of_setting.as_row(f"planted: {seeds} seeds, {items:,} items"))
        every += of_setting
    rows.append(every.as_row("planted, all"))
    return rows, table(rows)


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"| records whose arms differ by more than {2 * MARGIN:g} points | records | nothing recommended | chosen | "
        f"regret ≤ {MARGIN:g} points | mean regret | largest |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        told = f"{r['within']} | {r['mean']:.2f} | {r['most']:.1f}" if r["chosen"] else "– | – | –"
        lines.append(f"| {r['what']} | {r['records']} | {r['nothing']} | {r['chosen']} | {told} |")
    return "\n".join(lines)
