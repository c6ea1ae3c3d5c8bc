"""Options, the catalogue, plans and calibration."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import addenda as ad
from addenda.core.adapter.calibration import calibrate
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import _catalogue, build, info, register
from addenda.core.method.contract import Replace, WeightMethod, parse_options, to_float
from addenda.core.site.site import site_at
from shared import EVERY, METHODS, NAMES, bits, loss_of, same_bits, shape_for, stir, where


@pytest.mark.parametrize("name", EVERY)
def test_every_entry_is_complete(name):
    entry = info(name)
    assert entry.title
    assert entry.equation
    assert entry.hypothesis.endswith(".")
    assert entry.paper
    method = entry.build()
    assert isinstance(method.name, str)
    assert hash(method) == hash(entry.build())
    assert all(isinstance(v, (int, float, str, bool, type(None))) for v in method.options(defaults=True).values())
    assert entry.cls(**method.options()) == method
    shape = shape_for(name, 4096, 4096)
    assert method.check(*shape) is None or method.check(*shape)


@pytest.mark.parametrize("name", EVERY)
def test_check_and_count_are_quick_at_any_size(name):
    import time

    started = time.perf_counter()
    for m, n in ((1, 1), (1, 10**6), (10**6, 1), (10**5, 10**5)):
        shape = shape_for(name, m, n)
        if METHODS[name].check(*shape) is None:
            assert METHODS[name].trainable(*shape) >= 1
    assert time.perf_counter() - started < 2


def test_options_from_text():
    assert build("lora:rank=4, alpha=2.5,scaling=rs") == ad.LoRA(rank=4, alpha=2.5, scaling="rs")
    assert build("lora:alpha=none") == ad.LoRA()
    assert build("oft:block_share=TRUE") == ad.OFT(block_share=True)
    assert build("rslora") == ad.LoRA(scaling="rs", alpha=8.0)


BAD = {
    "lora:rnak=4": "no option 'rnak'.*Did you mean 'rank'.*Its options: rank=8",
    "lora:rank=x": "rank must be int, got 'x'",
    "lora:rank=0": "rank must be at least 1",
    "lora:rank": "Expected option=value.*'rank'",
    "lora:dropout=1": "dropout must be in",
    "lora:alpha=nan": "alpha must be finite",
    "lora:scaling=odd": "scaling must be one of 'classic', 'rs'",
    "oft:block_share=1": "block_share must be bool",
    "shira:density=2": "density must be in",
    "lorra": "no method 'lorra'.*Did you mean.*'lora'.*Known methods",
    "": "no method ''",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_options_say_what_is_wrong(text):
    with pytest.raises(AddendaError, match=BAD[text]):
        build(text)


def test_problems_come_together():
    with pytest.raises(AddendaError, match=r"rank must be at least 1.*dropout must be in"):
        ad.LoRA(rank=0, dropout=2.0)
    with pytest.raises(AddendaError, match="rank must be int, got True"):
        ad.LoRA(rank=True)


def test_first_option_by_position_is_the_methods_own():
    assert ad.LoRA(4).rank == 4


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="two methods are called 'lora'"):
        register("lora", title="", paper="", equation="", hypothesis="", family="")(type("X", (WeightMethod,), {}))


def test_a_method_of_ones_own_is_one_class(tiny, ids, tmp_path):
    @register("test-scale", title="t", paper="p", equation="W' = s W", hypothesis="h.", family="dense")
    @dataclass(frozen=True)
    class Scale(WeightMethod):
        def init(self, W, rng, p):
            return {"s": nn.Parameter(torch.zeros(1))}

        def delta(self, W, p):
            return W * p["s"]

        def trainable(self, m, n):
            return 1

    try:
        adapter = stir(ad.attach(tiny, "test-scale"), 0.5)
        y = tiny(ids)
        file = adapter.save(tmp_path / "a.safetensors")
        ad.detach(tiny)
        ad.load(tiny, file)
        assert torch.equal(tiny(ids), y)
    finally:
        del _catalogue["test-scale"]


def test_missing_hooks_raise():
    method = WeightMethod()
    for call in (
        lambda: method.init(None, None, {}), lambda: method.delta(torch.ones(1, 1), {}),
        lambda: method.factors({}, (1, 1)),
        lambda: method.sparse({}, (1, 1)), lambda: method.apply(None, None, {}), lambda: method.trainable(1, 1),
        lambda: method.calibrate(None, None, None), lambda: method.magnitude(None, {}),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError):
            call()
    assert not method.has("factors")
    assert Replace().trainable(3, 4) == 12


def test_helpers():
    assert nearest("lorra", ["lora", "oft"]) == " Did you mean 'lora'?"
    assert nearest("zzz", ["lora"]) == ""
    mixed = to_float({"a": torch.ones(1).half(), "i": torch.ones(1).int()})
    assert [t.dtype for t in mixed.values()] == [torch.float32, torch.int32]
    assert parse_options(ad.LoRA, {"rank": 3}) == ad.LoRA(rank=3)
    with pytest.raises(AttributeError, match="addenda has no 'nope'"):
        ad.nope  # noqa: B018


@settings(deadline=None, max_examples=25)
@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_shape_starts_at_zero_and_counts_right(m, n, seed):
    W = torch.from_numpy(Stream(seed, "W").normal(m, n).numpy())
    for name in ("lora", "pissa", "shira", "dora", "svft"):
        method = METHODS.get(name)
        if method is None or method.check(m, n):
            continue
        rng = Stream(seed, "site")
        p = method.derive(W, rng)
        p = p | method.init(W, rng, p)
        delta = method.delta(W, p)
        assert delta.shape == (m, n)
        assert float(delta.detach().abs().max()) <= 1e-5 * float(W.abs().max())
        trained = sum(t.numel() for t in p.values() if isinstance(t, nn.Parameter))
        assert trained == method.trainable(m, n)


# -- plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.on_device
@pytest.mark.parametrize("name", EVERY)
def test_a_plan_says_what_attach_does(name, tiny, ids):
    before = bits(tiny)
    plan = ad.plan(tiny, METHODS[name], targets=where(name), also_train=["score"])
    assert same_bits(bits(tiny), before)
    assert "_addenda" not in tiny.__dict__
    options = {"calibration": [ids], "loss": loss_of} if METHODS[name].calibration else {}
    adapter = ad.attach(tiny, METHODS[name], targets=where(name), also_train=["score"], **options)
    assert plan.trainable == adapter.trainable
    assert [row.path for row in plan.rows] == list(adapter.methods)
    assert plan.base == sum(p.numel() for p in before.values())
    assert ad.plan(tiny, "lora:rank=2").base == plan.base
    text = str(plan)
    if name in NAMES:
        assert plan.skipped == {"embed": 1}
        assert "left as they are: embed ×1" in text
    assert f"{plan.trainable:,} trainable numbers" in text


def test_a_plan_counts_experts(mixtral):
    plan = ad.plan(mixtral, "lora:rank=2", targets="*.experts.*")
    row = plan.rows[0]
    assert (row.copies, row.shape, row.trainable) == (4, (32, 8), 4 * 2 * 40)
    assert "32×8 ×4" in str(plan)


def test_a_plan_names_the_experts_that_no_target_reaches(mixtral):
    ad.attach(mixtral, "lora:rank=2", name="there")
    skipped = ad.plan(mixtral, "lora:rank=2", targets="linear").skipped
    assert skipped == {
        "model.embed_tokens": 1,
        "lm_head": 1,
        "model.layers.*.mlp.experts.gate_up_proj": 2,
        "model.layers.*.mlp.experts.down_proj": 2,
    }


def test_a_plan_raises_what_attach_would(tiny):
    with pytest.raises(AddendaError, match="12 of 12 sites"):
        ad.plan(tiny, ad.LoRA(rank=99))


# -- calibration ---------------------------------------------------------------------------------------------------


def test_calibration_sees_gradients_and_leaves_everything_as_it_was(tiny, ids):
    tiny.layers[0].eval()
    tiny.layers[0].requires_grad_(False)
    tiny.score.weight.grad = torch.ones_like(tiny.score.weight)
    flags = {n: p.requires_grad for n, p in tiny.named_parameters()}
    method = ad.SHiRA(density=0.1, mask="snip")
    plan = [(site_at(tiny, p), method) for p in ("layers.0.up_proj", "layers.1.down_proj")]
    seen = calibrate(tiny, plan, [ids, ids + 1], loss_of)
    assert {n: p.requires_grad for n, p in tiny.named_parameters()} == flags
    assert not tiny.layers[0].up_proj.training
    assert tiny.layers[1].up_proj.training
    assert torch.equal(tiny.score.weight.grad, torch.ones_like(tiny.score.weight))
    assert tiny.layers[1].down_proj.weight.grad is None
    expected = sum(torch.autograd.grad(loss_of(tiny, b), tiny.layers[1].down_proj.weight)[0] for b in (ids, ids + 1))
    torch.testing.assert_close(seen["layers.1.down_proj"], expected)


def test_calibration_without_loss_data_or_gradients(tiny, ids):
    method = ad.SHiRA(density=0.1, mask="snip")
    for options, pattern in (
        ({}, "looks at data"),
        ({"calibration": [], "loss": loss_of}, "held no batch"),
        ({"calibration": [ids]}, "found no loss"),
        ({"calibration": [ids], "loss": lambda m, b: m.embed(b).sum() + m.score.bias.requires_grad_().sum()},
         "got nothing from the calibration data"),
    ):  # fmt: skip
        with pytest.raises(AddendaError, match=pattern):
            ad.attach(tiny, method, **options)
        assert "_addenda" not in tiny.__dict__
        assert all(p.requires_grad for p in tiny.parameters())


def test_fields_are_documented_options_only():
    for entry in ad.catalogue():
        assert not {"start", "name", "any_shape"} & {f.name for f in dataclasses.fields(entry.cls)}, entry.name


@pytest.mark.parametrize("what", ["methods", "optim", "core", ""])
def test_modules_may_be_loaded_again_in_one_process(what):
    """As a notebook does: by importlib.reload, and by forgetting what was imported."""
    code = f"""
