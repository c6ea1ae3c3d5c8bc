"""The runs of recipes on a tiny encoder: once each, whoever asks; cut as they should be; gone on with after a kill."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipes import dylora, pool, work
from recipes.claims import Claim, Claims, Mended, Where, read_claims
from recipes.page import before, table
from recipes.pool import Pool
from recipes.shira import TwoTasks
from recipes.store import SEEDS, Busy, Clock, TimeUp, training_loss
from recipes.subjects import Setting

from addenda.comparing.entries import DataRecord, TrialSpec
from addenda.comparing.record import Record
from addenda.comparing.subject import Subject, of_splits
from addenda.comparing.trial import TrialSettings, trial
from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode
from addenda.data.examples import Data, Labelled
from addenda.models.load import load_model
from tiny_models import make_bert, make_tokenizer

LORA, MISS, NESTED = "lora:rank=4", "miss:rank=4", "dylora:rank=4,frozen=False"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    kept = tmp_path_factory.mktemp("model")
    model = make_bert(2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # so that a change shows
    model.save_pretrained(kept)
    make_tokenizer().save_pretrained(kept)
    return kept


def tiny(folder: Path, seed: int = 0, classes: str = "ab") -> Subject:
    """Texts of two classes, each of which has one letter more often."""
    loaded, data = load_model(folder, task="label", labels=2, dtype="float32"), {}
    draw = torch.Generator().manual_seed(seed)
    for part, n in (("train", 48), ("validation", 24), ("test", 40)):
        rows = torch.randint(0, 26, (n, 6), generator=draw).tolist()
        texts = ["".join(chr(97 + c) for c in row) + classes[i % 2] * 3 for i, row in enumerate(rows)]
        data[part] = Data(tuple(Labelled(t, i % 2) for i, t in enumerate(texts)), "label", ("a", "b"), part)
    encoded = {k: encode(d, loaded.tokenizer) for k, d in data.items()}
    return replace(of_splits(loaded, data, encoded, DataRecord(name="tiny", description="tiny")), heads=(), fresh=False)


@pytest.fixture
def setting(folder, monkeypatch, tmp_path) -> Setting:
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    return Setting("tiny", lambda seed: tiny(folder), steps=12, first=6, batch=8, validation=24, rates=3)


@pytest.fixture(autouse=True)
def any_rate(monkeypatch):
    """A search on so few texts ends at an edge: here the middle rate is taken, unsearched."""
    monkeypatch.setattr(pool, "grid", lambda middle, n: (middle,))


CUTS = [f"{LORA}|{how}={b}" for how in ("first", "best") for b in (1, 2)]
FOLDERS = dict.fromkeys([LORA, *CUTS, "base"], "shared") | {MISS: "miss", NESTED: "dylora", f"{NESTED}|at=1": "dylora"}


def made(setting, root, **more) -> Pool:
    return Pool(setting, FOLDERS, root, Clock(), dylora.CUTS, **more)


def test_an_arm_at_one_rate_and_seed_gives_one_number_wherever_it_is_run(setting, tmp_path, folder):
    one = made(setting, tmp_path / "one")
    one.ensure([LORA, MISS, "base"], SEEDS[:2])
    alone = made(setting, tmp_path / "two")
    alone.ensure([LORA], SEEDS[1:2])  # without the others, and after another run
    a, b = (p.store.find(LORA, "final", SEEDS[1]) for p in (one, alone))
    assert a is not None and b is not None and a.test == b.test and a.losses == b.losses
    on = tiny(folder)
    spec = TrialSpec(LORA, "final", SEEDS[1], a.rate or 0, setting.steps)
    lone = trial(on, alone.arm(LORA, on), TrialSettings(8, validation=24), spec)  # as `addenda compare` runs it
    assert lone.test is not None and a.test is not None and lone.test.items == a.test.items


def test_cuts_of_a_lora_differ_and_each_is_of_the_whole_one(setting, tmp_path, folder):
    """The second cut was once taken from what the first had left: its adapter's tensors are live."""
    seen: dict[str, dict] = {}

    def look(adapter, on, how):
        whole = dylora.copied(adapter)
        result = dylora.cut(adapter, on, how)
        name, b = how.split("=")
        seen[how] = {"first": dylora.first, "best": dylora.best}[name](whole, int(b))
        after = adapter.state_dict()
        assert all(torch.equal(after[k], whole[k]) for k in whole)  # it is whole again
        return result

    arms = [f"{LORA}|{how}={b}" for how in ("first", "best") for b in (1, 2, 4)]
    kept = Pool(setting, dict.fromkeys([LORA, *arms], "shared"), tmp_path / "r", Clock(), {"first": look, "best": look})
    kept.ensure([LORA, *arms], SEEDS[:1])
    path = next(k for k in seen["first=4"] if k.endswith("/B")).removesuffix("/B")
    ranks = {how: torch.linalg.matrix_rank(t[f"{path}/B"] @ t[f"{path}/A"]).item() for how, t in seen.items()}
    assert ranks == {f"{how}={b}": b for how in ("first", "best") for b in (1, 2, 4)}
    of = {how: t[f"{path}/B"] @ t[f"{path}/A"] for how, t in seen.items()}
    torch.testing.assert_close(of["first=4"], of["best=4"])  # the whole one
    nearest = {b: (of[f"best={b}"] - of["best=4"]).norm() for b in (1, 2)}
    assert nearest[2] < nearest[1] <= (of["first=1"] - of["first=4"]).norm() + 1e-6  # Eckart and Young
    results = {a: kept.store.find(a, "final", SEEDS[0]) for a in [LORA, *arms]}
    assert all(r is not None and r.test is not None for r in results.values())
    assert results[f"{LORA}|first=4"].test.items == results[LORA].test.items  # type: ignore[union-attr]


