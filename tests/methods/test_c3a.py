"""C3A against circulant blocks filled entry by entry, and against PEFT."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.c3a import C3A


def circulant(kernel):
    """The m × n matrix of blocks whose rows are the kernel, shifted right by one from row to row."""
    rows, columns, b = kernel.shape
    total = torch.zeros(rows * b, columns * b, dtype=kernel.dtype)
    for p in range(rows):
        for q in range(columns):
            for i in range(b):
                total[p * b + i, q * b : q * b + b] = torch.roll(kernel[p, q], i)
    return total


@pytest.mark.parametrize(("shape", "block"), [((12, 12), 4), ((15, 10), 5), ((9, 21), 3), ((6, 6), 1), ((8, 8), 8)])
def test_reference(check, shape, block):
    at = check.make(C3A(block=block), *shape)
    kernel = at.p["kernel"].detach()
    torch.testing.assert_close(at.delta.detach(), circulant(kernel) / shape[1], rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    G, want = check.upstream(at)[1], torch.zeros_like(kernel)
    for p in range(len(want)):
        for q in range(want.shape[1]):
            part = G[p * block : p * block + block, q * block : q * block + block]
            for i in range(block):
                want[p, q] += torch.roll(part[i], -i)
    for through in ("delta", "apply"):
        torch.testing.assert_close(check.gradients(at, through)["kernel"], want / shape[1], rtol=1e-9, atol=1e-9)


def test_gradient_of_the_input(check):
    at = check.make(C3A(block=5), 15, 10)
    x = at.x.clone().requires_grad_()
    Y = check.upstream(at)[0]
    (got,) = torch.autograd.grad((Y * at.apply(x)).sum(), x)
    torch.testing.assert_close(got, Y @ (at.W + at.delta.detach()))


def test_few_numbers_and_full_rank(check):
    at = check.make(C3A(block=8), 16, 16)
    assert at.method.trainable(16, 16) == 32
    assert torch.linalg.matrix_rank(at.delta.detach()) == 16


def test_start_and_counts(check):
    check.starts_exactly(C3A())
    check.starts_exactly(C3A(block=10), 50, 70)
    check.counts(C3A(block=16), [(64, 64), (96, 64), (64, 96)])
    check.counts(C3A(block=10), [(50, 70)])
    assert C3A(block=768).trainable(768, 768) * 24 == 18_432  # RoBERTa-base, q and v: 0.018 M in the paper


@pytest.mark.filterwarnings("default")
def test_peft_has_the_same_forward_and_gradients():
    peft = pytest.importorskip("peft")
    base, theirs = nn.ModuleDict({"proj": nn.Linear(20, 12)}), nn.ModuleDict({"proj": nn.Linear(20, 12)})
    theirs.load_state_dict(base.state_dict())
    config = peft.C3AConfig(block_size=4, target_modules=["proj"])
    layer = peft.get_peft_model(theirs, config).base_model.model["proj"]
    tensors = next(t for _, t in attach(base, C3A(block=4), targets="proj").sites())
    with torch.no_grad():
        layer.c3a_kernel["default"].copy_(tensors.kernel.normal_())
    x = torch.randn(2, 7, 20)
    mine, want = base["proj"](x), layer(x)
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
    mine.square().sum().backward(), want.square().sum().backward()
    torch.testing.assert_close(tensors.kernel.grad, layer.c3a_kernel["default"].grad, rtol=1e-4, atol=1e-4)
    merged = base["proj"].weight + tensors.method.delta(base["proj"].weight, tensors.tensors())
    torch.testing.assert_close(merged, theirs["proj"].weight + layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)


def test_options_and_shapes_are_checked():
    assert "does not divide" in C3A(block=32).check(64, 70)
    with pytest.raises(AddendaError, match="block must be at least 1"):
        C3A(block=0)
