"""Measures by query against ir-measures and against twenty lines written out, on runs with everything odd in them."""

import builtins
import math

import ir_measures
import numpy as np
import pytest

from addenda.core.base.errors import AddendaError
from addenda.ranking.measures import MEASURES, by_query, means
from addenda.ranking.trec import strict

ALL = (*MEASURES, "R@3", "P@5", "nDCG")


def written_out(graded, scores, measure):
    """The measure of one query. Equal scores: trec_eval takes the largest id first, MS MARCO's program the smallest."""
    name, _, k = measure.partition("@")
    order = sorted(sorted(scores, reverse=name != "RR"), key=lambda d: -scores[d])
    answers, cut = {d for d, g in graded.items() if g > 0}, int(k or len(order))
    hits = [i for i, d in enumerate(order[:cut], 1) if d in answers]
    gain = lambda grades: sum(g / math.log2(i + 1) for i, g in enumerate(grades[:cut] if k else grades, 1))  # noqa: E731
    if name == "AP":
        return sum(n / i for n, i in enumerate(hits, 1)) / len(answers)
    if name == "nDCG":
        best = gain(sorted((g for g in graded.values() if g > 0), reverse=True))
        return gain([max(graded.get(d, 0), 0) for d in order]) / best
    if name == "RR":
        return 1 / hits[0] if hits else 0.0
    return len(hits) / (len(answers) if name == "R" else cut)


def drawn(rng):
    """Judgements and a run with ties, unjudged documents, answers and whole queries missing, and unknown queries."""
    documents = [f"d{i}" for i in range(int(rng.integers(3, 30)))]
    qrels, run = {}, {}
    for q in range(int(rng.integers(1, 6))):
        judged = rng.choice(documents, int(rng.integers(1, len(documents))), replace=False).tolist()
        qrels[f"q{q}"] = {d: int(rng.integers(0, 4)) for d in judged} | {judged[0]: int(rng.integers(1, 4))}
        if rng.random() < 0.8:
            found = rng.choice(documents, int(rng.integers(0, len(documents))), replace=False).tolist()
            run[f"q{q}"] = {d: float(rng.integers(-3, 4)) / (1 if rng.random() < 0.5 else 7) for d in found}
    if rng.random() < 0.3 and run:
        run["another"] = {"d0": 1.0}
    return qrels, run


def test_measures_are_those_of_ir_measures_and_those_written_out():
    rng, ties, odd = np.random.default_rng(0), 0, 0
    parsed = [ir_measures.parse_measure(m) for m in ALL]
    for _ in range(1000):
        qrels, run = drawn(rng)
        found = by_query(qrels, run, ALL)
        theirs = {(str(m.measure), m.query_id): m.value for m in ir_measures.iter_calc(parsed, qrels, run)}
        ties += any(len(set(s.values())) < len(s) for s in run.values())
        odd += any(not run.get(q) for q in qrels)
        for name in ALL:
            assert list(found[name]) == list(qrels)
            for q, graded in qrels.items():
                value = found[name][q]
                assert abs(value - theirs[name, q]) <= 1e-12
                assert abs(value - written_out(graded, run.get(q, {}), name)) <= 1e-12
    assert ties > 600 and odd > 200


def test_a_strict_run_is_measured_in_the_order_given_by_every_measure():
    qrels, run = {"q": {"b": 1}}, {"q": {"b": 1.0, "a": 1.0, "c": 1.0}}
    assert by_query(qrels, run, ["AP", "RR@10"]) == {"AP": {"q": 0.5}, "RR@10": {"q": 0.5}}
    assert by_query(qrels, strict(run), ["AP", "RR@10"]) == {"AP": {"q": 1.0}, "RR@10": {"q": 1.0}}
    near = {"q": {"b": 1.0, "c": 1.0 - 1e-12}}  # one number to trec_eval
    assert by_query(qrels, near, ["AP"])["AP"]["q"] == 0.5
    assert by_query(qrels, strict(near), ["AP"])["AP"]["q"] == 1.0


def test_queries_without_an_answer_in_the_run_count_0():
    found = by_query({"q": {"a": 1}, "r": {"a": 1}, "s": {"a": 1}}, {"q": {"a": 2.0}, "r": {}})
    assert found["AP"] == {"q": 1.0, "r": 0.0, "s": 0.0}
    assert means(found)["AP"] == pytest.approx(1 / 3)
    assert set(means(by_query({"q": {"a": 1}}, {})).values()) == {0.0}


@pytest.mark.parametrize(
    ("qrels", "run", "measures", "words"),
    [
        ({}, {}, MEASURES, "no judgements"),
        ({"q": {"a": 0}}, {}, MEASURES, "1 of 1 judged queries have no answer, query 'q'"),
        ({"q": {"a": 1}}, {"other": {"a": 1.0}}, MEASURES, "of another collection or split"),
        ({"q": {"a": 1}}, {"q": {"a": math.nan}}, MEASURES, "'a' has the score nan for query 'q'"),
        ({"q": {"a": 1}}, {"q": {"a": math.inf}}, MEASURES, "diverged"),
        ({"q": {"a": 1}}, {}, ["__import__('os')"], "Expected measures such as AP"),
        ({"q": {"a": 1}}, {}, ["nDCG@0"], "got 'nDCG@0'"),
        ({"q": {"a": 1}}, {}, [], "got none"),
    ],
)
def test_what_cannot_be_measured_is_refused(qrels, run, measures, words):
    with pytest.raises(AddendaError, match=words.replace("(", r"\(")):
        by_query(qrels, run, measures)


def test_without_ir_measures_the_error_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "ir_measures":
            raise ImportError("No module named 'ir_measures'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(AddendaError, match=r'pip install "addenda\[ranking\]"'):
        by_query({"q": {"a": 1}}, {})
