"""Tensors that all sites of a method train together: one of each, wherever one looks, and nothing of it half-loaded."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.adapter.build import pool_of
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.file.inspect import inspect
from addenda.core.forward.slots import slots_of
from addenda.core.site.kinds import LINEAR
from addenda.core.site.site import Site
from addenda.train import checkpoint
from shared import METHODS, NAMES, attach, bits, loss_of, read_raw, same_bits, stir, write_raw

POOLED = [n for n in NAMES if METHODS[n].has("pool")]
SPEC = "vb-lora:rank=2,vectors=5,length=4"
every_pooled = pytest.mark.parametrize("name", POOLED)


def held(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The pooled tensors as each site has them."""
    return [p for _, t in ad.adapters(model)[name].sites() if "pool" in t._modules for p in t.pool.parameters()]


def test_there_is_one():
    assert "vb-lora" in POOLED


@every_pooled
def test_counted_once(name, tiny, ids):
    plan = ad.plan(tiny, METHODS[name], targets="linear")
    adapter = attach(tiny, name, ids, targets="linear")
    ((where, pool),) = adapter.pools()
    sites = list(adapter.sites())
    pooled = sum(p.numel() for p in pool.parameters())
    assert pooled == plan.pooled == METHODS[name].pooled([])
    assert plan.trainable == sum(row.trainable for row in plan.rows) + pooled == adapter.trainable
    assert f"of them {pooled:,} that all sites train together" in str(plan)
    assert "together" not in str(ad.plan(tiny, "lora:rank=2"))
    names = [n for n, _ in adapter.named_parameters()]
    assert len(names) == len(set(names)) == len({id(p) for p in adapter.parameters()})
    assert [n for n in names if n.startswith(where)] == [f"{where}/{k}" for k in pool._parameters]
    assert len({id(p) for p in held(tiny)}) == len(list(pool.parameters()))
    assert len(held(tiny)) == len(sites) * len(list(pool.parameters()))
    own = [p for n, p in tiny.named_parameters() if ".addenda." in n]
    assert {id(p) for p in own} == {id(p) for p in adapter.parameters()} and len(own) == len(names)
    assert all(p.dtype == torch.float32 for p in own)


