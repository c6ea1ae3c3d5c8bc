"""The recipe of Trained Rank Pruning on the digits of scikit-learn: the claim, and the record."""

import json
import sys

import pytest
import torch
from recipes import nets, trp

from addenda import AddendaError

pytest.importorskip("sklearn")


@pytest.mark.slow
def test_a_net_trained_for_it_is_cut_without_loss_and_a_plain_one_is_hardly_cut():
    """At one threshold on the energy. Seen with 40 epochs: 2.5 × fewer multiplications with no loss, plain 1.0 ×."""
    task = trp.digits(1000, 597)
    found = {}
    for arm in (trp.Arm(), trp.Arm("channel", 0.98, 1e-2)):
        net = trp.trained(task, arm, 0, 15, torch.float32)
        cut = trp.judged(net, task, "channel", "test", [{"energy": 0.98}])[0]
        found[arm.name] = (trp.accuracy(net, task.parts["test"]), cut)
    (plain, plainly), (dense, cut) = found.values()
    assert min(plain, dense) > 0.95
    assert cut["speedup"] > 1.5 and cut["as it is"] > dense - 0.015
    assert plainly["speedup"] < 0.8 * cut["speedup"]


def test_the_record_goes_on_and_says_what_was_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trp, "ENERGIES", (0.9,))
    monkeypatch.setattr(trp, "LAMBDAS", (1e-2,))
    monkeypatch.setattr(trp, "TIMES", (2.0,))
    small = ["--data", "digits", "--seeds", "2", "--epochs", "1", "--images", "128", "--test", "100"]
    monkeypatch.setattr(sys, "argv", ["trp", *small, "--dtype", "float32", "--out", str(tmp_path)])
    trp.main()
    assert "12 epochs of 128 images in 10 runs" in capsys.readouterr().err
    kept = json.loads((tmp_path / "verdict.json").read_text())
    assert len(kept["findings"]) == 6 and kept["table"][0]["energy"] == 0.9
    halves = [r for r in kept["table"] if r.get("times") == 2.0]
    assert len(halves) == 6 and all(2.0 <= r["speedup"] < 2.4 for r in halves)

    def trained(*_):
        raise AssertionError("a finished run was run again")

    one_epoch = trp.trained
    monkeypatch.setattr(trp, "trained", lambda *a: one_epoch(*a) if a[1] == trp.Arm() and a[2] == 0 else trained())
    trp.main()  # only the steps that tell the cost
    assert json.loads((tmp_path / "verdict.json").read_text())["findings"] == kept["findings"]

    assert "not measured yet" in kept["findings"][5]["measured"]
    sys.argv.append("--latency")
    trp.main()  # time alone, of nets with the ranks on record
    timed = json.loads((tmp_path / "verdict.json").read_text())["findings"]
    assert timed[:5] == kept["findings"][:5]
    assert timed[5]["measured"].count(" × (") == 4


def test_without_the_data_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(nets.idx, "PLACE", tmp_path / "nothing")
    with pytest.raises(AddendaError, match="apt-get install dataset-fashion-mnist"):
        trp.fashion(10, 10)
