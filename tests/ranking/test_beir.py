"""BEIR folders: a round trip, and everything damaged that a folder of somebody else's may hold."""

import json
import os

import pytest

from addenda.core.base.errors import AddendaError
from addenda.ranking import beir, lines
from addenda.ranking.collection import Collection, Document

GOOD = {
    "corpus.jsonl": '{"_id": "d1", "title": "Eins", "text": "Ein Text."}\n'
    '{"_id": "d2", "text": "Noch einer.", "metadata": {}}\n',
    "queries.jsonl": '{"_id": "q1", "text": "one text"}\n{"_id": "q2", "text": "another"}\n',
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\n",
    "qrels/train.tsv": "query-id\tcorpus-id\tscore\nq2\td2\t2\n",
}


def folder_of(tmp_path, **changed):
    folder = tmp_path / "toy"
    for name, text in {**GOOD, **{k.replace("__", "/"): v for k, v in changed.items()}}.items():
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def toy(**more):
    documents = {"d 1": Document("Ein Text\nmit\u2028Zeilen.", "Ein „Titel“"), "d2": Document("Noch\teiner 🙂")}
    qrels = {"train": {"q1": {"d2": 1}}, "test": {"q2": {"d 1": 2, "d2": 0}}}
    return Collection("toy", {"q1": "one", "q2": "two"}, documents, qrels, **more)


def test_a_folder_is_read(tmp_path):
    read = beir.read(folder_of(tmp_path))
    assert read.name == "toy" and read.queries == {"q1": "one text", "q2": "another"}
    assert read.documents == {"d1": Document("Ein Text.", "Eins"), "d2": Document("Noch einer.")}
    assert read.qrels == {"train": {"q2": {"d2": 2}}, "test": {"q1": {"d1": 1, "d2": 0}}}
    assert list(beir.read(folder_of(tmp_path), splits=["test"]).qrels) == ["test"]
    with pytest.raises(AddendaError, match=r"no split 'tset'; it has 'train', 'test'. Did you mean 'test'"):
        read.split("tset")


