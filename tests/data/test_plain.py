"""Plain texts out of lines, rows and lists; what is no text is said with its line."""

import json

import pytest

from addenda.core.base.errors import AddendaError
from addenda.data.read import read


def texts(source, **options):
    return [e.text for e in read(source, task="masked", **options).examples]


def test_lines_columns_and_lists_are_texts(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffEin Satz.\r\n\n  \nNoch einer.\n".encode())
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": i, "sentence": f"Satz {i}"}) for i in range(3)))
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "train.txt").write_text("eins\nzwei\n")
    assert texts(tmp_path / "a.txt") == ["Ein Satz.", "Noch einer."]
    assert texts(tmp_path / "a.jsonl") == ["Satz 0", "Satz 1", "Satz 2"]
    assert texts(folder) == ["eins", "zwei"]
    assert texts(["a b", "c"]) == ["a b", "c"]
    assert texts([{"other": "x"}], text="other") == ["x"]
    assert read(tmp_path / "a.txt", task="masked").place(1) == "line 4"
    (tmp_path / "b.txt").write_text("one \u2028two\nthree \x0c four\x85five\n", encoding="utf-8")
    assert texts(tmp_path / "b.txt") == ["one \u2028two", "three \x0c four\x85five"]


def test_a_share_is_held_out_by_text(tmp_path):
    data = read([f"text {i % 40}" for i in range(80)], task="masked")
    rest, held = data.split(0.25)
    assert not {e.text for e in rest.examples} & {e.text for e in held.examples}
    assert len(rest) + len(held) == 80 and data.form == "text"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (" \n\n", r"a\.txt holds no text"),
        (b"\xff\xfe", r"a\.txt cannot be read as text in UTF-8"),
        ([{"label": 1}], "lacks a column for text="),
        ([{"text": "a"}, {"text": " "}], r"row 1: column 'text' is empty"),
        ([{"text": "a"}, {"text": None}], "row 1: column 'text' holds"),
        ([], "holds no text"),
        (None, "nosuchuser"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, source, message):
    if isinstance(source, str | bytes):
        path = tmp_path / "a.txt"
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
        source = path
    source = "~nosuchuser/a.txt" if source is None else source
    with pytest.raises(AddendaError, match=message):
        read(source, task="masked")
    with pytest.raises(AddendaError, match="label='x' cannot be used for plain texts"):
        read(["a"], task="masked", label="x")
