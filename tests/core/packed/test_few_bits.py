"""Matrices in few bits: the codes against their definition, the gradient against autograd, files byte by byte."""

import copy
import dataclasses
import itertools
import json
import math
import pickle
import re
import tempfile

import pytest
import torch
from scipy import integrate, optimize, stats
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.file.inspect import inspect
from addenda.core.packed.bits import code_bytes, pack, unpack
from addenda.core.packed.few_bits import EPS, codebook, encoded, quantised
from shared import (
    METHODS,
    NAMES,
    attach,
    bits,
    effective,
    loss_of,
    read_raw,
    relative,
    same_bits,
    sites,
    stir,
    train,
    where,
    write_raw,
)

EACH = range(1, 9)

# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", EACH)
def test_codes_are_the_medians_of_their_cells(b):
    v = torch.tensor(codebook(b), dtype=torch.float64)
    assert len(v) == 2**b
    assert torch.equal(v, -v.flip(0))
    t = torch.cat([torch.tensor([-math.inf]), (v[1:] + v[:-1]) / 2, torch.tensor([math.inf])]).numpy()
    below, above = stats.norm.cdf(t[:-1]), stats.norm.cdf(t[1:])
    assert abs(stats.norm.cdf(v.numpy()) - (below + above) / 2).max() < 1e-14


def _error(z: float, v: float, power: int) -> float:
    return abs(z - v) ** power * stats.norm.pdf(z)  # pyright: ignore[reportReturnType]


def test_golden_codes_and_what_they_cost():
    assert codebook(1)[1] == pytest.approx(0.67449, abs=1e-5)
    assert codebook(2)[2:] == pytest.approx((0.3778, 1.2657), abs=5e-5)
    golden = (0.1056, 0.3190, 0.5401, 0.7752, 1.0340, 1.3331, 1.7077, 2.2655)
    assert codebook(4)[8:] == pytest.approx(golden, abs=5e-5)
    assert codebook(8)[-1] == pytest.approx(3.7854, abs=5e-5)
    c = codebook(1)[1]
    square_1 = 1 - 2 * c * math.sqrt(2 / math.pi) + c * c  # E (|z| − c)², in closed form
    for b, absolute, square in ((1, 0.473, square_1), (2, 0.266, 0.130), (4, 0.0747, 0.0120)):
        v = codebook(b)
        t = [-12.0, *((x + y) / 2 for x, y in itertools.pairwise(v)), 12.0]
        cells = list(zip(v, t[:-1], t[1:], strict=True))
        for power, want in ((1, absolute), (2, square)):
            parts = (integrate.quad(_error, lo, hi, (v, power))[0] for v, lo, hi in cells)
            assert sum(parts) == pytest.approx(want, abs=1.1e-3)


def test_two_bits_are_the_least_absolute_error_by_a_search():
    """Independent of the fixed point: minimise E|z − Q(z)| over the two positive codes directly."""
    z = stats.norm.ppf((torch.arange(20000).double().numpy() + 0.5) / 20000)

    def loss(c):
        return abs(abs(z)[:, None] - c[None]).min(1).mean()

    found = optimize.minimize(loss, [0.5, 1.5], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).x
    assert sorted(found) == pytest.approx(codebook(2)[2:], abs=2e-3)


def test_nearest_code_by_brute_force():
    W = torch.randn(11, 7, dtype=torch.float64) * 0.3 + 0.1
    for b in EACH:
        v = torch.tensor(codebook(b), dtype=torch.float64)
        z = (W - W.mean()) / (W.std() + EPS)
        want = v[(z[..., None] - v).abs().argmin(-1)] * W.std() + W.mean()
        torch.testing.assert_close(quantised(W, b), want, rtol=1e-12, atol=1e-12)
    shrunk = quantised(quantised(W, 1), 1)
    assert relative(shrunk, quantised(W, 1)) > 0.2, "quantising twice is not quantising once"


