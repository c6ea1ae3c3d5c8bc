"""What other libraries' save_pretrained writes of an adapted model comes back as it acts, or nothing is written."""

import copy
import gc
import pickle
from weakref import ref

import pytest
import torch
from huggingface_hub import ModelHubMixin, PyTorchModelHubMixin
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, LlamaForCausalLM, LlamaModel

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.modules.ours import is_ours
from shared import stir

IDS = torch.arange(12).reshape(2, 6)
SAVING = ("save_pretrained", "save", "push_to_hub")


@pytest.fixture
def adapted(llama):
    adapter = ad.attach(llama, "lora:rank=2")
    stir(adapter)
    return llama


def out(model):
    with torch.no_grad():
        return model(IDS).logits


def own(module):
    return [n for n in SAVING if n in vars(module)]


def test_refused_while_an_adapter_acts_and_nothing_is_written(adapted, tmp_path):
    for name in ("save_pretrained", "push_to_hub"):
        with pytest.raises(AddendaError, match=r"'default' acts.*adapter\.save.*addenda\.merge.*switch\(model, None\)"):
            getattr(adapted, name)(tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_a_state_dict_that_was_collected_before_is_refused_too(adapted, tmp_path):
    with pytest.raises(AddendaError, match="come back as the base"):
        adapted.save_pretrained(tmp_path / "out", state_dict=adapted.state_dict())
    assert not [*tmp_path.iterdir()]
    base = {n: t for n, t in adapted.state_dict().items() if not is_ours(n)}  # whoever leaves it out means it
    adapted.save_pretrained(tmp_path / "base", state_dict=base)
    ad.switch(adapted, None)
    assert torch.equal(out(LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()), out(adapted))


@pytest.mark.parametrize("given", [False, True])
def test_a_merged_change_is_written_under_the_bases_names(adapted, tmp_path, given):
    names = {n for n in adapted.state_dict() if not is_ours(n)}
    live = out(adapted)
    ad.merge(adapted, verify=IDS)
    adapted.save_pretrained(tmp_path, **({"state_dict": adapted.state_dict()} if given else {}))
    assert set(load_file(tmp_path / "model.safetensors")) == names - {"lm_head.weight"}  # tied, as ever
    back = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(out(back), live, rtol=0, atol=1e-5)
    ad.unmerge(adapted)
    assert torch.equal(out(adapted), live)
    assert (out(adapted) - out(back)).abs().max() < 1e-5 < 0.01 < (live - out(toys.make_llama())).abs().max()


def test_a_trained_head_and_a_merged_change_of_it_come_back(bert, tmp_path):
    stir(ad.attach(bert, "lora:rank=2", also_train=["classifier"]))
    live = out(bert)
    with pytest.raises(AddendaError, match="acts"):
        bert.save_pretrained(tmp_path)
    ad.merge(bert, verify=IDS)
    bert.save_pretrained(tmp_path)
    torch.testing.assert_close(
        out(BertForSequenceClassification.from_pretrained(tmp_path).eval()), live, rtol=0, atol=1e-5
    )


def test_where_nothing_acts_the_base_is_written(adapted, tmp_path):
    ad.switch(adapted, None)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(out(LlamaForCausalLM.from_pretrained(tmp_path).eval()), out(toys.make_llama()))
    with ad.disabled(adapted):
        adapted.save_pretrained(tmp_path / "again")
    assert not any(map(is_ours, load_file(tmp_path / "again" / "model.safetensors")))


def test_a_change_that_acts_in_a_block_only_counts(adapted, tmp_path):
    stir(ad.attach(adapted, "lora:rank=2", name="other"))
    ad.switch(adapted, "other")
    with ad.disabled(adapted):
        adapted.save_pretrained(tmp_path / "base")
    with pytest.raises(AddendaError, match="'other' acts"):
        adapted.save_pretrained(tmp_path / "no")
    assert (tmp_path / "base").is_dir() and not (tmp_path / "no").exists()


def test_a_part_of_the_model_is_guarded_and_a_model_around_it(llama, tmp_path):
    stir(ad.attach(llama, "lora:rank=2"))
    with pytest.raises(AddendaError, match="acts"):
        llama.model.save_pretrained(tmp_path / "part")
    ad.detach(llama)
    stir(ad.attach(llama.model, "lora:rank=2", name="inner"))  # the model around it knows nothing of this
    with pytest.raises(AddendaError, match="'inner' acts"):
        llama.save_pretrained(tmp_path / "whole")
    assert not [*tmp_path.rglob("*.safetensors")]
    live = out(llama)
    ad.merge(llama.model, verify=IDS)
    llama.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(
        out(LlamaForCausalLM.from_pretrained(tmp_path / "whole").eval()), live, rtol=0, atol=1e-5
    )


def test_an_untouched_part_may_be_written(bert, tmp_path):
    ad.attach(bert, "lora:rank=2", targets="classifier")
    bert.bert.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


class Hub(toys.Tiny, PyTorchModelHubMixin):
    """A model of one's own with huggingface_hub's mixin."""


def test_huggingface_hubs_mixin(ids, tmp_path):
    model = Hub().eval()
    assert isinstance(model, ModelHubMixin)
    stir(ad.attach(model, "lora:rank=2"))
    live = model(ids)
    with pytest.raises(AddendaError, match="acts"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ad.merge(model, verify=ids)
    model.save_pretrained(tmp_path / "out")
    back = Hub.from_pretrained(tmp_path / "out").eval()
    assert not any(map(is_ours, load_file(tmp_path / "out" / "model.safetensors")))
    torch.testing.assert_close(back(ids), live, rtol=0, atol=1e-5)


def test_detach_gives_the_methods_back(llama):
    before = {path: {**vars(m)}.keys() for path, m in llama.named_modules()}
    ad.attach(llama, "lora:rank=2", name="one")
    ad.attach(llama, "lora:rank=2", name="two")
    assert own(llama) == own(llama.model) == ["save_pretrained", "push_to_hub"]
    ad.detach(llama, "one")
    assert own(llama)
    ad.detach(llama)
    assert {path: vars(m).keys() for path, m in llama.named_modules()} == before
    assert not own(llama) and llama.save_pretrained.__func__ is LlamaForCausalLM.save_pretrained


def test_a_method_on_the_instance_is_used_and_given_back(llama, tmp_path):
    calls = []
    llama.save_pretrained = mine = lambda folder: calls.append(folder)
    ad.attach(llama, "lora:rank=2")
    with pytest.raises(AddendaError, match="acts"):
        llama.save_pretrained(tmp_path)
    ad.switch(llama, None)
    llama.save_pretrained(tmp_path)
    ad.detach(llama)
    assert calls == [tmp_path] and vars(llama)["save_pretrained"] is mine


def test_a_refused_attach_leaves_nothing(llama):
    with pytest.raises(AddendaError):
        ad.attach(llama, "lora:rank=900")
    assert not own(llama)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_look_at_themselves(adapted, tmp_path, copied):
    twin = copied(adapted)
    ad.switch(adapted, None)
    with pytest.raises(AddendaError, match="acts"):
        twin.save_pretrained(tmp_path / "twin")
    adapted.save_pretrained(tmp_path / "first")
    ad.detach(twin)
    assert own(adapted) and not own(twin)


def test_nothing_keeps_the_model_in_memory():
    model = toys.make_llama()
    ad.attach(model, "lora:rank=2")
    gone, method = ref(model), model.save_pretrained
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(AddendaError, match="no longer exists"):
        method("out")


def test_its_signature_is_the_methods_own(adapted):
    import inspect

    assert inspect.signature(adapted.save_pretrained) == inspect.signature(LlamaModel.save_pretrained.__get__(adapted))


def test_state_dicts_elsewhere_are_as_they_were(adapted):
    names = set(adapted.state_dict())
    assert any(map(is_ours, names))
    assert adapted.load_state_dict(adapted.state_dict(), strict=True).missing_keys == []
