"""What `python -m bench` does around a measurement: the record, the page, and what this machine cannot measure."""

import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("peft")

from bench import __main__ as command


def lacking(given):
    raise SystemExit("no llama.cpp here.")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Return what calls the command with two measurements, of which the first cannot be made here, in tmp_path."""
    made = {"attach": lambda given: ({"lora": 0.5}, "lora: 0.5 s"), "combine": lambda given: ({"ties": 2}, "ties: 2 s")}
    for name, run in {"gguf": lacking, **made}.items():
        monkeypatch.setitem(sys.modules, f"bench.{name}", SimpleNamespace(run=run))
    monkeypatch.setattr(command, "COMMANDS", ("gguf", "attach", "combine"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--out", str(tmp_path / "records")])
        command.main()

    return call


def test_all_goes_on_past_what_cannot_be_measured_here(bench, tmp_path, capsys):
    page = tmp_path / "speed.md"
    page.write_text("# Speed\n\n<!-- attach -->\nold\n<!-- end -->\nrest\n")
    with pytest.raises(SystemExit, match=r"Not measured: gguf\."):
        bench("all", "--docs", str(page))
    assert "gguf was not measured: no llama.cpp here." in capsys.readouterr().err
    text = page.read_text()  # of the tables the page has a mark for one
    assert text.startswith("# Speed\n\n<!-- attach -->\nlora: 0.5 s\n\n*") and text.endswith("<!-- end -->\nrest\n")
    assert "ties" not in text and "old" not in text
    assert {p.name for p in (tmp_path / "records").iterdir()} == {"attach.json", "combine.json"}
    assert json.loads((tmp_path / "records" / "combine.json").read_text())["found"] == {"ties": 2}


def test_one_that_was_named_is_measured_or_the_end(bench):
    with pytest.raises(SystemExit, match=r"^no llama.cpp here\.$"):
        bench("gguf")


@pytest.mark.parametrize(("what", "mark"), [("attach", "attach"), ("all", "NAME")])
def test_a_page_without_the_mark_is_refused_before_anything_is_measured(bench, tmp_path, what, mark):
    page = tmp_path / "page.md"
    page.write_text("# No mark\n")
    with pytest.raises(SystemExit, match=f"has no <!-- {mark} -->"):
        bench(what, "--docs", str(page))
    assert page.read_text() == "# No mark\n" and not (tmp_path / "records").exists()
