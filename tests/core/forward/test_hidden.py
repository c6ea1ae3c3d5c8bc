"""Changes of activations: what they read, how several act, what they keep, and what refuses them."""

import copy
from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.forward.slots import slots_of
from addenda.core.method.bottleneck import ACTIVATIONS, Bottleneck
from addenda.core.method.contract import Method, to_float
from addenda.core.modules.classes import set_original_class
from addenda.core.site.site import site_at
from shared import HIDDEN, METHODS, attach, loss_of, read_raw, relative, stir, write_raw

every_hidden = pytest.mark.parametrize("name", HIDDEN)


# -- bottlenecks: the fused function against plain algebra ---------------------------------------------------------


def plain(method: Bottleneck, x, y, p):
    f = {"relu": torch.relu, "gelu": F.gelu, "silu": lambda a: a * a.sigmoid()}[method.activation]
    if method.norm:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * p["norm_weight"] + p["norm_bias"]
    h = f(x @ p["down"].T + (p["down_bias"] if method.bias else 0))
    return y + method.scale * (h @ p["up"].T + (p["up_bias"] if method.bias else 0))


@pytest.mark.parametrize("serial", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_those_of_plain_algebra(activation, bias, norm, serial):
    method = Bottleneck(rank=3, activation=activation, bias=bias, norm=norm, scale=0.7)
    p = to_float(method.init(6, Stream(0, "x"), {}), torch.float64)
    p = {k: (t.detach() + 0.3 * torch.randn_like(t)).requires_grad_() for k, t in p.items()}
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = x if serial else torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    leaves = [*p.values(), x] if serial else [*p.values(), x, y]
    G = torch.randn(2, 5, 6, dtype=torch.float64)

    def run(out):
        return [out, *torch.autograd.grad((out * G).sum(), leaves)]

    torch.testing.assert_close(run(method.change(x, y, p)), run(plain(method, x, y, p)), rtol=1e-10, atol=1e-12)
    assert sum(t.numel() for t in p.values()) == method.trainable(6)


def test_dropout_of_a_bottleneck_is_unbiased_and_its_gradient_is_that_of_what_was_kept():
    method = Bottleneck(rank=4, dropout=0.5, bias=False)
    p = {"down": torch.randn(4, 6, dtype=torch.float64), "up": torch.randn(6, 4, dtype=torch.float64)}
    p = {k: t.requires_grad_() for k, t in p.items()}
    x = torch.randn(3, 6, dtype=torch.float64)
    y = torch.zeros_like(x)
    mean = sum(method.change(x, y, p, True) for _ in range(4000)) / 4000
    assert relative(mean, method.change(x, y, p)) < 0.1
    torch.manual_seed(5)
    out = method.change(x, y, p, True)
    a = x @ p["down"].T
    torch.manual_seed(5)
    kept = torch.empty_like(a, dtype=torch.bool).bernoulli_(0.5)
    expected = (torch.relu(a) * kept / 0.5) @ p["up"].T
    torch.testing.assert_close(out, expected)
    leaves = list(p.values())
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


def kept_bytes(run) -> int:
    sizes: dict[int, int] = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes.values())


@pytest.mark.parametrize("serial", [True, False])
def test_backward_keeps_the_input_and_the_narrow_intermediate(serial):
    method = Bottleneck(rank=4)
    p = method.init(32, Stream(0, "x"), {})
    x = torch.randn(100, 32)
    y = x if serial else torch.randn(100, 32)
    weights = 4 * (4 * 32 + 32 * 4)
    assert kept_bytes(lambda: method.change(x, y, p)) == 4 * 100 * 32 + 4 * 100 * 4 + weights
    p["down"].requires_grad_(False)
    assert kept_bytes(lambda: method.change(x, y, p)) == 4 * 100 * 4 + weights


# -- what is read --------------------------------------------------------------------------------------------------


