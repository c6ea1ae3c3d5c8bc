"""The general text: what every machine has, cut into windows; another where the training data is a copy of it."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from addenda import AddendaError
from addenda.data import general as module
from addenda.data.encode import Tokens
from addenda.data.encoded import IGNORE
from addenda.data.general import DOCSTRINGS, LENGTH, TOPICS, WINDOWS, copied, docstrings, general, topics, windows
from tiny_models import make_llama, make_tokenizer


@pytest.fixture(scope="module")
def model():
    return make_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def of(rows):
    return Tokens([list(r) for r in rows], [list(r) for r in rows], "causal", 0)


def test_the_docstrings_are_those_of_the_library_in_an_order_by_hash():
    text = docstrings()
    assert len(text) == module.CHARACTERS
    library = Path(sysconfig.get_path("stdlib"))
    source = "".join(file.read_text(encoding="utf-8") for file in library.glob("*.py"))
    lines = [line.strip() for line in text.splitlines()[:-1] if line.strip()]
    assert np.mean([line in source for line in lines]) > 0.9  # the others have escapes in them
    assert docstrings() is text  # read once


def test_an_order_by_hash_depends_on_each_text_alone(tmp_path, monkeypatch):
    one, other = "one " * 60, "another " * 40
    (tmp_path / "a.py").write_text(f'"""{one.strip()}"""\ndef f():\n    """{other.strip()}"""\n')
    (tmp_path / "b.py").write_text('"""too short"""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    docstrings.cache_clear()
    try:
        found = docstrings()
    finally:
        docstrings.cache_clear()
    expected = sorted((one.strip(), other.strip()), key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    assert found == "\n\n".join(expected)


def test_windows_are_alike_in_length_and_begin_as_texts_do(tokenizer, model):
    made = general("auto", tokenizer, model, of([[1, 2, 3]]))
    assert made.name == DOCSTRINGS and made.sha256 == hashlib.sha256(docstrings().encode()).hexdigest()
    assert len(made.windows) == WINDOWS and set(made.windows.lengths) == {LENGTH}
    start = tokenizer("a")["input_ids"][:1] if tokenizer.bos_token_id == tokenizer("a")["input_ids"][0] else []
    for ids, labels in zip(made.windows.ids, made.windows.labels, strict=True):
        assert ids[: len(start)] == start and labels == [IGNORE] * len(start) + ids[len(start) :]
    rows = [t for ids in made.windows.ids for t in ids[len(start) :]]
    assert rows == tokenizer(docstrings(), add_special_tokens=False)["input_ids"][: len(rows)]  # nothing left out


def test_data_that_copies_the_docstrings_gets_the_topics(tokenizer, model):
    own = tokenizer(docstrings(), add_special_tokens=False)["input_ids"]
    copies = of([own[i : i + 50] for i in range(0, 4000, 50)])
    made = general("auto", tokenizer, model, copies)
    assert made.name == TOPICS and made.sha256 == hashlib.sha256(topics().encode()).hexdigest()
    assert copied(windows(docstrings(), tokenizer), copies) > 0.9
    assert copied(windows(docstrings(), tokenizer), of([own[:10], own[7:17]])) == 0  # too short to be a copy


def test_a_file_of_ones_own_is_read_and_a_bad_one_is_said(tokenizer, model, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("a b c\n" * 4000, newline="\r\n")
    made = general(file, tokenizer, model, of([[1]]))
    assert (made.name, made.python) == ("mine.txt", None)
    assert made.sha256 == hashlib.sha256(("a b c\n" * 4000).encode()).hexdigest()  # however lines end
    file.write_text("short")
    with pytest.raises(AddendaError, match=r"at least 8 windows of 128 tokens; .*mine.txt has 0"):
        general(file, tokenizer, model, of([[1]]))
    file.write_bytes(b"\xff\xfe" * 50)
    with pytest.raises(AddendaError, match=r"UTF-8, and .*mine\.txt is none"):
        general(file, tokenizer, model, of([[1]]))
    with pytest.raises(AddendaError, match="cannot be read"):
        general(tmp_path / "absent.txt", tokenizer, model, of([[1]]))


def test_without_sources_and_topics_there_is_none(tokenizer, model, monkeypatch):
    monkeypatch.setattr(module, "docstrings", str)
    assert general("auto", tokenizer, model, of([[1]])).name == TOPICS
    monkeypatch.setattr(module, "topics", str)
    assert general("auto", tokenizer, model, of([[1]])) is None
