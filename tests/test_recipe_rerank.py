"""Rerankers in many languages as a recipe: what it costs, what is left out, going on after a kill, claims and table."""

import sys
from dataclasses import replace

import pytest
import torch
from recipes import rerank
from recipes.rerank_arms import Bench
from recipes.rerank_claims import FILE, read_claims, values, verdicts
from recipes.rerank_cost import Speeds, cost_lines, plan, timed, units
from recipes.rerank_setting import ARMS, Setting, hashed, part_of, slug
from recipes.rerank_table import WIDTH, table
from recipes.seconds import seconds_of
from recipes.store import WAIT, Clock, TimeUp, lock_of
from transformers import BertModel

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.models.load import load_model
from addenda.ranking.bi_encoder import BiEncoder
from addenda.ranking.first_stage import first_stage
from ranking.toy import ToyTexts, toy_config, toy_tokenizer
from shared import stir

ROUND = Speeds(
    {"judge": 0.1} | {f"part {k}": 1.0 for k in ("bottlenecks", "numbers")} | {f"task {a}": 1.0 for a in ARMS}
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    BertModel(toy_config()).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return ToyTexts(folder)


SMALL = Setting(
    model="toy", steps=3, part_steps=3, negatives=3, queries=4, depth=4, pool=24, learned=24, seeds=(0,),
    languages=("de",), task_rank=2, part_rank=4, max_length=32, arms=("pfeiffer + part", "lottery"),
)  # fmt: skip


class Stirred(Bench):
    """A bench whose parts have learned nothing and are not nothing: how they learn is tested where that is."""

    def part(self, kind, language, *, steps=None):
        if not steps:
            model = load_model(self.model, task="label", labels=1).model
            method = f"pfeiffer:rank={self.setting.part_rank}" if kind == "bottlenecks" else "sparse:total=40"
            made = stir(ad.attach(model, method, also_train=(), name="part"), seed=len(language))
            file = self.part_at(kind, language)
            file.parent.mkdir(parents=True, exist_ok=True)
            made.save(file, without_base=True)
        return {"seconds": 1.0, "steps": 3, "second": 0.3, "texts": 24, "bytes": 1000}


def bench(words, path, setting=SMALL):
    return Stirred(setting, words, kept=path)


def everything(setting=SMALL):
    return plan(setting, ROUND, None, lambda unit, queries: False)


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_the_cost_is_steps_and_queries_at_the_speed_that_was_measured():
    setting = Setting(steps=1000, part_steps=500, queries=100, languages=("de", "fi"), seeds=(0, 1))
    left = units(setting, setting.languages)
    kinds = [u.what for u in left]
    counts = {what: kinds.count(what) for what in ("control", "part", "task", "judge")}
    assert counts == {"control": 2 * 3, "part": 2 * 3, "task": 8 * 2, "judge": 8 * 2 * 3}
    want = 6 * 500 * 1.0 + 16 * 1000 * 1.0 + (6 + 48) * 100 * 0.1
    assert ROUND.total(left, setting) == pytest.approx(want)
    lines = cost_lines(left, ROUND, setting)
    assert lines[-1].split() == ["in", "all", "76", "runs", "5.4", "h"]
    assert cost_lines(left, ROUND, setting, 2)[-1].endswith("5.4 h  2.7 h of 2 processes")
    assert all(len(line) <= WIDTH for line in lines)
    assert len({u.name for u in units(setting, setting.languages, more=True)}) == len(
        units(setting, setting.languages, more=True)
    )


def test_ten_steps_of_each_arm_are_timed(words, tmp_path):
    setting = replace(SMALL, arms=("full", "lottery + part"))
    found = timed(bench(words, tmp_path, setting), units(setting, ("de",)))
    assert set(found.seconds) == {"judge", "part bottlenecks", "part numbers", "task full", "task lottery + part"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert not list(tmp_path.rglob("adapter.safetensors"))


@pytest.mark.parametrize(
    ("within", "languages", "queries", "said"),
    [
        (None, ("de", "fr", "it", "ja", "da", "fi"), 100, ()),
        (1e9, ("de", "fr", "it", "ja", "da", "fi"), 100, ()),
        (2000, ("de", "fr", "da", "ja", "fi"), 100, ("left out: the language it",)),
        (900, ("de", "fi"), 75,
         ("left out: the languages it, da, ja, fr", "left out: 25 of 100 queries in each language")),
    ],
)  # fmt: skip
def test_a_limit_leaves_out_languages_then_queries_and_never_seeds(within, languages, queries, said):
    setting = Setting(steps=10, part_steps=10)
    found = plan(setting, ROUND, within, lambda unit, q: False)
    assert set(found.languages) == set(languages) and found.queries == queries and found.said == said and found.fits
    assert len({u.seed for u in units(setting, found.languages)}) == 3


def test_what_fits_in_no_sitting_is_said_and_done_runs_cost_nothing():
    setting = Setting(steps=1000, part_steps=10)
    found = plan(setting, ROUND, 90 * 60, lambda unit, q: False)
    assert not found.fits and found.queries == 25 and "sitting by sitting, with all of its seeds" in found.said[-1]
    again = plan(setting, ROUND, 90 * 60, lambda unit, q: unit.what != "judge" or unit.seed != 2)
    assert again.fits and again.queries == 100 and again.languages == setting.languages
    assert [seconds_of(t) for t in ("90m", "2.5h", "300s")] == [5400, 9000, 300]
    for wrong in ("90", "m", "0m", "-3h", "1d"):
        with pytest.raises(AddendaError, match=r"90m, 2\.5h or 300s"):
            seconds_of(wrong)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_killed_recipe_goes_on_and_ends_with_the_same_records(words, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert rerank.run(bench(words, tmp_path / "a"), whole, everything(), None, Clock())

    class Killed(Clock):
        left = 4

        def spare(self, seconds):
            self.left -= 1
            if not self.left:
                raise TimeUp

    sittings = 0
    while not rerank.run(bench(words, tmp_path / "b"), cut, everything(), None, Killed()):
        sittings += 1
        Killed.left = 12  # the first is ended within its controls, the next ones within a training
    names = sorted(p.name for p in (whole / "runs").iterdir())
    assert sittings >= 2 and names == sorted(p.name for p in (cut / "runs").iterdir())
    assert names == sorted(f"{u.name}.json" for u in units(SMALL, ("de",)))
    for name in names:
        a, b = (rerank.known_in(root)(name.removesuffix(".json")) for root in (whole, cut))
        assert {k: v for k, v in a.items() if k not in ("seconds", "second", "ms")} == {
            k: v for k, v in b.items() if k not in ("seconds", "second", "ms")
        }
    for arm in SMALL.arms:
        files = [bench(words, tmp_path / x).file(arm, 0) for x in "ab"]
        assert files[0].read_bytes() == files[1].read_bytes()
    text = "".join(p.read_text() for p in (whole / "runs").iterdir())
    assert not any(f'"{word}"' in text for i in range(24) for word in (f"q{i}", f"d{i}", f"a{i}"))
    with pytest.raises(AddendaError, match="steps was 3, now 5"):
        rerank.run(bench(words, tmp_path / "a", replace(SMALL, steps=5)), whole, everything(), None, Clock())


def test_what_the_cache_has_lost_is_made_again_where_a_missing_run_reads_it(words, tmp_path, capsys):
    setting = replace(SMALL, arms=("full", "pfeiffer + part", "lottery"))
    what = plan(setting, ROUND, None, lambda unit, queries: False)
    first, root = bench(words, tmp_path / "a", setting), tmp_path / "runs-of-it"
    assert rerank.run(first, root, what, None, Clock()) and rerank.missing(root, first, 4) == []
    gone = bench(words, tmp_path / "another machine", setting)
    assert rerank.missing(root, gone, 4) == []  # the files of what is judged already are not missed
    (root / "runs" / "judged-pfeiffer-part-0-de.json").unlink()
    left = rerank.missing(root, gone, 4)
    read = ["part-bottlenecks-en", "part-bottlenecks-de", "task-pfeiffer-part-0"]
    assert [u.name for u in left] == [*read, "judged-pfeiffer-part-0-de"]
    assert rerank.chosen(root, gone, ROUND, None, processes=2).seconds == pytest.approx((2 * 3 + 3 + 0.4) / 2)
    capsys.readouterr()
    assert rerank.run(gone, root, what, None, Clock())
    made = [line.strip() for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    assert sorted(made) == sorted(u.name for u in left) and made[-1] == left[-1].name
    assert rerank.missing(root, gone, 4) == [] and rerank.missing(root, gone, 5) != []  # with more queries


def test_of_two_processes_each_does_what_the_other_is_not_at(words, tmp_path, monkeypatch, capsys):
    root, busy = tmp_path / "r", lock_of(tmp_path / "r", "task-lottery-0")
    assert busy.take()

    class Waits(Clock):
        def spare(self, seconds):
            if seconds == WAIT:
                raise TimeUp

    assert not rerank.run(bench(words, tmp_path / "a"), root, everything(), None, Waits())
    assert (
        "Waiting for another process, at task-lottery-0, judged-lottery-0-en, judged-lottery-0-de."
        in capsys.readouterr().err
    )
    left = {u.name for u in units(SMALL, ("de",))} - {p.stem for p in (root / "runs").iterdir()}
    assert left == {"task-lottery-0", "judged-lottery-0-en", "judged-lottery-0-de"}
    busy.release()
    assert rerank.run(bench(words, tmp_path / "a"), root, everything(), None, Waits())


def test_a_part_is_the_target_languages_where_it_is_judged(words, tmp_path):
    made = bench(words, tmp_path)
    for language in ("en", "de"):
        made.part("bottlenecks", language)
    kept = made.task("pfeiffer + part", 0)
    assert kept["bytes"] == made.file("pfeiffer + part", 0).stat().st_size and kept["numbers"] > 0
    asked, judged = made.asked("de"), made.judge("pfeiffer + part", 0, "de")
    assert judged["queries"] == [hashed(q) for q in asked] and len(judged["AP"]) == 4
    loaded = load_model(made.model, task="label", labels=1)
    ad.load(loaded.model, made.part_at("bottlenecks", "de"), name="part")
    ad.load(loaded.model, made.file("pfeiffer + part", 0), name="task")
    ad.switch(loaded.model, ["part", "task"])
    by_hand = ad.Reranker(loaded.model, loaded.tokenizer, max_length=32)
    run = first_stage(made.judged("de"), BiEncoder.load(made.model), queries=asked, k=24)
    for n, query in enumerate(asked):
        first = list(run[query])
        best = [d for d, _ in by_hand.rank(made.judged("de").queries[query], {
            d: made.judged("de").documents[d].whole for d in first[:4]
        })]  # fmt: skip
        place = [*best, *first[4:]].index(query.replace("q", "d")) + 1
        assert judged["AP"][n] == pytest.approx(1 / place, abs=1e-5)


def test_a_run_that_lost_its_record_alone_has_its_time_taken_again(words, tmp_path, monkeypatch):
    made = bench(words, tmp_path)
    monkeypatch.setattr("recipes.rerank_arms._drop", lambda folder: None)  # as if killed before that
    first, again = (made.task("lottery", 0) for _ in range(2))
    assert again["seconds"] > 0 and {k: first[k] for k in ("bytes", "numbers", "steps")} == {
        k: again[k] for k in ("bytes", "numbers", "steps")
    }


# ---- claims and table ------------------------------------------------------------------------------------------------


def records(**gains):
    """Made-up records of 60 queries in en, de and fi: the first stage at 0.5, arms at so much more or less."""
    made, seeds = {}, (0, 1, 2)
    texts = {"en": 9000, "de": 3000, "fi": 200}
    base = [0.4 + 0.2 * (i % 2) for i in range(60)]
    for x in texts:
        queries = [f"{i:012d}" for i in range(60)]
        for name in ("BM25", "e5"):
            made[f"control-{name}-{x}"] = {
                "queries": queries, "asked": 60, "documents": 600, "texts": texts[x], "recall": 0.95,
                "AP": base, "nDCG@10": base, "RR@10": base,
            }  # fmt: skip
        for arm in ARMS:
            for s in seeds:
                gain = gains.get(f"{slug(arm).replace('-', '_')}_{x}", gains.get(slug(arm).replace("-", "_"), 0.1))
                v = [
                    round(min(b + gain + 0.01 * ((i * 7 + s * 3 + ARMS.index(arm)) % 5 - 2), 1.0), 5)
                    for i, b in enumerate(base)
                ]
                made[f"judged-{slug(arm)}-{s}-{x}"] = {
                    "queries": queries, "ms": 40.0, "AP": v, "nDCG@10": v, "RR@10": v,
                }  # fmt: skip
    for arm in ARMS:
        for s in seeds:
            made[f"task-{slug(arm)}-{s}"] = {"seconds": 90.0 if "full" in arm else 50.0, "bytes": 470_000_000
                                             if "full" in arm else 900_000}  # fmt: skip
        for x in texts:
            made[f"part-{part_of(arm)}-{x}"] = {"seconds": 300.0, "bytes": 7_000_000, "texts": texts[x]}
    return made


def test_verdicts_on_what_was_claimed():
    margin, claims = read_claims()
    setting = Setting(languages=("de", "fi"))
    made = records(pfeiffer_part=0.2, pfeiffer_part_fi=0.3, lottery=0.1, random=0.1)
    said = verdicts(margin, claims, made.get, setting.languages, setting.seeds)
    words = [line.split(": ")[1] for line in said]
    assert words == ["holds", "does not hold", "holds", "holds", "holds", "holds"]
    assert "in fi (200 texts) the gain is +0.100 AP above" in said[3] and said[4].endswith("0.556 of full's seconds")
    del made["judged-pfeiffer-part-1-fi"]
    less = verdicts(margin, claims, made.get, setting.languages, setting.seeds)
    assert [line.endswith("not measured yet") for line in less[:4]] == [True, False, True, True]


def test_an_arm_that_is_no_reranker_gets_no_verdict_and_the_table_says_so():
    margin, claims = read_claims()
    setting = Setting(languages=("de", "fi"))
    made = records(full_en=-0.1)
    lines = table(margin, claims, made.get, setting)
    text = " ".join(" ".join(lines).split())
    assert "full is no reranker: in English it is not above e5" in text
    assert "beats zero-shot full fine-tuning: void: pfeiffer + part and full cannot be compared" in text
    assert max(map(len, lines)) <= WIDTH and lines[0] == lines[-1] == "```"
    assert "recall at 50 is 0.950" in text and "full + part" in text and "477000" in text


def test_a_query_of_two_languages_counts_once_and_only_shared_queries_are_compared():
    from recipes.rerank_claims import over_languages

    of = {x: {"a": {0: q}} for x, q in (("de", {"q": 0.2, "r": 0.4}), ("fi", {"q": 0.6}))}
    assert over_languages(of, ["a"]) == {"a": {0: {"q": pytest.approx(0.4), "r": 0.4}}}
    made = records()
    made["judged-full-0-de"] = {k: v[:25] if isinstance(v, list) else v for k, v in made["judged-full-0-de"].items()}
    found = values(made.get, ("de",), (0, 1, 2))["de"]
    assert {len(v) for arm in found.values() for v in arm.values()} == {25}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("margin = 0.02", "margin = 2", "margin is between 0 and 1"),
        ('b = "random"', 'b = "randon"', "claim 'lottery': b is one of full"),
        ('over = "least text"', 'over = "all"', "over is one of languages, least text"),
        ('refuted = "a seed of a takes as long as one of b"', 'refuted = ""', "does not say what refutes it"),
        ('measure = "seconds"', "", "holds no claims of rerankers"),
        ("[[claims]]", "[[claims", "holds no claims of rerankers"),
    ],
)
def test_the_file_of_claims_is_checked(tmp_path, old, new, told):
    file = tmp_path / "claims.toml"
    text = FILE.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(AddendaError, match=told):
        read_claims(file)


def test_the_command_puts_what_is_on_record_on_a_page(tmp_path, monkeypatch):
    from recipes import __main__ as command

    page = tmp_path / "page.md"
    page.write_text("# Here\n<!-- rerank -->\nold\n<!-- end -->\nbehind\n")
    monkeypatch.setattr(sys, "argv", ["recipes", "rerank", "--page", str(page), "--root", str(tmp_path / "none")])
    command.main()
    text = page.read_text()
    assert (
        "old" not in text and text.startswith("# Here\n<!-- rerank -->\n") and text.endswith("<!-- end -->\nbehind\n")
    )
    assert "not measured yet" in text
