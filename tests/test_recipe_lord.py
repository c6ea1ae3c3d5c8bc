"""`recipes.lord` on a tiny model, from its texts to its verdicts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recipes import lord, low_rank
from recipes.claims import read_claims
from recipes.common import Interval
from recipes.store import SEEDS, Clock
from scipy import stats
from transformers import LlamaForCausalLM

from tiny_models import config, make_tokenizer


@pytest.fixture
def subject(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(low_rank, "HEALED", 2)
    monkeypatch.setattr(low_rank, "LORA", 2)
    monkeypatch.setattr(low_rank, "python_texts", lambda: [f"x = {i}\n" * 80 for i in range(4)])
    monkeypatch.setattr(low_rank, "english_texts", lambda: [f"This is sentence {i} of many. " * 20 for i in range(4)])
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return low_rank.Subject(tmp_path / "model", 2, 3, "float32")


def test_every_cell(subject):
    subject.solve()
    dense = subject.dense()
    assert {k: len(v) for k, v in dense["losses"].items()} == {"code": 3, "english": 3}
    kept = {name: subject.cell(arm, 0.2) for name, arm in lord.ARMS.items()}
    assert all(0.5 < cell["kept"] <= 0.8 for cell in kept.values())
    same = np.array([kept[a]["losses"]["code"] for a in ("LoRD", "SVD-LLM")])
    np.testing.assert_allclose(same[0], same[1], rtol=1e-3)
    assert kept["LoRD, pivoted"]["error"] < kept["LoRD"]["error"] < kept["ASVD"]["error"]
    arm = lord.ARMS[lord.MENDED]
    cells = {n: subject.mended(arm, 0.2, **how) for n, how in lord._MENDED.items()}
    full = subject.mended(None, 0.0, quantised=True, healed=False)
    assert cells["NF4"]["bytes"] < full["bytes"] < cells["healed"]["bytes"]
    assert len(cells["NF4 and healed"]["training"]) == 2 and cells["NF4 and healed"]["trained"] > 0
    assert subject.dense() == dense  # whatever was put in its place, the model is back
    again = low_rank.Subject(Path(subject.folder), 2, 3, "float32")
    again.solve()  # nothing to do: no piece is missing
    assert again.cell(arm, 0.2) == kept[lord.MENDED]
    took = json.loads(json.dumps(subject.latency({"LoRD, 20%": (lord.ARMS["LoRD"], 0.2)}, rounds=1)))
    assert lord._faster(took).verdict in ("holds", "does not hold", "cannot tell")


def test_windows_are_whole_and_of_another_text_while_there_are_texts():
    tokenizer = make_tokenizer()
    texts = [f"{i} + {i} = 2, " * 200 for i in range(3)]
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert all(c > 2 * low_rank.WINDOW and c % low_rank.WINDOW for c in counts)  # each has a short end
    firsts = [tuple(tokenizer(t, add_special_tokens=False)["input_ids"][: low_rank.WINDOW]) for t in texts]
    assert low_rank.whole_windows(tokenizer, texts, 3) == tuple(firsts)
    every = low_rank.whole_windows(tokenizer, texts, 1000)
    assert len(every) == sum(c // low_rank.WINDOW for c in counts) and {len(row) for row in every} == {low_rank.WINDOW}
    short = [texts[0][:40]] * 5 + texts
    assert low_rank.whole_windows(tokenizer, short, 4)[:3] == tuple(firsts), "a text that is too short is passed by"


def test_cells_are_run_for_claims_and_measured_over_windows(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(lord, "Subject", lambda model, samples, judged, dtype: subject)
    kept = lord.Cells(tmp_path / "root", Clock(), samples=2, judged=3)
    claims = {c.id: c for c in read_claims().claims if c.subject == "lord"}
    assert kept.measured(claims["lord-asvd"]) is None
    kept.ensure(["LoRD, 20%", "ASVD, 20%"], SEEDS)
    assert kept.measured(claims["lord-asvd"]) is not None  # what stands beside it decides nothing
    kept.ensure(["SVD-LLM, 20%", "SVD, 20%", "LoRD, 10%"], SEEDS)  # though a cell has left its layers in the model
    files = sorted(p.stem for p in (tmp_path / "root" / "lord" / "runs").iterdir())
    assert files == ["ASVD-20", "LoRD-10", "LoRD-20", "SVD-20", "SVD-LLM-20", "dense"]
    found = kept.measured(claims["lord-asvd"])
    losses = [json.loads((tmp_path / "root" / "lord" / "runs" / f"{n}-20.json").read_text()) for n in ("LoRD", "ASVD")]
    gap = np.array(losses[0]["losses"]["code"]) - np.array(losses[1]["losses"]["code"])
    assert found is not None and found.difference == pytest.approx(gap.mean()) and not found.looks
    assert found.interval() == pytest.approx(stats.ttest_1samp(gap, 0).confidence_interval())
    apart = kept.measured(claims["lord-code"])
    assert apart is not None and apart.items == 6
    dense, low = (json.loads((tmp_path / "root" / "lord" / "runs" / f"{n}.json").read_text())["losses"]
                  for n in ("dense", "LoRD-10"))  # fmt: skip
    up = {d: np.array(low[d]) - np.array(dense[d]) for d in dense}
    welch = stats.ttest_ind(up["english"], up["code"], equal_var=False).confidence_interval()
    assert apart.interval() == pytest.approx((welch.low, welch.high))
    monkeypatch.setattr(subject, "cell", lambda *a: pytest.fail("a finished cell was run again"))
    kept.ensure(["LoRD, 20%"], SEEDS)
    assert kept.measured(claims["lord-half"]) is None  # a cell is missing


def cells_of(rises: dict[str, float]) -> dict[str, dict]:
    """Cells whose windows all rise by a share, give or take a thousandth."""
    rng = np.random.default_rng(0)
    base = {d: rng.uniform(1, 3, 24) for d in ("code", "english")}

    def cell(rise: float, english: float) -> dict:
        up = {"code": np.log1p(rise), "english": np.log1p(english)}
        return {"kept": 0.8, "losses": {d: list(b + up[d] + rng.normal(0, 1e-3, 24)) for d, b in base.items()}}

    made = {"dense": {"kept": 1.0, "losses": {d: list(b) for d, b in base.items()}}}
    for rate in lord.REMOVED:
        made |= {f"{a}, {rate:.0%}": cell(rises.get(a, 0.2), 2 * rises.get(a, 0.2)) for a in lord.ARMS}
    return made


def test_verdicts_follow_the_numbers():
    good = {"SVD": 9.0, "ASVD": 1.0, "SVD-LLM": 0.2, "LoRD": 0.2, "LoRD, pivoted": 0.05}
    found = lord.findings(cells_of(good), None)
    assert [f.verdict for f in found] == ["holds", "holds", "holds", "cannot tell"]
    assert "not measured yet" in found[3].measured
    for change, at in (({"LoRD": 0.25}, 0), ({"ASVD": 0.3}, 0), ({"LoRD, pivoted": 0.15}, 2)):
        assert lord.findings(cells_of(good | change), None)[at].verdict == "does not hold"
    assert lord.within(Interval(0.0, -0.02, 0.02), 0.01) == "cannot tell"
    rows = {r["cell"]: r for r in lord.table_of(cells_of(good))}
    assert rows["ASVD, 20%"]["code"]["rise"] == pytest.approx(1.0, abs=2e-3)
    few = {k: v for k, v in cells_of(good).items() if "30%" not in k}
    assert lord.rates_of(few) == [0.2, 0.1]
