"""Choosing, searching and exporting a rank of a trained DyLoRA."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda import AddendaError, attach
from addenda.exporting.nested import export, search_rank, set_rank
from addenda.methods.dylora import DyLoRA
from addenda.methods.lora import LoRA
from toys import two_dyloras


def test_a_rank_can_be_set_for_evaluation_and_is_a_plain_lora_of_that_rank():
    model, adapter, x = two_dyloras()
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


def test_search_finds_the_smallest_rank_that_is_good_enough():
    model, adapter, x = two_dyloras()
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
    model, adapter, _ = two_dyloras()
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
    model, adapter, _ = two_dyloras()
    with pytest.raises(AddendaError, match="rank must be from 1 to 4, got 5"):
        export(adapter, 5)
    with pytest.raises(AddendaError, match="called 'default' is attached already"):
        export(adapter, 2, name="default")
    mixed = attach(model, {"one": DyLoRA(rank=4), "two": "vera:rank=4"}, name="mixed")
    with pytest.raises(AddendaError, match=r"'mixed' is no DyLoRA at 1 sites, e\.g\. two"):
        export(mixed, 2)
    assert set(ad.adapters(model)) == {"default", "mixed"}