# -- gradient ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("b", [1, 3, 8])
def test_gradient_is_that_of_the_definition(b, stacked):
    W = torch.randn(3, 6, 5, dtype=torch.float64) * torch.tensor([1e-3, 1e-5, 2.0])[:, None, None].double()
    W.requires_grad_()
    G = torch.randn_like(W)
    (mine,) = torch.autograd.grad(quantised(W, b, "paper", stacked), W, G)
    dims = (1, 2) if stacked else (0, 1, 2)
    mean, std = W.mean(dims, keepdim=True), W.std(dims, keepdim=True)
    z = (W - mean) / (std + EPS)
    v = torch.tensor(codebook(b), dtype=torch.float64)
    zq = v[(z.detach()[..., None] - v).abs().argmin(-1)]
    (want,) = torch.autograd.grad((zq + z - z.detach()) * std + mean, W, G)
    torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-12)
    (plain,) = torch.autograd.grad(quantised(W, b, "plain", stacked), W, G)
    assert torch.equal(plain, G)
    assert relative(want, G) > (0.01 if b == 1 else 0)


def test_matrices_without_spread_have_values_and_gradients():
    for W in (torch.full((3, 4), 0.5), torch.zeros(2, 2), torch.tensor([[3.0]])):
        W.requires_grad_()
        Q = quantised(W, 2)
        torch.testing.assert_close(Q.detach(), W.detach())
        Q.sum().backward()
        torch.testing.assert_close(W.grad, torch.ones_like(W))
        torch.testing.assert_close(encoded(W, 2).dense(), W.detach())


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", EACH)
def test_packed_bytes(b):
    for n in (1, 2, 7, 8, 9, 64, 101):
        codes = torch.randint(0, 2**b, (3, n))
        held = pack(codes, b)
        assert held.shape == (3, math.ceil(n * b / 8))
        assert torch.equal(unpack(held, b, n), codes.to(torch.uint8))
        number = sum(int(c) << b * i for i, c in enumerate(codes[0]))  # little end first: one long number
        assert bytes(held[0].tolist()) == number.to_bytes(math.ceil(n * b / 8), "little")
    for shape, stacked in (((5, 7), False), ((3, 5, 7), True), ((3, 5, 7), False)):
        W = torch.randn(*shape) * 0.02
        made = encoded(W, b, stacked)
        assert torch.equal(made.dense(), quantised(W, b, stacked=stacked)), "the same arithmetic, the same bits"
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.to(torch.bfloat16).to(torch.float32)):
            assert torch.equal(twin.dense(), made.dense())
            assert twin.depth == b


# -- adapters ----------------------------------------------------------------------------------------------------------

FEW = {
    "lora": ad.LoRA(rank=3, bits=1),
    "lora-plain": ad.LoRA(rank=3, bits=3, ste="plain", dropout=0.1),
    "dora": ad.DoRA(rank=2, bits=2),
    "oft": ad.OFT(block=4, bits=4),
    "adaptformer": ad.AdaptFormer(rank=4, bits=1, bias=False),
    "houlsby": ad.Houlsby(rank=4, bits=5),
}
few = pytest.mark.parametrize("name", FEW)


def targets(name: str) -> str | None:
    return None if isinstance(FEW[name], ad.HiddenMethod) else "linear"


def test_every_method_starts_within_its_bound_or_says_why_it_has_no_bits(tiny, ids):
    expected, refused = tiny(ids), {}
    for name in METHODS:
        try:
            adapter = attach(tiny, dataclasses.replace(METHODS[name], bits=1), ids, targets=where(name))
        except AddendaError as error:
            refused[name] = str(error)
            continue
        start = adapter.methods[next(iter(adapter.methods))].start
        assert start.why
        assert start.bound > 0
        assert relative(tiny(ids), expected) <= start.bound, name
        for site in sites(tiny, adapter) if name in NAMES else ():
            assert relative(effective(site, torch.float32), site.weight) <= start.bound, name
        ad.detach(tiny)
    why = re.compile("trains vectors only|codes have one size|a part.s zeros")
    assert all(why.search(said) for said in refused.values())
    assert {"vera", "shira", "ia3", "mosa", "mosl"} <= set(refused)
    assert not {"lora", "pissa", "dora", "adaptformer", "houlsby", "pfeiffer", "parallel", "compacter"} & set(refused)