def test_cuts_that_are_a_live_dictionary_would_be_wrong(setting, tmp_path, folder):
    """What `copied` is for: with `state_dict()` in its place, the second cut is of the first."""
    on = tiny(folder)
    from addenda.comparing.trial import attached

    with attached(on, made(setting, tmp_path).arm(LORA, on), TrialSettings(8), 0) as adapter:
        for t in adapter.parameters():
            torch.nn.init.normal_(t, generator=torch.Generator().manual_seed(1))
        live, whole = adapter.state_dict(), dylora.copied(adapter)
        adapter.load_state_dict(dylora.first(whole, 1))
        name = next(k for k in live if k.endswith("/A"))
        assert not torch.equal(live[name], whole[name])
        assert torch.equal(dylora.first(live, 2)[name], dylora.first(whole, 1)[name])


def test_a_killed_sitting_goes_on_and_nothing_is_run_twice(setting, tmp_path, monkeypatch):
    one, ran = made(setting, tmp_path), []
    known = pool.trial

    def dies(*args, **options):
        ran.append(args[3].name)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return known(*args, **options)

    monkeypatch.setattr(pool, "trial", dies)
    with pytest.raises(KeyboardInterrupt):
        one.ensure([LORA, MISS], SEEDS[:2])
    made(setting, tmp_path).ensure([LORA, MISS], SEEDS[:2])
    assert len(ran) == 5 and len(set(ran)) == 4  # the one that was killed is the only one that began twice
    made(setting, tmp_path).ensure([LORA, MISS], SEEDS[:2])
    assert len(ran) == 5
    records = {p.parent.name: Record.read(p.parent) for p in (tmp_path / "tiny").glob("*/config.json")}
    assert sorted(records) == ["miss", "shared"]
    finals = records["shared"].trials_of(LORA, "final")
    assert len(finals) == 2 and len(records["shared"].trials_of(f"{LORA}|best=1", "final")) == 2
    assert finals[0].test is not None and finals[0].test.losses is not None and len(finals[0].losses or ()) == 12


