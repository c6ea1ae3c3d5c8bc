"""What may be said of rerankers: against the paired t and the randomisation test, and against a known truth."""

import math

import numpy as np
import pytest
from scipy import stats

from addenda.core.base.errors import AddendaError
from addenda.ranking.judge import judge
from addenda.statistics.randomisation import randomised

RNG = np.random.default_rng(0)
QUALITY = np.clip(RNG.normal(0.5, 0.15, 200), 0.2, 0.8)
STATE = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers_for_each_test():
    RNG.bit_generator.state = STATE


def arm(gain=0.0, seeds=(1, 2, 3), noise=0.03, between=0.004, queries=QUALITY, rng=RNG):
    shift = {s: 0.0 if s is None else rng.normal(0, between) for s in seeds}
    draws = rng.normal(0, noise, (len(seeds), len(queries)))
    draws -= draws.mean(1, keepdims=True)  # the mean is the gain, and what seeds do
    rows = {s: np.clip(queries + gain + shift[s] + own, 0, 1) for s, own in zip(seeds, draws, strict=True)}
    return {s: {f"q{i}": float(v) for i, v in enumerate(x)} for s, x in rows.items()}


def array(of):
    return np.array([list(x.values()) for x in of.values()])


def test_systems_without_seeds_are_the_paired_t_and_the_randomisation_test():
    values = {"bm25": arm(seeds=[None]), "e5": arm(0.01, seeds=[None])}
    found = judge(values, measure="nDCG@10")
    a, b = array(values["bm25"])[0], array(values["e5"])[0]
    (pair,) = found.pairs
    student = stats.ttest_rel(a, b)
    interval = student.confidence_interval()
    assert (pair.low, pair.high) == pytest.approx((interval.low, interval.high))
    assert pair.p == pytest.approx(max(student.pvalue, randomised(a - b)))
    assert pair.verdict == "worse"
    assert found.words() == [
        f"e5 better than bm25 by {-pair.difference:.3f} nDCG@10 ({-pair.high:.3f} to {-pair.low:.3f})"
    ]
    row, own = found.row("e5"), stats.ttest_1samp(b, 0).confidence_interval()
    assert (row.mean, row.low, row.high) == pytest.approx((b.mean(), own.low, own.high))


def test_each_verdict_in_the_measures_own_unit():
    values = {"full": arm(between=0), "lottery": arm(0.1), "random": arm(between=0)}
    found = judge(values, margin=0.02, pairs=[("lottery", "full"), ("full", "random")])
    better, equal = found.pairs
    assert better.verdict == "better" and equal.verdict == "equivalent"
    assert " AP (" in found.words()[0] and "equivalent within ±0.02 AP (difference " in found.words()[1]
    assert len(found.row("full").runs) == 3 and found.row("full").queries == 200
    assert [p.p_holm for p in found.pairs] == pytest.approx([min(1, 2 * better.p), max(2 * better.p, equal.p)])


def test_the_two_p_are_both_asked():
    """Seeds that scatter leave nothing to say, however sure the queries are."""
    noisy = {s: {q: v + 0.1 * (s - 2) for q, v in of.items()} for s, of in arm(0.03, noise=0.01).items()}
    values = {"full": arm(noise=0.01), "noisy": noisy}
    (pair,) = judge(values).pairs
    assert pair.verdict == "undecided" and "more seeds would decide" in str(pair.why)
    assert randomised((array(values["full"]) - array(noisy)).mean(0)) < 0.001 < 0.05 < pair.p


def test_few_queries_that_differ_are_told_as_right_and_wrong_ones_are():
    same = arm(seeds=[None])
    (pair,) = judge({"a": same, "b": same}).pairs
    assert pair.p == 1 and pair.high == -pair.low == pytest.approx(1 - 0.025 ** (1 / 200))
    other = {None: {q: v - 0.3 * (q == "q0") for q, v in same[None].items()}}
    (pair,) = judge({"a": same, "b": other}).pairs
    assert pair.high - pair.low > 2 * (1 - 0.025 ** (1 / 200)) - 1e-9


def test_more_queries_are_asked_for_in_their_own_words():
    values = {"a": arm(0.008, seeds=[None], noise=0.1), "b": arm(seeds=[None], noise=0.1)}
    assert "queries alone leave ±0.0" in judge(values, margin=0.015).words()[0]