@few
def test_what_acts_is_the_quantised_matrices(name, tiny, ids):
    """The same method in full precision, given the quantised values, computes the same; so do merging and switching."""
    expected = tiny(ids)
    adapter = stir(attach(tiny, FEW[name], targets=targets(name)))
    tiny.eval()
    few, plain = tiny(ids), dataclasses.replace(FEW[name], bits=None, ste="paper")
    assert relative(few, expected) > 1e-4
    other = ad.attach(tiny, plain, targets=targets(name), name="plain", freeze=False)
    values = {}
    for path, t in adapter.sites():
        for k, p in t._parameters.items():
            v = torch.tensor(codebook(FEW[name].bits))
            z = (p - p.mean()) / (p.std() + EPS)
            few_values = v[(z[..., None] - v).abs().argmin(-1)] * p.std() + p.mean()
            values[f"{path}/{k}"] = (few_values if p.dim() > 1 else p).detach()
    other.load_state_dict({k: values.get(k, t) for k, t in other.state_dict().items()})
    torch.testing.assert_close(tiny(ids), few, rtol=1e-5, atol=1e-6)
    ad.switch(tiny, None)
    assert torch.equal(tiny(ids), expected)
    ad.switch(tiny, "default")
    assert torch.equal(tiny(ids), few)
    with ad.per_example(tiny, ["default", None]):
        mixed = tiny(ids)
    torch.testing.assert_close(mixed, torch.stack([few[0], expected[1]]), rtol=1e-5, atol=1e-6)
    if targets(name):
        ad.merge(tiny, verify=ids)
        torch.testing.assert_close(tiny(ids), few, rtol=1e-5, atol=1e-6)


@few
def test_a_file_holds_codes_and_loads_to_the_same_outputs(name, tiny, ids, tmp_path):
    method = FEW[name]
    adapter = attach(tiny, method, targets=targets(name), also_train=["score"], head_bits=2)
    train(tiny, adapter, ids, torch.optim.AdamW(adapter.parameters(), lr=0.01), 3)
    tiny.eval()
    expected = tiny(ids)
    file, planned = adapter.save(tmp_path / "a.safetensors"), 0
    latent = adapter.save(tmp_path / "latent.safetensors", latent=True)
    for _, t in adapter.sites():
        for p in t._parameters.values():
            planned += math.ceil(p.numel() * t.method.bits / 8) + 8 if p.dim() > 1 else 4 * p.numel()
    ad.detach(tiny)
    _, tensors = read(file)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == planned
    plan = ad.plan(tiny, method, targets=targets(name), also_train=["score"], head_bits=2)
    assert plan.file_bytes == planned
    assert f"{method.bits} bit" in str(plan)
    assert f"{planned:,} bytes of tensors" in inspect(file)

    before = bits(tiny)
    loaded = ad.load(tiny, file)
    assert torch.equal(tiny(ids), expected)
    assert loaded.trainable == plan.trainable
    again = loaded.save(tmp_path / "b.safetensors")
    assert again.read_bytes() == file.read_bytes(), "codes are not quantised again"
    twin = copy.deepcopy(tiny).to(torch.bfloat16).to(torch.float32)
    _, through = read(ad.adapters(twin)["default"].save(tmp_path / "c.safetensors"))
    coded = [k for k, t in tensors.items() if t.dtype == torch.uint8 or k.endswith(".moments")]
    assert all(torch.equal(through[k], tensors[k]) for k in coded), "codes live through another dtype"
    with pytest.raises(AddendaError, match="holds codes"):
        loaded.requires_grad_()
    with pytest.raises(AddendaError, match="held as codes"):
        loaded.load_state_dict(loaded.state_dict())
    assert not any(p.requires_grad for p in loaded.parameters())
    ad.detach(tiny)
    with pytest.raises(AddendaError, match=r"holds codes.*latent=True"):
        ad.load(tiny, file, trainable=True)
    assert "_addenda" not in tiny.__dict__
    assert same_bits(bits(tiny), before)

    going = ad.load(tiny, latent, trainable=True)
    assert torch.equal(tiny(ids), expected)
    loss_of(tiny, ids).backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in going.parameters())
    assert going.save(tmp_path / "d.safetensors").read_bytes() == file.read_bytes()


