"""What others have written is shown as text, by everything that writes: pages, cards, figures, tables, the terminal."""

import io
import json
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from rich.console import Console

import addenda as ad
from addenda.cli.common import say, tell
from addenda.comparing import figures, report
from addenda.comparing.entries import Config, TrialRecord
from addenda.comparing.live import Board
from addenda.comparing.record import Record
from addenda.compressing.report import write_report
from addenda.core.base.markdown import code, fenced
from addenda.train.card import card_of
from tiny_models import make_llama

HOSTILE = {
    "script": "<script>alert(1)</script>",
    "attribute": "\" onload='alert(1)' x=\"",
    "close": "</style></title></svg><img src=x>",
    "entity": "&lt;b&gt;&#x3c;i&#x3e;",
    "link": "[x](javascript:alert(1)) <javascript:x>",
    "template": "{{7*7}}{% for %}${7*7}",
    "markup": "[red]a[/red][/] [link=http://x]b[/link]",
    "escape": "\x1b[31mred\x1b]0;title\x07\x9b2J",
    "mathtext": r"$\frac{1}{0}$ $",
    "lines": "a\r\n---\nlicense: mit\n---\n```\n# head",
    "bidi": "\u202eabc\u2066\u200b\ufeff",
    "surrogate": "\ud800",
    "nul": "a\0b",
    "formula": "=cmd|' /C calc'!A0",
    "ticks": "`a`` b```\n```",
    "row": "a | b \\| c",
    "yaml": "a: &x [*x]\n!!python/name:os.system",
}


class Page(HTMLParser):
    """The tags of a page with the names of their attributes, and where their values lead."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[tuple[str, str]] = set()
        self.leads: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags |= {(tag, name) for name, _ in attrs} | {(tag, "")}
        self.leads |= {v or "" for k, v in attrs if k in ("href", "src", "xlink:href", "action", "data")}


def moves(text: str) -> list[str]:
    """The characters that control a terminal or are not seen, joiners of letters left out."""
    hidden = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    return [hex(ord(c)) for c in text if unicodedata.category(c) in hidden and c not in "\n\t\u200c\u200d"]


def record_of(path, word: str) -> Record:
    """A comparison of two methods whose every free text is the word."""
    config = Config.of({
        "title": word, "created": "2025", "command": word,
        "model": {"name": word, "parameters": 100, "dtype": word},
        "data": {"name": word, "description": word, "sizes": {"test": 8}, "hashes": {"test": word}, "metric": word,
                 "example": {word: word}},
        "budget": {"kind": "steps", "value": 4, "steps": 4, "batch": 1},
        "methods": {k: {"title": f"{word}{k}", "options": {word: word}, "hypothesis": word, "trainable": n}
                    for k, n in (("lora", 10), ("svft", 20))},
        "seeds": [0, 1], "versions": {word: word}, "hardware": {word: word}, "notes": [word],
    })  # fmt: skip
    record = Record.write_config(path, config)
    for arm, items in (("lora", "01010111"), ("svft", "11110000")):
        for seed in (0, 1):
            test = {"accuracy": items.count("1") / 8, "loss": 1.0, "items": items}
            record = record.write_trial(TrialRecord.of({
                "method": arm, "seed": seed, "stage": "final", "rate": 1e-3, "steps": 4, "test": test, "status": "ok",
                "note": word, "losses": [[1, 2.0], [4, 1.0]], "trainable": 10, "step_seconds": 0.1,
            }))  # fmt: skip
    return record


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Page:
    return Page(report.page(record_of(tmp_path_factory.mktemp("plain") / "r", "plain")))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_comparison(tmp_path, plain, kind):
    word = HOSTILE[kind].encode("utf-8", "replace").decode()  # a file cannot hold half a character
    record = record_of(tmp_path / "record", word)
    text = report.page(record)
    page = Page(text)
    assert page.tags <= plain.tags, page.tags - plain.tags
    assert all(lead.startswith("#") for lead in page.leads), page.leads
    assert "<script" not in text and not any(name.startswith("on") for _, name in page.tags)
    assert not moves(text)
    out = io.StringIO()
    console = Console(file=out, width=400)
    console.print(report.summary(record))
    board = Board(console)
    board.trial(word, "final", 0, 1e-3)
    console.print(board.table())
    board.say(word)
    assert not moves(out.getvalue())
    if kind == "markup":
        assert out.getvalue().count("[red]a[/red]") >= 4  # as it stands: no colour, and not lost


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_terminal(capsys, kind):
    say(HOSTILE[kind])
    tell(HOSTILE[kind])
    said = capsys.readouterr()
    assert not moves(said.out + said.err)
    assert said.out.strip() and said.err.strip()


def outside_of_code(page: str) -> str:
    """What of a page of Markdown is no code: fences first, then spans."""
    kept, fence = [], ""
    for line in page.split("\n"):
        mark = re.match(r" {0,3}(`{3,})(.*)$", line)
        if fence:
            fence = "" if mark and len(mark[1]) >= len(fence) and not mark[2].strip() else fence
        elif mark and "`" not in mark[2]:
            fence = mark[1]
        else:
            kept.append(line)
    assert not fence, "a fence that never closes"
    return re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", "\n".join(kept))


@pytest.mark.parametrize("kind", HOSTILE)
def test_cards(tmp_path, kind):
    word = HOSTILE[kind]
    run = {
        "base": word, "options": {"targets": word, "batch": 8, "rate": 1e-3, "seed": 0, "dtype": "float32"},
        "data": {"train": word, "form": "pair", "examples": 9, "digest": "0" * 64, "labels": None},
        "losses": [[1, 2.0], [2, 1.0]], "steps": 2, "trainable": 10, "tokens": 0, "before": None, "after": None,
        "peak_memory_above_model": None,
    }  # fmt: skip
    model = make_llama()
    card = card_of(ad.attach(model, "lora:rank=2"), run)
    other = card_of(
        ad.attach(make_llama(), "lora:rank=2"), run | {"base": "plain", "data": run["data"] | {"train": "plain"}}
    )
    assert not moves(card) and card.encode()
    assert card.count("\n") == other.count("\n")
    shown = outside_of_code(card.partition("\n---\n")[2])
    for bad in ("<script", "<img", "onload", "](", "license", "javascript", "# head"):
        assert bad not in shown, shown


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_compressions_page(tmp_path, kind):
    class Said:
        source = f"/tmp/{HOSTILE[kind]}"

        def __str__(self):
            return f"first\n{HOSTILE[kind]}\nlast"

    import addenda.compressing.report as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "asdict", lambda _: {"source": Said.source.encode("utf-8", "replace").decode()})
        write_report(tmp_path, Said())  # type: ignore[arg-type]
    page = (tmp_path / "README.md").read_text()
    json.loads((tmp_path / "compress.json").read_text())
    shown = outside_of_code(page)
    assert not moves(page)
    for bad in ("<script", "<img", "onload", "](", "license", "javascript", "# head"):
        assert bad not in shown, shown


@pytest.mark.parametrize("kind", HOSTILE)
def test_code_and_fences_close(kind):
    assert outside_of_code(f"a {code(HOSTILE[kind])} b") == "a  b"
    assert outside_of_code("\n".join(["a", *fenced(HOSTILE[kind], "text"), "b"])) == "a\nb"
    assert figures._width(HOSTILE[kind].replace("\ud800", ""), 7) >= 0
