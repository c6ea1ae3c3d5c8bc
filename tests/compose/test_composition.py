"""Compositions against what each part does alone: for adapters of activations, of weights, and of both."""

import copy

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import slots_of
from shared import stir

IDS = torch.arange(24).reshape(4, 6) * 7 % toys.VOCAB
KINDS = {
    "serial": ("houlsby:rank=2", "houlsby:rank=3", "loreft:rank=2"),
    "sum": ("pfeiffer:rank=2", "pfeiffer:rank=3", "pfeiffer:rank=2"),
    "parallel": ("parallel:rank=2", "adaptformer:rank=3,scale=1.0", "parallel:rank=4"),
    "weights": ("lora:rank=2", "oft:block=2", "shira:density=0.2"),
    "mixed": ("lora:rank=2", "houlsby:rank=2", "adaptformer:rank=2"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, model: nn.Module | None = None) -> nn.Module:
    model = (toys.make_bert() if model is None else model).double().eval()
    for i, (name, method) in enumerate(zip("abc", KINDS[kind], strict=True)):
        adapter = ad.attach(model, method, name=name)
        g = torch.Generator().manual_seed(i)
        for p in adapter.parameters():
            p.data = p.data.double() + torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.2
    ad.switch(model, None)
    return model


def alone(model: nn.Module, name, ids=IDS) -> torch.Tensor:
    ad.switch(model, name)
    y = model(ids).logits
    ad.switch(model, None)
    return y


def together(model: nn.Module, composition: ad.Composition, ids=IDS) -> torch.Tensor:
    with ad.composed(model, composition):
        return model(ids).logits


@every_kind
def test_a_stack_is_what_switching_to_several_does(kind):
    model = make(kind)
    torch.testing.assert_close(together(model, ad.Stack("a", "b")), alone(model, ["a", "b"]))
    assert torch.equal(together(model, ad.Stack("a")), alone(model, "a"))
    assert torch.equal(together(model, ad.Stack("a", None)), alone(model, "a"))
    assert torch.equal(together(model, ad.Stack(None)), alone(model, None))


def test_a_stack_of_changes_is_their_composition_and_has_an_order():
    model = make("serial")
    h = torch.randn(2, 3, 8, dtype=torch.float64)
    dense = model.bert.encoder.layer[0].output.dense
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    parts = {n: next(t for p, t in ad.adapters(model)[n].sites() if p.endswith("0.output.dense@output")) for n in "ab"}

    def change(name, v):
        t = parts[name]
        return t.method.change(v, v, t.tensors())

    base = dense(x)
    with ad.composed(model, ad.Stack("a", "b")):
        torch.testing.assert_close(dense(x), change("b", change("a", base)))
    with ad.composed(model, ad.Stack("b", "a")):
        torch.testing.assert_close(dense(x), change("a", change("b", base)))
    assert (change("b", change("a", h)) - change("a", change("b", h))).abs().max() > 1e-3
    one, two = together(model, ad.Stack("a", "b")), together(model, ad.Stack("b", "a"))
    assert (one - two).abs().max() > 1e-4


def test_a_stack_of_weights_is_the_sum_and_has_no_order():
    model = make("weights")
    torch.testing.assert_close(together(model, ad.Stack("a", "b")), together(model, ad.Stack("b", "a")))


@every_kind
def test_an_average_with_all_weight_on_one_is_that_one(kind):
    model = make(kind)
    for i, name in enumerate("abc"):
        weights = [0.0] * 3
        weights[i] = 2.0
        assert torch.equal(together(model, ad.Average("a", "b", "c", weights=weights)), alone(model, name))
    torch.testing.assert_close(together(model, ad.Average("a", "a")), alone(model, "a"))


@every_kind
def test_an_average_is_the_mean_of_what_a_module_returns(kind):
    model = make(kind)
    path = {"serial": "output.dense", "sum": "output.LayerNorm", "weights": "output.dense"}.get(kind)
    if path is None:
        pytest.skip("reads another module's input: covered by the gradients below")
    layer = model.bert.encoder.layer[0].get_submodule(path)
    x = torch.randn(2, 3, 8 if kind == "sum" else 16, dtype=torch.float64)

    def once(name):
        ad.switch(model, name)
        return layer(x)

    def sum_before_the_norm(name):  # what is averaged is the changed sum, and then it is normalised again
        (t,) = (t for p, t in ad.adapters(model)[name].sites() if p.endswith("layer.0.output.LayerNorm@again"))
        return t.method.change(once(None), x, t.tensors())

    if kind == "sum":
        want = layer(0.75 * sum_before_the_norm("a") + 0.25 * sum_before_the_norm("b"))
    else:
        want = 0.75 * once("a") + 0.25 * once("b")
    ad.switch(model, None)
    with ad.composed(model, ad.Average("a", "b", weights=(3, 1))):
        torch.testing.assert_close(layer(x), want)
    with ad.composed(model, ad.Average("a", "b", weights=(0.75, 0.25), normalize=False)):
        torch.testing.assert_close(layer(x), want)


@every_kind
def test_an_average_of_weights_and_the_base_scales_the_change(kind):
    if kind != "weights":
        pytest.skip("about weights")
    model = make(kind)
    half = together(model, ad.Average("a", None))
    for _, t in ad.adapters(model)["a"].sites():
        t._parameters["B"].data.mul_(0.5)
    torch.testing.assert_close(half, alone(model, "a"))


@every_kind
def test_rows_of_a_batch_split_are_those_of_each_adapter(kind):
    model = make(kind)
    y = together(model, ad.BatchSplit("a", "b", None, sizes=(2, 1, 1)))
    for rows, name in ((slice(0, 2), "a"), (slice(2, 3), "b"), (slice(3, 4), None)):
        torch.testing.assert_close(y[rows], alone(model, name, IDS[rows]))
    with ad.per_example(model, ["a", "a", "b", None]):
        torch.testing.assert_close(y, model(IDS).logits)


@every_kind
def test_rows_of_parallel_are_those_of_each_adapter(kind):
    model = make(kind)
    hooks = dict(model._forward_pre_hooks)
    y = together(model, ad.Parallel("a", "b", ad.Stack("a", "c")))
    assert len(y) == 12
    for i, name in enumerate(["a", "b", ["a", "c"]]):
        torch.testing.assert_close(y[4 * i : 4 * i + 4], alone(model, name))
    assert len(model(IDS).logits) == 4
    assert dict(model._forward_pre_hooks) == hooks


def test_parallel_repeats_the_batch_whatever_is_given_first():
    """Positions of one row, and tensors of places, are no batch; what an encoder returned is one."""
    model = toys.make_llama()
    for name in "ab":
        stir(ad.attach(model, "lora:rank=2", name=name))
    with ad.composed(model, ad.Parallel("a", "b")):
        want = model(input_ids=IDS).logits
        assert len(want) == 2 * len(IDS)
        places = torch.arange(IDS.shape[1])
        torch.testing.assert_close(model(position_ids=places[None], input_ids=IDS).logits, want)
        kept = model(input_ids=IDS[:2], logits_to_keep=torch.tensor([4, 5])).logits
        torch.testing.assert_close(kept, model(input_ids=IDS[:2]).logits[:, [4, 5]])
    t5 = toys.make_t5()
    for name in "ab":
        stir(ad.attach(t5, "lora:rank=2", name=name, targets="re:.*decoder.*q"))
    encoded = t5.get_encoder()(IDS)
    with ad.composed(t5, ad.Parallel("a", "b")):
        for given in (encoded, tuple(encoded.to_tuple())):
            both = t5(encoder_outputs=given, decoder_input_ids=IDS).logits
            torch.testing.assert_close(both, t5(input_ids=IDS, decoder_input_ids=IDS).logits)


@every_kind
def test_a_split_covers_all_tokens(kind):
    """One token at a time in a layer: token j of the composition is token j of that adapter alone."""
    model = make(kind)
    block = model.bert.encoder.layer[0]
    inside = {"serial": "output.dense", "sum": "output.LayerNorm", "weights": "intermediate.dense"}.get(kind)
    if inside is None:
        pytest.skip("reads another module's input: covered by the gradients below")
    layer = block.get_submodule(inside)
    x = torch.randn(2, 6, 16 if inside == "output.dense" else 8, dtype=torch.float64)
    parts = {}
    for name in ("a", "b", None):
        ad.switch(model, name)
        parts[name] = layer(x)
    ad.switch(model, None)
    with ad.composed(model, ad.Split("a", None, "b", sizes=(1, 2, None))):
        want = torch.cat([parts["a"][:, :1], parts[None][:, 1:3], parts["b"][:, 3:]], 1)
        torch.testing.assert_close(layer(x), want)
    assert torch.equal(together(model, ad.Split("a", sizes=(6,))), alone(model, "a"))
    for sizes in ((3, 2), (5, 4)):
        with pytest.raises(AddendaError, match=r"gives \d tokens to its parts, and a layer got 6"):
            together(model, ad.Split("a", "b", sizes=sizes))


@every_kind
def test_compositions_nest_and_gradients_reach_every_part(kind):
    model = make(kind)
    tree = ad.BatchSplit(
        ad.Stack("a", ad.Average("b", "c", weights=(1, 3))), ad.Split("b", "c", sizes=(2, 4)), sizes=(3, 1)
    )
    y = together(model, tree)
    want = torch.cat([together(model, tree.parts[0], IDS[:3]), together(model, tree.parts[1], IDS[3:])])
    torch.testing.assert_close(y, want)
    parameters = [p for a in ad.adapters(model).values() for p in a.parameters()]
    grads = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad(want.square().sum(), parameters, allow_unused=True)
    torch.testing.assert_close(grads, wanted)
    for a in ad.adapters(model).values():
        assert any(bool(g.any()) for p, g in zip(parameters, grads, strict=True) for q in a.parameters() if q is p)


def test_afterwards_what_acted_before_acts_again_even_after_an_error():
    model = make("parallel")
    ad.switch(model, ["a", "c"])
    before = model(IDS).logits
    with pytest.raises(RuntimeError), ad.composed(model, ad.Average("b", "c")):
        raise RuntimeError
    assert torch.equal(model(IDS).logits, before)
    with ad.composed(model, ad.Stack("b")):
        model(IDS)
    assert torch.equal(model(IDS).logits, before)
    assert all(s.seen is None for m in model.modules() if (s := slots_of(m)) is not None)


@every_kind
@pytest.mark.parametrize("outer", [ad.Average("a", "b"), ad.Parallel("a", "b"), ad.Stack("b"), "per_example"], ids=str)
def test_blocks_nest(kind, outer):
    model = make(kind)
    alone_c, base, rows = alone(model, "c"), alone(model, None), ["c", "a", None, "b"]
    hooks = dict(model._forward_pre_hooks), dict(model._forward_hooks)
    with ad.per_example(model, rows):
        mixed = model(IDS).logits
    ad.switch(model, "c")
    hooks = dict(model._forward_pre_hooks), dict(model._forward_hooks)
    inner = {
        "disabled": (ad.disabled(model), base),
        "stack": (ad.composed(model, ad.Stack("c")), alone_c),
        "nothing": (ad.composed(model, ad.Stack(None)), base),
        "parallel": (ad.composed(model, ad.Parallel("c", None)), torch.cat([alone_c, base])),
        "per_example": (ad.per_example(model, rows), mixed),
    }
    with ad.per_example(model, ["a", "b", "a", None]) if outer == "per_example" else ad.composed(model, outer):
        want = model(IDS).logits
        for name, (block, said) in inner.items():
            with block:
                torch.testing.assert_close(model(IDS).logits, said, msg=name)
            assert torch.equal(model(IDS).logits, want), name
            with pytest.raises(ValueError, match="no more"), ad.disabled(model):
                raise ValueError("no more")
            assert torch.equal(model(IDS).logits, want), name
    assert torch.equal(model(IDS).logits, alone_c)
    assert (dict(model._forward_pre_hooks), dict(model._forward_hooks)) == hooks


def test_an_outer_block_goes_on_after_one_of_its_adapters_is_detached_only_without_it():
    model = make("serial")
    ad.switch(model, "c")
    only_c = model(IDS).logits
    with ad.composed(model, ad.Average("a", "b")):
        want = model(IDS).logits
        ad.attach(model, "houlsby:rank=2", name="d")
        ad.switch(model, "c")
        assert torch.equal(model(IDS).logits, only_c), "switch ends the arrangement"
    with ad.composed(model, ad.Average("a", "b")):
        ad.detach(model, "d")
        assert torch.equal(model(IDS).logits, want)
        with ad.disabled(model):
            ad.detach(model, "a")
        assert torch.equal(model(IDS).logits, only_c)
    assert torch.equal(model(IDS).logits, only_c)


def test_generation_wants_repeated_inputs_and_a_batch_split():
    model = make("serial", toys.make_llama())
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    with ad.composed(model, ad.Parallel("a", "b")):
        with pytest.raises(AddendaError, match=r"Parallel of 2.*generate.*BatchSplit\(…, sizes=\[examples\] \* 2\)"):
            model.generate(IDS, **options)
        with ad.disabled(model):
            plain = model.generate(IDS, **options)
    assert "generate" not in model.__dict__
    assert torch.equal(model.generate(IDS, **options), plain)
    twice = options | {"attention_mask": torch.ones_like(IDS).repeat(2, 1)}
    with ad.composed(model, ad.BatchSplit("a", "b", sizes=(4, 4))):
        both = model.generate(IDS.repeat(2, 1), **twice)
    for i, name in enumerate("ab"):
        ad.switch(model, name)
        assert torch.equal(both[4 * i : 4 * i + 4], model.generate(IDS, **options))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("block", ["composed", "parallel", "per_example"])
def test_what_backward_computes_again_does_as_in_its_forward(block, reentrant):
    model = make("serial", toys.make_llama())
    parameters = [p for n in "ab" for p in ad.adapters(model)[n].parameters()]

    def arranged():
        if block == "per_example":
            return ad.per_example(model, ["a", "b", "a", "a"])
        return ad.composed(model, ad.Average("a", "b") if block == "composed" else ad.Parallel("a", "b"))

    def loss():
        return model(IDS, use_cache=False).logits.square().mean()

    def grads(*losses):
        for p in parameters:
            p.grad = None
        sum(losses).backward()  # reentrant checkpoints know no other way
        return [p.grad for p in parameters]

    with arranged():
        want, y = grads(loss()), loss()
    with ad.composed(model, ad.Average("a", None)):
        other = loss()
    ad.switch(model, "b")
    both = grads(loss(), other, 3 * y)
    model.train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    with arranged():
        torch.testing.assert_close(grads(loss()), want)  # inside
        inner, late = loss(), loss()
        with ad.disabled(model):
            torch.testing.assert_close(grads(inner), want)
    torch.testing.assert_close(grads(late), want)
    with ad.composed(model, ad.Average("a", None)):
        other = loss()
    with arranged():
        y = loss()
    if not reentrant:
        plain = loss()
        ad.switch(model, None)
        with ad.disabled(model):
            torch.testing.assert_close(grads(plain, other, 3 * y), both)


def test_heads_stack_and_are_no_part_of_a_mean_that_lacks_them():
    model = toys.make_bert().double()
    ad.attach(model, "houlsby:rank=2", name="language")
    ad.attach(model, "houlsby:rank=2", also_train=["classifier"], name="task")
    ad.attach(model, "houlsby:rank=2", also_train=["classifier"], name="other")
    for i, a in enumerate(ad.adapters(model).values()):
        g = torch.Generator().manual_seed(i)
        for p in a.parameters():
            p.data = p.data.double() + torch.randn(p.shape, generator=g, dtype=torch.float64)
    torch.testing.assert_close(together(model, ad.Stack("language", "task")), alone(model, ["language", "task"]))
    with pytest.raises(AddendaError, match=r"classifier\.weight is a head that only some parts of Average have"):
        together(model, ad.Average("language", "task"))
    y = together(model, ad.Average("task", "other", weights=(3, 1)))
    pooled = torch.tanh(model.bert.pooler.dense(torch.randn(2, 8, dtype=torch.float64)))
    with ad.composed(model, ad.Average("task", "other", weights=(3, 1))):
        mean = model.classifier(pooled)
    each = []
    for name in ("task", "other"):
        ad.switch(model, name)
        each.append(model.classifier(pooled))
    ad.switch(model, None)
    torch.testing.assert_close(mean, 0.75 * each[0] + 0.25 * each[1])
    for name in ("task", "other"):
        assert (y - alone(model, name)).abs().max() > 1e-3
    rows = together(model, ad.BatchSplit("task", "other", "language", sizes=(1, 2, 1)))
    for at, name in ((slice(0, 1), "task"), (slice(1, 3), "other"), (slice(3, 4), "language")):
        torch.testing.assert_close(rows[at], alone(model, name, IDS[at]))
    both = together(model, ad.Parallel("task", "other"))
    torch.testing.assert_close(both, torch.cat([alone(model, "task"), alone(model, "other")]))


# -- fusion --------------------------------------------------------------------------------------------------------


def fused(**options) -> nn.Module:
    model = make("sum")
    ad.attach(model, ad.Fusion(**options), name="f")
    for p in ad.adapters(model)["f"].parameters():
        p.data = p.data.double()
    ad.switch(model, None)
    return model


def test_a_fusion_of_one_is_that_adapter_at_the_start():
    model = fused()
    torch.testing.assert_close(together(model, ad.Fuse("a", by="f")), alone(model, "a"))
    assert torch.equal(alone(model, "f"), alone(model, None))


def test_a_fusion_is_attention_over_what_its_adapters_change():
    model = fused(temperature=2.0)
    g = torch.Generator().manual_seed(8)
    for p in ad.adapters(model)["f"].parameters():
        p.data += torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.4
    layer = model.bert.encoder.layer[0].output.LayerNorm
    s = torch.randn(2, 3, 8, dtype=torch.float64)
    x = layer(s)
    here = {
        n: next(t.tensors() for p, t in a.sites() if p.endswith("layer.0.output.LayerNorm@again"))
        for n, a in ad.adapters(model).items()
    }
    deltas = [torch.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"] for p in (here["a"], here["b"])]
    f = here["f"]
    scores = torch.stack([((x @ f["query"].T) * (z @ f["key"].T)).sum(-1) / 2.0 for z in deltas])
    shares = scores.softmax(0)
    V = torch.eye(8, dtype=torch.float64) + f["value"]
    want = layer(s + sum(w[..., None] * (z @ V.T) for w, z in zip(shares, deltas, strict=True)))
    with ad.composed(model, ad.Fuse("a", "b", by="f")):
        torch.testing.assert_close(layer(s), want)


def test_a_fusion_trains_alone_and_is_saved_like_any_adapter(tmp_path):
    model = fused()
    for n in "abc":
        ad.adapters(model)[n].requires_grad_(False)
    with ad.composed(model, ad.Fuse("a", "b", "c", by="f")):
        model(IDS).logits.square().sum().backward()
    f = ad.adapters(model)["f"]
    assert all(bool(p.grad.any()) for p in f.parameters())
    assert f.trainable == 2 * 3 * 64
    with torch.no_grad():
        for p in f.parameters():
            p -= 0.1 * p.grad
    y = together(model, ad.Fuse("a", "b", "c", by="f"))
    file = f.save(tmp_path / "f.safetensors")
    ad.detach(model, "f")
    ad.load(model, file, name="again")
    torch.testing.assert_close(together(model, ad.Fuse("a", "b", "c", by="again")), y)


def test_a_fusion_that_shares_no_place_with_a_part_is_refused():
    model = toys.make_llama()
    ad.attach(model, "houlsby:rank=2", name="a")
    ad.attach(model, "pfeiffer:rank=2", name="b")
    ad.attach(model, "fusion", name="f")
    ad.attach(model, "fusion:reads=output", targets=("attention", "mlp"), name="g")
    said = r"by='{}'\) weighs changes at {} places, e\.g\. {}.*{} changes {} others, e\.g\. {}.*reads="
    layer, inside = r"model\.layers\.0@output", r"model\.layers\.0\.self_attn\.o_proj@output"
    for composition, match in (
        (ad.Fuse("a", by="f"), said.format("f", 2, layer, "'a'", 4, inside)),
        (ad.Stack(None, ad.Fuse("a", "b", by="g")), said.format("g", 4, inside, "'b'", 2, layer)),
        (ad.Fuse(ad.Stack("a"), "b", by="f"), said.format("f", 2, layer, r"Stack\('a'\)", 4, inside)),
    ):
        with pytest.raises(AddendaError, match=match):
            together(model, composition)
    together(model, ad.Fuse("a", None, by="g"))
    together(model, ad.Fuse(ad.Stack("a", "b"), "b", by="f"))


@pytest.mark.parametrize("make", [toys.make_bert, toys.make_llama])
def test_a_fusion_under_autocast_is_that_without_up_to_rounding(make):
    model = make().eval()
    for name, method in (("a", "pfeiffer:rank=2"), ("b", "pfeiffer:rank=3"), ("f", "fusion")):
        adapter = ad.attach(model, method, name=name)
        g = torch.Generator().manual_seed(ord(name))
        for p in adapter.parameters():
            p.data += torch.randn(p.shape, generator=g) * 0.2
    want = together(model, ad.Fuse("a", "b", by="f"))
    with torch.autocast("cpu", torch.bfloat16):
        got = together(model, ad.Fuse("a", "b", by="f"))
    got.float().sum().backward()
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
    assert all(p.grad is not None for a in ad.adapters(model).values() for p in a.parameters())


# -- bad input -----------------------------------------------------------------------------------------------------

BAD = {
    "no part": (lambda: ad.Stack(), "at least one adapter"),
    "a number": (lambda: ad.Stack(3), "names of adapters, None or compositions, not 3"),
    "parallel inside": (lambda: ad.Stack("a", ad.Parallel("b")), "stands outside"),
    "weights": (lambda: ad.Average("a", "b", weights=(1,)), "as many finite weights"),
    "nan": (lambda: ad.Average("a", weights=(float("nan"),)), "as many finite weights"),
    "to nothing": (lambda: ad.Average("a", "b", weights=(1, -1)), "sum to 0.*normalize=False"),
    "no weight": (lambda: ad.Average("a", weights=(0,), normalize=False), "a weight that is not 0"),
    "sizes": (lambda: ad.Split("a", "b", sizes=(1,)), "as many sizes"),
    "two rests": (lambda: ad.Split("a", "b", sizes=(None, None)), "at most one None"),
    "negative": (lambda: ad.Split("a", sizes=(-1,)), "numbers of tokens"),
    "twice": (lambda: ad.Stack("a", "b", "a"), "through 'a' twice"),
    "twice, deeper": (lambda: ad.Stack("a", ad.Split("b", "a", sizes=(1, None))), "through 'a' twice"),
    "another skip": (lambda: ad.Stack("a", skip="first"), "skip is 'last' or 'own', got 'first'"),
    "a fusion behind": (lambda: ad.Stack("a", ad.Fuse("b", by="f"), skip="own"), "a Fuse is a Stack's first part"),
    "a rest of examples": (lambda: ad.BatchSplit("a", "b", sizes=(1, None)), "wants every size"),
}


@pytest.mark.parametrize("case", BAD)
def test_compositions_that_make_no_sense(case):
    build, said = BAD[case]
    with pytest.raises(AddendaError, match=said):
        build()


def test_sizes_and_weights_are_numbers():
    for sizes in (None, torch.tensor([1, 3]), 4):
        with pytest.raises(AddendaError, match="sizes are a list of numbers of examples"):
            ad.BatchSplit("a", "b", sizes=sizes)
    for weights in (["x", "y"], [None, 1]):
        with pytest.raises(AddendaError, match="weights of Average are numbers"):
            ad.Average("a", "b", weights=weights)


def test_models_that_cannot_take_them():
    model = make("weights")
    for composition, said in (
        (ad.Stack("d"), "No adapter is called 'd'"),
        (ad.Fuse("a", "b", by="c"), r"by='c'\) wants an adapter of a method that weighs others"),
        ("a", "Expected a composition"),
        (ad.BatchSplit("a", "b", sizes=(1, 1)), "gives 2 examples to its parts, and a layer got 4"),
    ):
        with pytest.raises(AddendaError, match=said):
            together(model, composition)
        assert torch.equal(model(IDS).logits, alone(model, None))
    ad.switch(model, "a")
    ad.merge(model)
    with pytest.raises(AddendaError, match="merged into the base"):
        together(model, ad.Stack("b"))
    assert repr(ad.Stack("a", ad.Average("b", None))) == "Stack('a', Average('b', None))"


class InPlace(nn.Module):
    """A residual network that changes what its layers return, in place or copies of it."""

    def __init__(self, inplace: bool):
        super().__init__()
        self.inplace = inplace
        self.embed, self.one, self.two = nn.Embedding(toys.VOCAB, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.relu = nn.ReLU(inplace)

    def forward(self, ids):
        x = self.embed(ids)
        y = self.relu(self.one(x))
        z = self.two(y)
        if self.inplace:
            z += 0.3
            z *= 1.5
        else:
            z = (z + 0.3) * 1.5
        return z + x


FORMS = {
    "stack": ad.Stack("a", "b"),
    "average": ad.Average("a", "b", weights=(3, 1)),
    "one of an average": ad.Average("a", None, weights=(1, 0)),
    "split": ad.Split("a", "b", sizes=(2, None)),
    "batch split": ad.BatchSplit("a", None, "b", sizes=(1, 1, 2)),
    "parallel": ad.Parallel("a", "b", None),
    "nested": ad.Stack("a", ad.Average("b", None)),
    "per example": ["a", "b", None, "a"],
    "fuse": ad.Fuse("a", "b", by="f"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["lora", "dora", "oft:block=2", "ia3", "houlsby:rank=2", "parallel:rank=2"])
def test_what_layers_return_in_a_composition_may_be_changed_in_place(method, form):
    hidden = method.startswith(("houlsby", "parallel"))
    if form == "fuse" and not hidden:
        return  # it weighs activations
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model, names = InPlace(inplace).double(), ["a", "b"]
        for name in names:
            ad.attach(model, method, targets=["one", "two"], name=name)
        if form == "fuse":
            reads = "output" if method.startswith("houlsby") else "input"
            ad.attach(model, f"fusion:reads={reads}", targets=["one", "two"], name="f")
        adapters = ad.adapters(model).values()
        g = torch.Generator().manual_seed(1)
        for p in [p for adapter in adapters for p in adapter.parameters()]:
            p.data = p.data.double() + torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3
        composition = FORMS[form]
        block = ad.per_example if isinstance(composition, list) else ad.composed
        with block(model, composition):
            y = model(IDS)
        parameters = [p for adapter in adapters for p in adapter.parameters()]
        grads = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True, materialize_grads=True)
        assert any(grad.any() for grad in grads)
        found.append([y, *grads])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("weights", [0.5, None, "ab", {"a": 1}])
def test_weights_are_a_list_of_numbers(weights):
    if weights is None:
        assert ad.Average("a", "b", weights=weights).weights == [0.5, 0.5]
        return
    with pytest.raises(AddendaError, match="weights of Average are numbers in a list, one for each part, got"):
        ad.Average("a", "b", weights=weights)


def test_what_weighs_a_fusion_is_a_name():
    with pytest.raises(AddendaError, match=r"Fuse's by= is the name of the adapter.*got \['c'\]"):
        ad.Fuse("a", "b", by=["c"])


def test_a_copy_that_is_made_in_a_block_is_in_none(tiny, ids):
    stir(ad.attach(tiny, "lora:rank=2", targets="linear", name="a"))
    expected = tiny(ids)
    with ad.composed(tiny, ad.Parallel("a", None)):
        twin = copy.deepcopy(tiny)
        assert torch.equal(twin(ids), expected) and len(tiny(ids)) == 2 * len(ids)
    assert torch.equal(twin(ids), expected)
