"""Runs of a first stage: the best k of each query, in an order that does not depend on luck."""

import numpy as np
import pytest
import torch
from transformers import BertModel

from addenda.core.base.errors import AddendaError
from addenda.ranking.bi_encoder import BiEncoder
from addenda.ranking.bm25 import Bm25
from addenda.ranking.collection import Collection, Document
from addenda.ranking.first_stage import best, first_stage
from ranking.toy import toy, toy_config, toy_tokenizer


def test_bm25_finds_the_document_that_a_query_is_made_of():
    made = toy()
    run = first_stage(made, k=5)
    assert list(run) == list(made.queries)
    assert np.mean([next(iter(found)) == f"d{q[1:]}" for q, found in run.items()]) > 0.8
    (scores,) = Bm25([d.text for d in made.documents.values()]).scores([made.queries["q3"]])
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:5]
    assert list(run["q3"].items()) == [(f"d{i}", pytest.approx(float(scores[i]))) for i in order]


def test_bm25_leaves_out_what_shares_no_word():
    made = toy("b")
    assert all(not found for found in first_stage(made).values())
    small = Collection("small", {"q": "x y"}, {"d": Document("y"), "e": Document("z"), "f": Document("x")})
    assert set(first_stage(small)["q"]) == {"d", "f"}


def test_a_bi_encoder_scores_every_document():
    torch.manual_seed(0)
    made, by = toy(), BiEncoder(BertModel(toy_config()).eval(), toy_tokenizer(), cache=False)
    run = first_stage(made, by, queries=["q4", "q1"], k=1000)
    assert list(run) == ["q4", "q1"] and all(set(found) == set(made.documents) for found in run.values())
    assert all(list(found.values()) == sorted(found.values(), reverse=True) for found in run.values())


def test_equal_scores_keep_the_order_of_the_collection():
    assert list(best(["c", "a", "b", "d"], np.float32([1, 2, 1, 2]), 3)) == ["a", "d", "c"]
    assert best(["c", "a"], np.float32([0, 0]), 3, above=0.0) == {}


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda c: first_stage(c, queries=["q4", "p4"]), r"has no query 'p4' .1 such.. Did you mean 'q4'"),
        (lambda c: first_stage(c, "bm52"), "is 'bm25' or a BiEncoder"),
        (lambda c: first_stage(c, k=0), "k must be"),
        (lambda _: first_stage(Collection("c", {"q": "a"}, {"d": Document(" ")})), "document 'd' is empty"),
        (lambda _: first_stage(Collection("c", {"q": ""}, {"d": Document("a")})), "query 'q' is empty"),
    ],
)
def test_bad_input_is_named(ask, told):
    with pytest.raises(AddendaError, match=told):
        ask(toy())
