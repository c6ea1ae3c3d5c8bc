"""Names of adapters, and models whose modules were replaced under them."""

import pytest
import torch
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import Slots, slots_of
from addenda.core.forward.tensors import SiteTensors
from addenda.core.state.state import acting_again, apply_active, state_of
from shared import bits, flags, same_bits, stir

ISSUE = ["live", "kinds", "each", "seen", "readers", "waiting", "undoes", "training"]
PLAIN = ["weight", "output", "bias", "addenda", "default", "0", "_", "-", "a-b", "pool", "A", "model", "None", "x" * 64]
WORDS = sorted({*ISSUE, *dir(Slots()), *dir(SiteTensors), *PLAIN})


@pytest.mark.parametrize("name", WORDS)
def test_a_name_works_or_is_refused_before_anything_is_touched(name, tiny, ids, tmp_path):
    before = bits(tiny)
    try:
        adapter = ad.attach(tiny, "lora:rank=2", targets="*.q_proj", also_train="score", name=name)
    except AddendaError:
        assert name not in PLAIN
        assert not any(slots_of(m) for m in tiny.modules())
        with pytest.raises(AddendaError, match="no adapter can be called so"):
            ad.load(tiny, "no such file", name=name)
        return
    stir(adapter)
    y = tiny.train()(ids)
    y.sum().backward()
    state = {k: v.clone() for k, v in tiny.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(tiny, dict(tiny.named_parameters()), (ids,)), y)
    for n, _ in tiny.named_modules():
        tiny.get_submodule(n)
    tiny.load_state_dict(state)
    tiny.eval().to(torch.float64).to(torch.float32)
    adapter.save(tmp_path / "a.safetensors")
    ad.switch(tiny, None)
    ad.switch(tiny, name)
    with ad.disabled(tiny):
        pass
    ad.detach(tiny, name)
    assert same_bits(bits(tiny), before)


def resized(model):
    model.resize_token_embeddings(40, mean_resizing=False)


def new_head(model):
    model.lm_head = nn.Linear(8, 32, bias=False)


def gone(model):
    del model.model.layers[1]


@pytest.mark.parametrize(
    "method", ["lora:rank=2", "dora:rank=2", "shira:density=0.2", "full", "bitfit", "houlsby:rank=2"]
)
@pytest.mark.parametrize("change", [resized, new_head, gone])
def test_a_module_that_was_replaced_under_an_adapter_is_named_and_the_rest_is_given_back(change, method, tmp_path):
    model = toys.make_llama(tie_word_embeddings=False, attention_bias=True)
    before = {k: v.clone() for k, v in bits(model).items()}
    targets = None if method in ("bitfit", "houlsby:rank=2") else ["model.embed_tokens", "linear"]
    adapter = ad.attach(model, method, targets=targets, also_train="lm_head")
    ad.attach(model, "lora:rank=2", targets="model.layers.0*q_proj", name="other")
    ad.switch(model, "default")
    change(model)
    where = {resized: "embed_tokens|lm_head", new_head: "lm_head", gone: "layers.1"}[change]
    calls = [
        lambda: adapter.save(tmp_path / "a.safetensors"),
        lambda: ad.switch(model, "default"),
        lambda: ad.merge(model),
        lambda: adapter.parameters(),
        lambda: adapter.state_dict(),
        lambda: ad.switch(model, ["other", "default"]),
    ]
    for call in calls:
        if method == "houlsby:rank=2" and call is calls[2]:
            continue  # no weight is changed
        with pytest.raises(AddendaError, match=where) as said:
            call()
        assert "detach(model)" in str(said.value)
    assert "damaged" in ad.status(model)
    assert not (tmp_path / "a.safetensors").exists()
    ad.switch(model, "other")
    ad.detach(model, "default")
    ad.switch(model, "other")
    ad.detach(model)
    assert not any("addenda" in n for n, _ in model.named_modules())
    assert all(flags(model).values())
    after = bits(model)
    kept = {k: v for k, v in before.items() if k in after and after[k].shape == v.shape and "lm_head" not in k}
    assert len(kept) > 10
    assert same_bits({k: after[k] for k in kept}, kept)


def test_unmerging_after_a_head_was_replaced_leaves_the_new_one_alone():
    model = toys.make_llama(tie_word_embeddings=False)
    before = bits(model)
    stir(ad.attach(model, "lora:rank=2", targets=["lm_head", "*.q_proj"]))
    ad.merge(model, allow_loss=1.0)
    new_head(model)
    head = model.lm_head.weight.detach().clone()
    ad.unmerge(model)
    assert torch.equal(model.lm_head.weight, head)
    after = bits(model)
    assert all(torch.equal(after[k], v) for k, v in before.items() if k != "lm_head.weight")
    ad.detach(model)


def test_an_adapter_that_comes_idle_leaves_the_callers_block_as_it_is(tiny, ids, tmp_path):
    base = tiny(ids).detach()
    first = stir(ad.attach(tiny, "lora:rank=2", targets="*.q_proj", name="a"))
    first.save(tmp_path / "a.safetensors")
    acting = tiny(ids).detach()
    with ad.disabled(tiny):
        ad.load(tiny, tmp_path / "a.safetensors", name="b", activate=False)
        assert torch.equal(tiny(ids), base)
    assert torch.equal(tiny(ids), acting) and not torch.equal(acting, base)


def test_what_acted_acts_again_in_the_callers_block_too(tiny, ids):
    base = tiny(ids).detach()
    stir(ad.attach(tiny, "lora:rank=2", targets="*.q_proj", name="a"))
    root, state = state_of(tiny)
    acting = tiny(ids).detach()
    with ad.disabled(tiny):
        with acting_again(root, state):
            apply_active(root, state, ("a",))
            assert torch.equal(tiny(ids), acting)
        assert torch.equal(tiny(ids), base)
    assert torch.equal(tiny(ids), acting) and not torch.equal(acting, base)
