"""Hard negatives: never an answer or what says the same, the same for a seed, and as many as were asked for."""

from dataclasses import replace

import pytest

from addenda.core.base.errors import AddendaError
from addenda.ranking.collection import Collection, Document
from addenda.ranking.first_stage import first_stage
from addenda.ranking.negatives import hard_negatives
from ranking.toy import toy


def test_negatives_come_out_of_the_runs_and_answer_nothing():
    made = toy()
    run = first_stage(made, k=10)
    found = hard_negatives(made, [run], negatives=4)
    assert list(found.by_query) == list(made.split("train")) and not found.filled
    for query, drawn in found.by_query.items():
        assert len(set(drawn)) == 4 and set(drawn) <= set(run[query]) - set(made.split("train")[query])
    assert found.said == "4 negatives for each of 24 queries, all of them out of the first stage"


def test_draws_are_of_seed_and_query_alone():
    made = toy()
    run = first_stage(made, k=20)
    first = hard_negatives(made, [run], negatives=3, seed=1).by_query
    assert hard_negatives(made, [run], negatives=3, seed=1).by_query == first
    assert hard_negatives(made, [run], negatives=3, seed=2).by_query != first
    part = {q: graded for q, graded in made.split("train").items() if q != "q0"}
    fewer = hard_negatives(replace(made, qrels={"train": part}), [run], negatives=3, seed=1).by_query
    assert fewer == {q: drawn for q, drawn in first.items() if q != "q0"}


def test_the_runs_are_put_together_and_cut_at_the_depth():
    made = toy()
    one, two = {"q0": {"d9": 3.0, "d8": 2.0, "d7": 1.0}}, {"q0": {"d1": 1.0, "d2": 2.0}}
    only = replace(made, qrels={"train": {"q0": {"d0": 1}}})
    assert set(hard_negatives(only, [one, two], negatives=4, depth=2).by_query["q0"]) == {"d9", "d8", "d2", "d1"}
    assert hard_negatives(only, [one, two], negatives=1, depth=1, seed=3).by_query["q0"][0] in ("d9", "d2")


def test_near_duplicates_and_equal_texts_of_an_answer_are_never_negatives():
    texts = {"answer": "The same  text", "twin": "the same text", "near": "nearly", "back": "also", "other": "x",
             "dev": "y", "judged": "z"}  # fmt: skip
    made = Collection(
        "c", {"q": "a"}, {d: Document(t) for d, t in texts.items()},
        {"train": {"q": {"answer": 1, "judged": 0}}, "dev": {"q": {"dev": 2}}},
        near={"answer": frozenset({"near"}), "back": frozenset({"answer"})},
    )  # fmt: skip
    everything = {"q": {d: float(i) for i, d in enumerate(texts)}}
    assert hard_negatives(made, [everything], negatives=2).by_query["q"] == ("other", "judged")
    with pytest.raises(AddendaError, match=r"Query 'q' has 2 documents that may be its negatives .*3 were asked for"):
        hard_negatives(made, [everything], negatives=3)


def test_what_the_runs_lack_is_drawn_from_all_and_said():
    made = toy()
    run = {"q0": {"d5": 1.0, "d0": 2.0}}
    found = hard_negatives(made, [run], negatives=3)
    assert "d5" in found.by_query["q0"] and "d0" not in found.by_query["q0"]
    assert found.filled["q0"] == 2 and found.filled["q2"] == 3 and len(found.filled) == 24
    assert "for 24 of these the first stage had too few ('q0' lacked 2), and 71 were drawn" in found.said
    assert "drawn from all documents" in hard_negatives(made, [], negatives=3).said


def test_a_run_of_another_collection_is_refused():
    with pytest.raises(AddendaError, match="names document 'd99', which toy-a has not"):
        hard_negatives(toy(), [{"q0": {"d99": 1.0}}])
    with pytest.raises(AddendaError, match="no split 'tran'"):
        hard_negatives(toy(), [], split="tran")
