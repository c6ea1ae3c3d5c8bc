"""`recipes.lord` on a tiny model, from its texts to its verdicts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recipes import lord, low_rank
from recipes.common import Interval
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
