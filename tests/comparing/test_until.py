"""Comparisons that add seeds until they decide: on a tiny model, with trials that are made up, killed between looks."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
from tests.comparing.test_run import noted, written

from addenda.comparing import run as running
from addenda.comparing.entries import LookTaken, SplitResult, TrialRecord, Until, Validation
from addenda.comparing.head import head_of
from addenda.comparing.record import Record
from addenda.comparing.run import Watch, compare
from addenda.comparing.stats import analyse
from addenda.comparing.until import planned, told
from addenda.core.base.errors import AddendaError
from addenda.statistics.spending import LOOKS

QUIET = Watch(say=lambda text: None)
ITEMS = 400
APART = {"lora:rank=2": (0.7, 0.01), "shira": (0.4, 0.01)}  # accuracy, and how it scatters over seeds
ALIKE = {"lora:rank=2": (0.5, 0.1), "shira": (0.505, 0.1)}
APART_BY_ITEM = {"lora:rank=2": (0.5, 0.001, 0.2), "shira": (0.505, 0.001, 0.2)}  # other items right, in every seed


class KilledError(BaseException):
    """The driver is gone."""


class MadeUp:
    """Runs whose answers are drawn by arm and seed; each is said to take ten seconds."""

    arms: ClassVar[dict] = {}
    ran: ClassVar[list] = []
    most: ClassVar[int | None] = None  # runs, after which the driver is killed

    def __init__(self, subject, arms, settings, folder, *_):
        self.folder = folder

    def __call__(self, specs):
        for spec in specs:
            if len(self.ran) == self.most:
                raise KilledError
            self.ran.append(spec.name)
            yield spec, self.made(spec)

    def made(self, spec):
        accuracy, spread, *own = self.arms[spec.method]
        number = sorted(self.arms).index(spec.method)
        rng = np.random.default_rng([spec.seed, number])
        hard = np.random.default_rng(0).random(ITEMS)  # the same items are hard for all
        if own:
            hard += np.random.default_rng([1, number]).normal(0, own[0], ITEMS)
        right = hard + rng.normal(0, 0.02, ITEMS) < accuracy + rng.normal(0, spread)
        items = "".join("01"[int(r)] for r in right)
        test = SplitResult(accuracy=float(right.mean()), loss=1.0, items=items, losses=(1.0,) * ITEMS)
        return TrialRecord(
            method=spec.method, stage=spec.stage, seed=spec.seed, rate=spec.rate, steps=spec.steps, trainable=1,
            status="ok", losses=((spec.steps, 1.0),), validation=((spec.steps, Validation(loss=1.0, accuracy=0.5)),),
            test=None if spec.stage == "search" else test, step_seconds=1.0, seconds=10.0,
        )  # fmt: skip

    def recorded(self, spec):
        pass


@pytest.fixture
def files(tmp_path):
    return written(tmp_path)


@pytest.fixture
def made_up(monkeypatch):
    """Put trials that are made up in the place of trained ones; return what sets them, and gives the names of runs."""
    monkeypatch.setattr(running, "OneByOne", MadeUp)
    monkeypatch.setattr(running, "control", lambda subject, label, splits: TrialRecord(
        method=label, stage="control", status="ok", seconds=1.0, test=SplitResult(accuracy=0.0, items="0" * ITEMS)
    ))  # fmt: skip

    def put(arms, most=None):
        MadeUp.arms, MadeUp.most, MadeUp.ran = arms, most, []
        return MadeUp.ran

    return put


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Leave the report out, which takes longer than the runs that are made up."""
    monkeypatch.setattr(running, "write_report", lambda out: out / "report.html")


def run(files, **options):
    model, data, out = *files[:2], options.pop("out", files[2])
    asked = {"methods": ["lora:rank=2", "shira"], "budget": "steps=4", "rates": 1, "batch": 4, "watch": QUIET}
    return compare(model, data, out=out, dtype="float32", **(asked | options))


def looks(record):
    return [look.seeds for look in record.config.until.taken]


def test_what_differs_is_decided_at_the_first_look(files, made_up):
    ran = made_up(APART)
    record = run(files, until="decided")
    until = record.config.until
    assert record.config.seeds == (0, 1, 2) and len(ran) == 6
    assert looks(record) == [3] and until.taken[0].undecided == ()
    assert until.stopped == "every contrast that matters is decided" and until.looks == LOOKS
    assert len(until.seconds) == 5 and list(until.seconds) == sorted(until.seconds)
    before = noted(files[2])
    again = run(files, until="decided")
    assert again.config == record.config and len(ran) == 6 and noted(files[2]) == before


