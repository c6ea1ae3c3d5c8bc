"""The head of a report: what to take, then what is known of it against each other arm, each in one place."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from tests.comparing.test_choose import a_record
from tests.comparing.test_report import Page

from addenda.comparing import report
from addenda.comparing.entries import LookTaken, Until
from addenda.comparing.head import head_of
from addenda.comparing.stats import analyse

ARMS = {"lora": (0.500, (300, 30, 3)), "shira": (0.495, (100, 20, 2)), "ia3": (0.40, (1, 1, 1))}


def test_one_line_where_all_costs_agree(tmp_path):
    record = a_record(tmp_path, ARMS)
    head = head_of(record, analyse(record))
    (advice,) = head.advice
    assert advice.what == "Recommended: SHIRA, for memory (100 B), size (20 B) and time (2 s)"
    assert advice.command == head.choices["time"].command
    assert head.notes == ("A difference of less than 2 points of accuracy counts as none.",)
    assert [v.partition(" (")[0] for v in head.verdicts] == [
        "LORA better than SHIRA by 0.5 points", "SHIRA better than IA3 by 9.5 points",
        "SHIRA better than Base, zero-shot by 39.5 points",
    ]  # fmt: skip


def test_a_line_for_each_arm_where_costs_do_not_agree(tmp_path):
    arms = ARMS | {"vera": (0.497, (200, 10, 2.5))}
    record = a_record(tmp_path, arms, margin=1.0)
    head = head_of(record, analyse(record))
    assert [a.what for a in head.advice] == [
        "Recommended: SHIRA, for memory (100 B) and time (2 s)",
        "Recommended: VERA, for size (10 B)",
    ]
    assert head.notes == ("A difference of less than 1 point of accuracy counts as none.",)


def test_the_best_is_told_with_all_that_is_cheaper(tmp_path):
    record = a_record(tmp_path, {"lora": (0.5, (3, 3, 3)), "shira": (0.4, (4, 1, 1)), "ia3": (0.3, (1, 9, 9))})
    (advice,) = head_of(record, analyse(record)).advice
    assert advice.why == (
        "LORA is the best (50\N{NO-BREAK SPACE}%); of what costs less memory or size or time (IA3 and SHIRA), none is "
        "shown to be within 2 points of it.",
    )


def test_nothing_to_recommend_is_said_first(tmp_path):
    record = a_record(tmp_path, ARMS, base=0.6)
    head = head_of(record, analyse(record))
    (advice,) = head.advice
    assert (advice.what, advice.command) == ("Nothing is recommended", None)
    assert advice.why == ("None of the 3 methods is shown to beat Base, zero-shot (60\N{NO-BREAK SPACE}%), which needs "
                          "no adapter.",)  # fmt: skip
    assert len(head.verdicts) == 3, "each method against the base"
    text = Page(report.page(record)).text
    assert text.index("Nothing is recommended") < text.index("On sums, at 10 steps")


@pytest.mark.parametrize(("verdict", "words"), [
    ("better", "SHIRA better than IA3 by"), ("worse", "IA3 better than SHIRA by"),
    ("equivalent", "SHIRA and IA3 equivalent within ±2 points"),
    ("no gain", "SHIRA gains no more than 2 points over IA3"),
    ("undecided", "SHIRA and IA3 are undecided"), ("void", "IA3 is left out: it is void, every run diverged"),
])  # fmt: skip
def test_each_verdict_has_its_words(tmp_path, verdict, words):
    record = a_record(tmp_path, ARMS)
    found = analyse(record)
    turned = replace(found.between("shira", "ia3"), verdict=verdict, why="why", more_seeds=None)  # type: ignore[type-var]
    others = tuple(p for p in found.pairs if {p.a, p.b} != {"shira", "ia3"})
    void = {"ia3": "every run diverged"} if verdict == "void" else {}
    found = replace(found, pairs=(*others, turned), void=void)
    head = head_of(record, found)
    said = [*head.verdicts, *head.left_out, *(p.sentence for p in head.power)]
    assert sum(s.startswith(words) for s in said) == 1, said
    assert sum("IA3" in s for s in said) == 1, "and no other"


def test_the_page_and_the_terminal_begin_with_the_head(tmp_path):
    record = a_record(tmp_path, ARMS, command="addenda compare -m m -d d")
    html = report.page(record)
    text = Page(html).text
    first = text.index("Recommended: SHIRA, for memory (100 B), size (20 B) and time (2 s)")
    command = "addenda tune --out runs/shira --model m --data d --method shira --rate 0.003 --steps 10 --batch 4"
    assert first < text.index(command) < text.index("LORA better than SHIRA") < text.index("On sums, at 10 steps")
    assert re.search(f'<pre class="copy">{re.escape(command)}</pre>', html)
    assert text.count("less than 2 points of accuracy counts as none") == 1


def test_looks_are_told_with_the_titles_of_arms(tmp_path):
    record = a_record(tmp_path, ARMS)
    taken = LookTaken(seeds=3, when="2026-01-01", undecided=(("lora", "shira"),))
    until = Until(taken=(taken,), looks=(3, 5), seconds=(1.0, 2.0), max_minutes=1.0, stopped="5 would take too long")
    record = replace(record, config=replace(record.config, until=until))
    assert head_of(record, analyse(record)).notes[1] == (
        "Looked at with 3 seeds: 5 would take too long; undecided: LORA against SHIRA."
    )


def test_a_terminal_of_80_columns_shows_it_all(tmp_path):
    record = a_record(
        tmp_path, ARMS, command="addenda compare --model folder/of/a/model --data folder/of/the/data.jsonl"
    )
    console = Console(file=io.StringIO(), width=80)
    console.print(report.summary(record), crop=False)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line for line in lines if len(line) > 80] == [
        "addenda tune --out runs/shira --model folder/of/a/model --data folder/of/the/data.jsonl --method shira "
        "--rate 0.003 --steps 10 --batch 4"
    ], "in one piece, to be copied"
    (row,) = (line for line in lines if line.startswith("LORA  "))
    assert row.split() == ["LORA", "50.0", row.split()[2], "300", "B", "30", "B", "3", "s", "3e-3", "a"]
