"""The page: it holds everything, asks for nothing, hides nothing, and bears incomplete records."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from addenda.comparing import figures, report, words
from addenda.comparing.entries import Config, TrialRecord
from addenda.comparing.record import Record

METHODS = {"lora": ("LoRA", 0.55), "svft": ("SVFT", 0.53), "loldu": ("LoLDU <½ $x_1$>", 0.30), "full": ("Full", 0.57)}


def build(path, seeds=(0, 1), items=120, search=True, ood=True, controls=True, lost=(), skip=(), budget=None):
    """A small record on disk. `lost`: (method, seed) that diverged; `skip`: methods that have not run yet."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 0.2, items)

    def split(accuracy):
        right = rng.random(items) < accuracy + difficulty
        return {"accuracy": right.mean(), "loss": 1.0, "items": "".join("01"[int(r)] for r in right)}

    config = Config.of(
        {
            "title": "Sums & differences",
            "created": "2025-06-01",
            "command": "addenda compare --methods lora,svft",
            "model": {"name": "tiny", "parameters": 1_000_000, "dtype": "bfloat16"},
            "data": {
                "name": "sums",
                "description": "see https://example.org",
                "sizes": {"train": 9, "test": items},
                "hashes": {"test": "sha256:abcdef"},
                "metric": "exact match",
                "example": {"question": "1 + 1 < 3?", "answer": "yes"},
            },
            "budget": budget or {"kind": "steps", "value": 40, "steps": 40, "batch": 16},
            "methods": {
                k: {"title": t, "options": {"rank": 8}, "hypothesis": f"{k} holds", "trainable": 1000 * (i + 1)}
                for i, (k, (t, _)) in enumerate(METHODS.items())
            },
            "seeds": list(seeds),
            "search": {"kind": "successive halving", "steps": 10} if search else None,
            "versions": {"torch": "2.13.0"},
            "hardware": {"cpu": "a cpu", "cores": 2},
            "predicted_seconds": 100,
            "notes": ["a note to keep"],
        }
    )
    record = Record.write_config(path, config)
    for name, accuracy in (("base", 0.1), ("base 8-shot", 0.25)) if controls else ():
        t = {"method": name, "seed": None, "stage": "control", "test": split(accuracy), "status": "ok"}
        record = record.write_trial(TrialRecord.of(t | ({"ood": split(accuracy)} if ood else {})))
    for arm, (_, accuracy) in METHODS.items():
        if arm in skip:
            continue
        for factor in (0.5, 1.0, 2.0) if search else ():
            tried = {"method": arm, "seed": 0, "stage": "search", "rate": 1e-3 * factor, "steps": 10, "status": "ok"}
            tried |= {"validation": [[10, {"loss": 1 / factor, "accuracy": 0.2}]]}
            record = record.write_trial(TrialRecord.of(tried))
        for seed in seeds:
            failed = (arm, seed) in lost
            trial = {
                "method": arm,
                "seed": seed,
                "stage": "final",
                "rate": 2e-3 if arm == "lora" else 1e-3,
                "steps": 40,
                "losses": [[s, float("nan") if failed and s > 20 else 3 / s] for s in range(1, 41)],
                "validation": [[s, {"loss": 1.0, "accuracy": s / 80}] for s in (20, 40)],
                "step_seconds": 0.4,
                "peak_bytes": 4e8,
                "trainable": 1000,
                "adapter_bytes": 4000,
                "seconds": 30.0,
                "status": "diverged" if failed else "ok",
                "note": "loss not finite after step 20" if failed else "",
            }
            if not failed:
                trial |= {"test": split(accuracy)} | ({"ood": split(accuracy / 2)} if ood else {})
            record = record.write_trial(TrialRecord.of(trial))
    return record