def test_a_round_trip_keeps_all(tmp_path):
    whole = toy(language="de", query_language="en", near={"d2": frozenset({"d 1"})}, sections={"d2": "net"})
    beir.write(whole, tmp_path / "toy")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [
        "collection.json", "corpus.jsonl", "queries.jsonl", "test.tsv", "train.tsv",
    ]  # fmt: skip
    read = beir.read(tmp_path / "toy")
    assert read == whole and read.digest() == whole.digest()
    assert toy().digest() != whole.digest()
    first = json.loads((tmp_path / "toy" / "corpus.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert first == {"_id": "d 1", "title": "Ein „Titel“", "text": "Ein Text\nmit\u2028Zeilen."}


def test_another_programs_collection_json_is_not_read_and_a_damaged_one_of_ours_is_refused(tmp_path):
    assert beir.read(folder_of(tmp_path, **{"collection.json": '{"near": 5}'})).near == {}
    folder_of(tmp_path, **{"collection.json": f'{{"format": "{beir.FORMAT}", "near": 5}}'})
    with pytest.raises(AddendaError, match="not as addenda writes it"):
        beir.read(tmp_path / "toy")
    folder_of(tmp_path, **{"collection.json": f'{{"format": "{beir.FORMAT}", "near": {{"d1": ["d9"]}}}}'})
    with pytest.raises(AddendaError, match="'d9' is near to others"):
        beir.read(tmp_path / "toy")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("corpus.jsonl", None, "lacks corpus.jsonl"),
        ("queries.jsonl", None, "lacks queries.jsonl"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "holds no judgement"),
        ("corpus.jsonl", "\n\n", "corpus.jsonl is empty"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"_id": "d1", "text": "x"}', "line 3: the _id 'd1' stands in line 1"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"_id": "d3", "text": " "}', "line 3: document 'd3' is empty"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"_id": "d3"}', "line 3: document 'd3' is empty"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"_id": "d3", "text": 5}', "line 3: text is '5', a text was"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"_id": 3, "text": "x"}', "line 3: _id is '3'; a text in quotes"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"_id": "d\\t3", "text": "x"}', "line 3: _id is 'd\\\\t3'"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"text": "x"}', "line 3: _id is 'None'"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"_id": "d3", "tex', "line 3: Unterminated string"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '["d3"]', "line 3: an object .* was expected, got list"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"_id": "d3", "_id": "d4", "text": "x"}', "line 3: the key '_id'"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + '{"_id": "d3", "text": "\\ud800"}', "line 3: .*surrogates"),
        ("corpus.jsonl", GOOD["corpus.jsonl"] + "[" * 20000, "line 3: it is nested too deeply"),
        ("corpus.jsonl", b'{"_id": "d1", "text": "\xff"}', "line 1 is not UTF-8"),
        ("queries.jsonl", '{"_id": "q1", "text": "a"}\n{"_id": "q2", "text": ""}', "line 2: query 'q2' is empty"),
        ("queries.jsonl", '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}', "line 2: the _id 'q1' stands in"),
        ("qrels/test.tsv", "q1\td1\t1\n", "line 1: expected the header query-id corpus-id score"),
        ("qrels/test.tsv", GOOD["qrels/test.tsv"] + "q9\td1\t1\n", "line 4: query 'q9' is not in queries.jsonl"),
        ("qrels/test.tsv", GOOD["qrels/test.tsv"] + "q1\td9\t1\n", "line 4: document 'd9' is not in corpus.jsonl"),
        ("qrels/test.tsv", GOOD["qrels/test.tsv"] + "q1\td1\t1\n", "line 4: document 'd1' is judged twice"),
        ("qrels/test.tsv", GOOD["qrels/test.tsv"] + "q2\td1\t0\n", "line 4: query 'q2' has no answer"),
        ("qrels/test.tsv", GOOD["qrels/test.tsv"] + "q2 d1 1\n", "line 4: 1 columns, 3 with tabs"),
        ("qrels/test.tsv", GOOD["qrels/test.tsv"] + "q2\td1\tnan\n", "line 4: the grade 'nan' is not a whole number"),
        ("qrels/test.tsv", GOOD["qrels/test.tsv"] + "q2\td1\t99999999\n", "line 4: the grade '99999999'"),
        ("qrels/test.tsv", GOOD["qrels/test.tsv"] + "q2\td1\t0.5\n", "line 4: the grade '0.5'"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_by_file_and_line(tmp_path, name, text, words):
    folder = folder_of(tmp_path, **{name: text})
    with pytest.raises(AddendaError, match=words) as refused:
        beir.read(folder)
    assert name.split("/")[-1] in str(refused.value)


def test_many_faults_are_counted_and_five_are_told(tmp_path):
    text = GOOD["queries.jsonl"] + "x\n" * 40
    with pytest.raises(AddendaError, match=r"has 40 lines that cannot be used: line 3.*line 7.*… and 35 more"):
        beir.read(folder_of(tmp_path, **{"queries.jsonl": text}))


def test_gigantic_lines_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST", 1 << 20)
    folder = folder_of(tmp_path, **{"corpus.jsonl": GOOD["corpus.jsonl"] + '{"_id": "d3", "text": "' + "x" * (2 << 20)})
    with pytest.raises(AddendaError, match="line 3 is longer than 1 MiB"):
        beir.read(folder)


def test_what_is_no_folder_is_refused(tmp_path):
    folder_of(tmp_path)
    with pytest.raises(AddendaError, match=r"There is no folder .*Did you mean 'toy'"):
        beir.read(tmp_path / "tody")
    with pytest.raises(AddendaError, match="There is no folder"):
        beir.read(tmp_path / "toy" / "corpus.jsonl")
    with pytest.raises(
        AddendaError, match=r"lacks qrels/dev.tsv \(judgements there: qrels/test.tsv, qrels/train.tsv\)"
    ):
        beir.read(tmp_path / "toy", splits=["dev"])
    (tmp_path / "toy" / "corpus.jsonl").unlink()
    os.mkfifo(tmp_path / "toy" / "corpus.jsonl")
    with pytest.raises(AddendaError, match=r"lacks corpus.jsonl"):
        beir.read(tmp_path / "toy")


def test_judgements_need_not_be_there_for_a_search(tmp_path):
    folder = folder_of(tmp_path, **{"qrels/test.tsv": None, "qrels/train.tsv": None})
    with pytest.raises(AddendaError, match=r"lacks qrels/test.tsv"):
        beir.read(folder)
    assert beir.read(folder, judged=False).qrels == {}


def test_nothing_is_written_over_and_nothing_half(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    with pytest.raises(AddendaError, match="nothing is written over"):
        beir.write(toy(), tmp_path / "taken")
    monkeypatch.setattr(beir, "readable", lambda value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        beir.write(toy(), tmp_path / "new" / "toy")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("collection", "words"),
    [
        (Collection("c", {}, {}), "there are no queries; there are no documents"),
        (Collection("c", {"q": " "}, {"d": Document("")}), "query 'q' is empty; document 'd' is empty"),
        (Collection("c", {"q": "x"}, {"d": Document("x")}, {"test": {"p": {"d": 1}}}), "test: query 'p' is judged"),
        (Collection("c", {"q": "x"}, {"d": Document("x")}, {"test": {"q": {"e": 1}}}), "'e' is judged for query 'q'"),
        (Collection("c", {"q": "x"}, {"d": Document("x")}, {"test": {"q": {"d": 0}}}), "query 'q' has no answer"),
        (Collection("c", {"q\n": "x"}, {"d": Document("x")}), "ids and splits are words"),
        (Collection("c", {"q": "x"}, {"d": Document("x")}, {"../up": {"q": {"d": 1}}}), "'../up' is none"),
    ],
)  # fmt: skip
def test_a_collection_that_cannot_be_searched_is_not_written(tmp_path, collection, words):
    with pytest.raises(AddendaError, match=words):
        beir.write(collection, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("query", "document", "text", "grade", "words"),
    [
        (" q1", "d1", "a b", 1, "without tabs, line ends and spaces around, and ' q1' is none"),
        ("q1", "d1 ", "a b", 1, "'d1 ' is none"),
        ("q1", "d1", "a \ud800 b", 1, "'d1' holds half of a surrogate pair"),
        ("q\ud800", "d1", "a b", 1, "holds half of a surrogate pair"),
        ("q1", "d1", "a b", 2**21, "graded 2097152 for query 'q1', and a grade is a whole number"),
        ("q1", "d1", "a b", 0.5, "graded 0.5"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, query, document, text, grade, words):
    made = Collection("x", {query: "a b"}, {document: Document(text)}, {"test": {query: {document: grade}}})
    with pytest.raises(AddendaError, match=words):
        beir.write(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
