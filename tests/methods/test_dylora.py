"""DyLoRA against a separate LoRA for each rank b, cut from the same factors."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda import AddendaError, attach
from addenda.core.base.random import Stream
from addenda.methods.dylora import DyLoRA
from addenda.methods.lora import LoRA
from toys import two_dyloras


@pytest.mark.parametrize("alpha", [None, 16.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("b", [1, 3, 6])
def test_reference(check, b, frozen, alpha):
    at = check.make(DyLoRA(rank=6, frozen=frozen, alpha=alpha), 10, 17)
    at.p["active"] = torch.tensor(b)
    A, B, s = at.p["A"].detach(), at.p["B"].detach(), (alpha or 6) / b
    want = sum(s * torch.outer(B[:, k], A[k]) for k in range(b))
    torch.testing.assert_close(at.delta.detach(), want, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)

    G = check.upstream(at)[1]
    trained = range(b - 1, b) if frozen else range(b)
    gA, gB = torch.zeros_like(A), torch.zeros_like(B)
    for k in trained:
        gA[k], gB[:, k] = s * B[:, k] @ G, s * G @ A[k]
    got = check.gradients(at)
    torch.testing.assert_close(got["A"], gA, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got["B"], gB, rtol=1e-9, atol=1e-9)
    untouched = [k for k in range(6) if k not in trained]
    assert not got["A"][untouched].any()
    assert not got["B"][:, untouched].any()


def test_start_and_counts(check):
    check.starts_exactly(DyLoRA(rank=4))
    check.starts_exactly(DyLoRA(rank=4, alpha=7, frozen=True), 50, 70)
    check.counts(DyLoRA(rank=5))


def test_every_rank_is_drawn_and_the_stream_decides():
    method = DyLoRA(rank=5, min_rank=2)
    drawn = [int(method.on_step(i, Stream(0, "step", str(i)))["active"]) for i in range(400)]
    assert drawn == [int(method.on_step(i, Stream(0, "step", str(i)))["active"]) for i in range(400)]
    for b in range(2, 6):
        assert 60 < drawn.count(b) < 140
    assert set(drawn) == {2, 3, 4, 5}


def test_one_draw_for_all_sites_in_training_and_the_full_rank_after():
    model, adapter, _ = two_dyloras()
    seen = set()
    for step in range(30):
        adapter.draw(step)
        now = {int(t.tensors()["active"]) for _, t in adapter.sites()}
        assert len(now) == 1
        seen |= now
        model.eval()
        assert {int(t.tensors()["active"]) for _, t in adapter.sites()} == {4}
        model.train()
    assert seen == {1, 2, 3, 4}
    assert {int(t) for k, t in adapter.state_dict().items() if k.endswith("/active")} == {4}


@pytest.mark.parametrize("alpha", [None, 16.0, 0.3])
@pytest.mark.parametrize("b", [1, 2, 3, 5, 6])
def test_a_cut_is_a_plain_lora_with_the_same_alpha(check, alpha, b):
    at = check.make(DyLoRA(rank=6, alpha=alpha), 10, 17)
    at.p["active"] = torch.tensor(b)
    plain = {"A": at.p["A"][:b], "B": at.p["B"][:, :b]}
    want = LoRA(rank=b, alpha=alpha or 6.0).delta(at.W, plain)
    torch.testing.assert_close(at.delta, want, rtol=1e-12, atol=1e-12)


def test_ranks_come_in_units(check):
    method = DyLoRA(rank=12, min_rank=5, unit=4, frozen=True)
    assert list(method.ranks) == [8, 12]
    assert {int(method.on_step(i, Stream(0, "step", str(i)))["active"]) for i in range(50)} == {8, 12}
    at = check.make(method, 20, 16)
    at.p["active"] = torch.tensor(8)
    got, G, A, B = check.gradients(at), check.upstream(at)[1], at.p["A"].detach(), at.p["B"].detach()
    last = torch.arange(12).ge(4) & torch.arange(12).lt(8)  # the second of three units
    torch.testing.assert_close(got["A"], 12 / 8 * (B.T @ G) * last[:, None], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got["B"], 12 / 8 * (G @ A.T) * last, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, from Dynamo
def test_a_drawn_rank_does_not_recompile():
    model, adapter, x = two_dyloras()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(6):
            adapter.draw(step)
            torch.testing.assert_close(compiled(x), model(x))


def test_options_are_checked():
    with pytest.raises(AddendaError, match="min_rank <= rank"):
        DyLoRA(rank=4, min_rank=5)
    with pytest.raises(AddendaError, match="dropout must be in"):
        DyLoRA(dropout=1.0)
    with pytest.raises(AddendaError, match="alpha must be above 0"):
        DyLoRA(alpha=0.0)
    for unit in (0, 3, 16):
        with pytest.raises(AddendaError, match=f"unit must divide rank, got unit={unit}, rank=8"):
            DyLoRA(unit=unit)


def test_a_rank_that_has_not_been_drawn_twice_is_no_dead_tensor():
    """Frozen: A learns where B is not zero, from a rank's second turn on. Three different ranks warn of nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    for seed in range(8):
        adapter = attach(model, DyLoRA(rank=8, frozen=True), targets="0", seed=seed)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            adapter.step()
            optimizer.zero_grad()
        ad.detach(model)


@pytest.mark.parametrize("active", [0, 5])
def test_a_rank_that_cannot_act_is_no_value_of_a_file(active, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = attach(model, "dylora:rank=4", targets="0")
    adapter.state_dict()["0/active"].fill_(active)
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(model)
    with pytest.raises(AddendaError, match=f"nothing was loaded: 0: active says that {active} ranks act"):
        ad.load(model, file)
