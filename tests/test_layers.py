"""The floors of the package: nothing imports upward, no files import each other, no room is overfull."""

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