def test_losses_are_kept_of_the_first_seeds_and_training_losses_in_blocks(setting, tmp_path):
    kept = made(replace(setting, steps=360), tmp_path)
    kept.ensure([MISS], (SEEDS[0], SEEDS[5]))
    first, late = (kept.store.find(MISS, "final", s) for s in (SEEDS[0], SEEDS[5]))
    assert first is not None and first.test is not None and late is not None and late.test is not None
    assert first.test.losses and late.test.losses is None and len(late.test.items) == 40
    assert all(round(v, 3) == v for v in first.test.losses if v is not None)
    losses = list(first.losses or ())
    assert len(losses) == 120 and losses[-1][0] == 360
    record = kept.record([MISS], SEEDS)
    whole = training_loss(record, MISS, SEEDS[0], 360)
    assert whole == pytest.approx(sum(v for _, v in losses if v is not None) / 120)
    assert training_loss(record, MISS, SEEDS[0], 3) == losses[-1][1]


def test_two_processes_share_the_runs_by_locks(setting, tmp_path):
    one, other = made(setting, tmp_path), made(setting, tmp_path)
    one.ensure([MISS], SEEDS[:1])  # what it has read from now on is not all that there is
    rate = other.chosen(LORA).rate
    assert rate is not None
    with one.store.alone(TrialSpec(LORA, "final", SEEDS[0], rate, 12).name):
        with pytest.raises(Busy):
            other.ensure([LORA, MISS], SEEDS[:2])
        assert other.store.find(MISS, "final", SEEDS[1]) is not None  # all the rest was done
        assert other.store.find(LORA, "final", SEEDS[0]) is None
    with one.store.alone(f"all of {LORA}"), pytest.raises(Busy):
        other.ensure([LORA], SEEDS[:3])
    assert other.store.find(LORA, "final", SEEDS[2]) is None  # an arm is one process's at a time
    other.ensure([LORA], SEEDS[:2])
    with made(setting, tmp_path).store.alone(f"all of {LORA}"):
        other.ensure([LORA], SEEDS[:2])  # nothing of it is missing: it waits for nobody who is at further seeds
    assert one.store.find(LORA, "final", SEEDS[0]) is None  # as it had read it
    with one.store.alone("any"):
        assert one.store.find(LORA, "final", SEEDS[0]) is not None


def test_another_base_or_more_arms(setting, tmp_path, folder):
    made(setting, tmp_path).ensure([MISS], SEEDS[:1])
    more = Pool(setting, {MISS: "miss", "bat:rank=4": "miss"}, tmp_path, Clock(), {})
    more.ensure(["bat:rank=4"], SEEDS[:1])
    grown = Record.read(tmp_path / "tiny" / "miss")
    assert sorted(grown.config.methods) == ["bat:rank=4", MISS] and grown.config.looks
    made(setting, tmp_path).ensure([MISS], SEEDS[1:2])  # which knows less, and leaves the other there
    assert sorted(Record.read(tmp_path / "tiny" / "miss").config.methods) == ["bat:rank=4", MISS]
    from addenda import AddendaError

    other = replace(setting, make=lambda seed: tiny(folder, classes="xy"))
    with pytest.raises(AddendaError, match=r"belongs to another run.*examples"):
        made(other, tmp_path).ensure([MISS], SEEDS[2:3])


def test_no_run_begins_that_would_not_end_in_time(setting, tmp_path):
    kept = made(setting, tmp_path)
    kept.clock = Clock(hours=1e-9)
    with pytest.raises(TimeUp):
        kept.ensure([MISS], SEEDS[:1])
    assert not (tmp_path / "tiny").exists()


# ---- from claims to a page -------------------------------------------------------------------------------------------


def claim(name: str, **more) -> Claim:
    common = {"paper": "P", "words": name, "kind": "measured", "subject": "tiny", "metric": "accuracy", "delta": 90.0}
    return Claim(**({"id": name, "direction": "not lower", "refuted_by": "a loss"} | common | more))