def test_an_input_is_held_no_longer_than_the_forward(llama, ids):
    stir(ad.attach(llama, "parallel:rank=2", name="one"))
    stir(ad.attach(llama, "parallel:rank=3", name="two"))
    ad.switch(llama, ["one", "two"])
    slots = slots_of(llama.model.layers[0].mlp.gate_proj)
    assert slots.readers == 2
    y = llama(ids).logits
    assert slots.seen is None
    assert slots.waiting == 0
    ad.switch(llama, None)
    assert slots.readers == 0
    llama(ids)
    assert slots.seen is None
    ad.switch(llama, ["one", "two"])
    llama.model.layers[0].mlp.gate_proj(torch.randn(2, 8))  # read, but never used
    twin = copy.deepcopy(llama)
    assert slots_of(twin.model.layers[0].mlp.gate_proj).seen is None
    assert torch.equal(twin(ids).logits, y)


def test_a_part_run_alone_says_what_is_missing(llama):
    ad.attach(llama, "parallel:rank=2")
    with pytest.raises(AddendaError, match=r"down_proj@.*reads the input of a module that has not run before it"):
        llama.model.layers[0].mlp.down_proj(torch.randn(2, 16))


def test_a_checkpointed_part_without_the_module_that_is_read_is_an_error_and_not_a_wrong_gradient(llama, ids):
    ad.attach(llama, "adaptformer:rank=2")
    layer = llama.model.layers[0]
    x = torch.randn(1, 3, 8, requires_grad=True)
    y = checkpoint(layer.mlp, layer.post_attention_layernorm(x), use_reentrant=False)
    with pytest.raises(AddendaError, match="checkpoint whole blocks"):
        y.sum().backward()


def test_the_norm_that_is_read_may_be_lean_and_keeps_only_its_recipe(llama, ids):
    adapter = stir(ad.attach(llama, "parallel:rank=2"), 0.3)

    def run():
        y = llama(ids).logits
        return [y, *torch.autograd.grad(y.square().sum(), adapter.parameters())]

    want = run()
    ad.lean(llama)
    torch.testing.assert_close(run(), want, rtol=1e-5, atol=1e-6)


def readings() -> dict[str, Method]:
    """Every hidden method with each of its readings that keeps an input, or makes one again."""
    found = {}
    for name in HIDDEN:
        method = METHODS[name]
        chosen = any(f.name == "reads" for f in fields(method))
        for reads in get_args(get_type_hints(type(method))["reads"]) if chosen else [method.reads]:
            if reads != "output":
                found[f"{name}, {reads}"] = replace(method, reads=reads) if chosen else method
    return found


READINGS = readings()


def first_added(module, args, y):
    """A hook: what the module has read is changed in place once it has run."""
    args[0].add_(0.3)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("which", ["llama", "bert"])
@pytest.mark.parametrize("name", READINGS)
def test_an_input_that_is_changed_in_place_before_it_is_read_is_named(name, which, grad, ids, request):
    model = request.getfixturevalue(which)
    adapter = stir(ad.attach(model, READINGS[name]), 0.3)
    want = model(ids).logits
    sources = [path.partition("@")[2] for path, t in adapter.sites() if t.source]
    for path in sources[:1]:
        model.get_submodule(path).register_forward_hook(first_added)
    if not sources:  # it reads what has just been made
        torch.testing.assert_close(model(ids).logits, want)
        return
    with torch.set_grad_enabled(grad), pytest.raises(AddendaError, match=rf"{sources[0]}: .*changed in place since"):
        model(ids)
    with torch.inference_mode():  # changes are not counted there
        assert model(ids).logits.isfinite().all()