def test_what_cannot_be_decided_ends_at_the_last_look(files, made_up):
    ran, told_ = made_up(ALIKE), []
    record = run(files, until="decided", margin=0.01, watch=Watch(say=told_.append))
    assert looks(record) == [3, 5, 8, 12, 20] and len(ran) == 40 and record.config.seeds == tuple(range(20))
    assert record.config.until.stopped == "that is the most"
    assert any("3 to 20 seeds" in text for text in told_)
    assert any(text.startswith("Looked at with 3 and 5 seeds, and more are added; undecided: ") for text in told_)
    assert told_[-2].startswith("Looked at with 3, 5, 8, 12 and 20 seeds: that is the most; undecided: ")


def test_what_only_more_items_would_decide_ends_at_the_first_look(files, made_up):
    ran, told_ = made_up(APART_BY_ITEM), []
    record = run(files, until="decided", watch=Watch(say=told_.append))
    assert looks(record) == [3] and len(ran) == 6 and record.config.seeds == (0, 1, 2)
    assert record.config.until.taken[0].undecided == (("lora:rank=2", "shira"),)
    assert record.config.until.stopped == "more seeds, up to 20, would not decide what is open"
    assert "Looked at with 3 seeds: more seeds, up to 20, would not decide what is open; undecided: lora" in told_[-2]
    assert "the 400 items alone leave" in " ".join(power.sentence for power in head_of(record, analyse(record)).power)
    assert looks(run(files, until="decided")) == [3] and len(ran) == 6  # and the same command adds none either
    assert looks(run(files, seeds=5)) == [3, 5] and len(ran) == 10  # which whoever asks for them gets


def test_another_pair_that_seeds_may_decide_goes_on(files, made_up):
    made_up(APART_BY_ITEM | {"oft": (0.5, 0.05)})
    record = run(files, until="decided", methods=["lora:rank=2", "shira", "oft"])
    assert len(looks(record)) > 1


def test_which_looks_fit_is_known_before_the_first_step(files, made_up, monkeypatch):
    monkeypatch.setattr("addenda.comparing.costs.step_seconds", lambda *_: 10.0)  # 4 steps, 2 arms: 80 s for a seed
    monkeypatch.setattr("addenda.comparing.costs.forward_seconds", lambda *_: 0.0)
    made_up(ALIKE)
    with pytest.raises(AddendaError, match=r"first look, with 3 seeds .* 4 minutes in all, and max_minutes=4 are"):
        run(files, until="decided", max_minutes=4, margin=0.01)
    assert not files[2].exists()
    record = run(files, until="decided", max_minutes=12, margin=0.01, general=None)
    until = record.config.until
    assert until.seconds == pytest.approx([1.05 * 80 * n for n in LOOKS]) and until.max_minutes == 12
    assert looks(record) == [3, 5, 8] and record.config.seeds == tuple(range(8))
    assert until.stopped == "12 would take 17 minutes, and 12 minutes are allowed"
    more = run(
        files, until="decided", max_minutes=20, margin=0.01, general=None
    )  # the time that runs took, where there are some
    assert looks(more) == [3, 5, 8, 12, 20] and more.config.looks[-1].changed == {"max_minutes": [12, 20]}
    assert more.config.until.seconds[3:] == (161 + 80, 161 + 240)


def test_a_killed_driver_goes_on_to_the_same_record(files, made_up):
    made_up(ALIKE)
    whole = run(files, until="decided", margin=0.01, out=files[2].parent / "whole", max_minutes=600)
    for most in (0, 1, 5, 6, 7, 1, 9, 16, 2):  # between looks, and in the midst of one
        ran = made_up(ALIKE, most)
        try:
            run(files, until="decided", margin=0.01, max_minutes=600)
        except KilledError:
            assert len(ran) == most
    made_up(ALIKE)
    record = run(files, until="decided", margin=0.01, max_minutes=600)
    assert sorted(t.name for t in record.trials) == sorted(t.name for t in whole.trials)
    assert [(t.seeds, t.undecided) for t in record.config.until.taken] == [
        (t.seeds, t.undecided) for t in whole.config.until.taken
    ]
    same = ("seeds", "methods", "identity", "options", "margin", "budget", "search")
    assert [getattr(record.config, k) for k in same] == [getattr(whole.config, k) for k in same]


def test_a_kill_before_a_look_is_written_changes_nothing(files, made_up):
    def killed(*_):
        raise KilledError

    made_up(ALIKE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Record, "changed", killed)
        with pytest.raises(KilledError):
            run(files, until="decided", margin=0.01, grouped=False)
    record = Record.read(files[2])
    assert len(record.trials) == 7 and record.config.until.taken == () and record.config.seeds == (0, 1, 2)
    assert looks(run(files, until="decided", margin=0.01, grouped=False)) == [3, 5, 8, 12, 20]