def test_the_published_size():
    """Width 32 at 12 places of width 768 and a head of 100 classes without bias, all in one bit: 83,528 bytes."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Linear(768, 768, bias=False)

        def forward(self, x):
            return self.mlp(x)

    model = nn.Sequential()
    model.blocks = nn.Sequential(*(Block() for _ in range(12)))
    model.head = nn.Linear(768, 100, bias=False)
    method = ad.AdaptFormer(rank=32, bits=1, bias=False, reads="input")
    options = {"targets": "*.mlp", "also_train": ["head"], "head_bits": 1}
    assert ad.plan(model, method, **options).file_bytes == 83_528
    adapter = ad.attach(model, method, **options)
    assert adapter.trainable == 12 * 2 * 768 * 32 + 768 * 100
    held = [t for _, site in adapter.sites() for t in site.parameters()]
    assert sum(code_bytes(t.numel(), 1) + 8 for t in held) == 83_528
    with tempfile.TemporaryDirectory() as folder:
        _, tensors = read(adapter.save(f"{folder}/a.safetensors"))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 83_528
    with tempfile.TemporaryDirectory() as folder:  # the same with the head in float32
        ad.detach(model)
        _, tensors = read(
            ad.attach(model, method, targets="*.mlp", also_train=["head"]).save(f"{folder}/a.safetensors")
        )
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 73_920 + 4 * 768 * 100


def test_stacked_matrices_have_moments_of_their_own(tmp_path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x):
            return x @ self.weight.mT

    torch.manual_seed(0)
    model, x = nn.ModuleDict({"experts": Experts()}), torch.randn(3, 5, 6)
    method = ad.LoRA(rank=2, bits=2)
    adapter = stir(ad.attach(model, method, targets="experts.weight"))
    expected = model.experts(x)
    with torch.no_grad():
        ((_, t),) = adapter.sites()
        for e in range(3):
            A, B = quantised(t.A[e], 2), quantised(t.B[e], 2)
            W = model.experts._parameters["weight"][e]
            torch.testing.assert_close(expected[e], x[e] @ (W + B @ A).T, rtol=1e-5, atol=1e-5)
    file = adapter.save(tmp_path / "a.safetensors")
    assert ad.plan(model, method, targets="experts.weight").file_bytes == 3 * (3 + 8 + 4 + 8)
    ad.detach(model)
    ad.load(model, file)
    assert torch.equal(model.experts(x), expected)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo's own
def test_training_step_memory_is_predicted_and_blocks_compile(tiny, ids):
    plan = ad.plan(tiny, "lora:rank=4,bits=1", batch=2, length=6)
    assert plan.step.above > 0
    attach(tiny, FEW["lora"])
    for part, x in ((tiny.layers[0].up_proj, torch.randn(3, 8)),):
        torch._dynamo.reset()
        compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), part(x))
        torch._dynamo.reset()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_options_that_cannot_be(tiny, ids):
    for spec, why in (
        ("lora:bits=0", "bits must be from 1 to 8"),
        ("lora:bits=9", "bits must be from 1 to 8"),
        ("lora:bits=true", "bits must be int or None"),
        ("lora:bits=1.5", "bits must be int or None"),
        ("lora:bits=1,ste=none", "ste must be one of 'paper', 'plain'"),
        ("vera:bits=1", "trains vectors only"),
    ):
        with pytest.raises(AddendaError, match=why):
            ad.attach(tiny, spec, targets="up_proj")
        assert "_addenda" not in tiny.__dict__
    for bad in (0, 9):
        with pytest.raises(AddendaError, match="bits must be from 1 to 8"):
            ad.attach(tiny, "lora", also_train=["score"], head_bits=bad)
    with pytest.raises(AddendaError, match="head_bits=1 is for the heads"):
        ad.attach(tiny, "lora", head_bits=1)
    from addenda.optim import build

    with pytest.raises(AddendaError, match="lora-pro moves the factors that act"):
        build(ad.attach(tiny, "lora:rank=2,bits=1"), "lora-pro")


def test_files_made_to_harm(tiny, tmp_path):
    adapter = attach(tiny, ad.LoRA(rank=2, bits=3), targets="q_proj", also_train=["score"], head_bits=1)
    header, tensors = read_raw(adapter.save(tmp_path / "good.safetensors"))
    ad.detach(tiny)
    key = next(k for k in tensors if k.endswith("/A"))
    site = next(i for i, s in enumerate(header["sites"]) if f"{s['path']}/A" == key)
    A, M = tensors[key], tensors[f"{key}.moments"]
    bad_tensors = [
        {key: A[:-1]}, {key: torch.cat([A, A])}, {key: A.int()}, {key: A[None]}, {key: A.float()}, {key: A[0]},
        {f"{key}.moments": M[:1]}, {f"{key}.moments": M.double()}, {f"{key}.moments": M * torch.nan},
        {f"{key}.moments": -M.abs()}, {f"{key}.moments": M * torch.inf},
    ]  # fmt: skip
    for change in bad_tensors:
        bad_file(tiny, tmp_path, header, tensors | change)
    bad_file(tiny, tmp_path, header, {k: t for k, t in tensors.items() if k != f"{key}.moments"})

    def headers():
        for value in (0, 9, -1, 10**9, "1", None, True, 2, [1]):
            yield lambda h, v=value: h["methods"][0]["options"].update(bits=v)
            if value != 1:
                yield lambda h, v=value: h["head"].update(bits=v)
        for shape in ([2], [10**9, 10**9], [2, -8], [2, 8.0], "x", [], [True, 8], [8, 2], [4, 4]):
            yield lambda h, s=shape: h["sites"][site]["packed"].update(A=s)
        yield lambda h: h["sites"][site]["packed"].pop("A")
        yield lambda h: h["sites"][-1].update(packed={"value": h["sites"][-1]["shape"]})
        yield lambda h: h["sites"][site].update(packed={})
        yield lambda h: h["sites"][site].update(packed=[])
        yield lambda h: h["sites"][site]["packed"].update(C=[2, 8])
        yield lambda h: h["head"].update(colour="red")
        yield lambda h: h.update(head=3)
        yield lambda h: h["methods"][0]["options"].pop("bits")
        yield lambda h: h.pop("head")

    vector = next(s for s in header["sites"] if not s.get("packed"))  # a bias, as codes
    dressed = json.loads(json.dumps(header))
    next(s for s in dressed["sites"] if s["path"] == vector["path"])["packed"] = {"value": vector["shape"]}
    name = f"{vector['path']}/value"
    codes = {
        name: torch.zeros(math.ceil(math.prod(vector["shape"]) / 8), dtype=torch.uint8),
        f"{name}.moments": M.clone(),
    }
    bad_file(tiny, tmp_path, dressed, tensors | codes)

    for change in headers():
        broken = json.loads(json.dumps(header))
        change(broken)
        bad_file(tiny, tmp_path, broken, tensors)


def bad_file(model, folder, header, tensors) -> None:
    file = write_raw(folder / "bad.safetensors", header, tensors)
    with pytest.raises(AddendaError):
        ad.load(model, file)
    assert "_addenda" not in model.__dict__
