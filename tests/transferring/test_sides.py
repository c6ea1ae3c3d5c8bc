"""The models of a transfer: loaded as the bundle names them, and as they were afterwards."""

import pytest

import addenda as ad
from addenda.models.load import load_model
from addenda.transferring.bundle import read_bundle
from addenda.transferring.make_bundle import make_bundle
from addenda.transferring.sides import opened, put_on
from lister import DATA, SEEDS, make_lister

HOW = {
    "seeds": SEEDS, "name": "sums", "answers": ("y", "n"), "steps": 2, "batch": 12,
    "negatives": [f"{x} is {y}" for x in "abcd" for y in "ef"],
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model, and one with an adapter of it in NF4 and the bundle of this."""
    folder = tmp_path_factory.mktemp("sides")
    model, tokenizer = make_lister()
    model.save_pretrained(folder / "source")
    tokenizer.save_pretrained(folder / "source")
    packed = load_model(folder / "source", quantize="nf4", task="causal")
    (folder / "moving").mkdir()
    ad.attach(packed.model, "lora:rank=2").save(folder / "moving" / "adapter.safetensors")
    ad.detach(packed.model)
    where = folder / "moving"
    make_bundle(packed.model, packed.tokenizer, where / "adapter.safetensors", DATA, where / "sums.bundle", **HOW)
    return folder


def test_a_quantised_source_is_loaded_in_its_form_with_the_adapter_named_or_beside_the_bundle(source):
    bundle = read_bundle(source / "moving" / "sums.bundle")
    assert bundle.teacher.base["packed"] == ["NF4Tensor"]
    for adapter in (None, source / "moving" / "adapter.safetensors"):
        with opened(bundle, source / "source", make_lister(other=True), adapter=adapter) as sides:
            assert sides.adapter.name == "source" and "discriminator: idle" in ad.status(sides.judge.model)
        assert ad.status(sides.source.model) == "LlamaForCausalLM: no adapter attached"
    with (
        pytest.raises(ad.AddendaError, match=r"kept in another form \(NF4Tensor then, plain weights here\)"),
        opened(bundle, make_lister(), make_lister(other=True)),
    ):
        pass


def test_an_adapter_is_named_by_itself_its_name_or_its_file(source):
    model, tokenizer = make_lister()
    own = ad.attach(model, "lora:rank=2", name="source")
    own.save(source / "plain.safetensors")
    assert put_on(model, tokenizer, own)[1] is put_on(model, tokenizer, "source")[1] is False
    found, new = put_on(model, tokenizer, source / "plain.safetensors")
    assert new and found.name == "source-2" and "source: active" in ad.status(model)
    with pytest.raises(ad.AddendaError, match=r"no file, and no adapter on this model.*'source', 'source-2'"):
        put_on(model, tokenizer, "target")
    with pytest.raises(ad.AddendaError, match="is not on this model"):
        put_on(make_lister()[0], tokenizer, own)
