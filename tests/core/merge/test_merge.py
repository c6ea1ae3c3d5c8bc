"""Merging: exact where it can be, refused where rounding takes the change, and always undone exactly."""

import copy
import dataclasses
import re
import types
from collections import UserDict

import pytest
import torch
from torch import nn
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

import addenda as ad
import architectures
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.merge.write import rounded_to
from addenda.core.site.site import owners_of, refusal, site_at
from addenda.core.site.targets import all_paths
from shared import NAMES, attach, bits, relative, same_bits, stir

LORA = ad.LoRA(rank=2)


def test_float32_merge_proves_itself(llama, ids):
    stir(ad.attach(llama, LORA), 0.3)
    y = llama(ids).logits
    report = ad.merge(llama, verify={"input_ids": ids})
    assert report.top1 == 1.0
    assert report.kl <= 2 * report.noise_kl + 1e-9
    assert report.dtype == "float32"
    assert set(report.sites) == set(ad.adapters(llama)["default"].methods)
    assert "merged 14 sites in float32" in str(report)
    assert relative(llama(ids).logits, y) < 1e-5
    assert "base merged" in ad.status(llama)


def test_a_small_change_in_bfloat16_is_refused_and_undone(tiny, ids):
    tiny.bfloat16()
    stir(ad.attach(tiny, LORA), 0.001)
    before, y = bits(tiny), tiny(ids)
    with pytest.raises(AddendaError, match=r"The merge was undone.*rounding='stochastic'"):
        ad.merge(tiny)
    assert same_bits(bits(tiny), before)
    assert torch.equal(tiny(ids), y)
    report = ad.merge(tiny, allow_loss=1.0)
    assert report.total > 0.25
    ad.unmerge(tiny)
    assert same_bits(bits(tiny), before)
    ad.merge(tiny, dtype=torch.float32)
    assert tiny.score.weight.dtype == torch.float32


def test_stochastic_rounding_is_unbiased_and_seeded():
    exact = torch.full((20_000,), 1.0 + 2.0**-10)
    rounded = rounded_to(exact, torch.bfloat16, "stochastic", Stream(0, "x"))
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert abs(float(rounded.float().mean()) - float(exact[0])) < 2e-4
    assert torch.equal(rounded, rounded_to(exact, torch.bfloat16, "stochastic", Stream(0, "x")))
    negative = rounded_to(-exact, torch.bfloat16, "stochastic", Stream(0, "x"))
    assert abs(float(negative.float().mean()) + float(exact[0])) < 2e-4
    kept = torch.tensor([0.0, 1.0, -2.5])
    assert torch.equal(rounded_to(kept, torch.bfloat16, "stochastic", Stream(0)).float(), kept)


def test_wrong_states(tiny, ids):
    stir(ad.attach(tiny, LORA))
    with pytest.raises(AddendaError, match="Nothing is merged"):
        ad.unmerge(tiny)
    with pytest.raises(AddendaError, match="rounding must be"):
        ad.merge(tiny, rounding="up")
    for dtype in ("float32", torch.int8, torch.complex64, 3):
        with pytest.raises(AddendaError, match=r"dtype must be a floating one of torch's, .* got"):
            ad.merge(tiny, dtype=dtype)
    with pytest.raises(AddendaError, match="keep_merged=True wants"):
        ad.detach(tiny, keep_merged=True)
    ad.merge(tiny)
    for call in (lambda: ad.merge(tiny), lambda: ad.switch(tiny, None), lambda: ad.attach(tiny, LORA, name="b")):
        with pytest.raises(AddendaError, match="merged"):
            call()
    ad.unmerge(tiny)
    ad.switch(tiny, None)
    with pytest.raises(AddendaError, match="No adapter is active"):
        ad.merge(tiny)


def test_modes_and_flags_are_given_back(tiny, ids):
    stir(ad.attach(tiny, LORA))
    tiny.train()
    tiny.layers[0].eval()
    ad.merge(tiny, verify=ids)
    assert tiny.layers[1].up_proj.training
    assert not tiny.layers[0].up_proj.training


