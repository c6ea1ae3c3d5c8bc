"""The claims of `recipes.trans_lora` (trans_lora_claims.toml), and what its records say of them, seed by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from addenda.statistics.intervals import quantile, two_sided
from addenda.statistics.verdicts import holm
from addenda.transferring.verdict import better, non_inferior
from recipes.claims_file import claims_of

FILE = Path(__file__).with_name("trans_lora_claims.toml")
PARTS, MEASURES = ("toy", "real"), ("accuracy", "support", "non-inferior")
SEEDS = {"toy": 20, "real": 10}
Records = Mapping[int, Mapping[str, Any]]  # of a part, and of a task, by seed


@dataclass(frozen=True)
class Claim:
    """See trans_lora_claims.toml."""

    name: str
    part: str
    words: str
    measure: str
    a: str
    b: str
    least: float
    refuted: str


def read_claims(file: Path = FILE) -> tuple[float, tuple[Claim, ...]]:
    """Return the margin, of an accuracy, and the claims. Raises AddendaError as `claims_of` does."""
    return claims_of(file, Claim, "Trans-LoRA", {"part": PARTS, "measure": MEASURES})


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences over seeds, or of logarithms of multiples, its 95 % interval, and p of `least`."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def difference(values: Sequence[float], least: float) -> Difference:
    """Return the mean of values, one a seed, with Student's interval; p is of the mean being `least`."""
    x = np.asarray(values, dtype=np.float64)
    mean, n = float(x.mean()), len(x)
    if n < 2:
        return Difference(mean, -math.inf, math.inf, 1.0, n)
    error = float(x.std(ddof=1)) / n**0.5
    half = quantile(0.975, n - 1) * error
    return Difference(mean, mean - half, mean + half, two_sided(mean - least, error, n - 1), n)


def verdicts(part: str, margin: float, claims: Sequence[Claim], records: Records) -> list[str]:
    """Return a line for each claim of a part: holds, does not hold, cannot tell, or not measured yet."""
    own = [c for c in claims if c.part == part]
    found = {c.name: (c, d) for c in own if c.measure != "non-inferior" and (d := _measured(c, records)) is not None}
    groups = {c.measure for c, _ in found.values()}
    corrected: dict[str, float] = {}
    for measure in groups:
        corrected |= holm({n: d.p for n, (c, d) in found.items() if c.measure == measure})
    told = {n: _told(c, d, corrected[n], part) for n, (c, d) in found.items()}
    for claim in own:
        if claim.measure == "non-inferior" and (words := _non_inferior(claim, margin, records)) is not None:
            told[claim.name] = words
    return [f"{c.words}: {told.get(c.name, 'not measured yet')}" for c in own]


def _measured(claim: Claim, records: Records) -> Difference | None:
    if claim.measure == "support":
        pairs = [(r["support"][claim.a], r["support"][claim.b]) for r in records.values() if "support" in r]
        values = [math.log(max(a, 1e-4) / max(b, 1e-4)) for a, b in pairs]
        return difference(values, math.log(claim.least)) if values else None
    values = [
        r["accuracies"][claim.a] - r["accuracies"][claim.b]
        for r in records.values()
        if {claim.a, claim.b} <= r["accuracies"].keys()
    ]
    return difference(values, claim.least) if values else None


def _told(claim: Claim, d: Difference, p: float, part: str) -> str:
    if claim.measure == "support":
        numbers = f"{math.exp(d.mean):.2f} × ({math.exp(d.low):.2f} to {math.exp(d.high):.2f})" if d.seeds > 1 else (
            f"{math.exp(d.mean):.2f} ×"
        )  # fmt: skip
        least = math.log(claim.least)
    else:
        numbers = f"{100 * d.mean:+.1f} points" + (
            f" ({100 * d.low:+.1f} to {100 * d.high:+.1f})" if d.seeds > 1 else ""
        )
        least = claim.least
    word = "cannot tell"
    if d.seeds >= SEEDS[part] and p < 0.05:
        word = "holds" if d.mean > least else "does not hold"
    few = "" if d.seeds >= SEEDS[part] else f", of {SEEDS[part]}"
    return f"{word}: {numbers}, {d.seeds} seed{'s' * (d.seeds != 1)}{few}"


def _non_inferior(claim: Claim, margin: float, records: Records) -> str | None:
    arms: dict[str, dict[int, list[int]]] = {}
    for seed, record in records.items():
        for arm, items in record.get("items", {}).items():
            arms.setdefault(arm, {})[seed] = [int(c) for c in items]
    if not {claim.a, "source", "base"} <= arms.keys():
        return None
    reference = better({a: arms[a] for a in ("source", "base")}) if claim.b == "best" else claim.b
    found = non_inferior(arms[claim.a], arms[reference], margin=margin)
    word = {"non-inferior": "holds", "inferior": "does not hold"}.get(found.verdict, "cannot tell")
    return f"{word}: against {reference}: {found}"
