"""Which layer gets which rank: what a rank costs, from where on it saves nothing, and how a budget is shared out.

A layer W (m × n) costs m n parameters and as many multiplications for every row it sees. At rank r it costs

    factors   r (m + n)            saves below r = m n / (m + n)
    pivot     r (m + n) − r²       saves below r = min(m, n)

*Parameters kept* is that cost over m n; it is not r / min(m, n). A square layer at half its rank keeps all parameters.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from addenda.core.base.errors import AddendaError

Storage = Literal["factors", "pivot"]
Ranks = dict[str, int | None]  # by path; None: left dense
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # parameters kept that a search tries


def cost(m: int, n: int, rank: int, storage: Storage = "factors") -> int:
    """Return stored numbers of an m × n layer at a rank, its bias left out."""
    return rank * (m + n) - (rank * rank if storage == "pivot" else 0)


def break_even(m: int, n: int, storage: Storage = "factors") -> int:
    """Return the highest rank that still saves parameters; 0 where none does."""
    return min(m, n) - 1 if storage == "pivot" else (m * n - 1) // (m + n)


def rank_for(m: int, n: int, kept: float, storage: Storage = "factors") -> int:
    """Return the highest rank whose cost is at most `kept` of m n (for factors, floor(kept · m n / (m + n)))."""
    if storage == "factors":
        return math.floor(kept * m * n / (m + n) + 1e-9)
    half = (m + n) / 2
    return math.floor(half - math.sqrt(max(half * half - kept * m * n, 0.0)) + 1e-9)


@dataclass(frozen=True)
class Layer:
    """A candidate. errors[r]: relative error of its output at rank r = 0 … k. uses: rows it sees for each token."""

    path: str
    m: int
    n: int
    errors: Sequence[float] = ()
    uses: float = 1.0
    weight: float = 1.0  # how much its relative error counts
    storage: Storage = field(default="factors")

    @property
    def dense(self) -> float:
        return self.uses * self.m * self.n

    @property
    def break_even(self) -> int:
        """The highest rank that costs less than dense."""
        return break_even(self.m, self.n, self.storage)

    @property
    def limit(self) -> int:
        """The highest rank worth having."""
        return min(self.break_even, len(self.errors) - 1) if len(self.errors) else self.break_even

    def highest(self, keep: float) -> int:
        """Return the highest rank at which it keeps at most this share of its cost."""
        return rank_for(self.m, self.n, keep, self.storage)

    def cost(self, rank: int | None) -> float:
        return self.dense if rank is None else self.uses * cost(self.m, self.n, rank, self.storage)

    def error(self, rank: int | None) -> float:
        """Return the layer's weighed error at a rank."""
        return 0.0 if rank is None else float(self.errors[rank]) * self.weight

    def fitting(self, rank: int, multiple: int = 1) -> int | None:
        """Return a rank as it is used: a multiple, at least 1; None where it would save nothing."""
        rank = rank // multiple * multiple if rank >= multiple else max(rank, 1)
        return rank if 1 <= rank <= self.break_even else None


def kept(layers: Iterable[Layer], ranks: Ranks) -> float:
    """Return the share of the layers' cost that stays."""
    layers = list(layers)
    return sum(layer.cost(ranks[layer.path]) for layer in layers) / sum(layer.dense for layer in layers)


def uniform(layers: Sequence[Layer], keep: float, multiple: int = 1) -> Ranks:
    """Return ranks at which every layer keeps the same share of its parameters."""
    _check(layers, keep)
    return {x.path: x.fitting(min(x.highest(keep), max(x.limit, 1)), multiple) for x in layers}