import importlib, sys
import addenda as ad
count, names = len(ad.catalogue()), [i.name for i in ad.catalogue()]
from addenda.optim.registry import known
optimizers = list(known())
prefix = "addenda.{what}".rstrip(".")
for name, module in list(sys.modules.items()):
    if (name == prefix or name.startswith(prefix + ".")) and module is not None:
        importlib.reload(module)
import addenda as ad
assert [i.name for i in ad.catalogue()] == names
for name in [n for n in sys.modules if n == prefix or n.startswith(prefix + ".")]:
    del sys.modules[name]
import addenda as ad
assert [i.name for i in ad.catalogue()] == names
from addenda.optim.registry import known
assert list(known()) == optimizers, (list(known()), optimizers)
from torch import nn
ad.attach(nn.Sequential(nn.Linear(8, 8)), "lora:rank=2", targets="0")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cell_that_defines_a_method_may_run_twice():
    from addenda.core.method import catalogue as registry

    for _ in range(2):

        @registry.register("mine", title="", paper="", equation="", hypothesis="", family="low-rank")
        class Mine(ad.LoRA):
            pass

    assert registry.info("mine").cls is Mine
    del registry._catalogue["mine"]


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_a_whole_number_that_torch_cannot_take_is_refused(value):
    """An adapter with one loads, and its first forward would be an OverflowError."""
    with pytest.raises(AddendaError, match=r"must be finite and at most 9\.2e"):
        ad.LoRA(alpha=value)
    assert ad.LoRA(alpha=2**63 - 1).alpha == 2**63 - 1