def test_claims_are_run_to_their_verdicts_and_shown(setting, tmp_path, monkeypatch, capsys):
    known = Claims(
        (
            claim("miss-a", a=MISS, b=LORA, also=(("miss:rank=2", LORA),)),
            claim("miss-b", a=MISS, b=LORA, metric="loss", batches=12, direction="not higher", delta=50.0),
            claim("dylora-c", paper="Q", a=f"{NESTED}|at=1", b=f"{LORA}|first=1", also=((NESTED, LORA),)),
            claim("dylora-d", paper="Q", kind="arithmetic", where="8 / 1"),
        ),
        {"tiny": Where(90.0, (), "for the test")},
    )
    monkeypatch.setattr(work, "SETTINGS", {"tiny": setting})
    assert work.order(known) == ["P", "Q"]
    assert work.run(known, ["P", "Q"], tmp_path / "r", Clock())
    shared = Record.read(tmp_path / "r" / "tiny" / "shared")
    assert {t.method for t in shared.trials} == {LORA, f"{LORA}|first=1"}  # for both papers, once
    assert len(shared.trials_of(LORA, "final")) == 3
    said = capsys.readouterr().err
    assert said.count(f"final-{LORA.replace(':', '%3A').replace('=', '%3D')}") == 3
    lines = table(known, tmp_path / "r", tmp_path)
    cells = {line.split(" | ")[1]: line.strip("| ").split(" | ") for line in lines[2:] if line.startswith("|")}
    assert cells["miss-a"][3] == cells["dylora-c"][3] == "**holds**" and cells["dylora-d"][3] == "**arithmetic**"
    assert "3 seeds, 40 items" in cells["miss-a"][4] and "nats" in cells["miss-b"][4]
    assert said.index("miss%3Arank%3D2-seed") > said.rindex("dylora-c, 3 seeds: holds")  # as it decides nothing
    beside = [line for line in lines if line.startswith("- ")]
    assert re.fullmatch(r"- miss-a: miss:rank=2 − lora:rank=4 [+-].* points \(.* to .*\), 3 seeds\.", beside[0])
    assert beside[1].startswith(f"- dylora-c: {NESTED} − {LORA} ") and len(beside) == 2
    assert work.run(known, ["P"], tmp_path / "r", Clock())  # nothing to do
    assert "final-" not in capsys.readouterr().err


def test_a_paper_that_cannot_be_worked_at_is_left_out_and_the_others_are_decided(
    setting, tmp_path, monkeypatch, capsys
):
    known = Claims(
        (claim("miss-a", a=MISS, b=LORA), claim("dylora-c", paper="Q", a=f"{NESTED}|at=1", b=LORA)),
        {"tiny": Where(90.0, (), "for the test")},
    )
    monkeypatch.setattr(work, "SETTINGS", {"tiny": setting})
    decide = work._decide

    def missing(paper, claims, made):
        if paper[0].paper == "P":
            raise AddendaError("no text here")
        decide(paper, claims, made)

    monkeypatch.setattr(work, "_decide", missing)
    with pytest.raises(AddendaError, match=r"^P: no text here$"):
        work.run(known, ["P", "Q"], tmp_path / "r", Clock())
    said = capsys.readouterr().err
    assert "P is left out: no text here" in said and "dylora-c, 3 seeds: holds" in said
    assert not (tmp_path / "r" / "tiny" / "miss").exists()


def test_a_gate_that_fails_makes_the_subject_void_before_its_claims_are_run(setting, tmp_path, monkeypatch, capsys):
    known = Claims((claim("miss-a", a=MISS, b=LORA),), {"tiny": Where(90.0, (LORA, "base"), "")})
    monkeypatch.setattr(work, "SETTINGS", {"tiny": setting})
    assert work.run(known, ["P"], tmp_path / "r", Clock())
    told = work.verdicts(known.of("P"), known, work.places(known, tmp_path / "r", Clock()))
    assert told["miss-a"].word == "void" and "270 are wanted" in told["miss-a"].why
    assert not (tmp_path / "r" / "tiny" / "miss").exists()
    assert "the gate failed" in capsys.readouterr().err
    lines = table(known, tmp_path / "r", tmp_path)
    assert re.fullmatch(r"- tiny: gate failed, .* over base, 270 wanted\.", lines[-1])
    once = Where(90.0, (LORA, "base"), "", Mended("lora gained 2 points", "more steps"))
    again = replace(known, subjects={"tiny": once})
    said = work.gate("tiny", again, work.places(again, tmp_path / "r", Clock()))[1]
    assert said is not None and said.endswith("the subject was mended once, and is not again")
    told_ = "mended once, on validation data: lora gained 2 points; more steps."
    assert table(again, tmp_path / "r", tmp_path)[-1].endswith(f"270 wanted; {told_}")
    assert table(again, tmp_path / "empty", tmp_path)[-1] == f"- tiny: {told_}"  # before it is measured


