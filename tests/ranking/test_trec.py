"""TREC's files: round trips, scores that other programs read as the order meant, and everything hostile."""

import math

import ir_measures
import numpy as np
import pytest

from addenda.core.base.errors import AddendaError
from addenda.ranking import trec
from addenda.ranking.collection import Collection, Document
from addenda.ranking.measures import by_query

QRELS = {"q1": {"d1": 1, "d2": 0}, "q2": {"d3": 3, "d1": -2}}
COLLECTION = Collection("toy", {"q1": "a", "q2": "b"}, {f"d{i}": Document("x") for i in range(1, 5)})


def test_judgements_go_round_and_are_read_by_ir_measures(tmp_path):
    path = trec.write_qrels(QRELS, tmp_path / "out" / "test.qrels")
    assert trec.read_qrels(path) == trec.read_qrels(path, COLLECTION) == QRELS
    theirs = {}
    for row in ir_measures.read_trec_qrels(str(path)):
        theirs.setdefault(row.query_id, {})[row.doc_id] = row.relevance
    assert theirs == QRELS


def test_a_run_goes_round_in_its_order(tmp_path):
    run = {"q1": {"d3": 0.5, "d1": 2.0, "d2": 0.5, "d4": -1e30}, "q2": {"d1": 1 / 3}}
    path = trec.write_run(run, tmp_path / "bm25.run", tag="bm25")
    assert path.read_text().splitlines()[:2] == ["q1 Q0 d1 1 2 bm25", "q1 Q0 d3 2 0.5 bm25"]
    read = trec.read_run(path, COLLECTION)
    assert list(read["q1"]) == ["d1", "d3", "d2", "d4"]
    for query, scores in run.items():
        for d, score in scores.items():
            assert read[query][d] == pytest.approx(score, rel=1e-6)
    assert by_query({"q1": {"d3": 1}}, read, ["AP", "RR@10"]) == {"AP": {"q1": 0.5}, "RR@10": {"q1": 0.5}}


@pytest.mark.parametrize("scale", [0.0, 1e-46, 1e-30, 1e-8, 1.0, 1e8, 3.5e38, 1e300])
def test_written_scores_decrease_strictly_as_float32_and_as_text(tmp_path, scale):
    rng = np.random.default_rng(0)
    scores = {f"d{i}": scale * v for i, v in enumerate(np.round(rng.normal(size=300), 1).tolist())}
    trec.write_run({"q": scores}, tmp_path / "a.run")
    found = [line.split() for line in (tmp_path / "a.run").read_text().splitlines()]
    assert [f[2] for f in found] == sorted(scores, key=lambda d: -scores[d])
    values = np.array([float(f[4]) for f in found])
    assert np.isfinite(values).all() and (np.diff(values) < 0).all() and (np.diff(values.astype(np.float32)) < 0).all()
    assert [f[3] for f in found] == [str(i) for i in range(1, 301)]


def test_the_order_of_a_written_run_is_the_one_given_whatever_the_ids(tmp_path):
    run = {"q": dict.fromkeys(["b", "a", "z", "c"], 0.25)}
    read = trec.read_run(trec.write_run(run, tmp_path / "a.run"))
    for place, document in enumerate(["b", "a", "z", "c"], 1):
        found = by_query({"q": {document: 1}}, read, ["AP", "RR@10", "nDCG"])
        assert found["AP"]["q"] == found["RR@10"]["q"] == 1 / place
        assert found["nDCG"]["q"] == pytest.approx(1 / math.log2(place + 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q1 Q0 d1 1 2.0\n", "line 1: 5 columns, 6 were expected"),
        ("q1 Q0 d1 1 2.0 tag more\n", "line 1: 7 columns"),
        ("q1 Q0 d1 1 nan t\n", "line 1: the score 'nan' is no finite number"),
        ("q1 Q0 d1 1 1e999 t\n", "line 1: the score '1e999'"),
        ("q1 Q0 d1 1 1_0 t\n", "line 1: the score '1_0'"),
        ("q1 Q0 d1 1 2 t\nq1 Q0 d1 2 1 t\n", "line 2: document 'd1' is there twice for query 'q1'"),
        ("q1 Q0 d1 1 2 t\nq1 Q0 d9 2 1 t\n", "line 2: document 'd9' not in toy"),
        ("q1 Q0 d1 1 2 t\nq9 Q0 d8 2 1 t\n", "line 2: query 'q9' and document 'd8' not in toy"),
        ("a Q0 b 1 2 t\na Q0 c 2 1 t\n", "of another collection than toy: none of its lines"),
        ("", "holds no answer"),
    ],
)
def test_a_hostile_run_is_refused_by_line(tmp_path, text, words):
    (tmp_path / "a.run").write_text(text)
    with pytest.raises(AddendaError, match=words) as refused:
        trec.read_run(tmp_path / "a.run", COLLECTION)
    assert "a.run" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q1 0 d1\n", "line 1: 3 columns, 4 were expected"),
        ("q1 0 d1 yes\n", "line 1: the grade 'yes' is not a whole number"),
        ("q1 0 d1 1\n\nq1 0 d1 0\n", "line 3: document 'd1' is judged twice for query 'q1'"),
        ("q1 0 d1 0\nq1 0 d2 -1\n", "line 1: query 'q1' has no answer"),
        ("q1 0 d1 1\nq1 0 d7 1\n", "line 2: document 'd7' not in toy"),
        ("z 0 y 1\n", "of another collection than toy"),
        ("\n", "holds no judgement"),
    ],
)
def test_hostile_judgements_are_refused_by_line(tmp_path, text, words):
    (tmp_path / "a.qrels").write_text(text)
    with pytest.raises(AddendaError, match=words):
        trec.read_qrels(tmp_path / "a.qrels", COLLECTION)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(AddendaError, match=r"a.run cannot be read"):
        trec.read_run(tmp_path / "a.run")
    with pytest.raises(AddendaError, match="is a folder"):
        trec.read_qrels(tmp_path)


def test_nothing_is_written_over_and_no_id_becomes_a_column(tmp_path):
    (tmp_path / "a.run").write_text("mine")
    with pytest.raises(AddendaError, match="nothing is written over"):
        trec.write_run({"q": {"d": 1.0}}, tmp_path / "a.run")
    with pytest.raises(AddendaError, match="nothing is written over"):
        trec.write_qrels(QRELS, tmp_path / "a.run")
    for run, tag in (({"q 1": {"d": 1.0}}, "t"), ({"q": {"": 1.0}}, "t"), ({"q": {"d\n": 1.0}}, "t"), ({}, "a b")):
        with pytest.raises(AddendaError, match="whose columns are words"):
            trec.write_run(run, tmp_path / "b.run", tag=tag)
    with pytest.raises(AddendaError, match="has the score inf for query 'q'"):
        trec.write_run({"q": {"d": math.inf}}, tmp_path / "b.run")
    assert (tmp_path / "a.run").read_text() == "mine" and not (tmp_path / "b.run").exists()
