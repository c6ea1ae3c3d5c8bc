import json
import os

import pytest

from addenda.core.base.errors import AddendaError
from addenda.data.examples import Chat, Data, Labelled, Pair
from addenda.data.read import read
from tiny_models import SUMS


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_every_source_gives_the_same_examples(tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    memory = read(SUMS)
    write(tmp_path / "d.jsonl", SUMS)
    (tmp_path / "d.json").write_text(json.dumps(SUMS))
    (tmp_path / "d.csv").write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in SUMS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(SUMS), tmp_path / "d.parquet")
    made = datasets.Dataset.from_list(SUMS)
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "folder"))
    for name in ("d.jsonl", "d.json", "d.csv", "d.parquet", "folder"):
        assert read(tmp_path / name).digest == memory.digest, name
    assert read(made).digest == memory.digest
    assert len(read(tmp_path / "folder", split="test")) == 1
    assert memory.examples[9] == Pair("1+1=?", "2")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Pair("p", "c")),
        ({"instruction": "i", "input": "x", "output": "o"}, Pair("i\n\nx", "o")),
        ({"instruction": "i", "input": "", "output": "o"}, Pair("i", "o")),
        ({"question": "q", "answer": 4}, Pair("q", "4")),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            Chat((("user", "u"), ("assistant", "a"))),
        ),
    ],
)
def test_columns_are_found_by_their_usual_names(row, expected):
    assert read([row]).examples == (expected,)


def test_columns_can_be_named():
    assert read([{"frage": "q", "antwort": "a"}], question="frage", answer="antwort").examples == (Pair("q", "a"),)
    assert read([{"question": "q", "gold": "a"}], answer="gold").examples == (Pair("q", "a"),)


def test_labels_keep_their_names():
    data = read([{"text": "a", "label": "spam"}, {"text": "b", "label": "ham"}], task="label")
    assert data.labels == ("ham", "spam")
    assert data.examples[0] == Labelled("a", 1)
    assert read([{"text": "a", "label": 2}], task="label").labels == ("0", "1", "2")
    values = read([{"text": "a", "label": 0.5}], task="label")
    assert values.labels is None
    assert values.examples[0].label == 0.5
    paired = read([{"premise": "a", "hypothesis": "b", "label": 0}], task="label")
    assert paired.examples[0].pair == "b"
    ordered = read([{"text": "a", "label": "spam"}], task="label", labels=["spam", "ham"])
    assert ordered.examples[0].label == 0


def test_a_question_is_never_in_both_parts():
    data = read(SUMS + [{"question": r["question"], "answer": "again"} for r in SUMS])
    rest, held = data.split(0.25, seed=1)
    assert not {e.key for e in rest.examples} & {e.key for e in held.examples}
    assert len(rest) + len(held) == len(data)
    assert 8 <= len(held) <= 56
    assert data.split(0.25, seed=1)[1].examples == held.examples
    assert data.split(0.25, seed=2)[1].examples != held.examples


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([], {}, "at least one example"),
        ([{"frage": "q", "answer": "a"}], {}, "lacks a column for question=.*'frage', 'answer'"),
        ([{"question": "q", "answer": "a"}], {"answer": "anser"}, "answer='anser' Did you mean 'answer'"),
        (SUMS[:1] * 3 + [{"question": "q", "answer": " "}], {}, "1 of 4 rows .* row 3: column 'answer' is empty"),
        ([{"question": "q", "answer": None}], {}, "column 'answer' holds None"),
        ([{"messages": [{"role": "user", "content": "u"}]}], {}, "must end with an assistant's answer"),
        ([{"messages": "hello"}], {}, "a list of messages was expected"),
        ([{"text": "t", "label": "x"}], {"task": "label", "labels": ["a", "b"]}, "holds 'x', expected one of 'a', 'b'"),
        ([{"text": "t"}], {"task": "label"}, "lacks a column for label="),
        (["text"], {}, "row 0: expected an object with named columns, got str"),
        (7, {}, "got int"),
    ],
)
def test_bad_rows_are_told(rows, options, says):
    with pytest.raises(AddendaError, match=says):
        read(rows, **options)


def test_bad_files_are_told(tmp_path):
    write(tmp_path / "d.jsonl", SUMS)
    with pytest.raises(AddendaError, match=r"no data at .*Did you mean 'd.jsonl'"):
        read(tmp_path / "d.json")
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "answer": "a"}\n{oops\n')
    with pytest.raises(AddendaError, match="line 2 is not JSON"):
        read(tmp_path / "bad.jsonl")
    (tmp_path / "d.xml").write_text("<a/>")
    with pytest.raises(AddendaError, match=r"has the ending '.xml'"):
        read(tmp_path / "d.xml")
    for name in ("pipe.jsonl", "pipe.csv", "pipe.parquet"):  # it would be waited for
        os.mkfifo(tmp_path / name)
        with pytest.raises(AddendaError, match="a device or a pipe"):
            read(tmp_path / name)
    with pytest.raises(AddendaError, match=r"holds no validation.jsonl"):
        read(tmp_path, split="validation")
    with pytest.raises(AddendaError, match="leaves one part empty"):
        read(SUMS[:1]).split(0.5)


def test_data_passes_through():
    data = Data((Pair("q", "a"),), "pair")
    assert read(data) is data


LABELLED, PAIRED = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], [{"question": "a", "answer": "b"}]
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


@pytest.mark.parametrize(("rows", "task", "options"), [
    (PAIRED, "causal", {"text": "question"}), (PAIRED, "causal", {"label_kind": "class"}),
    (PAIRED, "causal", {"image": "question"}),
    (CHATS, "causal", {"messages": "messages", "answer": "messages"}), (LABELLED, "label", {"question": "text"}),
    (LABELLED, "label", {"image": "text"}), (LABELLED, "label", {"messages": "text"}),
    (read(LABELLED, task="label"), "label", {"text": "text"}), (read(PAIRED), "causal", {"question": "question"}),
    (LABELLED, "image", {"question": "text"}), (LABELLED, "image", {"text": "text"}),
])  # fmt: skip
def test_columns_that_nothing_reads_are_refused(rows, task, options):
    if "answer" in options:
        with pytest.raises(AddendaError, match="answer='messages' cannot be used"):
            read(rows, task=task, **options)
        return
    (name,) = options
    with pytest.raises(AddendaError, match=f"{name}='.*' cannot be used for"):
        read(rows, task=task, **options)


def test_a_file_has_no_part_of_another_name(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n', encoding="utf-8")
    assert len(read(file, split="test")) == 1
    with pytest.raises(AddendaError, match="one file, which has no part split='tset'"):
        read(file, split="tset")


def test_places_of_examples_are_lines_of_the_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"question": "a", "answer": "b"}\n\n{"question": "c", "answer": "d"}\n', encoding="utf-8")
    made = read(file)
    assert [made.place(i) for i in range(2)] == ["line 2", "line 4"]
    assert made.digest == read([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]).digest
