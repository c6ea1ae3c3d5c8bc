"""DyLoRA against a separate LoRA for each rank b, cut from the same factors."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.core.random import Stream
from addenda.methods.dylora import DyLoRA, set_rank


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


def two_sites():
    torch.manual_seed(1)
    model = nn.Sequential()
    model.one, model.two = nn.Linear(12, 9), nn.Linear(9, 12)
    adapter = attach(model, DyLoRA(rank=4), targets=["one", "two"])
    with torch.no_grad():
        for _, t in adapter.sites():
            t.B.normal_()
    return model, adapter, torch.randn(3, 12)


def test_one_draw_for_all_sites_in_training_and_the_full_rank_after():
    model, adapter, _ = two_sites()
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


def test_a_rank_can_be_set_for_evaluation_and_is_a_plain_lora_of_that_rank():
    model, adapter, x = two_sites()
    model.eval()
    outputs = []
    for b in (1, 2, 3, 4):
        set_rank(adapter, b)
        y = x
        for (_, t), layer in zip(adapter.sites(), (model.one, model.two), strict=True):
            cut = 4 / b * t.B[:, :b] @ t.A[:b]
            y = y @ (layer.weight + cut).T + layer.bias
        torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
        outputs.append(y)
    assert not torch.allclose(outputs[0], outputs[3])
    assert int(adapter.state_dict()["one/active"]) == 4
    for wrong in (0, 5):
        with pytest.raises(AddendaError, match="from 1 to 4"):
            set_rank(adapter, wrong)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, from Dynamo
def test_a_drawn_rank_does_not_recompile():
    model, adapter, x = two_sites()
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
