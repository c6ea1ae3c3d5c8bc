"""A model's own folder as a door: the change written into its weights."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import addenda as ad
from addenda import AddendaError
from addenda.exporting.probe import probe_of
from shared import METHODS, NAMES, attach, same_bits, stir
from shared import bits as bits_of
from tiny_models import make_llama as make_from_folder
from tiny_models import make_tokenizer
from toys import make_llama

IDS = torch.arange(10)[None]


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "svft", "shira", "full", "boft", "ia3"])
def test_the_folder_answers_as_the_live_adapter(tmp_path, name):
    model = make_llama(tie_word_embeddings=name != "full")
    adapter = stir(attach(model, name, IDS, targets="linear"))
    before = bits_of(model)
    report = ad.export(adapter, "merged", tmp_path / "out")
    assert name in NAMES and report.errors.keys() == adapter.methods.keys() and max(report.errors.values()) < 1e-3
    assert same_bits(before, bits_of(model)) and [*ad.adapters(model)] == ["default"]
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = probe_of(model)
    with torch.no_grad():
        live = model.eval()(**batch).logits
        assert float((other(**batch).logits - live).abs().max()) < 1e-5 * float(live.abs().max())
        assert float((make_llama(tie_word_embeddings=name != "full")(**batch).logits - live).abs().max()) > 1e-3


def test_the_tokenizer_of_the_models_folder_comes_along(tmp_path):
    make_from_folder().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "evil.bin").write_bytes(b"\x80")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ad.export(stir(ad.attach(model, "lora:rank=2")), "merged", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids
    assert not (tmp_path / "out" / "evil.bin").exists()


def test_what_rounding_would_take_is_refused_and_another_adapter_stays_active(tmp_path):
    model = make_llama(tie_word_embeddings=False).to(torch.bfloat16)
    adapter = stir(ad.attach(model, METHODS["lora"]), 1e-4)
    other = stir(ad.attach(model, METHODS["shira"], name="other"))
    with pytest.raises(AddendaError, match="rounding"):
        ad.export(adapter, "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists() and "other" in str(ad.status(model))
    with torch.no_grad():
        acting = model(IDS).logits
        ad.switch(model, other.name)
        assert torch.equal(acting, model(IDS).logits)


def test_what_writes_no_folder_and_ranks_are_refused(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x)

    adapter = stir(ad.attach(Plain(), "lora:rank=2", targets="layer"))
    with pytest.raises(AddendaError, match="has no save_pretrained"):
        ad.export(adapter, "merged", tmp_path / "out", probe=torch.ones(2, 8))
    with pytest.raises(AddendaError, match="leave rank= and energy= out"):
        ad.export(stir(ad.attach(make_llama(), METHODS["lora"])), "merged", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_grown_vocabulary_is_written_with_its_rows_and_without_the_old_tokenizer(tmp_path):
    base, tokenizer = tmp_path / "base", make_tokenizer()
    make_from_folder().save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    ad.grow(model, tokenizer, ["<call>", "</call>"])
    rows = {t: "trainable-tokens:tokens=76-77" for t in ("model.embed_tokens", "lm_head")}
    adapter = stir(ad.attach(model, {"linear": "lora:rank=2", **rows}))
    report = ad.export(adapter, "merged", tmp_path / "out")
    assert any("no tokenizer is in it" in note for note in report.notes)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == 78
    ids = torch.tensor([[5, 76, 77, 9]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, atol=1e-6)


def test_formats_of_adapters_have_no_place_for_new_rows_and_say_so_before_training(tmp_path):
    model, tokenizer = make_from_folder(), make_tokenizer()
    ad.grow(model, tokenizer, ["<call>"])
    for door in ("peft", "vllm", "gguf"):
        assert "model.embed_tokens.weight" in ad.passage(model, "lora:rank=2", door, targets="*.q_proj").refused
    assert not ad.passage(model, "lora:rank=2", "merged", targets="*.q_proj").refused
    adapter = stir(ad.attach(model, "lora:rank=2", targets="*.q_proj"))
    for door in ("peft", "vllm", "gguf"):
        with pytest.raises(AddendaError, match=r"new rows.*'merged'"):
            ad.export(adapter, door, tmp_path / "out")
    make_from_folder().save_pretrained(tmp_path / "base")
    file = adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(AddendaError, match=r"1 new tokens.*--to merged"):
        ad.merge_on_disk(tmp_path / "base", file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
