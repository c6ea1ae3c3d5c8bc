"""Life of adapters on a model: attach, switch, detach, heads, ties, refused calls that leave nothing behind."""

import copy
import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import slots_of
from shared import bits, flags, loss_of, relative, same_bits, stir, train

LORA = ad.LoRA(rank=2)


def untouched(model):
    return "_addenda" not in model.__dict__ and not any(slots_of(m) for m in model.modules())


REFUSED = {
    "a name taken": (dict(name="first"), "'first' is attached already"),
    "a bad name": (dict(name="a.b"), "1-64 letters"),
    "an empty name": (dict(name=""), "1-64 letters"),
    "no such target": (dict(targets="nope"), "matches nothing"),
    "a method that is none": (dict(method=3), "Expected a method such as"),
    "an unknown method": (dict(method="lorra"), "no method 'lorra'.*Did you mean 'lora'"),
    "ranks too high": (dict(method=ad.LoRA(rank=9)), r"12 of 12 sites.*rank 9 is above.*and 4 more.*exclude="),
    "two targets for a site": (dict(method={"q_proj": LORA, "attention": LORA}), "named by two targets"),
    "no data": (dict(method=ad.SHiRA(mask="snip")), "shira with these options looks at data"),
    "a name that is none": (dict(name=3), "1-64 letters"),
    "a target that is none": (dict(targets=3), "A target is a role.*got 3"),
    "one of several that is none": (dict(targets=["q_proj", 3]), "A target is a role.*got 3"),
    "nothing to exclude": (dict(exclude=None), "A target is a role.*got None"),
    "no heads": (dict(also_train=None), "A target is a role.*got None"),
    "no targets with methods": (dict(method={}), "names no target"),
    "everything a head": (dict(targets="q_proj", also_train=["q_proj.weight"]), "nothing is left for the method"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_calls_leave_nothing_behind(case, tiny, ids):
    options, pattern = REFUSED[case]
    if case == "a name taken":
        ad.attach(tiny, LORA, name="first", targets="q_proj")
    before, values, grads = flags(tiny), bits(tiny), [n for n, _ in tiny.named_parameters()]
    options = dict(options)
    with pytest.raises(AddendaError, match=pattern):
        ad.attach(tiny, options.pop("method", LORA), **options)
    assert flags(tiny) == before
    assert same_bits(bits(tiny), values)
    assert [n for n, _ in tiny.named_parameters()] == grads
    assert case == "a name taken" or untouched(tiny)


def test_not_a_model():
    with pytest.raises(AddendaError, match=r"Expected a torch.nn.Module as the model, got dict"):
        ad.attach({}, LORA)
    with pytest.raises(AddendaError, match=r"Expected a torch.nn.Module as the model, got NoneType"):
        ad.plan(None, LORA)


def test_wrapped_models_are_refused(tiny):
    with pytest.raises(AddendaError, match="Attach first, then wrap"):
        ad.attach(torch.compile(tiny, backend="eager"), LORA)
    assert untouched(tiny)


def test_through_a_compile_wrapper_the_state_is_found(tiny):
    ad.attach(tiny, LORA)
    assert "lora" in ad.status(torch.compile(tiny, backend="eager"))


def test_nothing_attached(tiny):
    for call in (ad.detach, ad.adapters, ad.merge, lambda m: ad.switch(m, None)):
        with pytest.raises(AddendaError, match="No adapter is attached to this Tiny"):
            call(tiny)
    assert ad.status(tiny) == "Tiny: no adapter attached"


def test_unknown_names(tiny):
    ad.attach(tiny, LORA, name="maths")
    for call in (
        lambda: ad.switch(tiny, "math"),
        lambda: ad.detach(tiny, "math"),
        lambda: ad.switch(tiny, ["maths", "math"]),
    ):
        with pytest.raises(AddendaError, match=r"No adapter is called 'math'.*Did you mean 'maths'"):
            call()
    with pytest.raises(AddendaError, match="acts once"):
        ad.switch(tiny, ["maths", "maths"])


def test_one_of_several_goes(tiny, ids):
    outputs = {}
    for i, name in enumerate("abc"):
        stir(ad.attach(tiny, LORA, name=name, targets="q_proj" if name == "b" else "linear"), 0.3, seed=i)
        outputs[name] = tiny(ids)
    ad.switch(tiny, ["a", "b"])
    both = tiny(ids)
    ad.detach(tiny, "c")
    assert torch.equal(tiny(ids), both)
    ad.detach(tiny, "a")
    torch.testing.assert_close(tiny(ids), outputs["b"])
    assert slots_of(tiny.layers[0].up_proj) is None
    assert slots_of(tiny.layers[0].self_attn.q_proj)
    assert list(ad.adapters(tiny)) == ["b"]
    assert not any(flags(tiny).values())
    ad.detach(tiny, "b")
    assert untouched(tiny)
    assert all(flags(tiny).values())


def test_flags_when_a_second_adapter_comes(tiny):
    tiny.embed.weight.requires_grad_(False)
    before = flags(tiny)
    one = ad.attach(tiny, LORA, name="one")
    ad.attach(tiny, LORA, name="two")
    assert all(p.requires_grad for p in one.parameters())
    ad.detach(tiny, "one")
    ad.detach(tiny, "two")
    assert flags(tiny) == before
    ad.attach(tiny, LORA, freeze=False)
    assert flags(tiny) == before
    ad.attach(tiny, LORA, name="two")
    assert not any(flags(tiny).values())
    ad.detach(tiny)
    assert flags(tiny) == before


def test_training_and_activity_are_independent(tiny, ids):
    adapter = ad.attach(tiny, LORA)
    adapter.requires_grad_(False)
    ad.switch(tiny, None)
    ad.switch(tiny, "default")
    assert not any(p.requires_grad for p in adapter.parameters())
    assert "not training" in ad.status(tiny)


def test_disabled(tiny, ids):
    expected = tiny(ids)
    stir(ad.attach(tiny, LORA))
    adapted = tiny(ids)
    with ad.disabled(tiny):
        assert torch.equal(tiny(ids), expected)
    with pytest.raises(ZeroDivisionError), ad.disabled(tiny):
        raise ZeroDivisionError
    assert torch.equal(tiny(ids), adapted)
    with ad.disabled(tiny):
        ad.detach(tiny)
    assert untouched(tiny)


def test_a_part_of_a_model_carries_adapters(tiny, ids):
    expected = tiny(ids)
    stir(ad.attach(tiny.layers[0], LORA, targets="q_proj"))
    adapted = tiny(ids)
    ad.switch(tiny, None)
    assert torch.equal(tiny(ids), expected)
    ad.switch(tiny, "default")
    assert torch.equal(tiny(ids), adapted)
    with pytest.raises(AddendaError, match="A part of this Tiny, a Block, carries adapters already"):
        ad.attach(tiny, LORA, name="outer")
    ad.attach(tiny.layers[1], LORA, targets="q_proj")
    with pytest.raises(AddendaError, match="2 parts of this Tiny carry adapters"):
        ad.switch(tiny, None)
    ad.detach(tiny.layers[1])
    ad.detach(tiny)
    assert untouched(tiny)
    assert torch.equal(tiny(ids), expected)
    ad.attach(tiny, LORA)
    with pytest.raises(AddendaError, match="part of a model that carries adapters"):
        ad.attach(tiny.layers[0], LORA, name="inner")


def test_two_adapters_may_not_see_one_weight_differently(tiny_conv):
    ad.attach(tiny_conv, LORA, targets="conv", name="one")
    with pytest.raises(AddendaError, match="another adapter holds this weight as a conv"):
        ad.attach(tiny_conv, LORA, targets="score", also_train=["conv1"], name="two")


def test_heads_are_trained_switched_saved_and_detached(tiny, ids, tmp_path):
    expected, before = tiny(ids), bits(tiny)
    adapter = ad.attach(tiny, LORA, also_train=["score"])
    assert torch.equal(tiny(ids), expected)
    assert "score.weight/value" in adapter.state_dict()
    train(tiny, adapter, ids, torch.optim.AdamW(tiny.parameters(), lr=0.1, weight_decay=0.3), 3)
    adapted = tiny(ids)
    file = adapter.save(tmp_path / "a.safetensors")
    ad.switch(tiny, None)
    assert torch.equal(tiny(ids), expected)
    ad.detach(tiny)
    assert same_bits(bits(tiny), before)
    nn.init.normal_(tiny.score.weight)  # a fresh head: the file's takes its place
    ad.load(tiny, file)
    assert torch.equal(tiny(ids), adapted)


def test_tied_embeddings_change_in_both_uses(llama, ids, tmp_path):
    expected, before = llama(ids).logits, bits(llama)
    adapter = ad.attach(llama, LORA, also_train="embed_tokens")
    assert [p for p in adapter.methods if "embed" in p or "head" in p] == ["model.embed_tokens.weight"]
    assert torch.equal(llama(ids).logits, expected)
    stir(adapter, 0.3)
    assert llama.lm_head.weight is not before
    assert torch.equal(llama.lm_head.weight, llama.model.embed_tokens.weight)
    adapted = llama(ids).logits
    llama(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    file = adapter.save(tmp_path / "a.safetensors")
    twin = copy.deepcopy(llama)
    assert torch.equal(twin(ids).logits, adapted)
    stir(ad.adapters(twin)["default"])
    assert torch.equal(twin.lm_head.weight, twin.model.embed_tokens.weight)
    ad.switch(llama, None)
    assert torch.equal(llama(ids).logits, expected)
    ad.switch(llama, "default")
    ad.merge(llama, verify={"input_ids": ids})
    assert relative(llama(ids).logits, adapted) < 1e-5
    ad.detach(llama)
    assert same_bits(bits(llama), before)
    assert torch.equal(llama(ids).logits, expected)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert type(llama.lm_head) is nn.Linear
    ad.load(llama, file)
    assert torch.equal(llama(ids).logits, adapted)


def test_tied_by_either_name_and_two_adapters(llama, ids):
    stir(ad.attach(llama, LORA, targets="lm_head.weight", name="a"), 0.3)
    a = llama(ids).logits
    stir(ad.attach(llama, LORA, targets="embed_tokens.weight", name="b"), 0.3, seed=5)
    b = llama(ids).logits
    assert not torch.equal(a, b)
    assert list(ad.adapters(llama)["a"].methods) == ["model.embed_tokens.weight"]
    ad.switch(llama, "a")
    assert torch.equal(llama(ids).logits, a)
    ad.switch(llama, ["a", "b"])
    assert torch.equal(llama.lm_head.weight, llama.model.embed_tokens.weight)
    ad.detach(llama, "a")
    torch.testing.assert_close(llama(ids).logits, b)
    ad.detach(llama)
    assert type(llama.lm_head) is nn.Linear


def test_methods_by_target(tiny, ids):
    adapter = ad.attach(tiny, {"attention": "lora:rank=3", "up_proj": ad.SHiRA(density=0.1)})
    assert adapter.methods["layers.0.self_attn.q_proj"] == ad.LoRA(rank=3)
    assert adapter.methods["layers.1.up_proj"] == ad.SHiRA(density=0.1)
    assert "layers.0.down_proj" not in adapter.methods
    assert list(adapter.methods) == [p for p, _ in tiny.named_modules() if p in adapter.methods]


def test_progress_and_repr(tiny):
    seen = []
    adapter = ad.attach(tiny, LORA, targets="q_proj", progress=lambda *a: seen.append(a))
    assert seen[0] == (0, 2, "layers.0.self_attn.q_proj")
    assert seen[-1] == (2, 2, "")
    assert repr(adapter) == "Adapter('default': lora, 2 sites, 64 trainable)"
    assert adapter.seconds > 0
    assert "1 adapter(s), base untouched" in ad.status(tiny)


# -- the handle ----------------------------------------------------------------------------------------------------


def test_state_dict_is_strict(tiny, ids):
    adapter = stir(ad.attach(tiny, LORA, targets="q_proj"))
    state = {k: v.clone() for k, v in adapter.state_dict().items()}
    y = tiny(ids)
    stir(adapter, seed=8)
    adapter.load_state_dict(state)
    assert torch.equal(tiny(ids), y)
    first = next(iter(state))
    bad = {k: v for k, v in state.items() if k != first} | {"x/y": torch.ones(1)}
    bad[list(state)[1]] = torch.ones(3)
    with pytest.raises(AddendaError, match=rf"missing {first}.*unexpected x/y.*shape \(3,\)"):
        adapter.load_state_dict(bad)


def test_no_gradient_in_the_first_step_is_an_error(tiny, ids):
    adapter = ad.attach(tiny, LORA)
    with pytest.raises(AddendaError, match=r"24 of 24 trainable tensors.*got no gradient in the first step"):
        adapter.step()


def test_dead_tensors(tiny, ids):
    adapter = ad.attach(tiny, LORA, targets="up_proj")
    for _ in range(2):
        loss_of(tiny, ids).backward()
        for p in adapter.parameters():
            p.grad.zero_()
        adapter.step()
    with pytest.raises(AddendaError, match=r"All 4 trainable tensors.*zero gradients for 3 steps"):
        adapter.step()


def test_some_dead_tensors_warn_with_their_sites(tiny, ids):
    adapter = ad.attach(tiny, LORA, targets="up_proj")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for step in range(3):
        loss_of(tiny, ids).backward()
        for n, p in adapter.named_parameters():
            if n.startswith("layers.1"):
                p.grad.zero_()
        optimizer.step()
        if step < 2:
            adapter.step()
    with pytest.warns(UserWarning, match=r"2 trainable tensors.*layers\.1\.up_proj/A"):
        adapter.step()
    adapter.step()
    assert adapter.step_count == 4


def test_attaching_is_linear_in_the_number_of_layers():
    def calls(n):
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(n)], *[nn.Bilinear(1, 2, 2) for _ in range(n)])
        counter = itertools.count()
        sys.setprofile(lambda frame, event, arg: next(counter))
        try:
            adapter = ad.attach(model, ad.LoRA(rank=1), targets=["linear", "re:\\d+.weight"])
            adapter.parameters()
            ad.switch(model, None)
            ad.detach(model)
        finally:
            sys.setprofile(None)
        return next(counter)

    calls(5)
    assert calls(160) < 4.5 * calls(40)


def test_sites_side_by_side_are_the_sites_one_by_one():
    """With more threads than one, factorisations run at the same time: the same tensors, and the threads given back."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(24, 16) for _ in range(5)])
    told = []
    one = _derived(model)
    torch.set_num_threads(2)
    try:
        two = _derived(model, progress=lambda *a: told.append(a))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value)
    assert told[-1] == (5, 5, "")
    assert [t[2] for t in told[:-1]] == ["0", "1", "2", "3", "4"]


def _derived(model, **options):
    adapter = ad.attach(model, "svft:pattern=banded,band=1", **options)
    found = {f"{path}/{k}": t for path, held in adapter.sites() for k, t in held.tensors().items()}
    ad.detach(model)
    return found


@pytest.mark.parametrize("name", ["lora", "pissa", "ia3"])
def test_an_entry_of_the_catalogue_is_a_method(tiny, name):
    (entry,) = ad.catalogue(name)
    assert ad.attach(tiny, entry, targets="attention").methods.items() >= {("layers.0.self_attn.q_proj", entry.build())}
    assert str(ad.plan(tiny, {"mlp": entry}))


@pytest.mark.parametrize("change", [
    nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm,
    lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: m._replicate_for_data_parallel(),
])  # fmt: skip
@pytest.mark.parametrize("name", ["lora:rank=2", "dora:rank=2", "shira", "oft:block=2", "ia3"])
def test_a_weight_that_is_no_parameter_any_more_is_told(name, change):
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    ad.attach(net, name, targets="0")
    changed = change(net[0])
    with pytest.raises(AddendaError, match=r"is no parameter of it any more.*before attach"):
        changed(x)


def test_a_class_derived_from_an_adapted_one_is_not_dropped(tiny, ids):
    expected, up = tiny(ids), tiny.layers[0].up_proj
    ad.attach(tiny, LORA, targets="up_proj")
    ad.switch(tiny, None)
    nn.utils.parametrizations.weight_norm(up)
    for change in (lambda: ad.detach(tiny), lambda: ad.attach(tiny, "bitfit", targets="up_proj.bias", name="bias")):
        with pytest.raises(AddendaError, match=r"0\.up_proj.*ParametrizedAdaptedLinear.*remove_parametrizations"):
            change()
        assert nn.utils.parametrize.is_parametrized(up) and list(ad.adapters(tiny)) == ["default"]
        torch.testing.assert_close(tiny(ids), expected)
    nn.utils.parametrize.remove_parametrizations(up, "weight")
    ad.detach(tiny)
    assert type(up) is nn.Linear and untouched(tiny)
    torch.testing.assert_close(tiny(ids), expected)


def test_heads_may_be_named_by_a_function(tiny):
    by_name = ad.attach(tiny, LORA, targets="q_proj", also_train="score")
    want, _ = list(by_name.methods), ad.detach(tiny)
    adapter = ad.attach(tiny, LORA, targets="q_proj", also_train=lambda path, module: path == "score")
    assert list(adapter.methods) == want and "score.weight" in want


@pytest.mark.parametrize("name", [[3], [["default"]], "defualt"])
def test_no_adapter_is_switched_to_by_what_is_no_name(name, tiny):
    ad.attach(tiny, LORA)
    with pytest.raises(AddendaError, match=r"No adapter is called .*Attached: 'default'"):
        ad.switch(tiny, name)
    assert "default: active" in ad.status(tiny)


@pytest.mark.parametrize("value", [3.0, None, np.zeros((2, 8)), torch.zeros(8, 2), torch.zeros(2, 8, dtype=torch.int32),
                                   torch.zeros(2, 8, device="meta")], ids=str)  # fmt: skip
def test_values_are_all_looked_at_before_the_first_is_written(value, tiny):
    adapter = stir(ad.attach(tiny, LORA, targets=["q_proj", "score"]))
    before = {k: t.clone() for k, t in adapter.state_dict().items()}
    given = {k: torch.zeros_like(t) for k, t in before.items()} | {"score/A": value}
    assert [*before][-2] == "score/A", "among the last"
    with pytest.raises(AddendaError, match=r"do not fit adapter 'default': score/A: "):
        adapter.load_state_dict(given)
    assert same_bits(adapter.state_dict(), before)
    with pytest.raises(AddendaError, match="tensors by name"):
        adapter.load_state_dict(None)
