"""Losses of ordering against loops over pairs."""

import math

import pytest
import torch

from addenda import AddendaError
from addenda.ranking.order.adapter import Scores
from addenda.ranking.order.losses import OrderLoss


def bce(logit, target):
    return math.log1p(math.exp(-abs(logit))) + max(logit, 0) - logit * target


def example():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([2.0, 0.0, 1.0, 1.0, 3.5])
    return Scores(torch.randn(5, generator=generator), torch.randn(5, 5, generator=generator)), values


def pairs_by_loop(logits, values, ties):
    found = []
    for i, y in enumerate(values.tolist()):
        for j, other in enumerate(values.tolist()):
            if ties == "paper":
                found.append(bce(logits[i][j], float(y > other)))
            elif i != j and (ties == "half" or y != other):
                found.append(bce(logits[i][j], 0.5 if y == other else float(y > other)))
    return sum(found) / len(found)


@pytest.mark.parametrize("ties", ["skip", "half", "paper"])
def test_terms_are_what_loops_give(ties):
    scores, values = example()
    only = {"regression": 0.0, "pairs": 0.0}
    logits = scores.pairs.tolist()
    found = OrderLoss(**only | {"pairs": 1.0}, ties=ties).of_values(scores, values)
    assert found.item() == pytest.approx(pairs_by_loop(logits, values, ties), rel=1e-6)
    gaps = (scores.values[:, None] - scores.values).tolist()
    found = OrderLoss(**only, ranknet=1.0, ties=ties).of_values(scores, values)
    assert found.item() == pytest.approx(pairs_by_loop(gaps, values, ties), rel=1e-6)
    errors = [abs(a - b) for a, b in zip(scores.values.tolist(), values.tolist(), strict=True)]
    smooth = sum(e * e / 2 if e < 1 else e - 0.5 for e in errors) / 5
    assert OrderLoss(pairs=0, regression=1).of_values(scores, values).item() == pytest.approx(math.log1p(smooth))
    zero = sum(bce(s, float(y != 0)) for s, y in zip(scores.values.tolist(), values.tolist(), strict=True)) / 5
    assert OrderLoss(**only, zero=1).of_values(scores, values).item() == pytest.approx(zero, rel=1e-6)


def test_terms_add_up_with_their_weights():
    scores, values = example()
    whole = OrderLoss(regression=0.2, pairs=1, zero=0.5).of_values(scores, values)
    one = OrderLoss(regression=1, pairs=0).of_values(scores, values)
    two = OrderLoss(regression=0, pairs=1).of_values(scores, values)
    three = OrderLoss(regression=0, pairs=0, zero=1).of_values(scores, values)
    torch.testing.assert_close(whole, 0.2 * one + two + 0.5 * three)


def test_comparisons_are_asked_in_both_orders():
    scores, _ = example()
    logits = scores.pairs.tolist()
    found = OrderLoss(regression=0, pairs=1).of_comparisons(scores, torch.tensor([4, 0]), torch.tensor([1, 2]))
    asked = [(4, 1, 1), (1, 4, 0), (0, 2, 1), (2, 0, 0)]
    assert found.item() == pytest.approx(sum(bce(logits[i][j], t) for i, j, t in asked) / 4, rel=1e-6)
    with pytest.raises(AddendaError, match="looks at pairs"):
        OrderLoss(pairs=0).of_comparisons(scores, torch.tensor([0]), torch.tensor([1]))


def test_pairs_at_zero_cost_ln_two_and_ties_alone_cost_nothing():
    scores = Scores(torch.zeros(4), torch.zeros(4, 4))
    assert OrderLoss(regression=0).of_values(scores, torch.arange(4.0)).item() == pytest.approx(math.log(2))
    assert OrderLoss(regression=0).of_values(scores, torch.ones(4)).item() == 0


def test_half_ties_are_the_same_for_the_turned_scores():
    scores, values = example()
    loss = OrderLoss(regression=0, ties="half")
    turned = Scores(scores.values, -scores.pairs.t())
    torch.testing.assert_close(loss.of_values(scores, values), loss.of_values(turned, values))


@pytest.mark.parametrize(
    "options", [{"regression": -1}, {"pairs": 0, "regression": 0}, {"ties": "no"}, {"zero": math.inf}]
)
def test_impossible_weights_are_refused(options):
    with pytest.raises(AddendaError):
        OrderLoss(**options)


def test_a_loss_of_pairs_wants_pairs():
    with pytest.raises(AddendaError, match="pairs=True"):
        OrderLoss().of_values(Scores(torch.zeros(3), None), torch.arange(3.0))


def test_comparisons_that_contradict_each_other_ask_for_a_half_and_repeated_ones_count_again():
    scores, _ = example()
    logits = scores.pairs.tolist()
    better, worse = torch.tensor([4, 1, 0, 0]), torch.tensor([1, 4, 2, 2])
    found = OrderLoss(regression=0).of_comparisons(scores, better, worse)
    asked = [(4, 1, 0.5), (1, 4, 0.5), (0, 2, 1), (2, 0, 0)]
    assert found.item() == pytest.approx(sum(bce(logits[i][j], t) for i, j, t in asked) / 4, rel=1e-6)
    alone = OrderLoss(regression=0, pairs=0, ranknet=1).of_comparisons(scores, better[:2], worse[:2])
    gap = float(scores.values[4] - scores.values[1])
    assert alone.item() == pytest.approx(bce(gap, 0.5), rel=1e-6)