def test_an_arm_that_is_not_above_the_first_stage_in_english_is_no_reranker():
    german = {"bm25": arm(-0.19, seeds=[None]), "full": arm(0.1), "broken": arm(0.2), "one": arm(0.1, seeds=[1])}
    english = {"e5": arm(seeds=[None]), "full": arm(0.1), "broken": arm(0.0), "one": arm(0.1, seeds=[1])}
    found = judge(german, first="e5", english=english)
    told = dict(zip([(p.a, p.b) for p in found.pairs], found.words(), strict=True))
    assert found.row("full").why is None and found.row("bm25").why is None and found.row("one").why is None
    why = found.row("broken").why
    assert why is not None and why.startswith("is no reranker: in English it is not above e5 (difference ")
    assert told["full", "broken"] == f"full and broken cannot be compared: broken {why}"
    assert told["bm25", "full"].startswith("full better than bm25 by 0.2")
    tested = [p for p in found.pairs if "broken" not in (p.a, p.b)]
    assert {p.verdict for p in found.pairs if p not in tested} == {"void"}
    assert min(p.p_holm for p in tested) == pytest.approx(min(p.p for p in tested) * len(tested))


def test_seeds_that_both_have_are_compared():
    values = {"a": arm(0.1, seeds=[1, 2, 3]), "b": arm(seeds=[2, 3, 4]), "c": arm(seeds=[9])}
    found = {(p.a, p.b): p for p in judge(values).pairs}
    assert found["a", "b"].seeds == 2
    assert found["a", "c"].why == "no seed that both have finished"
    x = (array(values["a"])[1:] - array(values["b"])[:2]).mean()
    assert found["a", "b"].difference == pytest.approx(x)


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ({}, {}, "nothing to judge"),
        ({"a": {1: {}}}, {}, "nothing to judge"),
        ({"a": {1: {"q": 0.5}}, "b": {1: {"r": 0.5}}}, {}, "b, seed 1, was not measured on the same queries as a: 'q'"),
        ({"a": {1: {"q": math.nan}}}, {}, "a, seed 1, has the value nan for query 'q'"),
        ({"a": {None: {"q": 1.5}}}, {}, "a has the value 1.5 for query 'q'"),
        ({"a": {None: {"q": 1.0}, 1: {"q": 1.0}}}, {}, "values with a seed and others without"),
        ({"a": {1: {"q": 1.0}}}, {"pairs": [("a", "A")]}, "There is no arm 'A'"),
        ({"a": {1: {"q": 1.0}}}, {"margin": 0.0}, "margin is what counts as equal"),
        ({"a": {1: {"q": 1.0}}}, {"english": {"e5": {None: {"q": 1.0}}}, "first": "e5"}, "in English lack a"),
        ({"a": {1: {"q": 1.0}}}, {"english": {"a": {1: {"q": 1.0}}}, "first": "e5"}, "in English lack e5"),
    ],
)
def test_what_cannot_be_judged_is_refused(values, options, words):
    with pytest.raises(AddendaError, match=words):
        judge(values, **options)


@pytest.mark.parametrize("rare", [False, True])
def test_intervals_cover_a_known_truth(rare):
    """Two equal arms, three seeds, 60 queries; rare: most queries are answered alike, as RR@10 of a good system is."""
    rng, covered, told, rounds, queries = np.random.default_rng(7), 0, 0, 400, 60
    for _ in range(rounds):
        quality, own = rng.normal(0.5, 0.1, queries), rng.normal(0, 0.05, (2, 1, queries))
        x = quality + own + rng.normal(0, 0.01, (2, 3, 1)) + rng.normal(0, 0.04, (2, 3, queries))
        if rare:
            ranks = rng.choice([1.0, 1.0, 1.0, 0.5, 1 / 3], (2, 1, queries))
            x = np.where(rng.random((2, 3, queries)) < 0.2, rng.choice([1.0, 0.5], (2, 3, queries)), ranks)
        values = {a: {s: dict(enumerate(np.clip(x[i, s], 0, 1))) for s in range(3)} for i, a in enumerate("ab")}
        (pair,) = judge(values, draws=19).pairs
        covered, told = covered + (pair.low <= 0 <= pair.high), told + (pair.better is not None)
    assert 0.92 <= covered / rounds <= 0.99
    assert told / rounds <= 0.075
