"""Training of the adapter that orders images: it learns, groups stay whole, a killed run ends with the same bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from addenda import AddendaError
from addenda.data.examples import Picture
from addenda.ranking.order import train
from addenda.ranking.order.losses import OrderLoss
from addenda.ranking.order.ratings import Ratings
from addenda.ranking.order.settings import OrderSettings
from addenda.ranking.order.train import groups, scales_of, train_order

SMALL = OrderSettings(width=16, heads=2, layers=1, after=1, prompts=2, tokens=2, ratio=2, dropout=0.1)


class Towers:
    """Stand-ins whose patches are given: a sentence is one direction, and its order is by that direction's mean."""

    image_width = text_width = 8
    identity = {"image": "i", "text": "t"}  # noqa: RUF012

    def tokens(self, sentence):
        at = {"first": 0, "second": 1}[sentence]
        return torch.eye(8)[at : at + 1] * 3, torch.ones(1, dtype=torch.bool)


def example(n=40, seed=0):
    patches = list(torch.randn(n, 4, 8, generator=torch.Generator().manual_seed(seed)))
    pictures = tuple(Picture(f"{i:04d}", 0, f"{i}.png", b"") for i in range(n))
    values = {
        q: {i: 5 + 2 * float(p[:, k].mean()) for i, p in enumerate(patches)} for k, q in enumerate(("first", "second"))
    }
    return Ratings(pictures, values), patches


def ranks(made, patches, ratings, query):
    with torch.no_grad():
        scores = made.adapter(torch.stack(patches), *Towers().tokens(query)).values
    return stats.spearmanr(scores, list(ratings.values[query].values())).statistic


@pytest.mark.parametrize(
    "loss", [OrderLoss(), OrderLoss(pairs=0, regression=1), OrderLoss(pairs=0, regression=0, ranknet=1)]
)
def test_it_learns_what_each_query_orders_by(loss):
    (ratings, patches), (others, unseen) = example(), example(seed=1)
    made = train_order(Towers(), ratings, patches, settings=SMALL, loss=loss, steps=160, rate=3e-3, batch=20)
    assert np.mean([x for _, x in made.losses[-20:]]) < 0.7 * np.mean([x for _, x in made.losses[:20]])
    for query in ("first", "second"):
        assert ranks(made, unseen, others, query) > 0.5
    assert ranks(made, unseen, Ratings(others.pictures, {"first": others.values["second"]}), "first") < 0.5


def test_comparisons_alone_are_enough():
    ratings, patches = example()
    of = ratings.values["first"]
    pairs = [(i, j) if of[i] > of[j] else (j, i) for i in range(0, 39) for j in (i + 1, (i + 7) % 40)]
    compared = Ratings(ratings.pictures, {}, {"first": tuple(pairs)})
    made = train_order(Towers(), compared, patches, settings=SMALL, loss=OrderLoss(ranknet=1), steps=120, rate=3e-3)
    assert ranks(made, patches, ratings, "first") > 0.6
    with pytest.raises(AddendaError, match="looks at values only"):
        train_order(Towers(), compared, patches, settings=SMALL, loss=OrderLoss(pairs=0))


def test_scales_are_each_query_s_own():
    ratings, _ = example()
    counts = {"first": {0: 0.0, 1: 10.0}, "second": {0: 1990.0, 1: 1990.5}}
    found = scales_of(Ratings(ratings.pictures, counts))
    assert (found["first"].centre, found["first"].spread) == (5.0, 5.0)
    assert (found["second"].centre, found["second"].spread) == (1990.25, 0.25)


def test_groups_are_of_one_query_whole_and_the_same_for_a_step():
    ratings, _ = example()
    drawn = [groups(ratings, 8, 2, 0, step) for step in range(20)]
    assert drawn == [groups(ratings, 8, 2, 0, step) for step in range(20)]
    assert drawn != [groups(ratings, 8, 2, 1, step) for step in range(20)]
    for step in drawn:
        assert sorted(q for q, _ in step) == ["first", "second"]
        assert all(len(set(at)) == 8 for _, at in step)
    compared = Ratings(ratings.pictures, {}, {"first": ((0, 1), (2, 3), (1, 4))})
    ((_, images),) = groups(compared, 3, 1, 0, 0)
    assert len(images) in (2, 3)
    assert any({a, b} <= set(images) for a, b in compared.comparisons["first"])


