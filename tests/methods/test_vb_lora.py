"""VB-LoRA against its pieces mixed one by one, and against PEFT with the same tensors."""

import math

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.core.base.random import Stream
from addenda.methods.vb_lora import VBLoRA


def mixed(logits: torch.Tensor, bank: torch.Tensor, k: int) -> torch.Tensor:
    """One piece, by the paper's words: all other logits are −∞, then a softmax over the whole bank."""
    kept = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:k]
    total = sum(math.exp(logits[i].item()) for i in kept)
    return sum(math.exp(logits[i].item()) / total * bank[i] for i in kept)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("shape", [(12, 8), (13, 10), (3, 17)])
def test_reference(check, shape, k):
    method = VBLoRA(rank=3, vectors=5, length=4, topk=k)
    at, (m, n) = check.make(method, *shape), shape
    bank = at.p["bank"].detach()
    assert at.p["a"].shape == (3, math.ceil(n / 4), 5)
    assert at.p["b"].shape == (math.ceil(m / 4), 3, 5)
    A = torch.stack([torch.cat([mixed(piece, bank, k) for piece in row])[:n] for row in at.p["a"].detach()])
    B = torch.stack([torch.cat([mixed(piece, bank, k) for piece in at.p["b"].detach()[:, i]])[:m] for i in range(3)], 1)
    torch.testing.assert_close(at.delta.detach(), B @ A, rtol=1e-10, atol=1e-12)
    check.forms_agree(at)


@pytest.mark.parametrize("through", ["delta", "apply"])
def test_gradients_by_hand(check, through):
    """Through the softmax of the chosen alone, and to the bank from every piece that chose it."""
    method = VBLoRA(rank=2, vectors=6, length=4, topk=2)
    at = check.make(method, 8, 12)
    G, got = check.upstream(at)[1], check.gradients(at, through)
    bank, a, b = (at.p[k].detach() for k in ("bank", "a", "b"))
    B, A = (t.detach() for t in method.factors(at.p, (8, 12)).pair())
    gA, gB = B.T @ G, G @ A.T
    gbank = torch.zeros_like(bank)
    for key, logits, gradient in (
        ("a", a, gA.view(2, 3, 4)),
        ("b", b, gB.view(2, 4, 2).transpose(1, 2)),
    ):
        want = torch.zeros_like(logits)
        for i in range(logits.shape[0]):
            for j in range(logits.shape[1]):
                one, two = logits[i, j].topk(2).indices.tolist()
                w = torch.sigmoid(logits[i, j, one] - logits[i, j, two])
                slope = w * (1 - w) * (gradient[i, j] @ (bank[one] - bank[two]))
                want[i, j, one], want[i, j, two] = slope, -slope
                gbank[one] += w * gradient[i, j]
                gbank[two] += (1 - w) * gradient[i, j]
        torch.testing.assert_close(got[key], want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got["bank"], gbank, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("k", [1, 2])
def test_peft_has_the_same_forward_and_gradients(k):
    peft = pytest.importorskip("peft")
    base = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
    theirs = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
    theirs.load_state_dict(base.state_dict())
    config = peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=4, topk=k, target_modules=["up", "down"])
    wrapped = peft.get_peft_model(theirs, config).base_model
    adapter = attach(base, VBLoRA(rank=3, vectors=7, length=4, topk=k), targets=["up", "down"])
    with torch.no_grad():
        for _, pool in adapter.pools():
            pool.bank.normal_()
            wrapped.vblora_vector_bank["default"].copy_(pool.bank)
        for path, tensors in adapter.sites():
            layer = wrapped.model[path]
            layer.vblora_logits_A["default"].copy_(tensors.a.normal_())
            layer.vblora_logits_B["default"].copy_(tensors.b.normal_())
    x = torch.randn(2, 5, 8)
    mine, other = (m["down"](torch.tanh(m["up"](x))) for m in (base, wrapped.model))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for y in (mine, other):
        y.square().sum().backward()
    ((_, pool),) = adapter.pools()
    torch.testing.assert_close(pool.bank.grad, wrapped.vblora_vector_bank["default"].grad, rtol=1e-4, atol=1e-4)
    for path, tensors in adapter.sites():
        layer = wrapped.model[path]
        torch.testing.assert_close(tensors.a.grad, layer.vblora_logits_A["default"].grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(tensors.b.grad, layer.vblora_logits_B["default"].grad, rtol=1e-4, atol=1e-4)


def test_counts(check):
    check.counts(VBLoRA(rank=2, vectors=16, length=32))
    check.counts(VBLoRA(rank=2, vectors=16, length=24))  # divides none of the widths
    assert VBLoRA().trainable(1024, 1024) == 8192  # h = b: a LoRA of this rank
    small = VBLoRA(vectors=90)
    pieces = 12 * 2 * small.trainable(768, 768) // 90  # RoBERTa-base, q and v
    stored = 90 * 256 + pieces * (1 + 2 / 4)  # k − 1 weights and k bytes of indices for each piece
    assert 23_000 < stored < 24_000 and stored == 23_904  # the paper prints 0.023 M


def test_the_start_is_as_small_as_declared_and_as_the_docstring_says():
    method = VBLoRA()
    shapes, rng = [(768, 512)], Stream(0, "site")
    p = method.pool(shapes, Stream(0, "pool"))
    assert float(p["bank"].detach().abs().max()) <= 0.02
    p |= method.init(torch.zeros(shapes[0]), rng, p)
    assert abs(float(p["a"].detach().std()) - 0.1) < 0.01
    delta = method.delta(torch.zeros(shapes[0]), p).detach()
    assert float(delta.abs().max()) <= 4 * 0.02**2
    assert 1.0e-4 < float(delta.square().mean().sqrt()) < 1.8e-4
    W = torch.full(shapes[0], 0.01)
    assert delta.norm() / W.norm() <= method.start.bound == pytest.approx(0.16)


def test_options_are_checked():
    for options, message in (
        ({"rank": 0}, "rank must be at least 1"), ({"vectors": 0, "topk": 1}, "vectors must be at least 1"),
        ({"length": 0}, "length must be at least 1"), ({"topk": 0}, "topk must be at least 1"),
        ({"vectors": 4, "topk": 5}, r"topk=5 is more than there are vectors \(4\)"), ({"dropout": 1.0}, "dropout must"),
    ):  # fmt: skip
        with pytest.raises(AddendaError, match=message):
            VBLoRA(**options)
    assert "rank 4 is above" in VBLoRA().check(3, 8)
    assert VBLoRA().check(100, 30) is None