def test_a_batch_of_floats_is_widened_with_the_model(tiny_conv, vit):
    stir(ad.attach(tiny_conv, LORA, targets=["conv", "score"]), 0.2)
    assert "not checked" not in str(ad.merge(tiny_conv, verify=torch.randn(2, 4, 8)))
    stir(ad.attach(vit, LORA), 0.2)
    assert "not checked" not in str(ad.merge(vit, verify={"pixel_values": torch.randn(1, 3, 8, 8)}))


def test_detaching_while_merged(tiny, ids):
    before = bits(tiny)
    stir(ad.attach(tiny, LORA, also_train=["score"]))
    y = tiny(ids)
    ad.merge(tiny)
    ad.detach(tiny)
    assert same_bits(bits(tiny), before)
    stir(ad.attach(tiny, LORA, also_train=["score"]))
    ad.merge(tiny)
    ad.detach(tiny, keep_merged=True)
    assert not same_bits(bits(tiny), before)
    assert relative(tiny(ids), y) < 1e-5
    assert all(p.requires_grad for p in tiny.parameters())


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_what_is_merged_stays_where_an_idle_adapter_goes(dtype, tiny, ids):
    before, flags = bits(tiny), [p.requires_grad for p in tiny.parameters()]
    stir(ad.attach(tiny, "dora:rank=2", targets="linear", also_train=["score"], name="idle"), 0.3)
    stir(ad.attach(tiny, LORA, targets="attention", name="a"), 0.3)
    y = tiny(ids)
    ad.merge(tiny, dtype=dtype)
    merged = tiny(ids)
    ad.detach(tiny, "idle")
    assert torch.equal(tiny(ids), merged) and "base merged" in ad.status(tiny)
    ad.unmerge(tiny)
    assert same_bits(bits(tiny), before)
    assert torch.equal(tiny(ids), y)
    ad.detach(tiny)
    assert [p.requires_grad for p in tiny.parameters()] == flags and same_bits(bits(tiny), before)