def test_its_runs_are_those_of_a_comparison_with_as_many_seeds(files):
    grown = run(files, until="decided", margin=100, max_minutes=1000)
    n = len(grown.config.seeds)
    at_once = run(files, seeds=n, margin=100, out=files[2].parent / "whole")
    assert at_once.config.until is None and len(at_once.trials) == len(grown.trials) == 1 + 2 * n
    for t in at_once.trials_of(stage="final"):
        same = grown.find(t.method, "final", t.seed)
        assert (same.losses, same.test, same.rate) == (t.losses, t.test, t.rate)


def test_a_number_of_seeds_becomes_until_decided(files, made_up):
    ran = made_up(ALIKE)
    run(files, seeds=2, margin=0.01)
    record = run(files, until="decided", max_minutes=5, margin=0.01)  # 10 s a run: 20 s for a seed, 41 s are spent
    assert looks(record) == [3, 5, 8, 12] and len(ran) == 24
    assert record.config.looks[0].changed == {"seeds": [2, 3], "until": [None, "decided"], "max_minutes": [None, 5]}
    assert "seeds 2 to 3; until decided; within 5 minutes" in record.config.notes[-1]
    with pytest.raises(AddendaError, match=r"looked at with 3, 5, 8, 12, 20 seeds, or more .* in place of seeds=13"):
        run(files, seeds=13, margin=0.01)
    with pytest.raises(AddendaError, match=r"seeds was 12, now 3"):
        run(files, margin=0.01)
    record = run(files, seeds=22, margin=0.01)
    assert looks(record) == [3, 5, 8, 12, 22] and record.config.until.stopped == "no more were asked for"
    with pytest.raises(AddendaError, match=r"has 22 seeds, more than the last look"):
        run(files, until="decided", margin=0.01)


def test_until_decided_goes_on_from_a_number_of_seeds(files, made_up):
    made_up(ALIKE, 7)  # in the midst of the look with five
    with pytest.raises(KilledError):
        run(files, until="decided", margin=0.01)
    ran = made_up(ALIKE)
    record = run(files, seeds=5, margin=0.01)
    assert looks(record) == [3, 5] and record.config.until.stopped == "no more were asked for"
    before = noted(files[2])
    assert compare(*files[:2], more=files[2], watch=QUIET).config == record.config and noted(files[2]) == before
    assert len(ran) == 3
    record = compare(*files[:2], more=files[2], until="decided", watch=QUIET)
    assert looks(record) == [3, 5, 8, 12, 20] and record.config.until.stopped == "that is the most"


def test_another_arm_is_looked_at_anew(files, made_up):
    made_up(APART | {"oft": (0.1, 0.01)})
    first = run(files, until="decided").config.until.taken
    record = run(files, until="decided", methods=["lora:rank=2", "shira", "oft"])
    assert [look.seeds for look in first] == looks(record) == [3], "a look with as many seeds takes its place"
    assert record.config.until.stopped == "every contrast that matters is decided"
    assert len(record.trials_of("oft", "final")) == 3


@pytest.mark.parametrize(("wrong", "says"), [
    ({"until": "known"}, "until must be 'decided', got 'known'"),
    ({"max_minutes": 5}, "max_minutes= is read with until='decided' only"),
    ({"until": "decided", "max_minutes": 0}, "max_minutes must be a positive number"),
    ({"until": "decided", "seeds": 3}, "seeds= is the number of them: give one"),
    ({"until": "decided", "within": 60.0}, "within= drops what does not fit a time: give one"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused_before_anything(files, wrong, says):
    with pytest.raises(AddendaError, match=says):
        run(files, **wrong)
    assert not files[2].exists()


def test_only_contrasts_that_matter_are_waited_for(files, made_up):
    """Two arms of which both are worse than a third may stay undecided."""
    made_up({"lora:rank=2": (0.9, 0.01), "shira": (0.3, 0.05), "oft": (0.3, 0.05)})
    record = run(files, until="decided", methods=["lora:rank=2", "shira", "oft"], margin=0.01)
    assert looks(record) == [3]


def test_words():
    assert told(Until()) == "Not looked at yet."
    until = planned(None, [60, 100, 160, 240, 400], None, 3)
    one = dataclasses.replace(until, taken=(LookTaken(seeds=3, when="now", undecided=(("a", "b"), ("a", "c"))),))
    assert told(one) == "Looked at with 3 seeds, and more are added; undecided: a against b and a against c."


def test_a_look_that_is_no_look_is_named(files, made_up):
    made_up(APART)
    run(files, until="decided")
    file = files[2] / "config.json"
    good = json.loads(file.read_text())
    for key, wrong in (("looks", [0]), ("taken", [{"seeds": 3, "undecided": [["a"]]}]), ("max_minutes", -1)):
        file.write_text(json.dumps(good | {"until": good["until"] | {key: wrong}}))
        with pytest.raises(AddendaError, match=rf"until\.{key}.*: expected"):
            Record.read(files[2])
