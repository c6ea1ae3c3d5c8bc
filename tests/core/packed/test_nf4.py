"""NF4 against values derived from the normal distribution, and as a weight in products, adapters and copies."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import nn

import addenda as ad
import shared
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.packed.nf4 import LEVELS, NF4Tensor
from addenda.quantizing.quantize import quantize


def test_levels_are_quantiles_of_the_normal_distribution():
    """Half-way between 1/32 and 1/30 of probability stays outside; 8 steps on one side of 0, 7 on the other."""
    edge = 1 - (1 / 32 + 1 / 30) / 2
    up = [norm.ppf(edge + (0.5 - edge) * i / 8) for i in range(8)]
    down = [-norm.ppf(edge + (0.5 - edge) * i / 7) for i in range(7)]
    wanted = torch.tensor(sorted([*up, 0.0, *down]), dtype=torch.float64) / norm.ppf(edge)
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), wanted, rtol=0, atol=2e-7)


def test_error_and_bits_on_a_normal_weight():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(512, 1024, generator=g)
    held = NF4Tensor.of(W)
    assert held.bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    error = float((held.dense() - W).norm() / W.norm())
    # independent: the same blocks with scales in full precision, nearest level by an exhaustive search
    blocks = W.view(-1, 64)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = levels[(scaled[..., None] - levels).abs().argmin(-1)] * blocks.abs().amax(1, keepdim=True)
    exact = float((nearest - blocks).norm() / blocks.norm())
    assert error == pytest.approx(exact, rel=0.01)
    assert 0.085 < error < 0.1


def test_one_large_block_costs_the_others_nothing():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(256, 256, generator=g)
    plain = NF4Tensor.of(W).dense()
    W[0, :64] *= 40
    error = (NF4Tensor.of(W).dense() - W)[1:].norm() / W[1:].norm()
    assert float(error) == pytest.approx(float((plain - W)[1:].norm() / W[1:].norm()), rel=0.01)


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (7, 300), (1, 1)])
def test_odd_shapes_zeros_and_what_is_not_finite(shape):
    W = torch.randn(shape)
    held = NF4Tensor.of(W)
    assert held.dense().shape == shape
    assert float((held.dense() - W).abs().max()) <= 0.16 * float(W.abs().max())
    assert torch.equal(NF4Tensor.of(torch.zeros(shape)).dense(), torch.zeros(shape))
    assert torch.equal(NF4Tensor.of(held.dense()).dense(), held.dense()) or shape == (7, 300)
    W[0, 0] = math.nan
    with pytest.raises(AddendaError, match="not finite"):
        NF4Tensor.of(W)


def layer(m=96, n=64, dtype=torch.float32):
    plain = nn.Linear(n, m).to(dtype)
    plain.weight = nn.Parameter(NF4Tensor.of(plain.weight.detach()), requires_grad=False)
    twin = nn.Linear(n, m).to(dtype)
    twin.weight, twin.bias = nn.Parameter(plain.weight.dense()), plain.bias
    return plain, twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_its_values_and_backward_keeps_codes_only(dtype):
    held, twin = layer(dtype=dtype)
    x = torch.randn(2, 5, 64, dtype=dtype)
    kept = []

    def pack(t):
        kept.append(t)
        return t

    xs = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = held(xs[0])
    assert not any(type(t) is torch.Tensor and t.numel() == 96 * 64 for t in kept)
    wanted = twin(xs[1])
    assert torch.equal(y, wanted)
    g = torch.randn_like(y)
    y.backward(g)
    wanted.backward(g)
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert held(x.float()).dtype == torch.bfloat16


def test_copies_moves_and_pickles():
    held, _ = layer()
    for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert isinstance(other.weight, NF4Tensor) and isinstance(other.weight, nn.Parameter)
        assert not other.weight.requires_grad
        assert torch.equal(other.weight.dense(), held.weight.dense())
    wide = copy.deepcopy(held).double()
    assert wide.weight.dtype == torch.float64 and isinstance(wide.weight, NF4Tensor)
    torch.testing.assert_close(wide.weight.dense().float(), held.weight.dense())
    with pytest.raises(AddendaError, match="write into a weight that is kept as NF4Tensor"), torch.no_grad():
        held.weight.add_(1)
    assert torch.equal((held.weight + 1).float(), held.weight.dense() + 1)


@pytest.fixture
def pair():
    """A quantised model, and a plain one with the same values."""
    held = toys.Tiny()
    quantize(held)
    twin = copy.deepcopy(held)
    for module in twin.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, NF4Tensor):
            module.weight = nn.Parameter(module.weight.dense())
    return held, twin


@pytest.mark.parametrize("name", [i.name for i in ad.catalogue() if issubclass(i.cls, ad.WeightMethod)])
def test_every_method_attaches_and_trains_as_on_the_plain_weight(pair, ids, name):
    held, twin = pair
    if name in ("bitfit", "ln"):
        pytest.skip("changes no matrix")
    outputs, gradients = [], []
    for model in (held, twin):
        adapter = shared.attach(model, name, ids, targets="linear")
        shared.stir(adapter)
        y = model(ids)
        y.square().mean().backward()
        outputs.append(y.detach())
        gradients.append([p.grad for p in adapter.parameters()])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    stored = [m.weight for m in held.modules() if isinstance(m, nn.Linear) and isinstance(m.weight, NF4Tensor)]
    assert len(stored) == 12
    ad.detach(held)


def test_files_know_the_codes(pair, ids, tmp_path):
    held, twin = pair
    fresh = copy.deepcopy(held)
    adapter = ad.attach(held, ad.LoRA(rank=2), targets="linear")
    shared.stir(adapter)
    wanted = held(ids).detach()
    adapter.save(tmp_path / "a.safetensors")
    ad.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(ids).detach(), wanted)
    with pytest.raises(AddendaError, match="other base weights"):
        ad.load(twin, tmp_path / "a.safetensors")
    held.layers[0].up_proj.weight.codes[0] ^= 1
    ad.detach(held)
    with pytest.raises(AddendaError, match="other base weights"):
        ad.load(held, tmp_path / "a.safetensors")


@pytest.mark.parametrize("method", [ad.LoRA(rank=2), ad.DoRA(rank=2), ad.SHiRA(density=0.2)])
def test_merging_makes_the_weight_plain_and_unmerging_gives_the_codes_back(pair, ids, method):
    held, _ = pair
    adapter = ad.attach(held, method, targets="linear")
    shared.stir(adapter)
    wanted, weight = held(ids).detach(), held.layers[0].up_proj.weight
    codes = weight.codes.clone()
    report = ad.merge(held, verify=ids)
    assert report.total < 1e-5
    torch.testing.assert_close(held(ids).detach(), wanted, rtol=1e-4, atol=1e-5)
    assert type(held.layers[0].up_proj.weight) is nn.Parameter
    ad.unmerge(held)
    assert held.layers[0].up_proj.weight is weight and torch.equal(weight.codes, codes)
    torch.testing.assert_close(held(ids).detach(), wanted)
    ad.merge(held, verify=ids)
    ad.detach(held, keep_merged=True)
    torch.testing.assert_close(held(ids).detach(), wanted, rtol=1e-4, atol=1e-5)


def test_linear_without_a_quantised_weight_is_torchs_own():
    x, W = torch.randn(3, 4), torch.randn(5, 4)
    held = NF4Tensor.of(x)
    torch.testing.assert_close(F.linear(held, W), F.linear(held.dense(), W))
