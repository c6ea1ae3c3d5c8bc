"""MAD-X's residual: a Stack whose parts skip from what the module itself returned, against the block written out."""

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError

IDS = torch.arange(24).reshape(4, 6) * 7 % toys.VOCAB


def stirred(model: nn.Module, **methods: str) -> nn.Module:
    model = model.double().eval()
    for i, (name, method) in enumerate(methods.items()):
        g = torch.Generator().manual_seed(i)
        for p in ad.attach(model, method, name=name).parameters():
            p.data = p.data.double() + torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3
    ad.switch(model, None)
    return model


def change(model: nn.Module, name: str, layer: str):
    """Δ(x) = U relu(D x + b) + c of an adapter in one layer, from its tensors alone."""
    (p,) = (t.tensors() for path, t in ad.adapters(model)[name].sites() if f"{layer}." in path.replace("@", "."))
    return lambda x: torch.relu(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


def bert_by_hand(model, deltas, own: bool = True) -> torch.Tensor:
    """BERT's logits with deltas(layer) after the MLP, all written out; own: each skips from o."""
    h = model.bert.embeddings(IDS)
    for i, layer in enumerate(model.bert.encoder.layer):
        h = layer.attention(h)[0]
        o = layer.output.dense(layer.intermediate(h))
        norm, s = layer.output.LayerNorm, o + h
        if own:
            z = norm(s)
            for delta in deltas(i):
                z = o + delta(z)
            h = norm(h + z) if deltas(i) else norm(s)
        else:
            for delta in deltas(i):
                s = s + delta(norm(s))
            h = norm(s)
    return model.classifier(torch.tanh(model.bert.pooler.dense(h[:, 0])))


def together(model: nn.Module, composition: ad.Composition, **options) -> torch.Tensor:
    with ad.composed(model, composition, **options):
        return model(IDS).logits


@pytest.mark.parametrize("names", ["lt", "tl", "ltx"])
def test_a_stack_that_skips_from_the_modules_own_output_is_madx(names):
    model = stirred(toys.make_bert(), l="pfeiffer:rank=2", t="pfeiffer:rank=3", x="pfeiffer:rank=2")

    def deltas(i: int):
        return [change(model, n, f"layer.{i}") for n in names]

    y = together(model, ad.Stack(*names, skip="own"))
    last = together(model, ad.Stack(*names))
    torch.testing.assert_close(y, bert_by_hand(model, deltas))
    torch.testing.assert_close(last, bert_by_hand(model, deltas, own=False))
    assert (y - last).abs().max() > 1e-3
    torch.testing.assert_close(together(model, ad.Stack("l", skip="own")), together(model, ad.Stack("l")))


def test_gradients_through_both_parts_are_those_of_the_loop():
    model = stirred(toys.make_bert(), l="pfeiffer:rank=2", t="pfeiffer:rank=3")
    parameters = [p for a in ad.adapters(model).values() for p in a.parameters()]
    want = bert_by_hand(model, lambda i: [change(model, n, f"layer.{i}") for n in "lt"])
    want = torch.autograd.grad(want.square().sum(), parameters)
    got = torch.autograd.grad(together(model, ad.Stack("l", "t", skip="own")).square().sum(), parameters)
    torch.testing.assert_close(got, want)


def test_in_a_model_that_normalises_before_the_sum_is_the_blocks_output():
    model = stirred(toys.make_llama(), l="pfeiffer:rank=2", t="pfeiffer:rank=3")
    seen, hooks, layers = [], [], list(model.get_submodule("model.layers").children())
    with torch.no_grad(), ad.composed(model, ad.Stack("l", "t", skip="own")):
        for layer in layers:
            hooks.append(layer.post_attention_layernorm.register_forward_hook(lambda m, a, y: seen.append((a[0], y))))
            hooks.append(layer.register_forward_hook(lambda m, a, y: seen.append(y)))
        model(IDS, use_cache=False)
    for i, layer in enumerate(layers):
        (h, normed), out = seen[2 * i : 2 * i + 2]
        o = layer.mlp(normed)
        z = o + change(model, "l", f"layers.{i}")(o + h)
        torch.testing.assert_close(out, h + o + change(model, "t", f"layers.{i}")(z))
    for hook in hooks:
        hook.remove()


def test_where_an_adapter_changes_the_output_itself_there_is_no_residual():
    model = stirred(toys.make_bert(), l="pfeiffer:rank=2,reads=output", t="pfeiffer:rank=3,reads=output")
    dense = model.bert.encoder.layer[1].output.dense
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    o = dense(x)
    with ad.composed(model, ad.Stack("l", "t", skip="own")):
        y = dense(x)
    language, task = change(model, "l", "layer.1"), change(model, "t", "layer.1")
    torch.testing.assert_close(y, o + task(o + language(o)))


def test_a_split_of_languages_under_a_task_skips_from_the_own_output():
    model = stirred(toys.make_bert(), q="pfeiffer:rank=2", d="pfeiffer:rank=2", t="pfeiffer:rank=3")
    sizes = torch.tensor([2, 6, 0, 3])
    which = (torch.arange(6)[None] < sizes[:, None])[..., None]

    def deltas(i: int):
        q, d, t = (change(model, n, f"layer.{i}") for n in "qdt")
        return [lambda x: torch.where(which, q(x), d(x)), t]

    want = bert_by_hand(model, deltas)
    torch.testing.assert_close(together(model, ad.Stack(ad.Split("q", "d", sizes=sizes), "t", skip="own")), want)
    inside = ad.Split(ad.Stack("q", "t", skip="own"), ad.Stack("d", "t", skip="own"), sizes=sizes)
    torch.testing.assert_close(together(model, inside), want)
    behind = together(model, ad.Stack("t", ad.Split("q", "d", sizes=sizes), skip="own"))
    torch.testing.assert_close(behind, bert_by_hand(model, lambda i: deltas(i)[::-1]))
    one = together(model, ad.Stack(ad.Split("q", "d", sizes=(2, None)), "t", skip="own"))
    torch.testing.assert_close(one[:1], want[:1])
    mean = together(model, ad.Stack(ad.Average("q", "d"), "t", skip="own"))

    def halves(i: int):
        q, d, t = (change(model, n, f"layer.{i}") for n in "qdt")
        return [lambda x: (q(x) + d(x)) / 2, t]

    torch.testing.assert_close(mean, bert_by_hand(model, halves))


def test_layers_without_the_first_part_are_those_of_the_second_alone():
    model = stirred(toys.make_bert(), l="pfeiffer:rank=2", t="pfeiffer:rank=3")
    y = together(model, ad.Stack("l", "t", skip="own"), leave_out={"l": [1]})

    def deltas(i: int):
        return [change(model, n, f"layer.{i}") for n in ("lt" if i == 0 else "t")]

    torch.testing.assert_close(y, bert_by_hand(model, deltas))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_backward_computes_again_inside_the_block_skips_alike(reentrant):
    model = stirred(toys.make_bert(), l="pfeiffer:rank=2", t="pfeiffer:rank=3")
    parameters = [p for a in ad.adapters(model).values() for p in a.parameters()]

    def grads():
        for p in parameters:
            p.grad = None
        model(IDS).logits.square().mean().backward()
        return [p.grad for p in parameters]

    with ad.composed(model, ad.Stack("l", "t", skip="own")):
        want = grads()
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    if reentrant:
        model.enable_input_require_grads()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    with ad.composed(model, ad.Stack("l", "t", skip="own")):
        torch.testing.assert_close(grads(), want)
        late = model(IDS).logits.square().mean()
    with pytest.raises(AddendaError, match="call backward inside the `with` block"):
        late.backward()


def test_changes_that_cannot_skip_are_refused_and_nothing_is_left_on_the_model():
    model = stirred(toys.make_bert(), p="parallel:rank=2", q="adaptformer:rank=2", l="pfeiffer:rank=2", w="lora:rank=2")
    ad.attach(model, "invertible", name="i")
    ad.attach(model, "invertible", name="j")
    ad.switch(model, None)
    plain = model(IDS).logits
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    for names, said in (("pq", "for changes that read what they change"), ("ij", "Leave skip= out")):
        with pytest.raises(AddendaError, match=said):
            together(model, ad.Stack(*names, skip="own"))
        assert torch.equal(model(IDS).logits, plain)
    torch.testing.assert_close(
        together(model, ad.Stack("w", "l", skip="own")), together(model, ad.Stack("w", "l"))
    )  # a weight's change has nothing to skip
    with pytest.raises(RuntimeError), ad.composed(model, ad.Stack("l", "w", skip="own")):
        raise RuntimeError
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks and torch.equal(model(IDS).logits, plain)
