"""What would decide: seeds, minutes out of the record's own runs, and the command."""

from dataclasses import replace

import pytest
from tests.comparing.test_choose import a_record

from addenda.comparing.power import powers, seconds_of_a_seed
from addenda.comparing.record import Record
from addenda.comparing.stats import analyse

TITLES = {"lora": "LoRA", "shira": "SHiRA", "vera": "VeRA", "ia3": "(IA)³", "miss": "MiSS"}


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_record("run", {"lora": (0.5, (1, 1, 1)), "shira": (0.5, (1, 1, 1))})
    return Record.read("run")


def timed(record, **seconds):
    """The record with other seconds of its final runs."""
    trials = [replace(t, seconds=seconds.get(t.method)) for t in record.trials]
    return replace(record, trials=tuple(trials))


def pair(record, b, more, difference=0.012, verdict="undecided", **changed):
    (known,) = (p for p in analyse(record).pairs if {p.a, p.b} == {"lora", "shira"})
    held = {"low": difference - 0.05, "high": difference + 0.05, "why": "as it is"} | changed
    return replace(known, a="lora", b=b, difference=difference, more_seeds=more, verdict=verdict, **held)


def test_the_fewest_seeds_come_first_each_with_its_time_and_command(record):
    record = timed(record, lora=50.0, shira=90.0)
    pairs = [pair(record, "shira", 6), pair(record, "vera", 1, -0.02), pair(record, "ia3", 6),
             pair(record, "miss", 9, verdict="better")]  # fmt: skip
    told = powers(record, pairs, TITLES)
    assert [p.sentence for p in told] == [
        "LoRA and VeRA are undecided (difference −2.0: −7.0 to +3.0). To separate them by 2 points: 1 more seed, "
        "about 2 minutes.",
        "LoRA and SHiRA are undecided (difference +1.2: −3.8 to +6.2). To separate them by 2 points: 6 more seeds, "
        "about 14 minutes.",
        "LoRA and (IA)³ are undecided (difference +1.2: −3.8 to +6.2). To separate them by 2 points: 6 more seeds, "
        "about 14 minutes.",
    ]
    assert [p.command for p in told] == [
        "addenda compare --more run --seeds 4", "addenda compare --more run --seeds 9", None
    ]  # fmt: skip


def test_what_no_number_of_seeds_decides_says_so(record):
    hopeless = pair(record, "shira", None, why="the 500 items alone leave ±1.4 points, so more of them are needed")
    nothing = pair(record, "shira", None, low=-1.0, high=1.0, why="no seed that both have finished")
    first, second = powers(record, [hopeless, nothing], TITLES)
    assert first.command is None
    assert first.sentence == (
        "LoRA and SHiRA are undecided (difference +1.2: −3.8 to +6.2): the 500 items alone leave ±1.4 points, so more "
        "of them are needed."
    )
    assert second.sentence == "LoRA and SHiRA are undecided: no seed that both have finished."


def test_seconds_are_those_of_one_run_of_every_arm(record):
    assert seconds_of_a_seed(timed(record, lora=50.0, shira=90.0)) == 140.0
    assert seconds_of_a_seed(timed(record, lora=50.0)) is None
    (untimed,) = powers(timed(record), [pair(record, "shira", 6)], TITLES)
    assert untimed.sentence.endswith("To separate them by 2 points: 6 more seeds.")