def energy(layers: Sequence[Layer], share: float, multiple: int = 1) -> Ranks:
    """Return each layer's lowest rank that keeps `share` of its outputs' energy (error ≤ 1 − share); no budget."""
    if not 0 < share <= 1:
        raise AddendaError(f"The share of the energy to keep must be in (0, 1], got {share}.")
    ranks: Ranks = {}
    for x in layers:
        choices = np.flatnonzero(np.asarray(x.errors[: x.limit + 1]) <= 1 - share + 1e-12)
        r = int(choices[0]) if len(choices) else None
        ranks[x.path] = None if r is None else x.fitting(-(-max(r, 1) // multiple) * multiple, multiple)
    return ranks


def waterfill(layers: Sequence[Layer], keep: float, multiple: int = 1, floor: float = 0.5) -> Ranks:
    """Return ranks that minimise Σ weight · error under the budget; no layer below `floor` of its uniform rank.

    A layer's error falls with its cost along ranks, and jumps to 0 where it is dense. The lower convex hull of these
    points is walked in order of gain for cost over all layers: on it, a layer goes from some rank below break-even to
    dense in one step. A step that the budget has no room for gives way to the hull of what it has room for; what the
    last ones leave is filled with single steps of rank. If that is no better than the same without any step to dense,
    or than `uniform`, as it can be where a few layers are most of the model, the best of the three is taken.
    """
    _check(layers, keep)
    if not 0 <= floor <= 1:
        raise AddendaError(f"The floor is a share of the uniform rank, in [0, 1]; got {floor}.")
    budget = keep * sum(x.dense for x in layers)
    start: Ranks = {
        x.path: x.fitting(min(max(int(floor * x.highest(keep)), 1), max(x.limit, 1)), multiple) for x in layers
    }
    room = budget - sum(x.cost(start[x.path]) for x in layers)
    if room < 0:
        raise AddendaError(
            f"Keeping {keep:.0%} of the cost leaves no room: layers that no rank makes smaller, and the floor of "
            f"the others, take {1 + -room / budget:.0%} of it. Keep more, lower the floor, or use multiples of fewer."
        )
    candidates = [_walked(layers, start, room, multiple, jumps) for jumps in (True, False)]
    uniform_ranks = uniform(layers, keep, multiple)
    if sum(x.cost(uniform_ranks[x.path]) for x in layers) <= budget:
        candidates.append(uniform_ranks)
    return min(candidates, key=lambda ranks: sum(x.error(ranks[x.path]) for x in layers))


def _walked(layers: Sequence[Layer], start: Ranks, left: float, multiple: int, jumps: bool) -> Ranks:
    """Return higher ranks, the best gain for cost first while they fit. jumps: layers may become dense."""
    ranks, order = dict(start), itertools.count()
    steps: list[tuple[float, int, float, Layer, int | None, int | None]] = []  # −gain for cost, _, cost, x, from, to

    def add(x: Layer, rank: int) -> None:
        for gain, price, old_rank, new_rank in _hull(x, rank, multiple, jumps, left):
            heapq.heappush(steps, (-gain, next(order), price, x, old_rank, new_rank))

    for x in layers:
        if (rank := ranks[x.path]) is not None:
            add(x, rank)
    while steps:
        _, _, price, x, old_rank, new_rank = heapq.heappop(steps)
        if ranks[x.path] != old_rank:
            continue
        if price <= left:
            ranks[x.path], left = new_rank, left - price
        elif old_rank is not None:
            add(x, old_rank)
    return _fill(layers, ranks, left, multiple)


def _hull(
    x: Layer, start: int, multiple: int, jumps: bool, room: float
) -> list[tuple[float, float, int | None, int | None]]:
    """Return steps on the lower convex hull of (cost, error) from `start`: (gain for cost, cost, from, to), falling.

    jumps: to dense too. room: what they may cost together.
    """
    ranks: list[int | None] = [start, *range(start // multiple * multiple + multiple, x.limit + 1, multiple)]
    points = [(x.cost(r), x.error(r), r) for r in (*ranks, *([None] if jumps else []))]
    points = [p for p in points if p[0] <= points[0][0] + room]
    hull: list[tuple[float, float, int | None]] = []
    for p in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], p):
            hull.pop()
        hull.append(p)
    return [(-_slope(a, b), b[0] - a[0], a[2], b[2]) for a, b in itertools.pairwise(hull) if b[1] < a[1]]


def _slope(a: tuple, b: tuple) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _fill(layers: Sequence[Layer], ranks: Ranks, left: float, multiple: int) -> Ranks:
    """Return the ranks raised by single steps, the best gain for cost first, while they fit."""
    while True:
        best = None
        for x in layers:
            r = ranks[x.path]
            if r is None or (next_rank := r // multiple * multiple + multiple) > x.limit:
                continue
            if (price := x.cost(next_rank) - x.cost(r)) > left:
                continue
            gain = (x.error(r) - x.error(next_rank)) / price
            if gain > 0 and (best is None or gain > best[0]):
                best = gain, price, x.path, next_rank
        if best is None:
            return ranks
        ranks[best[2]], left = best[3], left - best[1]


# -- by trying ---------------------------------------------------------------------------------------------------------

Judge = Callable[[Ranks], float]  # the model's loss with these layers low rank and the others dense


@dataclass(frozen=True)
class Trial:
    """One group of layers alone at one share of parameters, all else dense."""

    paths: tuple[str, ...]
    share: float
    ranks: Ranks
    loss: float


def trials(
    layers: Sequence[Layer],
    judge: Judge,
    *,
    shares: Sequence[float] = SHARES,
    groups: Iterable[Sequence[str]] | None = None,
    multiple: int = 1,
) -> list[Trial]:
    """Return the loss with each group of layers (by default each layer) at each share of its parameters."""
    by_path = {x.path: x for x in layers}
    results = []
    for paths in groups or [[x.path] for x in layers]:
        for share in shares:
            ranks = uniform([by_path[p] for p in paths], share, multiple)
            results.append(Trial(tuple(paths), share, ranks, judge(ranks)))
    return results


def sensitivity(layers: Sequence[Layer], table: Sequence[Trial], dense_loss: float, rise: float = 0.01) -> Ranks:
    """Return the deepest cut of each group whose perplexity alone is at most (1 + rise) times the dense model's."""
    if not rise >= 0:
        raise AddendaError(f"The rise of the perplexity that a cut alone may bring is 0 or more; got {rise}.")
    ranks: Ranks = {x.path: None for x in layers}
    deepest: dict[tuple[str, ...], float] = {}
    for t in sorted(table, key=lambda t: -t.share):
        if t.loss <= dense_loss + math.log1p(rise) and t.share < deepest.get(t.paths, 1.0):
            deepest[t.paths] = t.share
            ranks |= t.ranks
    return ranks


def asvd_search(layers: Sequence[Layer], table: Sequence[Trial], keep: float) -> Ranks:
    """Return ranks by ASVD's search (arXiv:2312.05821): cut first where a cut alone does least harm, to the budget.

    The trials are sorted by loss, falling; behind a cut in that list every group takes its smallest share. The cut is
    found by bisection, as the highest one that keeps at most `keep`; groups before it stay dense.
    """
    _check(layers, keep)
    order = sorted(table, key=lambda t: -t.loss)

    def behind(cut: int) -> Ranks:
        ranks: Ranks = {x.path: None for x in layers}
        for t in sorted(order[cut:], key=lambda t: -t.share):
            ranks |= t.ranks
        return ranks

    low, high = 0, len(order)  # behind(low) is small enough, behind(high) is not
    if kept(layers, behind(0)) > keep:
        raise AddendaError(
            f"Even the smallest shares that were tried keep {kept(layers, behind(0)):.0%} of the parameters, and "
            f"{keep:.0%} were wanted. Try smaller shares, or keep more."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(layers, behind(middle)) <= keep else (low, middle)
    return behind(low)


def _check(layers: Sequence[Layer], keep: float) -> None:
    if not layers:
        raise AddendaError("There is no layer to give a rank to.")
    if not 0 < keep < 1:
        raise AddendaError(f"The share of the parameters to keep must be between 0 and 1, got {keep}.")
