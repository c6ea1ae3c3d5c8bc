"""Rows out of files and of what is in memory: nothing is guessed, and what is refused is told by its line."""

import json

import pytest

from addenda.core.base.errors import AddendaError
from addenda.data.examples import Pair
from addenda.data.read import read
from addenda.data.rows import rows_of, splits_of


def file(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


GOOD = [{"question": "q, one", "answer": "1"}, {"question": "r", "answer": "2"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", 'question,answer\n"q, one",1\nr,2\n'),
        ("d.CSV", '\ufeffquestion,answer\r\n"q, one",1\r\n\r\nr,2\r\n'),
        ("d.jsonl", '{"question": "q, one", "answer": "1"}\n\n{"question": "r", "answer": "2"}\n'),
        ("d.JSONL", '\ufeff{"question": "q, one", "answer": "1"}\r\n{"question": "r", "answer": "2"}\r\n'),
        ("d.Json", json.dumps(GOOD)),
    ],
)
def test_what_is_written_in_other_ways_is_read_alike(tmp_path, name, content):
    path = file(tmp_path, name, content)
    assert list(rows_of(path)) == GOOD
    train = path.rename(tmp_path / f"train{path.suffix}")
    assert splits_of(tmp_path) == ["train"]
    assert list(rows_of(tmp_path)) == list(rows_of(train)) == GOOD


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.csv", "text,label\nfine,0\nno, not fine,1\n", r"has 2 columns .*but line 3 has 3\. A comma inside a field"),
        ("d.csv", 'text,label\n"two\nlines",0\nshort\n', "line 4 has 1"),
        ("d.csv", "text,label\nfine,0,\n", "line 2 has 3"),
        ("d.csv", "text,label,text\na,0,b\n", "line 1 has the column 'text' twice"),
        ("d.csv", 'text,label\n"open,0\n', "cannot be read as CSV: line"),
        ("d.csv", 'text,label\n"a"b,0\n', "cannot be read as CSV: line 2"),
        (
            "d.csv",
            b"text,label\n\xff\xfe,0\n",
            r"d\.csv, line 2 is not UTF-8 \(byte ff\)\. Save the file again in UTF-8",
        ),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"d\.jsonl, line 2 is not UTF-8 \(byte e9\)"),
        ("d.csv", "text,label\na,0\n".encode("utf-16"), "is in UTF-16, and rows are read in UTF-8"),
        (
            "d.jsonl",
            '{"text": "a"}\n{"text": "b',
            r"line 2 is not JSON: Unterminated string .*at column 10. One object",
        ),
        ("d.json", '[{"text": "a"},\n {"text" "b"}]', r"d\.json is not JSON: .*at line 2, column 10. Mend the file"),
        ("d.jsonl", '{"text": "a", "text": "b", "label": 0}\n', "line 1 has the key 'text' twice"),
        ("d.json", '[{"text": "a", "label": 0, "label": 1}]', "has the key 'label' twice"),
        ("d.jsonl", '\n{"text": "a", "label": 0},\n', "line 2 is not JSON"),
        ("d.json", '{"text": ["a"],\n "label": [0]}', "line 1 is not JSON"),
        ("d.jsonl", "[" * 100_000 + "]" * 100_000, "line 1 is not JSON that can be read: it is nested too deeply"),
        ("d.json", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("d.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}\n", "line 1 is not JSON"),
        ("d.jsonl", '{"text": "a", "label": "x"}\n7\n', "line 2: expected an object with named columns, got int"),
        ("d.jsonl", "", "at least one example"),
        ("d.csv", "", "at least one example"),
        ("d.csv", "text,label\n", "at least one example"),
        ("d.parquet", "PAR1", "cannot be read as PARQUET"),
        ("d.parquet", "", "cannot be read as PARQUET"),
        (
            "d.jsonl.gz",
            b"\x1f\x8b",
            r"ending '.gz'; expected one of .jsonl, .json, .csv, .parquet, or a folder. Unpack",
        ),
        ("d.jsonl", '{"text": "a", "label": "x"}\n\n{"text": "b"}\n', "line 3: it has no column 'label'"),
        ("d.jsonl", '{"text": "a \\ud800", "label": "x"}\n{"text": "b", "label": "y"}\n', "line 1: .*surrogate"),
        ("d.jsonl", '{"text": NaN, "label": "x"}\n{"text": "b", "label": "y"}\n', "line 1: .* holds nan, a text was"),
        ("d.jsonl", '{"text": "a", "label": "x", "class": 1}\n', "'label' and 'class', and each may be the label"),
    ],
    ids=range(29),
)
def test_what_is_refused_is_told_by_its_line(tmp_path, name, content, says):
    with pytest.raises(AddendaError, match=says):
        read(file(tmp_path, name, content), task="label")


