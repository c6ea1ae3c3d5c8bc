"""DyLoRA against a separate LoRA for each rank b, cut from the same factors."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda import AddendaError, attach
from addenda.core.random import Stream
from addenda.methods.dylora import DyLoRA, export, search_rank, set_rank
from addenda.methods.lora import LoRA


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


def test_search_finds_the_smallest_rank_that_is_good_enough():
    model, adapter, x = two_sites()
    set_rank(adapter, 3)
    asked = []

    def judge(m):
        assert m is model and not m.training and not torch.is_grad_enabled()
        (b,) = {int(t.tensors()["active"]) for _, t in adapter.sites()}
        asked.append((b, m(x)))
        return {1: 0.5, 2: 0.78, 3: 0.75, 4: 0.8}[b]

    model.train()
    adapter.draw(0)
    scores, best = search_rank(adapter, judge)
    assert (scores, best) == ({1: 0.5, 2: 0.78, 3: 0.75, 4: 0.8}, 4)
    assert search_rank(adapter, judge, tolerance=0.03)[1] == 2
    assert search_rank(adapter, judge, tolerance=1.0)[1] == 1
    assert model.training and {int(t) for k, t in adapter.state_dict().items() if k.endswith("/active")} == {3}
    model.eval()
    for b, y in asked:
        set_rank(adapter, b)
        assert torch.equal(model(x), y)


def test_search_says_what_is_wrong_and_gives_the_rank_back():
    model, adapter, _ = two_sites()
    set_rank(adapter, 2)
    with pytest.raises(ZeroDivisionError):
        search_rank(adapter, lambda m: 1 / 0)
    with pytest.raises(AddendaError, match="a number for each rank"):
        search_rank(adapter, lambda m: float("nan"))
    assert {int(t) for k, t in adapter.state_dict().items() if k.endswith("/active")} == {2}
    ad.switch(model, None)
    with pytest.raises(AddendaError, match="idle or merged"):
        search_rank(adapter, lambda m: 0.0)
    ad.switch(model, "default")
    ad.merge(model, allow_loss=1.0)
    with pytest.raises(AddendaError, match="idle or merged"):
        search_rank(adapter, lambda m: 0.0)
    other = attach(nn.Sequential(nn.Linear(4, 4)), "lora:rank=2")
    with pytest.raises(AddendaError, match="no DyLoRA site"):
        search_rank(other, lambda m: 0.0)


def test_search_asks_for_the_ranks_that_were_trained_for():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    methods = {"0": DyLoRA(rank=8, unit=2), "1": DyLoRA(rank=12, unit=4)}
    assert search_rank(attach(model, methods), lambda m: 1.0) == ({4: 1.0, 8: 1.0}, 4)


@pytest.mark.parametrize("alpha", [None, 16.0])
@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_an_export_is_a_lora_that_computes_the_same(b, alpha, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential()
    model.one, model.two, model.head = nn.Linear(12, 9), nn.Linear(9, 12), nn.Linear(12, 3)
    x = torch.randn(3, 12)
    adapter = attach(model, DyLoRA(rank=4, alpha=alpha, dropout=0.1), targets=["one", "two"], also_train=["head"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
    model.eval()
    set_rank(adapter, b)
    y, base = model(x), [p.requires_grad for p in model.parameters()]
    made = export(adapter, b, name="cut")
    assert torch.equal(model(x), y) and "cut: idle" in ad.status(model)
    assert [p.requires_grad for n, p in model.named_parameters() if ".cut." not in n] == base
    assert not any(p.requires_grad for p in made.parameters())
    plain = LoRA(rank=b, alpha=alpha or 4.0, dropout=0.1)
    assert [made.methods[p] for p in ("one", "two")] == [plain, plain]
    ad.switch(model, "cut")
    cut = model(x)
    torch.testing.assert_close(cut, y, rtol=1e-5, atol=1e-5 * y.abs().max().item())  # sums of b terms, not of 4
    assert b < 4 or torch.equal(cut, y)
    file = made.save(tmp_path / "cut.safetensors")
    ad.detach(model)
    ad.load(model, file)
    assert torch.equal(model(x), cut)
    assert f"lora (rank={b}" in ad.inspect(file)


def test_an_export_of_stacked_experts(mixtral, ids):
    adapter = attach(mixtral, DyLoRA(rank=4), targets=["*.experts.*", "q_proj"])
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.1)
    set_rank(adapter, 2)
    y = mixtral(ids).logits
    export(adapter, 2)
    ad.switch(mixtral, "lora")
    torch.testing.assert_close(mixtral(ids).logits, y, rtol=1e-5, atol=1e-6)


def test_an_export_wants_dylora_everywhere_a_rank_and_a_free_name():
    model, adapter, _ = two_sites()
    with pytest.raises(AddendaError, match="rank must be from 1 to 4, got 5"):
        export(adapter, 5)
    with pytest.raises(AddendaError, match="called 'default' is attached already"):
        export(adapter, 2, name="default")
    mixed = attach(model, {"one": DyLoRA(rank=4), "two": "vera:rank=4"}, name="mixed")
    with pytest.raises(AddendaError, match=r"'mixed' is no DyLoRA at 1 sites, e\.g\. two"):
        export(mixed, 2)
    assert set(ad.adapters(model)) == {"default", "mixed"}


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