def test_a_group_is_accumulated_whole():
    """Two groups of a step are two forwards: the gradient is the mean of theirs, pairs of each only."""
    ratings, patches = example(12)
    quiet = OrderSettings(width=16, heads=2, layers=1, after=1, prompts=2, tokens=2, ratio=2, dropout=0.0)
    one = train_order(Towers(), ratings, patches, settings=quiet, steps=1, batch=12, accumulate=2, rate=1e-3)
    total = 0.0
    from addenda.ranking.order.adapter import OrderAdapter

    adapter = OrderAdapter(quiet, 8, 8)
    for query, scale in scales_of(ratings).items():
        scores = adapter(torch.stack(patches), *Towers().tokens(query), pairs=True)
        values = torch.tensor(list(ratings.values[query].values()))
        total += float(OrderLoss().of_values(scores, (values - scale.centre) / scale.spread).detach()) / 2
    assert one.losses[0][1] == pytest.approx(total, rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EVERY", 3)
    ratings, patches = example()
    options = {"settings": SMALL, "steps": 10, "batch": 10, "rate": 1e-3}
    whole = train_order(Towers(), ratings, patches, out=tmp_path / "whole", **options)

    def killed(step, steps, loss):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_order(Towers(), ratings, patches, out=tmp_path / "again", progress=killed, **options)
    torch.manual_seed(99)
    resumed = train_order(Towers(), ratings, patches, out=tmp_path / "again", **options)
    assert resumed.resumed_from == 6
    assert resumed.losses == whole.losses
    assert (tmp_path / "again/order.safetensors").read_bytes() == (tmp_path / "whole/order.safetensors").read_bytes()
    with pytest.raises(AddendaError, match="rate"):
        train_order(Towers(), ratings, patches, out=tmp_path / "again", **options | {"rate": 2e-3})
    turned = {q: dict(reversed(values.items())) for q, values in ratings.values.items()}  # its groups are other ones
    with pytest.raises(AddendaError, match="data"):
        train_order(Towers(), replace(ratings, values=turned), patches, out=tmp_path / "again", **options)


def test_a_run_leaves_the_caller_s_random_numbers_alone():
    ratings, patches = example(8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train_order(Towers(), ratings, patches, settings=SMALL, steps=2)
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_learned_is_refused_before_a_step():
    ratings, patches = example(6)
    with pytest.raises(AddendaError, match="5 images, and 6"):
        train_order(Towers(), ratings, patches[:5], settings=SMALL)
    alike = Ratings(ratings.pictures, {"first": dict.fromkeys(range(6), 1.0)})
    with pytest.raises(AddendaError, match="no order to learn"):
        train_order(Towers(), alike, patches, settings=SMALL)
    with pytest.raises(AddendaError, match="steps"):
        train_order(Towers(), ratings, patches, steps=0)


def test_a_group_holds_images_that_are_rated_for_its_query_and_no_others():
    """Nothing is said of the other images, so that they are not taken for zeros; a zero that is said is a value."""
    ratings, _ = example(12)
    ratings = Ratings(ratings.pictures, {"first": {i: float(i) for i in range(5)}, "second": {7: 0.0, 8: 1.0, 9: 0.0}})
    drawn = [group for step in range(20) for group in groups(ratings, 8, 2, 0, step)]
    assert {q: set(at) for q, at in drawn} == {"first": {0, 1, 2, 3, 4}, "second": {7, 8, 9}}


def test_a_group_of_ties_teaches_nothing_and_stops_nothing():
    ratings, patches = example(8)
    tied = Ratings(ratings.pictures, {"first": dict.fromkeys(range(7), 1.0) | {7: 2.0}})
    made = train_order(Towers(), tied, patches, settings=SMALL, loss=OrderLoss(regression=0), steps=8, batch=2)
    losses = [x for _, x in made.losses]
    assert min(losses) == 0.0 < max(losses)


def test_values_of_ten_digits_are_told_apart():
    """Moments in seconds: float32 knows them to two minutes, so that they are scaled before."""
    ratings, patches = example(8)
    moments = {i: 1.7e9 + i for i in range(8)}
    seen = []

    class Looking(OrderLoss):
        def of_values(self, scores, values, zero=None):
            seen.append(values)
            return super().of_values(scores, values, zero)

    rated = Ratings(ratings.pictures, {"first": moments})
    train_order(Towers(), rated, patches, settings=SMALL, steps=1, loss=Looking())
    assert len(set(seen[0].tolist())) == 8
    assert float(seen[0].mean()) == pytest.approx(0, abs=1e-6)


def test_groups_of_one_image_are_refused_where_pairs_are_learned():
    ratings, patches = example(6)
    with pytest.raises(AddendaError, match="batch=1 makes groups of one image"):
        train_order(Towers(), ratings, patches, settings=SMALL, batch=1)
    alone = train_order(Towers(), ratings, patches, settings=SMALL, batch=1, steps=2, loss=OrderLoss(pairs=0))
    assert len(alone.losses) == 2
