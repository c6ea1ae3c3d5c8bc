"""A reranker beside its first stage: values by query, the recall that bounds them, and a verdict."""

import pytest

from addenda import AddendaError
from addenda.ranking.evaluate import FIRST, RERANKED, evaluate_reranker
from addenda.ranking.measures import by_query, means
from addenda.ranking.reranker import Reranker
from ranking.toy import toy, toy_model, toy_tokenizer


def test_both_systems_are_measured_on_the_same_queries():
    collection = toy()
    reranker = Reranker(toy_model(), toy_tokenizer())
    found = evaluate_reranker(reranker, collection, split="test", depth=5)
    qrels = collection.split("test")
    assert set(found.runs[RERANKED]) == set(qrels)
    for name in (FIRST, RERANKED):
        expected = by_query(qrels, found.runs[name], ["AP", "R@5"])
        assert found.values[name]["AP"] == expected["AP"]
        assert found.judgement.row(name).mean == pytest.approx(means(expected)["AP"])
    assert found.recall == means(by_query(qrels, found.runs[FIRST], ["R@5"]))["R@5"]
    assert means(found.values[RERANKED])["R@5"] == found.recall  # the same five documents
    assert [row[0] for row in found.rows()] == [FIRST, RERANKED]
    words = found.words()
    assert any(FIRST in w and RERANKED in w for w in words[:1]) and "Recall" in words[1] and "ms a query" in words[2]


def test_only_so_many_queries_and_another_run():
    collection = toy()
    reranker = Reranker(toy_model(), toy_tokenizer())
    found = evaluate_reranker(reranker, collection, split="test", depth=3, queries=4)
    asked = sorted(collection.split("test"))[:4]
    assert sorted(found.runs[FIRST]) == asked
    run = {q: {"d1": 2.0, "d2": 1.0} for q in asked}
    again = evaluate_reranker(reranker, collection, split="test", depth=3, queries=4, run=run)
    assert set(again.runs[FIRST][asked[0]]) == {"d1", "d2"}
    for none in ({"q0": {"d1": 1.0}}, {}):
        with pytest.raises(AddendaError, match="answers none"):
            evaluate_reranker(reranker, collection, split="test", run=none)
    with pytest.raises(AddendaError, match="no split"):
        evaluate_reranker(reranker, collection, split="tast")
