"""Ordering images as a recipe: tiny encoders from end to end, going on after a kill, two processes, claims, table."""

import sys
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipes import order, order_data
from recipes.kept import SharedRuns
from recipes.order_arms import Bench, Sources
from recipes.order_claims import FILE, read_claims, verdicts
from recipes.order_cost import Speeds, cost_lines, plan, timed, units
from recipes.order_measured import KEPT
from recipes.order_setting import ADAPTERS, ARMS, ASKED, LEARNED, OTHER, QUERIES, RIDGES, TUNED, Setting, run_name
from recipes.order_table import WIDTH, table
from recipes.order_tuned import tuned
from recipes.store import Busy, Clock, TimeUp, lock_of
from tests.ranking.order.tiny_towers import apart

from addenda.core.base.errors import AddendaError
from addenda.core.disk import cache
from addenda.ranking.order.adapter import OrderAdapter
from toy_mosaics import toy_tiles, toy_wheel

KINDS = ("image", "judging", "ridge", "sentence", "sentence by pairs", "step of one head", "step of both heads", *TUNED)
ROUND = Speeds(dict.fromkeys(KINDS, 1.0))


class Toys(Sources):
    """Tiles that are squares, cloth of one colour, encoders drawn at random."""

    def __init__(self, folder):
        self.folder = folder
        self.file = toy_wheel(folder / "toy.whl")

    def tiles(self):
        return toy_tiles()

    def wheel(self):
        return self.file


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    apart(folder)
    return Toys(folder)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    assert cache.cache_folder() == tmp_path / "cache"


def small(toys, **options):
    given = {
        "image": str(toys.folder / "vit"), "text": str(toys.folder / "bert"), "side": 16, "images": (12, 24), "few": 12,
        "test": 32, "validation": 16, "seeds": (0, 1), "width": 16, "heads": 2, "layers": 1, "after": 0, "batch": 8,
        "steps": (2, 3), "tuned_batch": 4, "tuned_steps": (1, 2), "names": 24, "draws": 20, "lora": "lora:rank=2",
    } | options  # fmt: skip
    return Setting(**given)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_every_arm_from_end_to_end_and_a_killed_recipe_goes_on_with_the_same_records(toys, tmp_path):
    setting = small(toys, images=(12,), steps=(2,), tuned_steps=(1,), names=12, seeds=(0,))
    everything = plan(setting, ROUND, None, 2, lambda unit: False)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert order.run(Bench(setting, toys), whole, everything, None, Clock())

    class Killed(Clock):
        left = 90

        def spare(self, seconds):
            self.left -= 1
            if not self.left:
                raise TimeUp

    assert not order.run(Bench(setting, toys), cut, everything, None, Killed())
    assert 0 < len(list((cut / "runs").iterdir())) < len(everything.units)
    assert order.run(Bench(setting, toys), cut, everything, None, Clock())
    known = order.known_in(whole)
    for unit in units(setting):
        a, b = (order.known_in(root)(unit.name) for root in (whole, cut))
        assert {k: v for k, v in a.items() if k not in ("seconds", "made")} == {
            k: v for k, v in b.items() if k not in ("seconds", "made")
        }
        if unit.what == "run":
            answered = set(a["mean"]) - {OTHER}
            all_groups = set(QUERIES[unit.subject])
            assert answered == ({LEARNED[unit.subject]} if unit.arm in ("pixels", "patches", *TUNED) else all_groups)
            assert (OTHER in a["mean"]) == (unit.arm == "dual")
            for group, of in a["by_query"].items():
                assert set(of) == set(QUERIES[unit.subject][group]) and all(len(v) == len(KEPT) for v in of.values())
                assert len(a["draws"][group]) == 20
            assert a["test"] == known(f"{unit.subject}-features-test")["digest"]
    assert {u.arm for u in units(setting) if u.what == "run"} == {*ARMS}
    size = sum(p.stat().st_size for p in (whole / "runs").iterdir())
    assert size < 6000 * len(everything.units)  # small: no scores, no pixels
    with pytest.raises(AddendaError, match=r"setting\.batch was 8, now 9"):
        order.run(Bench(replace(setting, batch=9), toys), whole, everything, None, Clock())


