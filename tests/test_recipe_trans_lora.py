"""The recipe of transfers: its claims, its toy world, its plan, and the real part's arms on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch
from recipes import store, trans_lora, trans_lora_real, trans_lora_sitting
from recipes.store import Clock, lock_of
from recipes.trans_lora_claims import difference, read_claims, verdicts
from recipes.trans_lora_power import power
from recipes.trans_lora_real import ARMS, FURTHER, QUICK, SHARED, Bench, Setting, Unit, units
from recipes.trans_lora_sitting import missing, plan, record_file, seconds_of, sitting, steady
from recipes.trans_lora_table import WIDTH, table
from recipes.trans_lora_tasks import drawn, sort_words, task
from recipes.trans_lora_toy import NO, YES, ToySetting, World, answer, is_task, make_tokenizer
from transformers import LlamaForCausalLM

import addenda as ad
from addenda.data.read import read

SECONDS = {"target step": 1.0, "source step": 0.5, "item": 0.1, "sample": 0.2, "answer": 0.1, "judged": 0.05}
COUNTS = {"samples": 40, "lines": 40, "malformed": 10, "repeats": 4, "copies": 1, "near_copies": 1, "tokens": 900}
LEAKED = {"of": 250, "exact": 0, "near": 1, "widest": 0.5, "n": 3, "share": 0.5, "known": 5}


def toy_records(seeds=20, **arms):
    """Made-up records of the toy: every arm at so much, with a little of each seed."""
    means = {"source": 0.95, "base": 0.0, "real": 0.97, "filtered": 0.93, "unfiltered": 0.92}
    means |= {"seeds": 0.6, "random": 0.5}
    return {
        s: {
            "accuracies": {a: m + 0.01 * ((7 * s + i) % 5 - 2) for i, (a, m) in enumerate((means | arms).items())},
            "support": {"made": 0.1, "passed": 0.4 + 0.01 * (s % 3), "learned": 0.4}, "passed": 20, "made": 24,
            "counts": COUNTS, "judge": 0.9, "held": 50, "leaked": LEAKED, "leaked_inputs": LEAKED,
            "seconds": {"students": 30.0, "synthesis": 10.0},
        }
        for s in range(seeds)
    }  # fmt: skip


def told(records, part="toy"):
    margin, claims = read_claims()
    return [line.split(": ")[1] for line in verdicts(part, margin, claims, records)]


def test_claims_are_judged_by_intervals_over_seeds():
    assert told(toy_records()) == ["holds", "holds", "holds", "holds"]
    assert told(toy_records(filtered=0.7))[:2] == ["does not hold", "cannot tell"]
    assert told(toy_records(unfiltered=0.96))[3] == "does not hold"
    assert told(toy_records(seeds=3)) == ["cannot tell"] * 4, "fewer seeds than claimed"
    assert told({}) == ["not measured yet"] * 4
    found = difference([0.1, 0.2, 0.3], 0.0)
    assert found.mean == pytest.approx(0.2) and found.low == pytest.approx(0.2 - 4.3027 * 0.1 / 3**0.5, abs=1e-4)
    assert difference([0.1], 0.0).low == -math.inf


def test_the_real_part_is_told_apart_by_task_and_is_lossless_or_not():
    right = {"source": 600, "base": 300, "filtered": 590, "seeds": 400}
    items = {a: "1" * n + "0" * (1000 - n) for a, n in right.items()}
    records = {
        s: {"items": items, "accuracies": {a: bits.count("1") / 1000 for a, bits in items.items()}} for s in range(10)
    }
    words = told(records, "real")
    assert words[0] == "holds" and words[1] == "not measured yet" and words[2] == "holds"
    worse = {s: r | {"items": r["items"] | {"filtered": "1" * 400 + "0" * 600}} for s, r in records.items()}
    assert told(worse, "real")[0] == "does not hold"
    assert told(dict(list(records.items())[:4]), "real")[0] == "cannot tell"


@pytest.mark.parametrize(("change", "why"), [
    (("margin = 0.05", ""), "margin"), (('part = "toy"', 'part = "game"'), "part is one of"),
    (('measure = "support"', 'measure = "speed"'), "measure is one of"), 
    (("margin = 0.05", "margin = 5"), "between 0 and 1"),
    (('refuted = "the 95 % interval of the multiple ends below 3"', 'refuted = " "'), "does not say what refutes"),
])  # fmt: skip
def test_claims_that_are_no_claims_are_refused(tmp_path, change, why):
    from recipes.trans_lora_claims import FILE

    text = FILE.read_text(encoding="utf-8")
    assert change[0] in text
    (tmp_path / "claims.toml").write_text(text.replace(*change))
    with pytest.raises(ad.AddendaError, match=why):
        read_claims(tmp_path / "claims.toml")


def test_the_table_has_arms_stages_costs_and_claims_in_eighty_columns(tmp_path):
    margin, claims = read_claims()
    assert table(margin, claims, tmp_path) == ["Nothing is on record yet."]
    for seed, record in toy_records().items():
        file = tmp_path / "toy" / "runs" / f"seed-{seed}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(trans_lora.readable(record))
    lines = table(margin, claims, tmp_path)
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= WIDTH and "**toy**, 20 of 20 seeds" in text
    assert "transferred (filtered) 93." in text and "accepted: format 75%, new 80%, discriminator 83%" in text
    assert "a seed takes 40 s: students 30 s, synthesis 10 s; in all 13 min" in text and "holds: +33" in text


def test_the_toys_world_is_drawn_by_its_seed_and_its_words_are_tokens():
    world, tokenizer = World(3), make_tokenizer()
    lines = world.different(40, world.task_line)
    assert lines == World(3).different(40, World(3).task_line) or lines[0] == World(3).task_line()
    assert len({*lines}) == 40 and all(map(is_task, lines))
    assert answer("good and bad or fine") == YES and answer("grim or bad and good") == NO
    assert not any(map(is_task, ("good and bad", "good but bad or fine", "good bad fine", "red and red or red", "")))
    text = World(1).listed()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert [line.strip() for line in tokenizer.decode(ids).split("\n")] == text.split("\n")
    assert text.count("\n") == 8 and not set(World(2).noise().split()) & {"1.", "Is"}
    for word in ("yes", "no", YES, NO):
        assert len(tokenizer(word)["input_ids"]) == 1


def test_seeds_of_the_toy_are_run_once_and_other_settings_are_refused(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("recipes.trans_lora_toy.run", lambda seed, *_: ran.append(seed) or {
        "accuracies": {"base": 0.5}, "shown": {"made": ["a"], "real": ["b"]}})  # fmt: skip
    assert trans_lora.toy(tmp_path / "toy", range(2), Clock(None)) and ran == [0, 1]
    assert trans_lora.toy(tmp_path / "toy", range(3), Clock(None)) and ran == [0, 1, 2]
    assert trans_lora.records_in(tmp_path / "toy")[2] == {"accuracies": {"base": 0.5}}, "and no text is kept"
    assert not trans_lora.toy(tmp_path / "toy", range(4), Clock(1e-6)) and ran == [0, 1, 2]
    with pytest.raises(ad.AddendaError, match="belongs to another run"):
        trans_lora.toy(tmp_path / "toy", range(3), Clock(None), replace(ToySetting(), steps=1))


def test_verdicts_err_as_seldom_as_is_said():
    """With few draws: about 16 % of equal arms pass with three seeds, and hardly a worse one with ten."""
    few, enough = power(3, 200, 0.03, 0.03, 60), power(10, 400, 0.05, 0.03, 60)
    assert few["equal"] < 0.4 and enough["equal"] > 0.75 and enough["worse"] < 0.13
    assert power(3, 200, 0.03, 0.12, 60)["worse by items"] > 0.2


def test_words_are_sorted_and_draws_of_a_seed_share_nothing():
    assert task("sort-words") is sort_words() and len(sort_words().splits["test"]) > 998
    for example in sort_words().splits["test"][:50]:
        words = example.question.split(": ")[1].split()
        back = example.question.startswith("Sort z")
        assert example.answer.split() == sorted(words, reverse=back) and len({*words}) == 3
    own, other = drawn("sort-words", 100, 1)
    assert len({*own.examples} | {*other.examples}) == 200 and drawn("sort-words", 100, 2)[0] != own
    with pytest.raises(ad.AddendaError, match="no task 'sums'"):
        task("sums")


def test_the_plan_is_runs_by_their_seconds_and_never_leaves_out_a_seed():
    every = units(("sort-numbers", "sort-words"), range(10))
    assert len(every) == 10 * (2 * len(SHARED + ARMS) + len(FURTHER)) and [u.what for u in every[:10]] == ["real"] * 10
    assert {u.what for u in units(("sort-numbers",), range(2), quick=True)} == {*SHARED, *QUICK}
    lines = plan(every, SECONDS, Setting(), 3600.0, is_healed=False)
    real = seconds_of(Unit("sort-numbers", 0, "real"), SECONDS, Setting())
    assert real == pytest.approx(400 + 99.8)
    assert any(line.startswith("real") and "20 runs" in line and "2.8 h" in line for line in lines)
    assert lines[-1].startswith("in all") and "sittings of 60 min" in lines[-1] and any("healing" in x for x in lines)
    assert "give a longer --within" in plan(every, SECONDS, Setting(), 100.0, is_healed=True)[-1]


def test_real_labels_are_looked_at_before_the_rest(tmp_path):
    assert "0 of the 5 seeds" in steady(tmp_path, ("sort-numbers",))
    for seed, accuracy in enumerate((0.5, 0.51, 0.52, 0.5, 0.49)):
        file = record_file(tmp_path, Unit("sort-numbers", seed, "real"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(trans_lora.readable({"accuracies": {"real": accuracy}}))
    assert "vary by 1.1 points between seeds, steady enough" in steady(tmp_path, ("sort-numbers",))


# ---- the real part's arms, on a tiny model ---------------------------------------------------------------------------

TINY = Setting(
    layers=2, third=2, heal_steps=2, heal_batch=2, heal_length=40, heal_rank=4, count=6, tries=64, steps=30,
    judge_steps=2, batch=6, rate=2e-2, temperature=1.0, lines=1, max_new_tokens=4, test=5,
)  # fmt: skip


def sums(rows):
    turns = [("system", ""), ("user", "{}+{}=?"), ("assistant", "{}")]
    made = []
    for i in rows:
        a, b = i % 10, (i // 10 + 3 * i) % 10
        texts = ("", f"{a}+{b}=?", str((a + b) % 10))
        made.append({"messages": [{"role": r, "content": t} for (r, _), t in zip(turns, texts, strict=True)]})
    return read(made)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    from lister import make_lister

    lister, tokenizer = make_lister()
    lister.config.num_hidden_layers = 3
    model = LlamaForCausalLM(lister.config)
    model.load_state_dict(lister.state_dict(), strict=False)
    for last in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        torch.nn.init.normal_(last.weight, std=1e-3)  # a third layer that changes little
    tokenizer.add_tokens(["yes", "no"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    for where in (trans_lora_real, trans_lora_sitting):
        monkeypatch.setattr(where, "data", lambda name, part, rows: sums(rows))
        monkeypatch.setattr(where, "drawn", lambda name, n, seed: (sums(range(n)), sums(range(50, 50 + n))))
    return Bench(TINY, tmp_path / "target", kept=tmp_path / "kept")


@pytest.mark.slow
def test_every_arm_runs_once_and_leaves_the_bases_as_they_were(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trans_lora_sitting, "SEEDS", {"real": 1})
    assert sitting(tmp_path, tasks=["sort-numbers"], within=1e9, bench=bench)
    record = trans_lora.records_in(tmp_path / "real" / "sort-numbers")[0]
    assert {*record["accuracies"]} == {"source", "base", *ARMS, *FURTHER} and len(record["items"]["real"]) == 5
    assert {*record["seconds"]} == {*SHARED, *ARMS, *FURTHER} and record["passed"] <= record["made"]
    assert record["distance"].keys() == {"made", "chosen", "bandwidth"} and record["leaked"]["known"] == 5
    texts = " ".join(map(str, record.values()))
    assert "+" not in texts.replace("e+", ""), "no text is on record"
    for name in ("target", "source", "third"):
        assert "no adapter attached" in ad.status(bench.side(name).model)
    said = capsys.readouterr().out
    assert "0 of 16 runs are on record" in said and "filtered          1 runs" in said
    assert sitting(tmp_path, tasks=["sort-numbers"], within=1e9, bench=bench)
    assert "16 of 16 runs are on record" in capsys.readouterr().out
    margin, claims = read_claims()
    assert any("factors copied, no training" in line for line in table(margin, claims, tmp_path))


def test_a_machine_that_lost_the_cache_makes_again_what_missing_arms_read(bench, tmp_path):
    every = units(("sort-numbers",), range(2))
    whats = {s: {u.what for u in every if u.seed == s} for s in (0, 1)}

    def left(seed, *, but):
        file = record_file(tmp_path, Unit("sort-numbers", seed, "real"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(trans_lora.readable({"seconds": dict.fromkeys(whats[seed] - {*but}, 1.0)}))
        return [u.what for u in missing(tmp_path, bench, every) if u.seed == seed]

    assert left(0, but=()) == []  # whole: nothing of it is read again
    assert left(1, but=("real",)) == ["real"] and left(1, but=("projected",)) == ["source", "projected"]
    assert left(1, but=("dora",)) == ["source", "bundle", "dora"]
    assert left(1, but=("chain",)) == ["source", "bundle", "filtered", "chain"]
    for name in ("source.safetensors", "task.bundle"):
        place = bench.place(Unit("sort-numbers", 1, "chain"))
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"here")
    assert left(1, but=("dora",)) == ["dora"] and left(1, but=("chain",)) == ["filtered", "chain"]
    assert left(0, but=()) == []


def test_a_seed_is_one_processes_at_a_time(bench, tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(trans_lora_sitting, "timed", lambda bench: SECONDS)
    monkeypatch.setattr(
        Bench,
        "run",
        lambda self, unit, record: ran.append(unit) or {"seconds": record.get("seconds", {}) | {unit.what: 1}},
    )
    monkeypatch.setattr(trans_lora_sitting, "READ", {"an arm": ()})
    monkeypatch.setattr(store, "WAIT", 1e9)  # it gives up where it would wait
    other = lock_of(tmp_path, "sort-numbers-1")
    assert other.take()
    told = {"tasks": ["sort-numbers"], "within": 1e8, "seeds": 3, "bench": bench, "processes": 2}
    assert not sitting(tmp_path, **told)
    said = capsys.readouterr()
    assert "sittings of" in said.out and ", 2 processes" in said.out and "The time is up" in said.out
    assert "Waiting for another process, at sort-numbers, seed 1: real, sort-numbers, seed 1: source" in said.err
    assert {u.seed for u in ran} == {0, 2} and len(ran) == len(set(ran)) == 2 * len(SHARED + ARMS + FURTHER)
    other.release()
    monkeypatch.setattr(trans_lora_sitting, "steady", lambda root, tasks: "steady")
    assert sitting(tmp_path, **told) and {u.seed for u in ran} == {0, 1, 2} and len(ran) == len(set(ran))
    with pytest.raises(ad.AddendaError, match="--processes is 0"):
        sitting(tmp_path, **(told | {"processes": 0}))


@pytest.mark.slow
def test_a_sitting_that_is_too_short_begins_nothing_and_says_so(bench, tmp_path, capsys):
    assert not sitting(tmp_path, tasks=["sort-numbers"], within=1e-3, seeds=1, bench=bench)
    said = capsys.readouterr().out
    assert "The time is up. The same command goes on." in said and "give a longer --within" in said
    assert not list((tmp_path / "real").rglob("seed-*.json"))
    assert not sitting(tmp_path, tasks=["sort-numbers"], only_cost=True, seeds=1, bench=bench)
    with pytest.raises(ad.AddendaError, match="no task 'sums' here"):
        sitting(tmp_path, tasks=["sums"], bench=bench)
