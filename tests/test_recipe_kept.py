"""A recipe's folder: the committed records are read and concluded from; others go on only where they are the same."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from recipes import lord
from recipes.claims import read_claims
from recipes.kept import Runs, is_old, parsed, put_table
from recipes.work import folders

from addenda import AddendaError
from addenda.comparing.record import Record
from addenda.comparing.stats import analyse
from addenda.core.disk.lock import alone

ROOT = Path(__file__).parents[1]


def options(*argv: str, monkeypatch) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("nowhere"))
    parser.add_argument("--model", default="splade-tiny")
    parser.add_argument("--seeds", type=int, default=3)
    monkeypatch.setattr(sys, "argv", ["recipe", *argv])
    return parsed(parser)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_old_record_of_lord_is_read_and_concluded_from(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = ROOT / "records" / "recipes" / "lord"
    for loads in ("Subject", "load_model"):
        monkeypatch.setattr(f"recipes.lord.{loads}", lambda *a, **k: pytest.fail("something was run"), raising=False)
    before, said = tree(folder), json.loads((folder / "verdict.json").read_text())["findings"]
    kept, conclude = [], lord.conclude
    monkeypatch.setattr(lord, "conclude", lambda given, *rest: (kept.append(rest[1]), conclude(given, *rest)))
    monkeypatch.setattr(sys, "argv", ["recipes.lord"])
    lord.main()
    assert [f.verdict for f in kept[0]] == [f["verdict"] for f in said]
    assert "only read" in capsys.readouterr().err
    assert tree(folder) == before
    monkeypatch.setattr(sys, "argv", ["recipes.lord", "--samples", "2"])
    with pytest.raises(AddendaError, match=r"only read, without --s.*another --out"):
        lord.main()


@pytest.mark.parametrize("name", ["svft", "loldu", "miss", "lora_pro", "one_bit"])
def test_an_old_comparison_is_still_read_and_analysed(name):
    record = Record.read(ROOT / "records" / "recipes" / name)
    found = analyse(record)
    assert record.config.identity is None and set(record.config.methods) <= set(found.test)


def test_a_record_of_a_recipe_stays_small():
    """Items of every run, item losses of three seeds, training losses in 120 blocks."""
    for file in (ROOT / "records" / "recipes2").glob("*/*/config.json"):
        size = sum(p.stat().st_size for p in file.parent.rglob("*.json"))
        assert size < 3_000_000, (file.parent, size)
    most = 3 * 5783 * len(", 0.123") + 20 * (5783 + 120 * len("[2400, 0.1234], ")) + 22 * 2500  # of one arm, 20 seeds
    arms = [a for a, folder in folders(read_claims())["docstrings"].items() if folder == "one-bit" and "|" not in a]
    assert len(arms) * most < 3_000_000


def test_runs_belong_to_one_identity_and_may_get_more_seeds(tmp_path, monkeypatch):
    given = options("--out", str(tmp_path / "r"), monkeypatch=monkeypatch)
    of = {"base": {"weights": "a"}, "steps": 5, "seeds": 2}
    with Runs(given, of) as runs:
        assert runs.once("one", lambda: {"x": 1}) == {"x": 1}
        with pytest.raises(AddendaError, match="Another run is under way"), Runs(given, of):
            pass
    before = tree(given.out)
    for other in (of | {"steps": 6}, of | {"base": {"weights": "b"}}, of | {"seeds": 1}, of | {"new": 1}):
        with pytest.raises(AddendaError, match="belongs to another run"), Runs(given, other):
            pass
    assert tree(given.out) == before
    given = options("--out", str(tmp_path / "r"), "--seeds", "4", monkeypatch=monkeypatch)
    with Runs(given, of | {"seeds": 4}) as runs:
        assert runs.once("one", dict) == {"x": 1}
    looks = json.loads((given.out / "identity.json").read_text())["looks"]
    assert [look["changed"] for look in looks] == [{"seeds": [2, 4]}]


def test_old_runs_are_read_and_never_added_to(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one.json").write_text('{"x": 1}')
    (tmp_path / "verdict.json").write_text('{"paper": "p", "findings": []}')
    given = options("--out", str(tmp_path), monkeypatch=monkeypatch)
    assert given.old and is_old(tmp_path)
    before = tree(tmp_path)
    with Runs(given, {}) as runs:
        assert runs.once("one", dict) == {"x": 1}
        with pytest.raises(AddendaError, match="lacks the run two"):
            runs.once("two", dict)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["verdict.json", "identity.json", "runs/notes.txt"])
def test_what_others_wrote_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(AddendaError, match="which addenda has not written"):
        options("--out", str(tmp_path), monkeypatch=monkeypatch)
    assert (tmp_path / name).read_text() == "mine"


def test_a_mistake_is_refused_beforehand(tmp_path, monkeypatch):
    for argv, said in ((["--seeds", "0"], "at least 1"), (["--out", ""], "names nothing|home|disk|folder")):
        if argv[1]:
            with pytest.raises(AddendaError, match=said):
                options(*argv, monkeypatch=monkeypatch)
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- verdicts -->\nold\n<!-- end -->\n")
    put_table(page, ["new"])
    assert page.read_text() == "head\n<!-- verdicts -->\nnew\n<!-- end -->\n"
    page.write_text("no marks")
    with pytest.raises(AddendaError, match="has no <!-- verdicts"):
        put_table(page, ["new"])
    with alone(tmp_path / "x"), pytest.raises(AddendaError, match="Another run"), alone(tmp_path / "x"):
        pass
