"""A report of many sites is short, fits 80 columns, and goes into JSON."""

import json

import pytest
from torch import nn

import addenda as ad
from addenda.exporting.reduce_report import OutputError, ReducedSite, ReduceReport


def made(count: int, outputs: OutputError | None = None) -> ReduceReport:
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = ad.attach(model, "lora:rank=1", targets="0")
    path, form = "model.layers.{}.a_block_of_a_long_name.self_attn.q_proj", "12,345,678 entries"
    rows = [ReducedSite(path.format(i), form, 7, i / 100, 0.5, 2.0, weighed=i > 3) for i in range(count)]
    return ReduceReport(adapter, "sparse", tuple(rows), (10**9, 10**10), outputs, ("score.weight",), ("x",) * 9)


def test_the_worst_sites_come_first_in_80_columns():
    text = str(made(30, OutputError(0.1, 1e-3, 1.0, 1e-5, 0.99)))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 20
    assert lines[1].startswith("…") and ".self_attn.q_proj" in lines[1] and "0.2900" in lines[1]
    assert "… and 22 sites with less error" in text and "x, x, x, x and 5 more" in text
    assert "top-1 agreement 99.00%" in text and "10.00%" in text
    assert "outputs: not compared" in str(made(2))


def test_the_whole_error_weighs_sites_by_their_change():
    report = made(3)
    assert report.error == pytest.approx(((0 + 0.01**2 + 0.02**2) / 3) ** 0.5)
    assert json.loads(json.dumps(report.to_dict()))["sites"][2]["error"] == 0.02
    assert report.to_dict()["outputs"] is None and report.to_dict()["bytes"] == [10**9, 10**10]