class Page(HTMLParser):
    """Collects what a browser would load, ids, tags and text; fails on tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.loads, self.ids, self.tags, self.words, self.open = [], [], set(), [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action") and not value.startswith("#"):
                self.loads.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"[ \n]+", " ", " ".join(self.words))


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path):
    record = build(tmp_path / "run")
    file = report.write_report(tmp_path / "run")
    assert file == tmp_path / "run" / "report.html"
    html = file.read_text(encoding="utf-8")
    page = Page(html)
    assert page.loads == []
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert re.findall(r"https?://\S+", html) == ["https://example.org</span></dd>"]  # the data's own words, no link
    assert "@import" not in html
    assert all(u.startswith("#") for u in re.findall(r"url\(\s*['\"]?([^)]*)", html))
    for title, _ in METHODS.values():
        assert page.text.count(title) >= 4
    for piece in ("Sums & differences", report.answer(record), "Base, zero-shot", "Base, 8-shot", "svft holds",
                  "sha256:abcdef", "1 + 1 < 3?", "torch", "2.13.0", "a cpu", "addenda compare --methods lora,svft",
                  "a note to keep", "Holm", "rank 8"):  # fmt: skip
        assert piece in page.text
    assert html == report.page(Record.read(tmp_path / "run"))


def test_the_winner_at_the_edge_of_the_grid_is_named(tmp_path):
    text = Page(report.page(build(tmp_path))).text
    assert "at the edge of what was tried for LoRA: one beyond" in text
    assert text.count("at the edge of the grid") == 1
    assert "No learning-rate search" not in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seeds": (0,)}, "No arm has two seeds"),
        ({"ood": False}, "a note to keep"),
        ({"controls": False}, "lead and cannot be told apart"),
        ({"search": False}, "No learning-rate search was done: one that did not tune per method says so."),
        ({"lost": {("svft", 1)}}, "SVFT 1 of 2 diverged"),
        ({"lost": {("svft", 0), ("svft", 1)}}, "diverged: seed 0, 1"),
        ({"skip": ("svft",)}, "SVFT: 0 of 2 runs have finished."),
        ({"skip": ("svft", "loldu", "full")}, "LoRA reaches"),
        ({"skip": tuple(METHODS)}, "no method has finished yet"),
        ({"seeds": (0,), "search": False, "ood": False, "controls": False, "lost": {("lora", 0)}}, "diverged"),
    ],
)
def test_incomplete_records_are_shown_as_they_are(tmp_path, options, expected):
    record = build(tmp_path, **options)
    page = Page(report.page(record))
    assert expected in page.text
    assert all(title in page.text for title, _ in METHODS.values())
    assert ("Out of distri" in page.text) == options.get("ood", True)
    console = Console(file=io.StringIO(), width=160)
    console.print(report.summary(record))
    assert all(title in console.file.getvalue() for title, _ in METHODS.values())


def test_a_lost_run_is_never_hidden(tmp_path):
    record = build(tmp_path, lost={("svft", 1)})
    text = Page(report.page(record)).text
    assert "loss not finite after step 20" in text
    assert "SVFT: 1 of 2 runs diverged" in text
    assert report.answer(record).endswith("SVFT diverged in some run.")


def test_the_answer_in_plain_words(tmp_path):
    answer = report.answer(build(tmp_path, items=300))
    assert answer.startswith("On sums, at 40 steps, ")
    assert "LoRA and SVFT lead and cannot be told apart" in answer or "LoRA leads" in answer
    assert "2 of 3 methods beat the better base control (base, 8-shot," in answer
    assert "full fine-tuning, the other control, gets" in answer
    assert answer.count(".") == 1


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"kind": "seconds", "value": 600}, "in 600 seconds of training"),
        ({"kind": "parameters", "value": 100_000, "steps": 40}, "at about 100 k trainable parameters"),
        ({"kind": "steps", "value": 1500}, "at 1,500 steps"),
    ],
)
def test_budgets_in_words(tmp_path, budget, words):
    assert report.budget(build(tmp_path, budget=budget, search=False)) == words


def test_numbers_are_rounded_for_people():
    assert [words.count(n) for n in (None, 7, 999, 1000, 24_576, 999_600, 134_515_008)] == [
        "–", "7", "999", "1.00 k", "24.6 k", "1.00 M", "135 M"
    ]  # fmt: skip
    assert [words.size(n) for n in (0, 98_300, 1.62e9)] == ["0 B", "98.3 kB", "1.62 GB"]
    assert [words.duration(s) for s in (0.412, 2.5, 75, 7400)] == ["412 ms", "2.5 s", "1 min 15 s", "2 h 3 min"]
    assert [words.points(x) for x in (0.031, -0.0312, -0.0001)] == ["+3.1", "−3.1", "0.0"]
    assert [words.rate(r) for r in (1e-3, 3.3e-4, 0.02, 1.0)] == ["1e-3", "3.3e-4", "2e-2", "1e0"]


def test_long_curves_are_thinned_and_gaps_stay_gaps():
    thin = figures.thin([[s, 1.0] for s in range(1000)])
    assert len(thin) == 200
    assert np.allclose(thin[:, 1], 1)
    assert np.isnan(figures.thin([[1, None], [2, 1.0]])[0, 1])
    assert figures.thin(None).shape == (0, 2)
