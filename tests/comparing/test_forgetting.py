"""Forgetting: what is said of losses on a general text, against a derivation of its own and in simulation."""

import io
import json
import re
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from tests.comparing.test_record import config, trial

from addenda.comparing.entries import Config, TextResult, as_json
from addenda.comparing.forgetting import contrasts, forgetting, told
from addenda.comparing.record import Record
from addenda.comparing.report import page, summary
from addenda.core.base.errors import AddendaError

TITLES = {"lora": "LoRA", "lora+": "LoRA+"}


def text(losses):
    return TextResult(loss=float(np.mean(losses)), losses=tuple(float(x) for x in losses))


def record_of(path, base, arms, **more):
    """A record whose final runs have these losses, {arm: seeds × windows}, or None for an arm without."""
    made = config(methods={a: {"title": TITLES.get(a, a), "options": {}} for a in arms}, **more)
    record = Record.write_config(path, made)
    general = None if base is None else text(base)
    control = {"seed": None, "stage": "control", "rate": None, "steps": None, "losses": None}
    record = record.write_trial(trial(method="base", general=general, **control))
    for arm, seeds in arms.items():
        for seed, losses in enumerate(seeds):
            found = None if losses is None else text(losses)
            record = record.write_trial(trial(method=arm, seed=seed, general=found))
    return Record.read(path)


def drawn(rng, means, seeds=4, windows=24, of_seed=0.01, of_window=0.02, rest=0.005):
    base = rng.normal(3.0, 0.4, windows)
    arms = {}
    for arm, mean in means.items():
        of_windows = rng.normal(0, of_window, windows)
        arms[arm] = [
            base + mean + of_windows + rng.normal(0, of_seed) + rng.normal(0, rest, windows) for _ in range(seeds)
        ]
    return base, arms


def test_one_arm_is_students_interval_over_seeds_and_windows(tmp_path):
    base, arms = drawn(np.random.default_rng(0), {"lora": 0.05})
    found = forgetting(record_of(tmp_path, base, arms))["lora"]
    x = np.stack(arms["lora"]) - base
    seeds, windows = x.shape
    # two-way random effects, by mean squares: of windows, of seeds, of the rest
    of_windows = seeds * x.mean(0).var(ddof=1)
    of_seeds = windows * x.mean(1).var(ddof=1)
    rest = ((x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()) ** 2).sum() / ((seeds - 1) * (windows - 1))
    lasting, nu = max(of_windows - rest, 0), seeds - 1
    total = lasting + of_seeds
    variance = total / (seeds * windows)
    df = 1 / ((of_seeds / total) ** (2 - 2.3 / nu) / nu + (lasting / total) ** 2 / (windows - 1))
    half = stats.t.ppf(0.975, df) * variance**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((x.mean(), x.mean() - half, x.mean() + half), rel=1e-6)
    assert (found.seeds, found.windows) == (4, 24)


def test_arms_are_contrasted_at_the_seeds_they_share_and_holm_counts_the_pairs(tmp_path):
    rng = np.random.default_rng(1)
    base, arms = drawn(rng, {"lora": 0.20, "lora+": 0.0, "shira": 0.002})
    arms["shira"] = arms["shira"][:2]
    found = {(c.a, c.b): c for c in contrasts(record_of(tmp_path, base, arms))}
    assert {frozenset(pair) for pair in found} == {
        frozenset(p) for p in (("lora", "lora+"), ("lora", "shira"), ("lora+", "shira"))
    }
    clear = found["lora+", "lora"]
    assert clear.change.mean == pytest.approx(np.mean(arms["lora"]) - np.mean(arms["lora+"]), abs=1e-6)
    assert clear.apart and clear.change.low > 0.1
    ranked = sorted(found.values(), key=lambda c: c.p)
    assert ranked[0].p_holm == pytest.approx(min(1, 3 * ranked[0].p))
    assert all(b.p_holm >= a.p_holm for a, b in pairwise(ranked))
    pair = next(c for c in found.values() if {c.a, c.b} == {"lora+", "shira"})
    assert pair.change.seeds == 2 and not pair.apart


def test_intervals_hold_what_they_promise(tmp_path):
    rng, held, draws = np.random.default_rng(2), 0, 60
    for i in range(draws):
        base, arms = drawn(rng, {"lora": 0.03, "lora+": 0.06}, seeds=3, of_window=0.01, of_seed=0.02)
        change = forgetting(record_of(tmp_path / str(i), base, arms))["lora"]
        held += change.low <= 0.03 <= change.high
    assert held >= 52  # of 60 at 95 %: fewer come in one of 3,000 tries