def test_shuffled_values_are_those_of_each_image_and_the_pair_head_alone_ranks_by_pairs(toys, monkeypatch):
    bench, seen = Bench(small(toys), toys), []

    rates = []

    def trained(towers, ratings, patches, **options):
        seen.append(ratings)
        rates.append(options["rate"])
        raise TimeUp

    monkeypatch.setattr("recipes.order_arms.train_order", trained)
    for arm in ("dual", "shuffled", "regression"):
        with pytest.raises(TimeUp):
            bench.run("mosaics", arm, 24, 0)
    plain, dealt = (np.array([[r.values.get(q, {}).get(i, 0.0) for q in ASKED] for i in range(24)]) for r in seen[:2])
    assert rates == [3e-4, 3e-4, 1e-4]
    assert (np.sort(plain, 1) == np.sort(dealt, 1)).mean() > 0.9 and (plain != dealt).any()
    heard = [
        {tuple(t.tokens(q)[0].flatten().tolist()) for q in (*ASKED, "red squares")} for t in (bench.towers, bench.deaf)
    ]
    assert len(heard[0]) > 1 == len(heard[1])
    adapter = OrderAdapter(bench.settings, 16, 12).eval()
    patches = bench.patches("mosaics", "test")
    against = bench.patches("mosaics", "train", 0)[:5]
    found = bench.scored(adapter, bench.towers, patches, ASKED[0], against)
    tokens = bench.towers.tokens(ASKED[0])
    for i in (0, 31):
        pairs = adapter(torch.cat([patches[i : i + 1], against]), *tokens, pairs=True).pairs.detach().numpy()
        assert found[i] == pytest.approx(pairs[0, 1:].mean(), abs=1e-5)
    values = bench.scored(adapter, bench.towers, patches, ASKED[0], None)
    assert np.allclose(values, adapter(patches, *tokens).values.detach().numpy(), atol=1e-5)


def test_no_part_of_a_mosaic_is_cropped(toys):
    bench = Bench(small(toys, side=84), toys)
    picture = bench.part("mosaics", "test").pictures[0]
    assert (bench.pixels("mosaics", "test", 0)[0][..., 0] == np.asarray(picture.open())).all()


def test_two_processes_share_the_work_and_nothing_is_made_twice(tmp_path):
    root = tmp_path / "root"
    with SharedRuns(Namespace(out=root, old=False), {"x": 1}) as one:
        with SharedRuns(Namespace(out=root, old=False), {"x": 1}) as other:
            made = one.once("a", lambda: {"busy": _busy(other)})
            assert made == {"busy": True} and other.once("a", dict) == made
        with pytest.raises(AddendaError, match="x was 1, now 2"), SharedRuns(Namespace(out=root, old=False), {"x": 2}):
            pass


def _busy(runs):
    try:
        runs.once("a", dict)
    except Busy:
        return True
    return False


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_the_cost_is_images_steps_and_sentences_at_the_speed_that_was_measured():
    setting = Setting(images=(10, 50), few=10, steps=(3, 7), tuned_steps=(1, 2), test=40, validation=20, seeds=(0, 1),
                      names=50)  # fmt: skip
    every = units(setting)
    assert len({u.name for u in every}) == len(every)
    runs = [u for u in every if u.what == "run"]
    assert len(runs) == 2 * (12 * 2 + 5 + 5) and len(every) - len(runs) == 3 * 4 + 1
    of = {u.name: ROUND.of(u, setting) for u in every}
    assert of["mosaics-features-train-1"] == 50 and of["grades-features-test"] == 20
    assert of["mosaics-dual-50-0"] == 1 + 7 + 32 and of["grades-blind-10-1"] == 1 + 3 + 6 / 2
    assert of["mosaics-whole-50-0"] == 1 + 2 + 40 and of["mosaics-pixels-10-0"] == 2
    lines = cost_lines(every, ROUND, setting, 2)
    assert all(len(line) <= WIDTH for line in lines) and lines[-1].startswith("in all") and "2 processes" in lines[-1]