def test_an_arm_without_a_rate_is_void_and_the_others_go_on(setting, tmp_path, monkeypatch):
    known = Claims((claim("miss-a", a=MISS, b=LORA), claim("miss-b", a=LORA, b=LORA)), {"tiny": Where(90.0, (), "")})
    monkeypatch.setattr(work, "SETTINGS", {"tiny": setting})
    one = work.places(known, tmp_path / "r", Clock())
    one["tiny"].void[MISS] = "the best rate is the lowest that was tried"
    told = work.verdicts(known.of("P"), known, one)
    assert told["miss-a"].word == "void" and "lowest" in told["miss-a"].why and told["miss-b"].word == "not run"


def test_two_adapters_are_judged_together_on_both_tasks(setting, tmp_path, folder):
    sets = (setting, replace(setting, name="other", make=lambda seed: tiny(folder, 5, "cd")))
    tasks = tuple(Pool(s, {LORA: "shira"}, tmp_path, Clock(), {}, saving=[LORA]) for s in sets)
    both = TwoTasks(tasks, {LORA: "shira", f"{LORA}|fused": "shira"}, tmp_path)  # type: ignore[arg-type]
    both.ensure([LORA, f"{LORA}|fused"], SEEDS[:3])
    record = both.record([LORA, f"{LORA}|fused"], SEEDS)
    alone, fused = (record.trials_of(a, "final") for a in (LORA, f"{LORA}|fused"))
    assert len(alone) == len(fused) == 3 and all(len(t.test.items) == 80 for t in (*alone, *fused) if t.test)
    first = tasks[0].store.find(LORA, "final", SEEDS[0])
    assert first is not None and first.test is not None and alone[0].test is not None
    assert alone[0].test.items.startswith(first.test.items)
    assert not any("addenda" in name for name, _ in tasks[0].subject(None).model.named_modules())  # as it was
    lost = claim("shira-x", a=(f"{LORA}|fused", LORA), b=(f"{LORA}|fused", LORA))
    from addenda.comparing.stats import analyse

    nothing = work.contrast(record, analyse(record), lost, lost.a, lost.b, SEEDS[:3])
    assert nothing.difference == 0 and nothing.error == 0 and nothing.items == 80
    what = work.contrast(record, analyse(record), lost, f"{LORA}|fused", LORA, SEEDS[:3])
    gaps = [100 * (f.test.accuracy - a.test.accuracy) for f, a in zip(fused, alone, strict=True) if f.test and a.test]
    assert what.difference == pytest.approx(sum(gaps) / 3)


def test_the_old_table_stands_in_the_column_before():
    old = Path(__file__).parents[1] / "records" / "recipes"
    loss = "loss 1.029 after 460 steps against 571: 0.80 of LoRA's (0.45 to 1.16)"
    assert before(claim("miss-a", was=("miss", 0)), old) == f"cannot tell: {loss}"
    first = before(claim("dylora-a", was=("dylora", 0)), old)
    assert first == "cannot tell: b = 1: -2.2 points (-3.5 to -0.9), frozen -2.7 points (-4.1 to -1.3)"
    for was in (c.was for c in read_claims().claims if c.was):
        assert "|" not in before(claim("miss-a", was=was), old)
    assert before(claim("miss-a"), old) == "–"
