"""A record that anybody may have written: a wrong value in any field is named, or shown as it is; never a traceback."""

import copy
import io
import json
import random

import pytest
from rich.console import Console
from tests.comparing.test_report import build

from addenda import AddendaError
from addenda.comparing.grow import open_record
from addenda.comparing.record import Record
from addenda.comparing.report import page, summary

WRONG = (
    None, True, -1, 0, 1.5, 10**290, -(10**290), 1e300, "", "text", "\x1b[31m [/red] \ud800 \u202e", "x" * 300_000,
    [], [1], [[1, 2, 3]], [["a", "b"]], {}, {"a": "b"}, {"\x1b[2J": []},
)  # fmt: skip


def fields_of(value, path=()):
    """The path of every field, however deep; of a list its first entry."""
    yield path
    for key, held in (
        value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    ):
        yield from fields_of(held, (*path, key))


def put(value, path, wrong):
    """A copy with another value at a path. `del`: without it."""
    made = at = copy.deepcopy(value)
    for key in path[:-1]:
        at = at[key]
    if wrong is del_:
        del at[path[-1]]
    else:
        at[path[-1]] = wrong
    return made


del_ = object()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "r"
    build(path, seeds=(0,), items=20)
    config = json.loads((path / "config.json").read_text())
    config["data"]["general"] = {"name": "text", "sha256": "ab", "python": "3.11", "windows": 2, "length": 8}
    for file in [*(path / "trials").glob("control-base.json"), *(path / "trials").glob("final-*.json")]:
        run = json.loads(file.read_text())
        file.write_text(json.dumps(run | {"general": {"loss": 2.5, "losses": [2.0, 3.0]}}))
    config["identity"], config["looks"] = {"methods": {}, "of": "steps", "budget": 40}, []
    (path / "config.json").write_text(json.dumps(config))
    return path


def shown(path):
    """As `addenda report` does, without the plots, whose cost is the same for every value."""
    record = Record.read(path)
    out = io.StringIO()
    Console(file=out, width=140).print(summary(record))
    assert "\x1b" not in out.getvalue()
    return record


@pytest.mark.parametrize("file", ["config.json", "a final run", "a search", "a control"])
def test_a_wrong_value_in_any_field(whole, file, monkeypatch):
    monkeypatch.setattr("addenda.comparing.figures.curves", lambda *_: [])
    monkeypatch.setattr("addenda.comparing.figures.frontiers", lambda *_: [])
    prefix = {"a final run": "final", "a search": "search", "a control": "control"}.get(file, "")
    at = whole / file if not prefix else sorted((whole / "trials").glob(f"{prefix}*.json"))[0]
    good, draw = at.read_text(), random.Random(0)
    value = json.loads(good)
    refused = read = longest = 0
    try:
        for path in [p for p in fields_of(value) if p]:
            for wrong in draw.sample((del_, *WRONG), 4 if prefix else 1):
                at.write_text(json.dumps(put(value, path, wrong)))
                try:
                    record = shown(whole)
                    page(record).encode()
                    read += 1
                    open_record(whole)
                except AddendaError as error:
                    refused += 1
                    longest = max(longest, len(str(error)))
    finally:
        at.write_text(good)
    assert refused and read and longest < 3000


@pytest.mark.parametrize(
    ("path", "wrong", "said"),
    [
        (("losses", 0, 1), "2.0", r"losses\[0\]\[1\]: expected a number, came '2.0'"),
        (("losses", 0), [1, 2.0, 3.0], r"losses\[0\]: expected a pair"),
        (("validation",), "text", "validation: expected a list"),
        (("seconds",), 10**290, "seconds: expected a number"),
        (("rate",), 0, "rate: expected a positive number"),
        (("rate",), None, "rate"),
        (("steps",), 1.5, "steps: expected an integer"),
        (("test", "accuracy"), True, "test.accuracy: expected a number"),
        (("test", "loss"), [], "test.loss: expected a number"),
        (("note",), ["x"], "note: expected text"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_field(whole, path, wrong, said):
    at = sorted((whole / "trials").glob("final*.json"))[0]
    good = at.read_text()
    try:
        at.write_text(json.dumps(put(json.loads(good), path, wrong)))
        with pytest.raises(AddendaError, match=f"{at.name}: .*{said}"):
            Record.read(whole)
    finally:
        at.write_text(good)


def test_a_value_that_is_nested_deeply_is_refused(whole):
    at = whole / "config.json"
    good = at.read_text()
    try:
        for deep in (100, 100_000):
            at.write_text(good.replace('"a cpu"', "[" * deep + "]" * deep))
            with pytest.raises(AddendaError, match="nested"):
                Record.read(whole)
    finally:
        at.write_text(good)


def test_markup_and_escapes_are_shown_as_text(whole, capsys):
    at = whole / "config.json"
    good = at.read_text()
    config = json.loads(good)
    config["title"] = config["methods"]["lora"]["title"] = "a [/red] \x1b]0;b\x07 \u202e"
    config["notes"] = ["\x1b[2J [/b]"]
    try:
        at.write_text(json.dumps(config))
        record = Record.read(whole)
        out = io.StringIO()
        Console(file=out, width=200, force_terminal=True).print(summary(record))
        assert "a [/red] \\x1b]0;b\\x07 \\u202e" in out.getvalue() and "\x1b]0" not in out.getvalue()
        text = page(record).encode().decode()
        assert "\x1b" not in text and "\\x1b[2J [/b]" in text
    finally:
        at.write_text(good)
