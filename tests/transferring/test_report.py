"""The report of a transfer: what it says, what it keeps, and the verdict of five accuracies."""

from dataclasses import replace

import numpy as np
import pytest

import addenda as ad
from addenda.transferring.mmd import features, median_distance, mmd
from addenda.transferring.report import Report, distances, judged, leaked, read_report, write_report
from tiny_models import make_llama, make_tokenizer

COUNTS = {"samples": 40, "lines": 40, "malformed": 10, "repeats": 4, "copies": 1, "near_copies": 1, "tokens": 900}


def answers(seeds, items, accuracy):
    rng = np.random.default_rng(int(accuracy * 1000))
    return {s: (rng.random(items) < accuracy).astype(int).tolist() for s in range(seeds)}


def make_report(**more):
    stages = {"format": 0.75, "new": 0.8, "discriminator": None}
    cost = {"synthesis": {"seconds": 12.0, "tokens": 900}, "labels": {"seconds": 3.0, "tokens": 80}}
    said = leaked(["a b c d", "x"], ["a b c e", "x"])
    return Report(
        "sums", "one/", "two/", "lora", 20, 12, 4, COUNTS, stages, 0.93, 40, said, agreement=0.875, cost=cost, **more
    )


def test_a_report_says_what_was_accepted_what_leaked_and_what_it_cost(tmp_path):
    report = make_report(stopped="40 samples (tries)", notes=["by seeds alone"])
    told = str(report)
    assert "12 of 20 inputs, accepted by stage: format 75.0%, new 80.0%, discriminator none came so far" in told
    assert "4 of the inputs did not pass it" in told and "sampling ended at 40 samples (tries)" in told
    assert "leaked of the seeds: 1 of 2 exactly, 1 by 50% of the 3-grams that one of 2 has alone" in told
    assert "student and teacher agree on 87.5%" in told and "15 s: synthesis 12 s, labels 3 s" in told
    assert told.endswith("by seeds alone") and "training inputs" not in told and "MMD" not in told
    write_report(tmp_path, report)
    again = read_report(tmp_path)
    assert str(again) == told and again == replace(report, notes=["by seeds alone"])
    page = (tmp_path / "README.md").read_text()
    assert "accepted by stage" in page and page.startswith("# `sums` on another base") and "without the data" in page


def test_five_accuracies_a_gap_and_a_verdict():
    arms = {a: answers(10, 1000, p) for a, p in
            (("source", 0.8), ("base", 0.3), ("transferred", 0.79), ("real_inputs", 0.81), ("real", 0.85))}  # fmt: skip
    said = judged(arms)
    means = {a: np.mean([np.mean(v) for v in of.values()]) for a, of in arms.items()}
    assert said["means"] == pytest.approx(means) and said["reference"] == "source"
    assert said["gap"] == pytest.approx((means["transferred"] - means["base"]) / (means["real"] - means["base"]))
    assert said["verdict"] == "non-inferior" and said["low"] < said["difference"] < said["high"]
    told = str(make_report(judged=said, distance={"made": 0.5, "chosen": 0.25, "bandwidth": 1.0}))
    assert ("target on real inputs, teacher's labels" in told and "gap recovered: 0.8" in told) or "0.9" in told
    assert "MMD² to real inputs: 0.5000 of all that was made, 0.2500 of what was learned" in told
    assert max(len(line) for line in told.splitlines()[5:14]) <= 130
    few = judged({a: answers(2, 50, 0.5) for a in ("source", "base", "transferred")})
    assert few["verdict"] == "cannot tell" and few["gap"] is None
    assert judged({**arms, "source": answers(10, 1000, 0.1)})["reference"] == "base"
    with pytest.raises(ad.AddendaError, match="transferred missing"):
        judged({"source": arms["source"], "base": arms["base"]})


def test_distances_are_taken_under_one_bandwidth():
    model, tokenizer = make_llama(), make_tokenizer()
    made, real = [f"{i} is {i}" for i in range(6)], [f"{i}+{i}=?" for i in range(5)]
    found = distances(model, tokenizer, made, made[:3], real)
    X, Z = features(model, tokenizer, made), features(model, tokenizer, real)
    assert found["bandwidth"] == pytest.approx(median_distance(X, Z))
    assert found["made"] == pytest.approx(mmd(X, Z, bandwidth=found["bandwidth"], unbiased=True))
    assert found["chosen"] == pytest.approx(mmd(X[:3], Z, bandwidth=found["bandwidth"], unbiased=True), abs=1e-6)


def test_what_is_no_report_is_refused(tmp_path):
    for text in ("{}", "[]", "no", '{"name": "a"}'):
        (tmp_path / "transfer.json").write_text(text)
        with pytest.raises(ad.AddendaError):
            read_report(tmp_path)
