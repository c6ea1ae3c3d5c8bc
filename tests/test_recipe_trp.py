"""The recipe of Trained Rank Pruning on the digits of scikit-learn: what is chosen, and what is kept of every image."""

from dataclasses import replace

import pytest
import torch
from recipes import nets, trp
from recipes.claims import read_claims
from recipes.store import SEEDS, Busy, Clock, TimeUp
from recipes.work import folders

from addenda import AddendaError
from addenda.comparing.record import Record

pytest.importorskip("sklearn")
FOLDERS = folders(read_claims())["trp"]


@pytest.mark.slow
def test_a_net_trained_for_it_is_cut_without_loss_and_a_plain_one_is_hardly_cut():
    """At one threshold on the energy. Seen with 40 epochs: 2.5 × fewer multiplications with no loss, plain 1.0 ×."""
    task = nets.digits(1000, 597)
    right = {}
    for arm in (trp.Arm(), trp.Arm("channel", 0.98, 1e-2)):
        net = trp.trained(task, arm, 0, 15)
        for how in ("threshold", "2x"):
            right[arm.name, how] = trp.cut(net, task, "channel", how, 0.98, "test").count("1") / 597
        right[arm.name, ""] = nets.answered(net, task.parts["test"]).count("1") / 597
    assert min(right["plain", ""], right["channel-0.98-0.01", ""]) > 0.95
    assert right["channel-0.98-0.01", "threshold"] > right["channel-0.98-0.01", ""] - 0.015
    assert right["plain", "2x"] < right["channel-0.98-0.01", "2x"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(trp, "ENERGIES", (0.9,))
    monkeypatch.setattr(trp, "LAMBDAS", (0.0, 1e-2))
    return replace(nets.digits(128, 100), epochs=2)


def test_every_cut_of_a_net_keeps_its_answers_and_nothing_is_trained_twice(small, tmp_path, monkeypatch):
    trained, known = [], trp.trained
    monkeypatch.setattr(trp, "trained", lambda task, arm, *rest: trained.append(arm) or known(task, arm, *rest))
    place = trp.Nets(FOLDERS, tmp_path, Clock(), small, epochs=2)
    monkeypatch.setattr(place, "_looked", lambda arm: {0.0: 0.9, 1e-2: 0.8}[arm.nuclear])
    place.ensure(["channel trp|2x", "channel trp bare|2x", "channel trp nuclear|2x", "plain|spatial 2x"], SEEDS[:2])
    assert trained.count(trp.Arm("channel", 0.9, 0.0)) == 2  # λ = 0 is the best: both names are of one net
    assert len(trained) == 6
    record = Record.read(tmp_path / "trp" / "trp")
    assert {t.method for t in record.trials} == {a for a in FOLDERS if a.split(" ")[0].split("|")[0] != "spatial"}
    assert all(t.test is not None and len(t.test.items) == 100 for t in record.trials)
    same = [record.find(a, "final", SEEDS[0]) for a in ("channel trp|2x", "channel trp bare|2x")]
    assert same[0] is not None and same[1] is not None and same[0].test == same[1].test
    place.ensure(["plain|spatial 2x", "plain"], SEEDS[:2])
    assert len(trained) == 6
    net = known(small, trp.Arm(), SEEDS[0], 2)
    whole = place.store.find("plain", "final", SEEDS[0])
    assert whole is not None and whole.test is not None
    assert whole.test.items == nets.answered(net, small.parts["test"])
    place.clock = Clock(hours=1e-9)
    with pytest.raises(TimeUp):
        place.ensure(["plain"], SEEDS[:3])


def test_lambda_and_energy_are_chosen_on_validation_images_zero_among_them(small, tmp_path, monkeypatch):
    place = trp.Nets(FOLDERS, tmp_path, Clock(), small, epochs=2)
    assert place.arm("plain") == trp.Arm()
    chosen = place.arm("spatial trp")
    files = sorted(p.stem for p in (tmp_path / "trp" / "search").iterdir())
    assert files == ["channel-0.9-0", "channel-0.9-0.01"]
    best = max(trp.LAMBDAS, key=lambda n: place._looked(trp.Arm("channel", 0.9, n)))
    assert chosen == trp.Arm("spatial", 0.9, best)
    assert place.arm("spatial trp bare").nuclear == 0 and place.arm("channel trp nuclear").nuclear == 1e-2
    other = trp.Nets(FOLDERS, tmp_path / "elsewhere", Clock(), small, epochs=2)
    with place.store.alone("unrelated"), other.store.alone("search-channel-0.9-0"), pytest.raises(Busy):
        trp.Nets(FOLDERS, tmp_path / "elsewhere", Clock(), small, epochs=2).arm("channel trp")


def test_other_images_are_refused(small, tmp_path, monkeypatch):
    for value in (0.0, 1.0):
        place = trp.Nets({"plain": "trp"}, tmp_path, Clock(), small, epochs=2)
        if value:
            x, y = small.parts["test"]
            place._given = replace(small, parts=small.parts | {"test": (x + value, y)})
            with pytest.raises(AddendaError, match=r"belongs to another run.*data.test"):
                place.ensure(["plain"], SEEDS[:2])
        else:
            place.ensure(["plain"], SEEDS[:1])


def test_answers_are_those_of_the_largest_logit():
    class Sign(torch.nn.Module):
        def forward(self, x):
            return torch.stack([-x.flatten(1).sum(1), x.flatten(1).sum(1)], 1)

    x = torch.tensor([1.0, -1.0, 2.0, -3.0]).view(4, 1, 1, 1)
    assert nets.answered(Sign(), (x, torch.tensor([1, 1, 1, 0]))) == "1011"


def test_without_the_data_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(nets.idx, "PLACE", tmp_path / "nothing")
    with pytest.raises(AddendaError, match="apt-get install dataset-fashion-mnist"):
        nets.fashion(10, 10)
