"""How often the intervals of `compare` hold the truth, and how often equal arms are called different: simulated.

An answer is right where a latent number is above a logistic threshold of its own: the item's difficulty (sd 1.5), what
the item is for this arm in every seed (sd `lasting`), and the seed (sd `spread`, of which the share ρ is the same for
all arms). All arms are equally good, so that the truth of a difference is 0 and that of a mean ½. Variances, degrees of
freedom and error spending are the functions of `addenda.comparing`; what is averaged, and Holm's step, is done here for
many draws at once.
"""

import argparse
from itertools import combinations, product

import numpy as np
from scipy import optimize, special

from addenda.statistics import spending
from addenda.statistics.intervals import shared_freedom, spread, uneven
from addenda.statistics.verdicts import LEVEL

DRAWS, LOOKED, QUICK = 10_000, 5_000, 400
ARMS, SEEDS, ITEMS, LASTING, RHOS = (2, 4), (3, 5, 8), (500, 1600), (0.0, 1.0), (0.0, 0.65)
SPREADS = (0.0, 0.15, 0.5)  # about 0, 2.5 and 8 points of accuracy
DIFFICULTY, MARGIN = 1.5, 0.02
THRESHOLDS = special.logit((np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32)
SIZE = 20_000_000  # answers at once

Means = tuple[np.ndarray, np.ndarray, np.ndarray]  # mean, standard error, degrees of freedom: draws × contrasts


class Latent:
    """Items and thresholds of many draws, arms × seeds × items, over which any spread of seeds is laid."""

    def __init__(self, rng: np.random.Generator, draws: int, arms: int, seeds: int, items: int, lasting: float):
        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal((draws, *shape), dtype=np.float32)

        def thresholds(*shape: int) -> np.ndarray:
            n = draws * int(np.prod(shape))
            return THRESHOLDS[np.frombuffer(rng.bytes(2 * n), dtype=np.uint16)].reshape(draws, *shape)

        items_ = DIFFICULTY * normal(1, 1, items)
        self.needed = thresholds(arms, seeds, items) - items_ - np.float32(lasting) * normal(arms, 1, items)
        base = items_[:, 0, 0] + np.float32(lasting) * normal(items)
        self.control = (thresholds(items) < base).astype(np.float32)
        self.common, self.apart = normal(1, seeds, 1), normal(arms, seeds, 1)

    def answers(self, spread_of_seeds: float | np.ndarray, rho: float, gains: np.ndarray | float = 0.0) -> np.ndarray:
        """Return 1 where right. gains: of each arm, on the latent scale."""
        seeds = np.float32(rho**0.5) * self.common + np.float32((1 - rho) ** 0.5) * self.apart
        gained = np.asarray(gains, dtype=np.float32).reshape(-1, 1, 1)
        return (self.needed < np.asarray(spread_of_seeds, dtype=np.float32) * seeds + gained).astype(np.float32)


def measured(x: np.ndarray, control: np.ndarray | None = None) -> dict[str, Means]:
    """Return what `analyse` does: of all pairs, of arms, and of arms minus a control that has no seed.

    x: draws × arms × seeds × items.
    """
    _, arms, seeds, items = x.shape
    runs, over_seeds, right = x.mean(3, dtype=np.float64), x.mean(2), x.sum((2, 3), dtype=np.float64)
    alone = uneven(runs)
    pool = ~alone[..., None]
    n = pool.sum(1)[:, 0]  # arms in the pool
    centred = (runs - runs.mean(2, keepdims=True)) * pool
    rest = (centred - centred.sum(1, keepdims=True) / n[:, None, None]) * pool
    freedom = (n - 1) * (seeds - 1)
    residual, within = (rest**2).sum((1, 2)) / freedom, (centred**2).sum((1, 2)) / (n * (seeds - 1))
    of_arm = within, shared_freedom(within, residual, n, n * (seeds - 1))

    def one(d: np.ndarray, squares: np.ndarray, means: np.ndarray, variance, df, out: np.ndarray) -> Means:
        """Return the mean, its standard error and its degrees of freedom in every draw.

        d: means of items over seeds; squares: the sum over items and seeds; means: of seeds over items.
        """
        of_mean, of_d, of_seeds = means.mean(1) ** 2, (d**2).sum(1, dtype=np.float64), (means**2).sum(1)
        of_items = (of_d - items * of_mean) / (items - 1) / items
        rest = squares - items * of_seeds - seeds * of_d + seeds * items * of_mean
        shared = rest / ((items - 1) * (seeds - 1)) / (items * seeds)
        variance, df = np.where(out, means.var(1, ddof=1), variance), np.where(out, seeds - 1, df)
        return means.mean(1), *spread(of_items, variance / seeds, shared, items, df)

    pairs = [
        one(
            over_seeds[:, a] - over_seeds[:, b],
            right[:, a] + right[:, b] - 2 * np.einsum("dsi,dsi->d", x[:, a], x[:, b]).astype(np.float64),
            runs[:, a] - runs[:, b],
            2 * residual,
            freedom,
            alone[:, a] | alone[:, b],
        )
        for a, b in combinations(range(arms), 2)
    ]
    found = {
        "pair": pairs,
        "arm": [one(over_seeds[:, a], right[:, a], runs[:, a], *of_arm, alone[:, a]) for a in range(arms)],
    }
    if control is not None:
        total = control.sum(1, dtype=np.float64)
        found["control"] = [
            one(
                over_seeds[:, a] - control,
                right[:, a] + seeds * (total - 2 * (over_seeds[:, a] * control).sum(1, dtype=np.float64)),
                runs[:, a] - control.mean(1, dtype=np.float64)[:, None],
                *of_arm,
                alone[:, a],
            )
            for a in range(arms)
        ]
    return {k: tuple(np.stack(part, 1) for part in zip(*rows, strict=True)) for k, rows in found.items()}


def half(found: Means, level: float) -> np.ndarray:
    """Return half the width of the t intervals that miss at this level."""
    return special.stdtrit(np.minimum(found[2], 1e9), 1 - level / 2) * found[1]


def p_values(found: Means) -> np.ndarray:
    """Return the two-sided p of every mean, by Student's t."""
    mean, error, df = found
    return 2 * special.stdtr(np.minimum(df, 1e9), -abs(mean) / np.maximum(error, 1e-300))


def told_apart(p: np.ndarray) -> np.ndarray:
    """Return for each draw whether Holm's correction leaves any of its p below the level: its first step does."""
    return p.min(1) * p.shape[1] < LEVEL


def chunks(draws: int, answers: int) -> list[int]:
    """Return the draws in parts that memory holds; answers: of one draw."""
    most = max(SIZE // answers, 1)
    return [min(most, draws - start) for start in range(0, draws, most)]


def coverage(rng: np.random.Generator, draws: int, arms: int, seeds: int, items: int, lasting: float) -> list[dict]:
    """Return a row for each spread of seeds and ρ; they share their items and thresholds."""
    cells = {(s, rho): [] for s in SPREADS for rho in RHOS if s or not rho}
    for n in chunks(draws, arms * seeds * items):
        latent = Latent(rng, n, arms, seeds, items, lasting)
        for cell, rows in cells.items():
            found = measured(latent.answers(*cell), latent.control)
            held = [(abs(found[k][0] - truth) <= half(found[k], LEVEL)).mean(1) for k, truth in TRUTH.items()]
            rows.append(np.stack([*held, half(found["pair"], LEVEL).mean(1), told_apart(p_values(found["pair"]))], 1))
    names = (*TRUTH, "half_width", "told_apart")
    about = {"arms": arms, "seeds": seeds, "items": items, "lasting": lasting}
    return [
        about | {"spread": s, "rho": rho} | dict(zip(names, np.concatenate(rows).mean(0).tolist(), strict=True))
        for (s, rho), rows in cells.items()
    ]


TRUTH = {"pair": 0.0, "control": 0.0, "arm": 0.5}


def looks(rng: np.random.Generator, draws: int, arms: int, items: int, lasting: float) -> list[dict]:
    """Return how often equal arms are told apart at any look, and without error spending; of two arms also how often
    they are called equivalent at any look where they differ by just the margin.
    """
    cells = {(s, rho): [] for s in SPREADS for rho in RHOS if s or not rho}
    for n in chunks(draws, arms * spending.LOOKS[-1] * items):
        latent = Latent(rng, n, arms, spending.LOOKS[-1], items, lasting)
        for cell, rows in cells.items():
            x, ever, naive, equal = latent.answers(*cell), False, False, False
            gained = latent.answers(*cell, gains=_gains(arms, cell[0], lasting)) if arms == 2 else None
            for seeds in spending.LOOKS:
                p = p_values(measured(x[:, :, :seeds])["pair"])
                ever, naive = ever | told_apart(spending.overall(seeds, p)), naive | told_apart(p)
                if gained is not None:
                    pair = measured(gained[:, :, :seeds])["pair"]
                    equal |= (abs(pair[0]) + half(pair, spending.level(seeds, 2 * LEVEL)) < MARGIN)[:, 0]
            rows.append(np.stack([ever, naive] if gained is None else [ever, naive, equal], 1))
    about = {"arms": arms, "items": items, "lasting": lasting}
    names = ("told_apart", "without_spending", "wrongly_equivalent")
    return [
        about | {"spread": s, "rho": rho} | dict(zip(names, np.concatenate(rows).mean(0).tolist(), strict=False))
        for (s, rho), rows in cells.items()
    ]


def _gains(arms: int, spread_of_seeds: float, lasting: float) -> np.ndarray:
    """Return gains with which the first arm is better than the others by just the margin."""
    sd = (DIFFICULTY**2 + lasting**2 + spread_of_seeds**2) ** 0.5

    z, weights = np.polynomial.hermite_e.hermegauss(101)

    def short(gain: float) -> float:
        return float(weights @ special.expit(gain + sd * z) / weights.sum()) - 0.5 - MARGIN

    return np.eye(arms)[0] * optimize.brentq(short, 0.0, 2.0)


def run(given: argparse.Namespace) -> tuple[dict, str]:
    """Simulate, and return all rows and the tables."""
    draws, rng = QUICK if given.quick else DRAWS, np.random.default_rng(18)
    rows = [r for cell in product(ARMS, SEEDS, ITEMS, LASTING) for r in coverage(rng, draws, *cell)]
    seen = QUICK if given.quick else LOOKED
    looked = [r for arms, items in product(ARMS, ITEMS) for r in looks(rng, seen, arms, items, 0.0)]
    return {"draws": [draws, seen], "coverage": rows, "looks": looked}, table(draws, seen, rows, looked)


def table(draws: int, seen: int, rows: list[dict], looked: list[dict]) -> str:
    """Return both tables in Markdown: the least and the most of what was simulated in each row."""

    def span(of: list[dict], name: str) -> str:
        values = [100 * r[name] for r in of if name in r]
        return f"{min(values):.1f} to {max(values):.1f}" if values else "–"

    lines = [
        f"Coverage of 95 % intervals in percent, the least and the most of {len(rows)} settings, {draws:,} draws each.",
        "",
        "| arms | seeds | items | pairs of arms | arm − control | an arm's own | equal arms told apart (Holm) |",
        "|--|--|--|--|--|--|--|",
    ]
    for arms, seeds, items in product(ARMS, SEEDS, ITEMS):
        if of := [r for r in rows if (r["arms"], r["seeds"], r["items"]) == (arms, seeds, items)]:
            told = " | ".join(span(of, k) for k in (*TRUTH, "told_apart"))
            lines.append(f"| {arms} | {seeds} | {items:,} | {told} |")
    lines += [
        "",
        f"Looked at with {', '.join(map(str, spending.LOOKS))} seeds, percent of {seen:,} draws:",
        "",
        "| arms | items | equal arms told apart | the same at 5 % a look | equivalent, though at the margin |",
        "|--|--|--|--|--|",
    ]
    for arms, items in product(ARMS, ITEMS):
        if of := [r for r in looked if (r["arms"], r["items"]) == (arms, items)]:
            told = " | ".join(span(of, k) for k in ("told_apart", "without_spending", "wrongly_equivalent"))
            lines.append(f"| {arms} | {items:,} | {told} |")
    return "\n".join(lines)