def test_a_limit_leaves_out_whole_arms_and_never_seeds():
    setting = Setting()
    most = plan(setting, ROUND, None, 2, lambda unit: False)
    assert most.said == () and len(most.units) == len(units(setting))
    some = plan(setting, ROUND, most.seconds / 4, 2, lambda unit: False)
    blocks = {u.block for u in some.units}
    assert some.seconds <= most.seconds / 2 and some.said[0].startswith("left out, for a later call: ")
    for unit in units(setting):
        assert (
            (unit in some.units) == (unit.block in blocks) != (unit.block in some.said[0].split(": ", 1)[1].split(", "))
        )
    assert {"mosaics: dual 500", "mosaics: image × text 500"} <= blocks
    rest = plan(setting, ROUND, None, 2, lambda unit: unit in some.units)
    assert len(rest.units) + len(some.units) == len(most.units)
    cloth = plan(setting, ROUND, None, 2, lambda unit: False, lambda u: "No cloth." if u.subject == "textile" else "")
    assert cloth.said == ("left out: textile. No cloth.",) and all(u.subject != "textile" for u in cloth.units)


def test_a_few_steps_of_each_kind_are_timed(toys, tmp_path):
    setting = small(toys)
    found = timed(Bench(setting, toys), units(setting))
    assert set(found.seconds) == {*KINDS} and all(v > 0 for v in found.seconds.values())
    assert not list(tmp_path.rglob("*.json"))


def test_missing_cloth_is_told_and_everything_else_is_run(toys, monkeypatch):
    def missing():
        raise AddendaError("There is no cloth.")

    bench = Bench(small(toys), Toys(toys.folder))
    bench.sources.wheel = missing
    cannot = order.cannot_run(bench)
    assert {u.subject: cannot(u) for u in units(bench.setting)} == {
        "mosaics": "", "grades": "", "textile": "There is no cloth.",
    }  # fmt: skip


# ---- claims and table ------------------------------------------------------------------------------------------------

HEIGHTS = {"dual": 0.7, "regression": 0.68, "pairwise": 0.69, "ranknet": 0.67, "blind": 0.2, "shuffled": 0.2,
           "pixels": 0.5, "patches": 0.55, "image × text": 0.55, "whole": 0.6, "lora": 0.6, "alignment": 0.4,
           OTHER: -0.05}  # fmt: skip


def records(**heights):
    """Made-up records: every arm's height, with noise of 0.01 over seeds and 0.01 over images."""
    rng, made = np.random.default_rng(0), {"mosaics-features-test": {"images": 400}}
    of = HEIGHTS | {k.replace("_", " "): v for k, v in heights.items()}
    shared = 0.01 * rng.normal(size=100)
    for unit in units(Setting()):
        if unit.what == "features":
            continue
        mean, draws = {}, {}
        groups = [*QUERIES[unit.subject]] if unit.arm in (*ADAPTERS, "image × text", "alignment") else [
            LEARNED[unit.subject]]  # fmt: skip
        for group in [*groups, *([OTHER] if unit.arm == "dual" else [])]:
            low = of[OTHER if group == OTHER else unit.arm] + 0.01 * rng.normal()
            mean[group] = round(low, 5)
            draws[group] = [round(float(v), 4) for v in low + shared + 0.005 * rng.normal(size=100)]
        made[unit.name] = {"mean": mean, "draws": draws, "seconds": 12.3}
    return made


def test_verdicts_on_what_was_claimed():
    margin, claims = read_claims()
    said = verdicts(margin, claims, records().get, Setting())
    words = {c.name: line.removeprefix(f"{c.words}: ").split(":")[0] for c, line in zip(claims, said, strict=False)}
    assert set(words.values()) == {"holds"} and len(words) == 18
    assert said[-1] == "The adapter is above every ridge here: it is worth its training."
    assert "dual − pixels is +0.1" in said[2] and "classes, 20 images" in said[2]


def test_what_does_not_hold_is_said_and_what_lacks_a_seed_is_not_run():
    margin, claims = read_claims()
    made = records(patches=0.8, regression=0.75, blind=0.69, shuffled=0.5)
    del made[run_name("mosaics", "dual", 100, 3)]
    said = dict(zip([c.name for c in claims], verdicts(margin, claims, made.get, Setting()), strict=False))
    assert said["patches-500"].startswith("and than a ridge on pooled patches: does not hold")
    assert said["patches-20"].startswith("and as a ridge on pooled patches: does not hold")
    assert "void" not in said["patches-20"] and said["pixels-100"].endswith(": not run")
    assert "holds" in said["pixels-500"] and "does not hold" in said["shuffled-blind"]
    last = verdicts(margin, claims, made.get, Setting())[-1]
    assert last == "The adapter is not above the ridge on patches: it is not worth it here."


