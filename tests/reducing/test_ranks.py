"""Allocations against exhaustive search, and the arithmetic of break-even."""

import itertools
import math

import numpy as np
import pytest

from addenda.core.base.errors import AddendaError
from addenda.reducing import ranks
from addenda.reducing.ranks import Layer, Trial


def falling(k: int, rate: float) -> np.ndarray:
    """A convex error curve from 1 to 0."""
    energy = np.exp(-rate * np.arange(k))
    return np.concatenate([[1.0], 1 - np.cumsum(energy) / energy.sum()]).clip(0)


def test_break_even_is_the_last_rank_that_saves():
    for m, n in itertools.product((1, 2, 3, 7, 16, 24), repeat=2):
        for storage in ("factors", "pivot"):
            r = ranks.break_even(m, n, storage)
            assert r == 0 or ranks.cost(m, n, r, storage) < m * n
            assert ranks.cost(m, n, r + 1, storage) >= m * n
    assert ranks.break_even(576, 576) == 287  # a square layer: below half its rank
    assert ranks.rank_for(576, 1536, 0.8) == math.floor(0.8 * 576 * 1536 / (576 + 1536))


def test_a_share_of_the_parameters_is_not_a_share_of_the_rank():
    layer = Layer("x", 16, 16, falling(16, 0.1))
    given = ranks.uniform([layer], 0.5)
    assert given == {"x": 4}  # a quarter of the rank
    assert ranks.kept([layer], given) == 0.5
    pivot = Layer("x", 16, 16, falling(16, 0.1), storage="pivot")
    r = ranks.uniform([pivot], 0.5)["x"]
    assert ranks.cost(16, 16, r, "pivot") <= 128 < ranks.cost(16, 16, r + 1, "pivot")


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.9])
def test_waterfill_is_the_best_there_is(keep):
    layers = [
        Layer("a", 8, 8, falling(8, 0.9)), Layer("b", 8, 12, falling(8, 0.3)), Layer("c", 6, 10, falling(6, 0.02)),
    ]  # fmt: skip
    budget = keep * sum(x.dense for x in layers)
    found = ranks.waterfill(layers, keep, floor=0.0)

    def loss(given):
        return sum(0.0 if given[x.path] is None else x.errors[given[x.path]] for x in layers)

    choices = [[*range(1, x.limit + 1), None] for x in layers]
    best = min(
        loss(dict(zip("abc", chosen, strict=True)))
        for chosen in itertools.product(*choices)
        if sum(x.cost(r) for x, r in zip(layers, chosen, strict=True)) <= budget
    )
    assert sum(x.cost(found[x.path]) for x in layers) <= budget
    assert loss(found) <= best + 0.08  # one step of a layer may not fit; the hull's bound holds but for that
    assert loss(found) <= loss(ranks.uniform(layers, keep)) + 1e-12


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_waterfill_on_many_layers_is_close_to_the_bound_of_the_dual_problem(keep):
    layers = [Layer(str(i), 24, 40, falling(24, 0.02 + 0.03 * i)) for i in range(12)]
    found = ranks.waterfill(layers, keep, floor=0.0)
    budget = keep * sum(x.dense for x in layers)
    assert 0.98 * keep < ranks.kept(layers, found) <= keep
    bound = max(  # no allocation within the budget has a lower loss, whatever the price of a parameter
        sum(min(e + price * c for e, c in points(x)) for x in layers) - price * budget
        for price in np.logspace(-6, -1, 400)
    )
    loss = sum(0.0 if found[x.path] is None else x.errors[found[x.path]] for x in layers)
    even = ranks.uniform(layers, keep)
    assert bound <= loss < bound + 0.1 * (sum(x.errors[even[x.path]] for x in layers) - bound)


def points(x: Layer) -> list[tuple[float, float]]:
    return [(0.0, x.dense)] + [(float(x.errors[r]), x.cost(r)) for r in range(1, x.limit + 1)]


def test_a_layer_whose_step_to_dense_does_not_fit_goes_on_by_ranks():
    small = [1, *(1e-4 * 0.8**i for i in range(32))]
    layers = [Layer("steep", 64, 64, small), Layer("flat", 64, 64, [1 - i / 64 for i in range(33)])]
    given = ranks.waterfill(layers, 0.6)
    best = min(
        sum(x.error(r) for x, r in zip(layers, pair, strict=True))
        for pair in itertools.product([*range(9, 32), None], repeat=2)  # from the floor up
        if sum(x.cost(r) for x, r in zip(layers, pair, strict=True)) <= 0.6 * 2 * 64 * 64
    )
    assert sum(x.error(given[x.path]) for x in layers) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(40))