def test_who_forgets_least_is_said_and_only_what_is_known(tmp_path):
    base, arms = drawn(np.random.default_rng(3), {"lora": 0.20, "lora+": 0.01})
    said = told(record_of(tmp_path / "two", base, arms), TITLES)
    assert re.fullmatch(
        r"On the general text LoRA\+ forgets least: less than LoRA by \+0\.\d{3} \(\+0\.\d{3} to \+0\.\d{3}\) nats\.",
        said,
    )
    base, arms = drawn(np.random.default_rng(4), {"lora": 0.01, "lora+": 0.01})
    assert "not told apart from" in told(record_of(tmp_path / "alike", base, arms), TITLES)
    assert told(record_of(tmp_path / "one", base, {"lora": arms["lora"]}), TITLES) is None


def test_the_report_has_the_column_only_where_it_was_measured(tmp_path):
    base, arms = drawn(np.random.default_rng(5), {"lora": 0.20, "lora+": 0.01})
    about = {"name": "sums", "description": "", "sizes": {"test": 4}, "general": {"name": "my text", "windows": 24}}
    with_it = page(record_of(tmp_path / "with", base, arms, data=about))
    mean = f"+{np.mean(arms['lora']) - np.mean(base):.3f}"
    assert "Forgetting,<br>nats a token" in with_it and mean in with_it and "(my text)" in with_it
    screen = Console(width=80, file=io.StringIO())
    screen.print(summary(Record.read(tmp_path / "with")))
    lines = screen.file.getvalue().splitlines()
    assert f"Forgetting, nats a token on my text: LoRA {mean}" in " ".join(lines) and max(map(len, lines)) <= 80
    old = page(record_of(tmp_path / "old", None, {a: [None] * 4 for a in arms}))
    assert "Forgetting" not in old


def test_a_diverged_run_and_one_without_a_number_do_not_count(tmp_path):
    base, arms = drawn(np.random.default_rng(6), {"lora": 0.1, "lora+": 0.1}, seeds=2)
    record = record_of(tmp_path, base, arms)
    broken = [*map(float, arms["lora"][0])]
    broken[3] = float("nan")
    record = record.write_trial(trial(seed=2, general=text(broken)))
    record = record.write_trial(trial(seed=3, general=text(base + 9), status="diverged", note="the loss is nan"))
    assert forgetting(Record.read(tmp_path))["lora"].seeds == 2
    file = tmp_path / "trials" / "control-base.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"general": {"losses": [None, 1.0]}}))
    with pytest.raises(AddendaError, match="must read the same windows"):
        Record.read(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"general": {"losses": [None] * 24}}))
    assert forgetting(Record.read(tmp_path)) == {} and not contrasts(Record.read(tmp_path))


@pytest.mark.parametrize(
    "wrong", [[], {}, {"losses": []}, {"losses": "text"}, {"losses": [[1]]}, {"loss": 1.0}, 3, "x"]
)
def test_a_general_text_that_nobody_wrote_is_named(tmp_path, wrong):
    base, arms = drawn(np.random.default_rng(7), {"lora": 0.1}, seeds=1)
    record_of(tmp_path, base, arms)
    [file] = (tmp_path / "trials").glob("final-*")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"general": wrong}))
    with pytest.raises(AddendaError, match="general"):
        Record.read(tmp_path)


def test_one_seed_and_one_window_say_little_and_do_not_fail(tmp_path):
    base, arms = drawn(np.random.default_rng(8), {"lora": 0.1, "lora+": 0.1}, seeds=1, windows=1)
    record = record_of(tmp_path, base, arms)
    assert forgetting(record)["lora"].high == float("inf") and not any(c.apart for c in contrasts(record))
    assert "Forgetting" in page(record)
    base, arms = drawn(np.random.default_rng(8), {"lora": 0.3, "lora+": 0.1}, seeds=1)
    [pair] = contrasts(record_of(tmp_path / "apart", base, arms))
    assert pair.change.low > 0 and not pair.apart


def test_what_is_kept_of_the_text_is_read_again():
    about = {"name": "docstrings", "sha256": "ab", "python": "3.11.7", "windows": 32, "length": 128, "later": 1}
    made = config(data={"name": "sums", "general": about})
    assert made.data.general.python == "3.11.7"
    assert as_json(Config.of(as_json(made)))["data"]["general"] == about
