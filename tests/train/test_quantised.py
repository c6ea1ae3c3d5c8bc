"""Training on quantised bases: transformers' check is replaced by ours for our trainer, and for nobody else."""

from types import SimpleNamespace

import pytest
import torch
import transformers

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.models.load import load_model
from addenda.quantizing.quantize import bits_of, quantize
from addenda.train.fit import fit
from addenda.train.quantised import check
from tiny_models import SUMS, make_llama, make_tokenizer


def quantised(trainable=True):
    """A model as transformers leaves one behind that it has quantised, and an adapter."""
    model = make_llama()
    quantize(model)
    model.is_quantized = True
    model.hf_quantizer = SimpleNamespace(
        is_trainable=trainable, is_qat_trainable=False, quantization_config=SimpleNamespace(quant_method="gptq")
    )
    return model, ad.attach(model, ad.LoRA(rank=2))


def test_our_trainer_asks_what_training_needs(tmp_path):
    from addenda.data.encode import encode
    from addenda.data.read import read

    model, adapter = quantised()
    train = encode(read(SUMS), make_tokenizer())
    made = fit(model, adapter, train, steps=6, batch=8, rate=2e-2)
    assert made.losses[-1][1] < made.losses[0][1]
    assert model.is_quantized and not model._hf_peft_config_loaded
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    for p in adapter.parameters():
        p.requires_grad_(False)
    with pytest.raises(AddendaError, match="no tensor of 'default' learns"):
        check(model, adapter)
    model, adapter = quantised(trainable=False)
    with pytest.raises(AddendaError, match="quantised with gptq, whose layers have no backward"):
        fit(model, adapter, train, steps=1, batch=8, rate=1e-2)


def test_tune_quantises_the_base_and_evaluation_does_so_again(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    made = ad.tune(
        tmp_path / "model", SUMS, "lora", quantize="nf4", out=tmp_path / "run", steps=4, batch=8, dtype="float32",
        eval_data=0.1, progress=False,
    )  # fmt: skip
    assert 4 < bits_of(made.model) < 5
    assert all(p.grad is None for n, p in made.model.named_parameters() if ".addenda." not in n)
    from addenda.models.load import wanted_by

    wanted = wanted_by(tmp_path / "run/adapter.safetensors")
    assert wanted == {"quantize": "nf4"}
    loaded = load_model(tmp_path / "model", dtype="float32", **wanted)
    assert "nf4, 4." in loaded.note and loaded.quantize == "nf4"
    ad.load(loaded.model, tmp_path / "run/adapter.safetensors")
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded.model(ids).logits, made.model(ids).logits)
    with pytest.raises(AddendaError, match="other base weights"):
        ad.load(load_model(tmp_path / "model", dtype="float32").model, tmp_path / "run/adapter.safetensors")
    with pytest.raises(AddendaError, match="quantize is for folders"):
        ad.tune(make_llama(), SUMS, tokenizer=make_tokenizer(), quantize="nf4")
    with pytest.raises(AddendaError, match="no form 'nf5'"):
        load_model(tmp_path / "nowhere", quantize="nf5")