class First(nn.Module):
    """Changes what it is given in place, or a copy of it."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.first, self.layer = nn.ReLU(inplace), nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.first(x))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", READINGS)
def test_a_module_that_changes_its_input_in_place_is_named(name, grad):
    found = []
    for inplace in (False, True):
        torch.manual_seed(1)
        model = nn.ModuleDict({"odd": First(inplace)})
        adapter = stir(ad.attach(model, READINGS[name], targets="odd"), 0.3)
        kept = any(t.reads == "input" for _, t in adapter.sites())
        x = torch.randn(3, 8, requires_grad=grad) * 2
        if inplace and kept:
            with pytest.raises(AddendaError, match=r"odd@input: .*changed in place since"):
                model["odd"](x)
        else:
            y = model["odd"](x)
            found.append(y.detach())
    if len(found) == 2:
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", [n for n in READINGS if n.startswith(("pfeiffer", "mosa-pfeiffer"))])
def test_a_norm_that_runs_again_and_works_in_place_is_named(name, bert, ids):
    class InPlace(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.mul_(2))

    stir(ad.attach(bert, READINGS[name]), 0.3)
    norm = bert.bert.encoder.layer[0].output.LayerNorm
    set_original_class(norm, InPlace)
    with torch.no_grad(), pytest.raises(AddendaError, match=r"LayerNorm@again: .*changed in place since"):
        bert(ids)


@pytest.mark.filterwarnings("default")  # dynamo's own
def test_a_compiled_forward_does_not_ask_whether_an_input_was_changed(bert):
    stir(ad.attach(bert, "parallel:rank=2"), 0.3)
    block, x = bert.bert.encoder.layer[0], torch.randn(2, 3, 8)
    want = block(x)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(compiled(x), want)
    torch._dynamo.reset()


@every_hidden
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo's own
def test_whole_blocks_of_real_models_compile(name, kind, request):
    model = request.getfixturevalue(kind)
    if kind == "gpt2" and "key" in METHODS[name].targets:  # one layer makes queries, keys and values
        with pytest.raises(AddendaError, match="has no layer for each key alone"):
            attach(model, name)
        return
    adapter = stir(attach(model, name), 0.2)
    block = model.bert.encoder.layer[0] if kind == "bert" else model.transformer.h[0]
    x = torch.randn(2, 3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    leaves = [p for n, p in adapter.named_parameters() if ".0." in n]
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    if not leaves:  # only the embeddings are changed
        return
    wanted = torch.autograd.grad(block(x).square().sum(), leaves, allow_unused=True)
    found = torch.autograd.grad(compiled(x).square().sum(), leaves, allow_unused=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    ad.switch(model, None)
    torch.testing.assert_close(compiled(x), block(x))
    torch._dynamo.reset()


# -- several, and others beside them -------------------------------------------------------------------------------


def test_several_act_one_after_another(tiny, ids):
    tiny.double()
    for i, name in enumerate("ab"):
        stir(ad.attach(tiny, ad.Houlsby(rank=2), targets="block", name=name), 0.5, seed=i)
    p = {n: [dict(t._parameters) for _, t in a.sites()] for n, a in ad.adapters(tiny).items()}
    ad.switch(tiny, None)
    method, x = ad.Houlsby(rank=2), torch.randn(2, 3, 8, dtype=torch.float64)
    y = tiny.layers[0](x)
    one = plain(method, y, y, to_float(p["a"][0], torch.float64))
    both = plain(method, one, one, to_float(p["b"][0], torch.float64))
    ad.switch(tiny, ["a", "b"])
    torch.testing.assert_close(tiny.layers[0](x), both)
    ad.switch(tiny, ["b", "a"])
    assert relative(tiny.layers[0](x), both) > 1e-3, "the order counts"


def test_weights_and_activations_at_one_place(tiny, ids):
    """{target: method}: a LoRA in the very layer whose output an adapter changes."""
    tiny.double()
    adapter = ad.attach(tiny, {"*.down_proj": "lora:rank=2", "mlp": "houlsby:rank=2"})
    assert "layers.0.down_proj" in adapter.methods
    assert "layers.0.down_proj@output" in adapter.methods
    stir(adapter, 0.4)
    down, x = tiny.layers[0].down_proj, torch.randn(3, 16, dtype=torch.float64)
    tensors = dict(adapter.sites())
    A, B = (tensors["layers.0.down_proj"]._parameters[k].double() for k in "AB")
    y = x @ (down.weight + B @ A).T + down.bias
    p = to_float(dict(tensors["layers.0.down_proj@output"]._parameters), torch.float64)
    torch.testing.assert_close(down(x), plain(ad.Houlsby(rank=2), y, y, p))
    with pytest.raises(AddendaError, match=r"cannot be merged: houlsby changes what modules return \(2 places"):
        ad.merge(tiny)


@every_hidden
def test_merging_is_refused_and_changes_nothing(name, tiny, ids):
    stir(attach(tiny, name))
    y = tiny(ids)
    with pytest.raises(AddendaError, match=f"'default' cannot be merged: {name} changes what modules return"):
        ad.merge(tiny, verify=ids)
    assert torch.equal(tiny(ids), y)


def test_per_example_reads_its_own_rows(llama):
    llama.double()
    batch = torch.randint(0, toys.VOCAB, (4, 5))
    methods = {"a": "parallel:rank=2", "b": "adaptformer:rank=3", "c": "pfeiffer:rank=2"}
    for i, (name, method) in enumerate(methods.items()):
        stir(ad.attach(llama, method, name=name), 0.3, seed=i)
    stir(ad.attach(llama, "lora:rank=2", name="d"), 0.3)
    names = ["b", None, "c", "d"]
    want = []
    for row, name in zip(batch, names, strict=True):
        ad.switch(llama, name)
        want.append(llama(row[None]).logits)
    with ad.per_example(llama, names):
        torch.testing.assert_close(llama(batch).logits, torch.cat(want), rtol=1e-6, atol=1e-6)
    with ad.per_example(llama, ["a"] * 3), pytest.raises(AddendaError, match="each of 3 examples"):
        llama(batch)


@every_hidden
def test_status_and_plan_name_the_places(name, tiny):
    plan = ad.plan(tiny, METHODS[name])
    adapter = attach(tiny, name)
    assert {row.kind for row in plan.rows} == {"output"}
    assert all(row.shape == site_at(tiny, row.path).shape == (8,) for row in plan.rows)
    assert "@" in str(plan)
    assert f"default: active, {name}, {len(plan.rows)} sites, {adapter.trainable:,} trainable" in ad.status(tiny)


# -- what cannot be ------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Returns what is asked for."""

    def __init__(self, make):
        super().__init__()
        self.layer, self.make = nn.Linear(8, 8), make

    def forward(self, x):
        return self.make(self.layer(x))


