"""The floors of the package: nothing imports upward, no files import each other, no room is overfull."""

import re
from pathlib import Path

import layers


def test_no_file_imports_a_floor_above_it():
    assert layers.upward(layers.imports()) == []


def test_no_files_import_each_other():
    assert layers.circles(layers.imports()) == []


def test_every_file_stands_on_a_floor():
    outside = {name for name in layers.files() if not layers.floor(name)}
    assert outside == {"", "__main__", "core"}


def test_no_floor_of_the_core_is_overfull():
    for floor in layers.FLOORS:
        if floor.startswith("core."):
            inside = [name for name in layers.files() if name.startswith(f"{floor}.")]
            assert 1 <= len(inside) <= 14, floor


def test_the_reading_of_imports_sees_what_it_should(tmp_path: Path):
    """Imports in functions, of a module out of its package, under TYPE_CHECKING; a circle over three files."""
    (tmp_path / "core" / "base").mkdir(parents=True)
    (tmp_path / "train").mkdir()
    for folder in ("", "core", "core/base", "train"):
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "core/base/errors.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from addenda.train import fit\n"
    )
    (tmp_path / "train/fit.py").write_text("def f():\n    import addenda.train.loss\n")
    (tmp_path / "train/loss.py").write_text("from addenda.core.base.errors import AddendaError\n")
    graph = layers.imports(tmp_path)
    assert graph["core.base.errors"] == {"train.fit"} and graph["train.fit"] == {"train.loss"}
    assert layers.upward(graph) == [("core.base.errors", "train.fit")]
    assert layers.circles(graph) == [["core.base.errors", "train.fit", "train.loss"]]


def test_the_table_names_every_floor():
    table = layers.table()
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(layers.FLOORS)


PACKAGES = sorted({floor.split(".")[0] for floor in layers.FLOORS})
DOTTED = re.compile(rf"`(?:addenda\.)?((?:{'|'.join(PACKAGES)})\.[\w.]+)`")
PATHED = re.compile(rf"\b((?:{'|'.join(PACKAGES)})/[a-z_/]+\.py)\b")
REPO = layers.ROOT.parents[1]


def known(name: str) -> bool:
    """Whether a dotted name is a file of the package, a name that one defines, or a member of such a class."""
    files = layers.files()
    module, rest = name, []
    while module not in files:
        module, _, last = module.rpartition(".")
        rest.insert(0, last)
        if not module:
            return False
    text = files[module].read_text()
    return all(re.search(rf"\b{re.escape(part)}\b", text) for part in rest) and len(rest) < 3


def test_what_texts_name_is_there():
    """Files and definitions named in docstrings and pages: they move, and what speaks of them has to follow."""
    pages = [*REPO.glob("docs/*.md"), REPO / "README.md", REPO / "CONTRIBUTING.md"]
    texts = [*layers.files().values(), *pages, *REPO.glob("recipes/*.py"), *REPO.glob("bench/*.py")]
    texts += [path for path in REPO.glob("tests/**/*.py") if path.name != "test_layers.py"]
    assert len(texts) > 300
    gone = []
    for path in texts:
        text = path.read_text(encoding="utf-8")
        gone += [(path.name, n) for n in DOTTED.findall(text) if not known(n) and not n.endswith((".jsonl", ".csv"))]
        gone += [
            (path.name, name)
            for name in PATHED.findall(text)
            if not any((REPO / place / name).is_file() for place in ("src/addenda", "", "tests"))
        ]
    assert gone == []


def test_the_page_draws_the_floors_that_are_held():
    page = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [name.replace("/", ".") for row in rows for name in re.findall(r"`([\w/]+)`", row)]
    assert named == list(layers.FLOORS)
