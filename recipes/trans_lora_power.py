"""How often equal arms pass as non-inferior, and how often an arm that is worse by the margin does: simulated.

An answer is right with the accuracy of its arm and seed, which varies from seed to seed by `deviation`, and with the
item's own difficulty. Verdicts are those of `addenda.transferring.verdict`, with its limits for a verdict lowered to
what is simulated. "items alone" is a t interval over items, seeds taken as given: what must not be done.
"""

import numpy as np
from scipy import special

from addenda.statistics.intervals import quantile
from addenda.transferring.verdict import non_inferior

ACCURACY, DIFFICULTY = 0.7, 1.0  # of the better arm; the deviation of items, on the logistic scale
CASES = (
    (10, 998, 0.05, 0.03), (10, 998, 0.05, 0.0), (10, 998, 0.05, 0.06),
    (5, 998, 0.05, 0.03), (3, 500, 0.03, 0.0), (3, 500, 0.03, 0.03), (3, 500, 0.03, 0.12),
)  # fmt: skip


def draw(rng: np.random.Generator, seeds: int, items: np.ndarray, accuracy: float, deviation: float) -> np.ndarray:
    """Return answers, seeds × items, of an arm. items: the difficulty of each."""
    p = np.clip(accuracy + deviation * rng.standard_normal(seeds), 0.01, 0.99)
    shift = special.logit(p) * (1 + 0.35 * DIFFICULTY**2) ** 0.5  # so that the mean over items is p, nearly
    return (rng.random((seeds, len(items))) < special.expit(shift[:, None] + DIFFICULTY * items)).astype(np.int8)


def by_items(a: np.ndarray, b: np.ndarray, margin: float) -> bool:
    """Whether an interval over items alone calls a non-inferior."""
    x = (a.astype(float) - b).mean(0)
    return bool(x.mean() - quantile(0.95, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 > -margin)


def power(seeds: int, items: int, margin: float, deviation: float, draws: int, seed: int = 0) -> dict[str, float]:
    """Return how often arms pass: "equal", "worse" by the margin, and "worse by items" where items alone are asked."""
    rng, passed = np.random.default_rng(seed), {"equal": 0, "worse": 0, "worse by items": 0}
    for _ in range(draws):
        difficulty = rng.standard_normal(items)
        b = draw(rng, seeds, difficulty, ACCURACY, deviation)
        for name, loss in (("equal", 0.0), ("worse", margin)):
            a = draw(rng, seeds, difficulty, ACCURACY - loss, deviation)
            arms = [{s: rows.tolist() for s, rows in enumerate(x)} for x in (a, b)]
            found = non_inferior(*arms, margin=margin, seeds=2, items=1)
            passed[name] += found.verdict == "non-inferior"
            passed["worse by items"] += name == "worse" and by_items(a, b, margin)
    return {name: count / draws for name, count in passed.items()}


def lines(draws: int = 1000) -> list[str]:
    """Return a table of `CASES`."""
    told = [f"{'seeds':>5} {'items':>5} {'margin':>7} {'deviation':>9} {'equal pass':>11} {'worse pass':>11} "
            f"{'by items alone':>15}"]  # fmt: skip
    for seeds, items, margin, deviation in CASES:
        found = power(seeds, items, margin, deviation, draws)
        told.append(
            f"{seeds:>5} {items:>5} {100 * margin:>6.0f}p {100 * deviation:>8.0f}p {found['equal']:>11.1%} "
            f"{found['worse']:>11.1%} {found['worse by items']:>15.1%}"
        )
    return [*told, f"{draws:,} draws each, accuracy {ACCURACY:.0%}; p: points"]