def test_the_gradient_is_the_sum_over_sites(tiny, ids):
    """Against float64 by hand: two layers in a row, their factors mixed from one bank by loops."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)).double()
    adapter = stir(ad.attach(model, SPEC, targets=["0", "2"]), 0.3)
    x = torch.randn(5, 8, dtype=torch.float64)
    bank = held(model)[0].detach().double().requires_grad_()
    h = x
    for i, (_, t) in zip((0, 2), adapter.sites(), strict=True):
        rows = [[[_mixed(piece, bank) for piece in row] for row in logits.detach().double()] for logits in (t.a, t.b)]
        A = torch.stack([torch.cat(row) for row in rows[0]])
        B = torch.cat([torch.stack(group, 1) for group in rows[1]])
        m, n = model[i].weight.shape  # pyright: ignore[reportGeneralTypeIssues]
        h = h @ (model[i].weight.detach() + B[:m] @ A[:, :n]).T + model[i].bias.detach()
        h = torch.tanh(h) if i == 0 else h
    h.square().sum().backward()
    y = model(x)
    torch.testing.assert_close(y, h, rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    found = held(model)[0].grad
    torch.testing.assert_close(found.double(), bank.grad, rtol=1e-4, atol=1e-5)
    for path in ("0", "2"):  # neither site alone gives it
        model.zero_grad()
        other = model[2 - int(path)]
        with torch.no_grad():
            kept = slots_of(other).live["weight"]
            slots_of(other).live["weight"] = ()
        model(x).square().sum().backward()
        slots_of(other).live["weight"] = kept
        assert not torch.allclose(held(model)[0].grad, found)


def _mixed(logits: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    one, two = logits.topk(2).indices
    w = torch.sigmoid(logits[one] - logits[two])
    return w * bank[one] + (1 - w) * bank[two]


@every_pooled
def test_copies_have_one_of_their_own(name, tiny, ids):
    stir(attach(tiny, name, ids, targets="linear"))
    expected = tiny(ids)
    buffer = io.BytesIO()
    torch.save(tiny, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny)), torch.load(buffer, weights_only=False)):
        mine, theirs = ({id(p) for p in held(m)} for m in (tiny, twin))
        assert len(mine) == len(theirs) and not mine & theirs
        loss_of(twin, ids).backward()
        optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1)
        assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(tiny.parameters()))
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(held(twin)[:1], held(twin)[-1:], strict=True))
        assert not torch.equal(held(twin)[0], held(tiny)[0])
        assert torch.equal(tiny(ids), expected)


@every_pooled
def test_saved_once_and_loaded_as_one(name, tiny, ids, tmp_path):
    adapter = stir(attach(tiny, name, ids, targets="linear", also_train=["score"]))
    file, y = adapter.save(tmp_path / "a.safetensors"), tiny(ids)
    header, tensors = read(file)
    ((_, pool),) = adapter.pools()
    own = {f".0/{k}" for k in pool._parameters}
    assert {k for k in tensors if k.startswith(".")} == own
    assert header.pools == (tuple(pool._parameters),)
    pooled = sum(p.numel() for p in pool.parameters())
    assert f"trained by all sites together: {pooled:,} numbers" in inspect(file)
    assert f"  {adapter.trainable:,} trained numbers" in inspect(file)
    ad.detach(tiny)
    again = ad.load(tiny, file, name="other")
    assert torch.equal(tiny(ids), y)
    assert len({id(p) for p in held(tiny, "other")}) == len(own)
    assert not any(p.requires_grad for p in again.parameters())
    again.requires_grad_()
    assert all(p.requires_grad for p in held(tiny, "other"))
    assert again.save(tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


def test_moves_with_the_model_and_reads_its_state(tiny, ids):
    adapter = stir(ad.attach(tiny, SPEC))
    state, y = copy.deepcopy(tiny.state_dict()), tiny(ids)
    stir(adapter, 0.5, seed=3)
    tiny.load_state_dict(state)
    assert torch.equal(tiny(ids), y)
    tiny.to(torch.float64)
    assert {p.dtype for p in held(tiny)} == {torch.float64} and len({id(p) for p in held(tiny)}) == 1
    torch.testing.assert_close(tiny(ids).float(), y, rtol=1e-4, atol=1e-5)
    values = {n: p.detach() * 0 for n, p in tiny.named_parameters() if ".addenda." in n}
    with ad.disabled(tiny):
        plain = tiny(ids)
    assert torch.equal(torch.func.functional_call(tiny, values, (ids,)), plain)  # a bank of zeros, at every site


def test_each_adapter_and_each_method_has_its_own(tiny, ids, tmp_path):
    two = {"self_attn.*": SPEC, "up_proj": "vb-lora:rank=1,vectors=7,length=8", "down_proj": "lora:rank=2"}
    stir(ad.attach(tiny, SPEC, name="first"))
    second = stir(ad.attach(tiny, two, name="second"), seed=2)
    first = ad.adapters(tiny)["first"]
    assert [n for n, _ in second.pools()] == [".0", ".1"]
    assert [tuple(pool.bank.shape) for _, pool in second.pools()] == [(5, 4), (7, 8)]
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    outputs = {}
    for name in ("first", "second", None):
        ad.switch(tiny, name)
        outputs[name] = tiny(ids)
    names = ["second", None]
    with ad.per_example(tiny, names):
        mixed = tiny(ids)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], outputs[name][i], rtol=1e-5, atol=1e-6)
    ad.switch(tiny, "second")
    file = second.save(tmp_path / "two.safetensors")
    ad.detach(tiny, "second")
    assert not any("second" in n for n, _ in tiny.named_modules())
    ad.load(tiny, file, name="again")
    assert torch.equal(tiny(ids), outputs["second"])
    ad.detach(tiny)
    assert not any(slots_of(m) for m in tiny.modules())


def test_checkpoints_restore_it(tiny, ids, tmp_path):
    adapter = stir(ad.attach(tiny, SPEC))
    checkpoint.write(adapter, tmp_path)
    y = tiny(ids)
    stir(adapter, 0.5, seed=3)
    checkpoint.restore(adapter, tmp_path)
    assert torch.equal(tiny(ids), y)
    tensors = adapter.state_dict()
    del tensors[".0/bank"]
    with pytest.raises(AddendaError, match=r"missing \.0/bank"):
        adapter.load_state_dict(tensors)


def test_stacked_experts_share_it_with_all_others(mixtral):
    adapter = stir(ad.attach(mixtral, SPEC, targets=["*.experts.*", "q_proj"]), 0.2)
    ids = torch.arange(8)[None]
    loss_of(mixtral, ids).backward()
    found = held(mixtral)[0].grad.clone()
    assert len({id(p) for p in held(mixtral)}) == 1
    assert adapter.trainable == ad.plan(mixtral, SPEC, targets=["*.experts.*", "q_proj"]).trainable
    stack, changes = mixtral.model.layers[0].mlp.experts, {}
    for path, t in adapter.sites():
        if path.startswith("model.layers.0.mlp.experts"):
            bank = t.pool.bank.detach()
            A = [torch.stack([torch.cat([_mixed(u, bank) for u in row]) for row in a]) for a in t.a.detach()]
            B = [torch.cat([torch.stack([_mixed(u, bank) for u in g], 1) for g in b]) for b in t.b.detach()]
            changes[path.rpartition(".")[2]] = torch.stack([b @ a for a, b in zip(A, B, strict=True)])
    for name, change in changes.items():
        torch.testing.assert_close(getattr(stack, name), stack._parameters[name] + change, rtol=1e-5, atol=1e-6)
    mixtral.zero_grad()
    ad.switch(mixtral, None)
    ad.switch(mixtral, "default")
    loss_of(mixtral, ids).backward()
    torch.testing.assert_close(held(mixtral)[0].grad, found)


def test_a_dead_one_is_named(tiny, ids):
    adapter = ad.attach(tiny, SPEC, targets="up_proj")
    loss_of(tiny, ids).backward()
    held(tiny)[0].grad = None
    with pytest.raises(AddendaError, match=r"1 of 5 trainable tensors .* got no gradient in the first step: \.0/bank"):
        adapter.step()


def test_sites_on_several_devices_are_refused():
    layers = {path: nn.Linear(8, 8, device=device) for path, device in (("a", "cpu"), ("b", "meta"))}
    sites = [Site(path, layer, "weight", LINEAR) for path, layer in layers.items()]
    with pytest.raises(AddendaError, match="on several devices: a on cpu and b on meta"):
        pool_of(METHODS["vb-lora"], sites, 0)
    assert pool_of(METHODS["lora"], sites, 0) is None


@pytest.fixture
def good(tiny, tmp_path):
    file = stir(ad.attach(tiny, SPEC, targets="up_proj")).save(tmp_path / "good.safetensors")
    ad.detach(tiny)
    return file


def refused(model, header, tensors, path, pattern):
    write_raw(path, header, tensors)
    before = bits(model)
    with pytest.raises(AddendaError, match=pattern):
        ad.load(model, path)
    assert same_bits(bits(model), before)
    assert not any(slots_of(m) for m in model.modules())


BANKS = {
    "NaN": (torch.full((5, 4), torch.nan), r"\.0/bank holds values that are not finite"),
    "empty": (torch.zeros(0, 4), "expected 20 trained numbers, the file has 0"),
    "turned": (torch.zeros(4, 5), r"expected bank float \[5, 4\], the file has bank float \[4, 5\]"),
    "wide": (torch.zeros(5, 8), "expected 20 trained numbers, the file has 40"),
    "integers": (torch.zeros(5, 4, dtype=torch.int32), "must be float64, float32"),
}


@pytest.mark.parametrize("kind", BANKS)
def test_banks_that_do_not_fit(kind, good, tiny, tmp_path):
    header, tensors = read_raw(good)
    value, pattern = BANKS[kind]
    refused(tiny, header, tensors | {".0/bank": value}, tmp_path / "x.safetensors", pattern)


HEADERS = [
    ([], {}, "expected 1 sets|missing|unexpected"),
    ([["bank"], ["bank"]], {".1/bank": torch.zeros(5, 4)}, "expected 1 sets of tensors .* the file has 2"),
    ([["bank", "bank"]], {}, "damaged"),
    ([["more"]], {".0/more": torch.zeros(5, 4)}, "unexpected"),
    ([["bank", "more"]], {".0/more": torch.zeros(5, 4)}, "expected 20 trained numbers, the file has 40"),
    ([[]], {}, "unexpected"),
    (None, {}, "damaged"), (3, {}, "damaged"), ("x", {}, "damaged"), ([3], {}, "damaged"), ([[3]], {}, "damaged"),
    ({"a": 1}, {}, "damaged"), ([{"bank": 1}], {}, "damaged"), (["bank"], {}, "damaged"),
]  # fmt: skip


@pytest.mark.parametrize("case", HEADERS, ids=range(len(HEADERS)))
def test_headers_that_do_not_fit(case, good, tiny, tmp_path):
    header, tensors = read_raw(good)
    header["pools"], more, pattern = case
    refused(tiny, header, tensors | more, tmp_path / "x.safetensors", pattern)


def test_a_pool_of_none_is_not_taken(tiny, tmp_path):
    file = ad.attach(tiny, "lora:rank=2", targets="up_proj").save(tmp_path / "lora.safetensors")
    ad.detach(tiny)
    header, tensors = read_raw(file)
    assert header["pools"] == []
    header["pools"] = [["bank"]]
    refused(tiny, header, tensors | {".0/bank": torch.zeros(5, 4)}, tmp_path / "x.safetensors", "expected 0 sets")
    del header["pools"]  # files of before there were pools
    write_raw(tmp_path / "old.safetensors", header, tensors)
    ad.load(tiny, tmp_path / "old.safetensors")


@every_pooled
def test_a_state_dict_holds_it_once_and_loads_strictly(name, tiny, ids):
    adapter = stir(attach(tiny, name, ids, targets="linear"))
    state = {k: v.clone() for k, v in tiny.state_dict().items()}
    mine = [k for k in state if ".pool." in k]
    ((_, pool),) = adapter.pools()
    assert len(mine) == len(list(pool.parameters())) < len(held(tiny))
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    for _ in range(2):
        stir(adapter, seed=5)
        tiny.load_state_dict(state)
        assert same_bits(adapter.state_dict(), before)
        found = tiny.load_state_dict({k: v for k, v in state.items() if k not in mine}, strict=False)
        assert {k.rpartition(".")[2] for k in found.missing_keys} == {k.rpartition(".")[2] for k in mine}
    twin = pickle.loads(pickle.dumps(tiny))
    assert [k for k in twin.state_dict() if ".pool." in k] == mine
    first = mine[0].partition(".addenda.")[0]
    holders = [n for n, m in tiny.named_modules(remove_duplicate=False) if n.endswith(".pool")]
    everywhere = {f"{n}.{k.rpartition('.')[2]}": state[k] for n in holders for k in mine}
    assert first in holders[0]
    tiny.load_state_dict(state | everywhere)  # as earlier versions wrote it, under every holder's name