def test_waterfill_is_never_worse_than_uniform(seed):
    rng = np.random.default_rng(seed)
    layers = []
    for i in range(int(rng.integers(1, 6))):
        m, n = (int(k) for k in 2 ** rng.integers(4, 9, 2))
        layers.append(Layer(str(i), m, n, falling(min(m, n), rng.uniform(0, 0.3)), weight=rng.uniform(0.2, 3)))
    for keep in (0.3, 0.6, 0.8, 0.95):
        total = [
            sum(x.error(r[x.path]) for x in layers)
            for r in (ranks.waterfill(layers, keep), ranks.uniform(layers, keep))
        ]
        assert total[0] <= total[1] + 1e-12
        assert ranks.kept(layers, ranks.waterfill(layers, keep)) <= keep + 1e-12


def test_a_flat_spectrum_stays_dense_and_a_steep_one_pays_for_it():
    flat, steep = Layer("flat", 16, 16, falling(16, 0.0)), Layer("steep", 16, 16, falling(16, 1.5))
    found = ranks.waterfill([flat, steep], 0.7, floor=0.0)
    assert found["flat"] is None
    assert found["steep"] == (0.7 * 512 - 256) // 32  # what the dense one leaves


def test_floor_multiple_and_weights():
    dull, keen = Layer("dull", 32, 32, falling(32, 2.0)), Layer("keen", 32, 32, falling(32, 0.05))
    found = ranks.waterfill([dull, keen], 0.5, floor=0.5)
    assert found["dull"] >= 4
    assert ranks.waterfill([dull, keen], 0.5, floor=0.0)["dull"] <= found["dull"] + 8
    found = ranks.waterfill([dull, keen], 0.5, multiple=4)
    assert all(r is None or r % 4 == 0 for r in found.values())
    heavy = Layer("heavy", 32, 32, falling(32, 0.05), weight=100.0)
    found = ranks.waterfill([Layer("light", 32, 32, falling(32, 0.05)), heavy], 0.5, floor=0.2)
    assert found["heavy"] is None or found["heavy"] > found["light"]


def test_energy_takes_the_lowest_rank_that_has_it():
    layer = Layer("x", 20, 30, falling(20, 0.5))
    r = ranks.energy([layer], 0.9)["x"]
    assert layer.errors[r] <= 0.1 < layer.errors[r - 1]
    assert ranks.energy([Layer("flat", 16, 16, falling(16, 0.0))], 0.99) == {"flat": None}


def test_flops_count_how_often_a_layer_is_called():
    often, rare = Layer("often", 16, 16, falling(16, 0.3), uses=4.0), Layer("rare", 16, 16, falling(16, 0.3), uses=0.25)
    found = ranks.waterfill([often, rare], 0.5, floor=0.0)
    assert found["rare"] is None or found["rare"] > (found["often"] or 0)
    assert ranks.kept([often, rare], found) <= 0.5


def losses(given):
    """A made-up model: each layer's cut costs its square, the first ten times as much."""
    return 1.0 + sum((10 if p == "0" else 1) * (0 if r is None else (1 - r / 16) ** 2) / 100 for p, r in given.items())


def test_searches_by_trying():
    layers = [Layer(str(i), 16, 16, falling(16, 0.3)) for i in range(4)]
    table = ranks.trials(layers, losses)
    assert len(table) == 4 * len(ranks.SHARES)
    assert table[0].loss == losses(table[0].ranks)
    with pytest.raises(AddendaError, match="0 or more; got -2"):
        ranks.sensitivity(layers, table, 1.0, rise=-2)
    found = ranks.sensitivity(layers, table, 1.0, rise=0.02)
    assert found["0"] is None  # any cut of it costs more
    assert found["1"] == min(t.ranks["1"] for t in table if t.paths == ("1",) and t.loss <= 1 + math.log(1.02))
    found = ranks.asvd_search(layers, table, 0.8)
    assert ranks.kept(layers, found) <= 0.8
    assert (found["0"] or 16) > max(found[p] or 16 for p in "123")
    with pytest.raises(AddendaError, match="smallest shares"):
        ranks.asvd_search(layers, table, 0.1)
    together = ranks.trials(layers, losses, shares=[0.5], groups=[["0", "1"], ["2", "3"]])
    assert [t.paths for t in together] == [("0", "1"), ("2", "3")]
    assert isinstance(together[0], Trial)


def test_budgets_that_cannot_be_met_say_so():
    tiny = Layer("tiny", 1, 8, falling(1, 1.0))  # no rank of a vector saves
    big = Layer("big", 8, 8, falling(8, 0.5))
    with pytest.raises(AddendaError, match="no room"):
        ranks.waterfill([tiny, big], 0.1, floor=1.0)
    with pytest.raises(AddendaError, match="between 0 and 1"):
        ranks.uniform([big], 1.5)
    with pytest.raises(AddendaError, match="no layer"):
        ranks.waterfill([], 0.5)