@pytest.mark.parametrize("name", ["shira:density=0.2", "lora:rank=2", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_converted_while_merged_has_its_base_in_the_new_dtype(name, dtype, tiny, ids):
    base = bits(tiny)
    adapter = stir(ad.attach(tiny, name, targets=["linear", "embedding"]))
    ad.merge(tiny)
    tiny.to(dtype)
    ad.unmerge(tiny)
    assert same_bits(bits(tiny), {k: t.to(dtype) for k, t in base.items()})
    assert all(p.dtype == dtype for p in adapter.parameters())
    ad.detach(tiny)
    assert same_bits(bits(tiny), {k: t.to(dtype) for k, t in base.items()})


def test_one_of_two_merged_goes(tiny, ids):
    stir(ad.attach(tiny, LORA, name="a"), 0.3)
    y = tiny(ids)
    stir(ad.attach(tiny, LORA, name="b"), 0.3, seed=4)
    ad.switch(tiny, ["a", "b"])
    before = bits(tiny)
    ad.merge(tiny)
    twin = copy.deepcopy(tiny)
    ad.detach(tiny, "b")
    assert same_bits(bits(tiny), before)
    assert torch.equal(tiny(ids), y)
    ad.unmerge(twin)
    assert same_bits(bits(twin), before)


def test_a_failing_batch_restores_the_base(tiny, ids):
    stir(ad.attach(tiny, LORA))
    before = bits(tiny)
    calls, real = [], type(tiny).forward

    def forward(*a):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("late")
        return real(tiny, *a)

    tiny.forward = forward
    with pytest.raises((RuntimeError, AddendaError)):
        ad.merge(tiny, verify=ids)
    del tiny.forward
    assert same_bits(bits(tiny), before)
    ad.merge(tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sparse_change_touches_its_entries_only(dtype, tiny):
    """One adapter, and two that overlap: the dense sum, the base's bits elsewhere, and all of them afterwards."""
    tiny.to(dtype)
    before = bits(tiny)
    for name, density in (("one", 0.2), ("two", 0.4)):
        stir(ad.attach(tiny, ad.SHiRA(density=density), name=name), 0.5, seed=len(name) + int(density * 10))
    for names in (("one",), ("one", "two")):
        ad.switch(tiny, names)
        want = {p: effective_at(tiny, p, names).to(dtype) for p in ad.adapters(tiny)["one"].methods}
        report = ad.merge(tiny, allow_loss=1.0)
        after = bits(tiny)
        for path, weight in want.items():
            assert torch.equal(after[f"{path}.weight"], weight), path
            kept = (after[f"{path}.weight"] == before[f"{path}.weight"]).float().mean()
            assert kept > 0.3, "most entries are the base's own"
        assert report.sites.keys() == want.keys()
        ad.unmerge(tiny)
        assert same_bits(bits(tiny), before)


def effective_at(model, path, names):
    from addenda.core.state.state import tensors_at

    W = model.get_submodule(path)._parameters["weight"].detach().float()
    return W + sum(tensors_at(model, n, path).method.delta(W, tensors_at(model, n, path).tensors()) for n in names)


def test_a_file_saved_while_a_sparse_change_is_merged_fits_the_base(tiny, tmp_path):
    fresh = copy.deepcopy(tiny)
    adapter = stir(ad.attach(tiny, ad.SHiRA(density=0.2)), 0.5)
    ad.merge(tiny, allow_loss=1.0)
    y = tiny(torch.arange(6)[None])
    path = ad.save(adapter, tmp_path / "a.safetensors")
    ad.load(fresh, path)
    torch.testing.assert_close(fresh(torch.arange(6)[None]), y)


def test_what_is_not_finite_is_no_proof(ids):
    """A change that overflows float16, and outputs that are NaN before anything is merged."""
    x = torch.ones(2, 8, dtype=torch.float16) / 1024
    model = nn.Sequential(nn.Linear(8, 8)).half()
    adapter = ad.attach(model, ad.LoRA(rank=2))
    with torch.no_grad():
        model[0].weight.fill_(60000.0)
        for p in adapter.parameters():
            p.fill_(100.0)
    before, y = bits(model), model(x)
    assert y.isfinite().all()
    for options in ({"verify": x}, {}, {"verify": x, "allow_loss": 1.0}, {"allow_loss": 1.0}):
        with pytest.raises(AddendaError, match=r"was undone: the .* not finite in float16.*6\.55e\+04"):
            ad.merge(model, **options)
        assert same_bits(bits(model), before)
        assert torch.equal(model(x), y)
    ad.merge(model, verify=x.float(), dtype=torch.float32)
    ad.unmerge(model)
    with pytest.raises(AddendaError, match=r"not finite before anything is merged: 16 of 16, in torch\.float16"):
        ad.merge(model, verify=x * torch.nan)
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("allow_loss", [None, 1.0])
def test_outputs_that_become_nan_undo_the_merge(allow_loss, tiny, ids, monkeypatch):
    """NaN is neither above nor below the noise."""
    stir(ad.attach(tiny, LORA))
    before = bits(tiny)
    tiny.score.register_forward_hook(
        lambda module, args, y: y * torch.nan if tiny.__dict__["_addenda"].merged is not None else y
    )
    with pytest.raises(AddendaError, match="The merge was undone: the outputs are not finite in float32"):
        ad.merge(tiny, verify=ids, allow_loss=allow_loss)
    assert same_bits(bits(tiny), before)


# -- a proof that can fail ---------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def spoil(monkeypatch, size=0.5):
    """What is merged ends up with one weight moved, as by a mistake of ours."""
    from addenda.core.merge import write as writing

    real = writing.apply_active

    def apply(root, state, names):
        real(root, state, names)
        for path in list(state.merged or ())[-1:]:
            site, kept = writing.site_at(root, path), state.merged[path]
            with torch.no_grad():
                if kept.index is None:
                    site.weight.add_(size)
                else:  # nothing else of it is the merge's
                    site.weight.view(-1)[kept.index] += 4 * size

    monkeypatch.setattr(writing, "apply_active", apply)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_method_merges_with_proof_and_a_wrong_merge_is_undone(name, dtype, tiny, ids, monkeypatch):
    tiny.to(dtype).eval()
    stir(attach(tiny, name, ids, targets="linear"))
    before, y = bits(tiny), tiny(ids).detach()
    report = ad.merge(tiny, verify=ids)
    assert report.compared == 1 and report.moved <= report.limit and report.worst == "output"
    assert float((tiny(ids) - y).detach().abs().max()) <= report.limit
    ad.unmerge(tiny)
    spoil(monkeypatch)
    for options in ({}, {"allow_loss": 1.0}):
        with pytest.raises(AddendaError, match=r"The merge was undone: of 1 outputs 'output' moves by .* limit"):
            ad.merge(tiny, verify=ids, **options)
        assert same_bits(bits(tiny), before)
        assert torch.equal(tiny(ids), y)


@pytest.mark.parametrize("way", ["plain", "to float64", "to bfloat16", "onto codes", "onto the full weights"])
def test_a_wrong_merge_is_undone_in_every_way(way, ids, monkeypatch):
    from addenda.quantizing.quantize import quantize

    model, full = toys.make_llama(), toys.make_llama()
    options = {"to float64": {"dtype": torch.float64}, "to bfloat16": {"dtype": torch.bfloat16}}.get(way, {})
    if way.startswith("onto"):
        quantize(model, "int8")
    if "full" in way:
        options = {"base": "full-precision", "full": full, "requantize": True, "allow_loss": 1e-4}
    stir(ad.attach(model, LORA, targets="mlp"), 0.3)
    y = model(ids).logits
    dtypes = [t.dtype for t in model.parameters()]
    if "full" not in way:
        spoil(monkeypatch, 5.0)
    with pytest.raises(AddendaError, match="The merge was undone"):
        ad.merge(model, verify={"input_ids": ids}, **options)
    assert torch.equal(model(ids).logits, y)
    assert [t.dtype for t in model.parameters()] == dtypes


def test_what_stands_in_the_base_is_read_back(tiny, ids, monkeypatch):
    """Also without a batch, and whatever loss is allowed."""
    from addenda.core.merge import write as writing

    stir(ad.attach(tiny, LORA))
    before, real = bits(tiny), writing.rounded_to
    monkeypatch.setattr(writing, "rounded_to", lambda *args: real(*args) * 1.001)
    for options in ({}, {"allow_loss": 1.0}, {"verify": ids, "allow_loss": 1.0}):
        with pytest.raises(AddendaError, match=r"what stands at .* is not W"):
            ad.merge(tiny, **options)
        assert same_bits(bits(tiny), before)


def test_allowed_loss_is_what_rounding_took():
    """A small change in bfloat16: outputs may lose of it what the weights lost, and in float32 nothing."""
    model, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(3, 64)
    stir(ad.attach(model, LORA, targets="0"), 0.01)
    limits = {}
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        for allowed in (None, 0.05, 1.0):
            report = ad.merge(model, verify=x.to(dtype), allow_loss=allowed)
            limits[dtype, allowed] = report.limit
            ad.unmerge(model)
            assert (report.total > 0.02) == (dtype == torch.bfloat16)
    strict, some, every = (limits[torch.bfloat16, a] for a in (None, 0.05, 1.0))
    assert strict < some < every
    assert limits[torch.float32, 1.0] < 1.1 * limits[torch.float32, None]


# -- what is compared, and with what -----------------------------------------------------------------------------------


class Many(nn.Module):
    """A dict with what is wanted hidden in it, and tensors before that no adapter reaches."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap, self.lin, self.late = wrap, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, y=None, *, scale=1.0):
        x = x["x"] if isinstance(x, dict) else x
        x = x if y is None else x + y
        return self.wrap(x * 1.0, self.lin(x) * scale, self.late(x))


@dataclasses.dataclass
class Held:
    first: torch.Tensor
    rest: list


class Cache:
    def __init__(self, keys):
        self.layers = [types.SimpleNamespace(keys=keys, length=3)]


WRAPS = {
    "tuple": lambda a, b, c: (a, b, c),
    "nested": lambda a, b, c: {"a": a, "n": [1, None, {"deep": (b, c)}]},
    "dataclass": lambda a, b, c: Held(a, [b, {"c": c}]),
    "model output": lambda a, b, c: BaseModelOutput(last_hidden_state=a, hidden_states=(b, c)),
    "cache": lambda a, b, c: (a, b, Cache(c)),
    "complex": lambda a, b, c: (a, b, torch.complex(a, c)),
    "sparse": lambda a, b, c: (a, b, c.to_sparse()),
    "number": lambda a, b, c: (a, b, float(c.sum())),
    "view of a cycle": lambda a, b, c: (lambda held: held.append(held) or held)([a, b, c]),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_everything_that_floats_is_compared(wrap, monkeypatch):
    model, x = Many(WRAPS[wrap]), torch.randn(3, 8)
    stir(ad.attach(model, LORA, targets=["lin", "late"]), 0.3)
    before = bits(model)
    assert ad.merge(model, verify=x).compared == 3
    ad.unmerge(model)
    spoil(monkeypatch)  # `late`, the last of them
    with pytest.raises(AddendaError, match=r"of 3 outputs '.*' moves by"):
        ad.merge(model, verify=x)
    assert same_bits(bits(model), before)


def test_a_proof_needs_numbers_that_float():
    model = Many(lambda a, b, c: (b.argmax(-1), c.argmax(-1)))
    stir(ad.attach(model, LORA, targets="lin"))
    with pytest.raises(AddendaError, match=r"without a floating tensor.*2 of whole numbers"):
        ad.merge(model, verify=torch.randn(3, 8))
    assert ad.merge(model, verify=lambda m: m.lin(torch.ones(1, 8))).compared == 1


def test_every_form_of_a_batch():
    x, model = torch.randn(3, 8), Many(WRAPS["tuple"])
    stir(ad.attach(model, LORA, targets="lin"), 0.3)
    good = [x, (x,), (x, x), {"x": x}, {"x": x, "y": x, "scale": 2.0}, BatchEncoding({"x": x}),
            UserDict(x=x), {"x": {"x": x}}, lambda m: m(x, scale=0.5)]  # fmt: skip
    for batch in good:
        assert ad.merge(model, verify=batch).compared == 3
        ad.unmerge(model)

    class Whole(Many):
        def forward(self, batch):
            return super().forward(batch["x"], batch["y"])

    own = Whole(WRAPS["tuple"])
    stir(ad.attach(own, LORA, targets="lin"), 0.3)
    assert ad.merge(own, verify={"x": x, "y": x}).compared == 3
    before, tokens = bits(model), torch.utils.data.DataLoader([x])
    bad = [({"x": x, "skale": 2.0}, "takes x, y, scale\\. Did you mean 'scale'"), ({"y": x}, "'y', and Many"),
           ("text", "got a str"), (tokens, "got a DataLoader"), (iter([x]), "one batch"), (3, "got a int"),
           (torch.randn(3, 5), "does not run through this Many: RuntimeError"),
           ((x, x, x, x), "does not run through this Many")]  # fmt: skip
    for batch, why in bad:
        with pytest.raises(AddendaError, match=why):
            ad.merge(model, verify=batch)
        assert same_bits(bits(model), before)


def test_what_forwards_write_into_and_draw_is_the_same_each_time():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x, cache):
            cache.append(x.add_(1))
            return nn.functional.dropout(self.lin(sum(cache)), 0.5, training=True)

    model, x, cache = Draws(), torch.zeros(3, 8), []
    stir(ad.attach(model, LORA, targets="lin"), 0.3)
    before = torch.get_rng_state()
    report = ad.merge(model, verify={"x": x, "cache": cache})
    assert report.moved < 1e-5 and "draws random numbers" in str(report)
    assert not x.any() and not cache and torch.equal(torch.get_rng_state(), before)


def test_masks_of_infinity_hide_nothing_and_are_no_size(monkeypatch):
    """Logits that a model forbids are ∞ or a dtype's lowest; neither makes the limit wide."""
    for mask in (-torch.inf, torch.finfo(torch.float32).min):
        model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
        model.register_forward_hook(lambda m, a, y, mask=mask: torch.cat([y, torch.full_like(y, mask)], -1))
        stir(ad.attach(model, LORA, targets="0"), 0.3)
        report = ad.merge(model, verify=x)
        assert report.limit < 1e-3
        ad.unmerge(model)
        with monkeypatch.context() as patch:
            spoil(patch)
            with pytest.raises(AddendaError, match="moves by"):
                ad.merge(model, verify=x)


def test_operators_without_float64_are_measured_in_what_they_have(mixtral, ids):
    """Grouped products of experts."""
    stir(ad.attach(mixtral, LORA, targets=["attention", "*.experts.gate_up_proj", "*.experts.down_proj"]), 0.1)
    report = ad.merge(mixtral, verify={"input_ids": ids})
    assert 0 < report.noise_output < 1e-4
    assert not report.notes
    ad.unmerge(mixtral)
    only_float32 = torch.nn.functional.linear

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x):
            y = self.lin(x)
            return only_float32(y.float(), torch.ones(8, 8)) + y

    model = Picky()
    stir(ad.attach(model, LORA, targets="lin"), 0.1)
    report = ad.merge(model, verify=torch.randn(3, 8))
    assert report.noise_output > 0 and not report.notes


def exact(model):
    """Every parameter and buffer, adapters' included, with its dtype."""
    return {k: t.clone() for k, t in [*model.named_parameters(), *model.named_buffers()]}


def the_same(model, before):
    after = exact(model)
    return after.keys() == before.keys() and all(
        t.dtype == after[k].dtype and torch.equal(t, after[k]) for k, t in before.items()
    )


def test_a_failed_conversion_gives_all_dtypes_and_bits_back(tiny, ids):
    adapter = stir(ad.attach(tiny, LORA), 0.001)
    tiny(ids).sum().backward()
    before, y = exact(tiny), tiny(ids).detach()
    for options in ({}, {"verify": torch.zeros(2, 2)}):  # rounding takes too much; embeddings look up no floats
        with pytest.raises((AddendaError, RuntimeError)):
            ad.merge(tiny, dtype=torch.bfloat16, **options)
        assert the_same(tiny, before) and all(p.grad.dtype == p.dtype for p in adapter.parameters())
        assert torch.equal(tiny(ids), y)


def test_unmerge_converts_back(tiny, ids, tmp_path):
    stir(ad.attach(tiny, LORA), 0.3)
    tiny.register_buffer("scale", torch.rand(3))
    before, y = exact(tiny), tiny(ids).detach()
    ad.merge(tiny, dtype=torch.bfloat16, allow_loss=1.0)
    assert {p.dtype for p in tiny.parameters()} == {torch.bfloat16}
    twin, gone = copy.deepcopy(tiny), copy.deepcopy(tiny)
    for model in (tiny, twin):
        ad.unmerge(model)
        assert the_same(model, before)
        assert torch.equal(model(ids), y)
    ad.detach(gone, keep_merged=True)
    assert {t.dtype for t in [*gone.parameters(), *gone.buffers()]} == {torch.bfloat16}
    ad.merge(tiny, dtype=torch.float64)
    ad.detach(tiny)
    assert {t.dtype for t in [*tiny.parameters(), *tiny.buffers()]} == {torch.float32}


@pytest.mark.parametrize(("base", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("method", [LORA, "bitfit", "shira:density=0.5"])
def test_a_file_saved_while_the_model_is_converted_is_that_of_before(base, other, method, ids, tmp_path):
    model = toys.Tiny().to(base)
    adapter = stir(ad.attach(model, method, also_train=["head"] if hasattr(model, "head") else ()), 0.3)
    adapter.save(tmp_path / "before")
    ad.merge(model, dtype=other, allow_loss=1.0)
    adapter.save(tmp_path / "during")
    assert (tmp_path / "during").read_bytes() == (tmp_path / "before").read_bytes()
    assert {p.dtype for p in model.parameters()} == {other}
    ad.unmerge(model)
    adapter.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


@pytest.mark.parametrize("block", [ad.disabled, lambda m: ad.composed(m, ad.Stack("b"))])
def test_a_merge_that_fails_in_a_block_leaves_what_acts_there(tiny, ids, block):
    for name in "ba":
        stir(ad.attach(tiny, LORA, name=name), 0.3, seed=ord(name))
    outside = tiny(ids).detach()
    with block(tiny):
        y = tiny(ids).detach()
        with pytest.raises((AddendaError, IndexError)):
            ad.merge(tiny, verify=torch.full((1, 2), 10**6))
        assert torch.equal(tiny(ids), y) and not torch.equal(y, outside)
    assert torch.equal(tiny(ids), outside)


def test_in_a_block_of_ones_own_no_other_thread_is_blamed(tiny, ids):
    for name in "ab":
        stir(ad.attach(tiny, LORA, name=name), 0.01)
    with ad.disabled(tiny):
        ad.switch(tiny, "a")
        with pytest.raises(AddendaError, match=r"runs inside of a `with` block of the base alone\. Call it behind"):
            ad.merge(tiny)
    ad.merge(tiny)


def test_keywords_in_any_order(tiny, ids):
    stir(ad.attach(tiny, LORA), 0.01)
    assert ad.merge(verify=ids, model=tiny).output is not None


def test_a_weight_that_cannot_be_written_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(8, 6))
    model[0].weight = nn.Parameter(torch.randn(1, 8).expand(6, 8))
    stir(ad.attach(model, "lora:rank=2", targets="0"), 0.1)
    x = torch.randn(3, 8)
    y = model(x).detach()
    with pytest.raises((AddendaError, RuntimeError)):
        ad.merge(model)
    assert torch.equal(model(x), y)
    ad.switch(model, None)
    ad.detach(model)


# -- architectures -----------------------------------------------------------------------------------------------------

PAST = {  # the modules whose weight is read past their forward, by their last names
    "LayoutLMv3ForTokenClassification": {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"},
    "WavLMModel": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "MambaForCausalLM": {"conv1d", "dt_proj"},
    "Mamba2ForCausalLM": {"conv1d"},
    "DebertaV2ForSequenceClassification": {"rel_embeddings"},
    "JambaForCausalLM": {"conv1d", "dt_proj"},
    "Lfm2ForCausalLM": {"conv"},
}


@torch.no_grad()
def refused(model, batch) -> list[str]:
    """The sites that the first forward names, if it does."""
    try:
        model(**batch)
    except AddendaError as error:
        return re.findall(r"([\w.]+) \(by ", str(error))
    return []


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_real_architectures_agree_or_are_refused_by_name(name):
    """LoRA wherever it can be; what is read past its forward is named at the first forward, and the rest merges."""
    model = architectures.make(name)
    batch = architectures.batch_for(model)
    owners = owners_of(model)
    paths = [p for p in all_paths(model) if p in dict(model.named_modules())]
    paths = [p for p in paths if model.get_submodule(p)._parameters.get("weight") is not None]
    paths = [p for p in paths if not refusal(model, s := site_at(model, p, owners)) and min(s.shape) >= 2]
    before, found = bits(model), set()
    stir(ad.attach(model, LORA, targets=paths), 0.1)
    while named := refused(model, batch):
        with pytest.raises(AddendaError, match=r"past their forward.*exclude="):
            ad.merge(model, verify=batch)
        ad.detach(model)
        found |= {n.rpartition(".")[2] for n in named}
        paths = [p for p in paths if p not in named]
        stir(ad.attach(model, LORA, targets=paths), 0.1)
    assert found == PAST.get(name, set())
    report = ad.merge(model, verify=batch)
    assert report.moved <= report.limit and not report.notes
    ad.detach(model)
    assert same_bits(bits(model), before)


def test_a_convolution_that_only_decoding_reads_is_refused_there():
    """RecurrentGemma calls its convolution on a prompt, and reads its weight for each token after it."""
    model = architectures.make("RecurrentGemmaForCausalLM")
    stir(ad.attach(model, LORA, targets="conv"), 0.1)
    batch = architectures.batch_for(model)
    ad.merge(model, verify=batch)
    ad.unmerge(model)
    with pytest.raises(AddendaError, match=r"conv_1d \(by RecurrentGemmaRecurrentBlock\.forward"):
        model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