RETURNS = {
    "a dict": (lambda y: {"y": y}, "returned dict. Name a module inside it"),
    "another width": (
        lambda y: y[..., :4],
        r"odd@output: houlsby reads \(3, 4\) and changes \(3, 4\): both must be \(…, 8\)",
    ),
}


@pytest.mark.parametrize("case", RETURNS)
def test_what_returns_something_else_says_so(case):
    make, said = RETURNS[case]
    model = nn.ModuleDict({"odd": Odd(make)})
    stir(ad.attach(model, "houlsby:rank=2", targets="odd"))
    with pytest.raises(AddendaError, match=said):
        model["odd"](torch.randn(3, 8))


def test_a_tuple_keeps_what_comes_after():
    model, x = nn.ModuleDict({"odd": Odd(lambda y: (y, "rest"))}), torch.randn(3, 8)
    before, _ = model["odd"](x)
    stir(ad.attach(model, "houlsby:rank=2", targets="odd"), 0.5)
    y, rest = model["odd"](x)
    assert rest == "rest"
    assert not torch.equal(y, before)


def test_a_weight_method_at_an_output_and_the_other_way_round(tiny, tmp_path):
    for method, target, other in (("houlsby:rank=2", None, "lora"), ("lora:rank=2", "up_proj", "houlsby")):
        file = ad.attach(tiny, method, targets=target).save(tmp_path / "a.safetensors")
        ad.detach(tiny)
        header, tensors = read_raw(file)
        header["methods"] = [{"name": other, "options": {"rank": 2}}]
        write_raw(tmp_path / "b.safetensors", header, tensors)
        with pytest.raises(AddendaError, match=r"changes (weights|what a module returns), and this is"):
            ad.load(tiny, tmp_path / "b.safetensors")
        assert "_addenda" not in tiny.__dict__


def test_one_step_of_training_moves_what_backward_reached(tiny, ids):
    adapter = ad.attach(tiny, "houlsby:rank=2")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    first = float(loss_of(tiny, ids).detach())
    for _ in range(5):
        loss_of(tiny, ids).backward()
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()
    assert float(loss_of(tiny, ids).detach()) < first
