"""Docstrings as a task: what is read of a source, what is blotted out, and splits that share no text."""

import json
import sys
from collections import Counter

import pytest

from addenda.core.base.errors import AddendaError
from addenda.data import docstrings
from addenda.data.docstrings import KINDS, LIBRARIES, SIZES, splits

SOURCE = '''"""Of the module: not read."""

def shown(x):
    """The first paragraph of a function,
    over two lines.

    The second paragraph: not read.
    """
    def inner():
        """A function within a function, read as well."""

def _hidden():
    """Private functions are not read at all."""

class Shown:
    """A class of pandas and np that is public."""

    def method(self):
        """What the method of a DataFrame does."""

    async def later(self):
        """Few words only."""

def same():
    """This paragraph stands in it twice, alas."""

def again():
    """This paragraph stands in it twice, alas."""
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An installed library of one file, and a cache folder of its own."""
    root = tmp_path / "site"
    (root / "tinylib" / "tests").mkdir(parents=True)
    (root / "tinylib-1.0.dist-info").mkdir()
    (root / "tinylib-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tinylib\nVersion: 1.0\n")
    (root / "tinylib" / "__init__.py").write_text(SOURCE)
    (root / "tinylib" / "broken.py").write_text("def (")
    (root / "tinylib" / "tests" / "more.py").write_text('def test():\n    """Tests of the library are not read."""\n')
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    monkeypatch.setattr(docstrings, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path


def test_public_first_paragraphs_are_read_once_and_names_blotted_out(library):
    told: list[str] = []
    rows = docstrings.docstrings(["tinylib"], told.append)
    assert sorted(rows) == [
        ("A class of … and … that is public.", "tinylib", "class"),
        ("A function within a function, read as well.", "tinylib", "function"),
        ("The first paragraph of a function, over two lines.", "tinylib", "function"),
        ("What the method of a … does.", "tinylib", "method"),
    ]
    assert docstrings.docstrings(["tinylib"], told.append) == rows
    assert told == ["Reading the docstrings of tinylib 1.0, once."]


def test_a_damaged_copy_is_read_anew(library):
    rows = docstrings.docstrings(["tinylib"])
    (kept,) = (library / "cache").iterdir()
    kept.write_text(kept.read_text()[:-30])
    assert docstrings.docstrings(["tinylib"]) == rows
    assert len(json.loads(kept.read_text())) == len(rows)


def test_a_library_that_is_missing_is_named():
    with pytest.raises(AddendaError, match="The docstrings of no-such-library are part of this task"):
        docstrings.docstrings(["no-such-library"])


@pytest.fixture
def rows():
    """900 texts a library, in the order of a hash as they are read."""
    made = [(f"Text {i} of {name}.", name, KINDS[i % 3]) for name in LIBRARIES for i in range(900)]
    return sorted(made, key=lambda row: docstrings._hash(row[0]))


def test_every_split_has_as_many_of_every_class_and_shares_no_text(rows):
    made = splits(rows)
    assert {k: len(v) for k, v in made.items()} == SIZES
    seen = [e.text for part in made.values() for e in part.examples]
    assert len(set(seen)) == sum(SIZES.values())
    for part, data in made.items():
        assert set(Counter(e.label for e in data.examples).values()) == {SIZES[part] // len(LIBRARIES)}
        assert all(e.text.endswith(f" of {LIBRARIES[int(e.label)]}.") for e in data.examples)
        assert all(n > 0 for n in Counter(e.label for e in data.examples[: len(data) // 4]).values())


def test_the_second_task_is_of_texts_that_the_first_leaves_over(rows):
    few = {"train": 240, "validation": 48, "test": 96}
    first, second = (splits(rows, task, few) for task in ("library", "kind"))
    texts = [{e.text for part in made.values() for e in part.examples} for made in (first, second)]
    assert not texts[0] & texts[1]
    kinds = {text: kind for text, _, kind in rows}
    assert all(kinds[e.text] == KINDS[int(e.label)] for e in second["test"].examples)


def test_too_few_of_a_class_is_said(rows):
    with pytest.raises(AddendaError, match="There are 900 docstrings of matplotlib, and 1250 are wanted"):
        splits(rows, sizes={"train": 10_000})