def test_a_column_that_begins_late_is_found(tmp_path):
    lines = [{"question": "q"}] * 150 + [{"question": "q", "answer": "a"}]
    path = file(tmp_path, "d.jsonl", "".join(json.dumps(r) + "\n" for r in lines))
    with pytest.raises(AddendaError, match=r"150 of 151 rows .*line 1: it has no column 'answer'"):
        read(path)


def test_long_fields_are_read(tmp_path):
    text = "x" * 300_000
    assert rows_of(file(tmp_path, "d.csv", f"question,answer\n{text},1\n"))[0]["question"] == text


def test_paths_that_cannot_be(tmp_path, monkeypatch):
    for path in ("x" * 300 + ".csv", tmp_path / "a\0b.csv", "~nobody-of-this-name/d.csv"):
        with pytest.raises(AddendaError):
            read(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    file(tmp_path, "d.csv", "question,answer\nq,1\n")
    assert read("~/d.csv").examples == (Pair("q", "1"),)
    file(tmp_path, "train.csv", "question,answer\nq,1\n")
    file(tmp_path, "train.jsonl", "")
    with pytest.raises(AddendaError, match=r"train.csv and train.jsonl; name the one"):
        read(tmp_path)


def test_a_parquet_file_with_a_column_twice(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"], ["c"]], names=["question", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(AddendaError, match="column 'answer' twice"):
        read(tmp_path / "d.parquet")
    table = pyarrow.table({"question": ["a", None], "answer": ["b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "n.parquet")
    with pytest.raises(AddendaError, match="row 1: column 'question' holds None"):
        read(tmp_path / "n.parquet")


def test_a_damaged_folder_of_datasets(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(GOOD)
    for name, damage in (
        ("cut", lambda p: next(p.rglob("*.arrow")).write_bytes(b"ARROW1")),
        ("gone", lambda p: next(p.rglob("*.arrow")).unlink()),
        ("state", lambda p: next(p.rglob("state.json")).write_text("{}")),
        ("json", lambda p: next(p.rglob("state.json")).write_text("{oops")),
        ("info", lambda p: next(p.rglob("dataset_info.json")).write_text("7")),
        ("splits", lambda p: (p / "dataset_dict.json").write_text("[]")),
    ):
        folder = tmp_path / name
        datasets.DatasetDict({"train": made}).save_to_disk(str(folder))
        assert list(rows_of(folder)) == GOOD
        damage(folder)
        with pytest.raises(
            AddendaError, match=r"cannot be read|does not say which splits|is not JSON|no folders beside"
        ):
            splits_of(folder) and rows_of(folder)


def test_what_is_in_memory():
    import datasets
    import pandas

    columns = {k: [r[k] for r in GOOD] for k in GOOD[0]}
    sources = [
        columns,
        pandas.DataFrame(GOOD),
        datasets.Dataset.from_list(GOOD),
        datasets.Dataset.from_list(GOOD).to_iterable_dataset(),
        (r for r in GOOD),
        {"train": GOOD, "test": GOOD[:1]},
        {"train": datasets.Dataset.from_list(GOOD)},
        datasets.DatasetDict({"train": datasets.Dataset.from_list(GOOD)}),
    ]
    for source in sources:
        assert list(rows_of(source)) == GOOD
    assert splits_of({"train": GOOD, "test": GOOD[:1]}) == ["train", "test"]
    assert len(read({"train": GOOD, "test": GOOD[:1]}, split="test")) == 1
    assert splits_of(columns) == []
    frame = pandas.DataFrame({"text": ["a", "b", None], "label": [0, 1, None]})
    with pytest.raises(AddendaError, match="row 2: column 'text' holds None"):
        read(frame.assign(label=["x", "y", "z"]), task="label")
    with pytest.raises(AddendaError, match=r"row 0: column 'label' holds 0\.0, and it may be"):
        read(frame, task="label")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"question": ["a", "b"], "answer": ["c"]}, "lengths are 'question' 2, 'answer' 1"),
        ({"question": "q", "answer": "a"}, r"'question' holds str\. One row alone is given as a list"),
        ({"train": GOOD}, "no split 'test'; it has train"),
        ({}, "at least one example"),
        (lambda: GOOD, "got function. Call it"),
        (b"d.csv", "got bytes"),
        (["some text"], "row 0: expected an object with named columns, got str"),
        ([{"text": "all that there is"}], "lacks a column for question=, answer="),
    ],
)
def test_what_is_no_data(source, says):
    with pytest.raises(AddendaError, match=says):
        read(source, split="test" if "no split" in says else "train")


def test_text_alone_out_of_a_generator_is_refused():
    import datasets

    made = datasets.Dataset.from_generator(lambda: iter([{"text": "all that there is"}]))
    with pytest.raises(AddendaError, match="lacks a column for question=, answer="):
        read(made)


def test_columns_have_names():
    with pytest.raises(AddendaError, match="columns, whose names are texts; got the key 1"):
        rows_of({1: ["a"], "b": ["c"]})