def test_two_heads_that_have_learned_nothing_are_not_called_alike():
    margin, claims = read_claims()
    made = records(dual=0.19, regression=0.19, pairwise=0.19)
    said = dict(zip([c.name for c in claims], verdicts(margin, claims, made.get, Setting()), strict=False))
    for name in ("dual-regression", "dual-pairwise", "shuffled-blind"):
        assert ": void" in said[name] and "it has learned no query" in said[name]


def test_the_table_has_every_arm_at_every_size_within_80_columns():
    margin, claims = read_claims()
    lines = table(margin, claims, records().get, Setting())
    assert max(map(len, lines)) <= WIDTH and lines[0] == lines[-1] == "```"
    for images in (20, 100, 500):
        assert f"mosaics, {images} rated images a query, 400 test images: mean Spearman, 95 %" in lines
    rows = [line for line in lines if line.startswith("dual ")]
    assert len(rows) == 2 * 3 + 2 and 0.68 <= float(rows[0].split()[1]) <= 0.72
    assert sum(line.startswith(OTHER) for line in lines) == 5 and sum(line.startswith("whole") for line in lines) == 3
    none = table(margin, claims, dict().get, Setting())
    assert all(": not run" in " ".join(" ".join(none).split()) for _ in claims) and len(RIDGES) == 3


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("margin = 0.02", "margin = 2", "margin is between 0 and 1"),
        ('b = "regression"', 'b = "regresion"', "claim 'dual-regression': b is one of dual"),
        ('queries = "german"', 'queries = "dutch"', "queries is one of classes"),
        ("images = 500", "images = 501", "images is one of 20, 100, 500"),
        ('direction = "equal"', 'direction = "lower"', "direction is one of higher, not lower, equal"),
        ('name = "german"', 'name = "grades"', "has a name that another has"),
        ('refuted = "a − b is beyond the margin"', 'refuted = ""', "does not say what refutes it"),
        ("images = 500", 'images = "500"', "images is '500', int was expected"),
        ('refuted = "a − b is beyond the margin"', "refuted = 5", "refuted is 5, str was expected"),
        ("[[claims]]", "[[claims", "holds no claims of orders"),
    ],
)
def test_the_file_of_claims_is_checked(tmp_path, old, new, told):
    file = tmp_path / "claims.toml"
    text = FILE.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(AddendaError, match=told):
        read_claims(file)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"images": (20,)}, "give as many of each"), ({"few": 30}, "few is one of"), ({"draws": 0}, "at least 1"),
     ({"names": 30}, "names are 500 at least")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(options, told):
    with pytest.raises(AddendaError, match=told):
        Setting(**options)


def test_the_command_puts_what_is_on_record_on_a_page(tmp_path, monkeypatch):
    from recipes import __main__ as command

    page = tmp_path / "page.md"
    page.write_text("# Here\n<!-- order -->\nold\n<!-- end -->\nbehind\n")
    monkeypatch.setattr(sys, "argv", ["recipes", "order", "--page", str(page), "--root", str(tmp_path / "none")])
    command.main()
    text = page.read_text()
    assert "old" not in text and text.startswith("# Here\n<!-- order -->\n") and "not run" in text
    monkeypatch.setattr(sys, "argv", ["recipes", "order", "--processes", "0"])
    with pytest.raises(AddendaError, match="--processes is 0"):
        command.main()


def test_features_are_made_once(toys):
    setting = small(toys)
    first = Bench(setting, toys).features("mosaics", "test", 0)
    again = Bench(setting, toys).features("mosaics", "test", 0)
    assert first["made"] >= 30 and again["made"] == 0 and first["digest"] == again["digest"]
    assert order_data.mosaics(toy_tiles(), "test", 32, 0).digest == first["digest"]


def test_an_encoder_whose_training_diverges_says_so_at_its_step(toys):
    bench = Bench(small(toys), toys)
    with pytest.raises(AddendaError, match="nan at step 1"):
        tuned(bench.towers, np.zeros((4, 16, 16, 3), np.uint8), np.full((4, 2), np.nan), steps=2, batch=4, rate=1e-3,
              head_rate=1e-3, seed=0)  # fmt: skip


def test_what_is_done_in_one_folder_does_not_keep_another_waiting(tmp_path):
    first, same, other = lock_of(tmp_path / "a", "x"), lock_of(tmp_path / "a", "x"), lock_of(tmp_path / "b", "x")
    assert first.take() and not same.take() and other.take()
    first.release()
    assert same.take()
    for lock in (same, other):
        lock.release()
