"""An evaluation compares scores with what was said of the same images, by query."""

import pytest
from scipy import stats

from addenda import AddendaError
from addenda.data.examples import Picture
from addenda.ranking.order.evaluate import evaluate_order
from addenda.ranking.order.ratings import Ratings

PICTURES = tuple(Picture(f"{i}", 0, f"{i}.png", b"") for i in range(8))


class Order:
    """A stand-in: the score of an image is its number, turned for one of the queries."""

    skipped: dict = {}  # noqa: RUF012

    def scores(self, pictures, sentence):
        return {n: float(p.key) * (-1 if sentence == "turned" else 1) for n, p in enumerate(pictures)}


def test_each_query_is_compared_on_its_own_images():
    values = {"as it is": {0: 1.0, 3: 2.0, 5: 1.5, 7: 4.0}, "turned": {1: 1.0, 2: 0.0, 6: -3.0}}
    found = evaluate_order(Order(), Ratings(PICTURES, values, {"turned": ((0, 1), (4, 2))}), draws=50)
    assert found.by_query["as it is"]["spearman"] == pytest.approx(stats.spearmanr([0, 3, 5, 7], [1, 2, 1.5, 4])[0])
    assert found.by_query["turned"]["spearman"] == pytest.approx(1)
    assert found.mean["spearman"] == pytest.approx((found.by_query["as it is"]["spearman"] + 1) / 2)
    assert found.counts == {"as it is": 4, "turned": 3}
    assert found.compared == {"turned": 0.5}
    assert found.interval[0] <= found.mean["spearman"] <= found.interval[1]


class Better(Order):
    def scores(self, pictures, sentence):
        return {n: float(p.key) for n, p in enumerate(pictures)}


def test_two_orders_are_told_apart_on_the_same_images():
    values = {"turned": {i: float(i) for i in range(8)}, "as it is": {i: float(i) for i in range(8)}}
    ratings = Ratings(PICTURES, values)
    found = evaluate_order(Better(), ratings, against=Order(), draws=50)
    assert found.difference == pytest.approx((1.0, 1.0, 1.0))  # 2 of one query, 0 of the other
    assert found.against().startswith("better than the other adapter: mean Spearman +1.000")
    assert evaluate_order(Order(), ratings, against=Better(), draws=50).against().startswith("worse than")
    same = evaluate_order(Order(), ratings, against=Order(), draws=50)
    assert same.difference == (0.0, 0.0, 0.0) and same.against().startswith("not told apart")
    few = evaluate_order(Order(), Ratings(PICTURES, {"q": {0: 1.0, 1: 2.0}}), against=Better(), draws=5)
    assert few.against().startswith("no correlation to compare")


def test_nothing_to_compare_with_and_corrupt_images_are_said():
    with pytest.raises(AddendaError, match="rates no image"):
        evaluate_order(Order(), Ratings(PICTURES))
    order = Order()
    order.skipped = {"3.png": "cut"}
    with pytest.raises(AddendaError, match=r"3\.png cannot be decoded: cut"):
        evaluate_order(order, Ratings(PICTURES, {"q": {0: 1.0, 3: 2.0}}))
