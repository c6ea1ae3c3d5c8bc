"""Trained copies: whole modules, biases, norms, and what PEFT has no place for."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from peft_folders import CONFIG, WEIGHTS, by_peft, edited, given, in_addenda, in_peft, outputs, same, take
from shared import stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


class Head(nn.Module):
    def __init__(self, rank: int = 8):
        super().__init__()
        self.dense, self.out = nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.out(self.norm(torch.tanh(self.dense(x))))


class Classifier(nn.Module):
    """A layer, a head of several modules, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), Head()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(self.body(x)) * self.scale


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def _config(folder) -> dict:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def test_a_head_is_the_modules_that_own_its_parameters_and_its_buffers_come_along(tmp_path):
    model = Classifier()
    base = outputs(model, X)
    adapter = stir(ad.attach(model, {"body": ad.LoRA(rank=2)}, also_train=["head"]), 0.3)
    wanted = outputs(model, X)
    folder = given(adapter, tmp_path / "out")
    assert _config(folder)["modules_to_save"] == ["head.dense", "head.out", "head.norm"]
    assert "base_model.model.head.norm.running_mean" in load_file(folder / WEIGHTS)
    same(in_peft(Classifier, folder, X), wanted, base)
    same(in_addenda(Classifier, folder, X)[1], wanted, base)

    def move(tensors: dict) -> None:
        tensors["base_model.model.head.norm.running_mean"] += 1

    with pytest.raises(AddendaError, match="running_mean is a buffer and differs"):
        take(Classifier(), edited(folder, None, move))


def make_classifier() -> nn.Module:
    torch.manual_seed(0)
    like = toys.make_llama().config
    like.num_labels, like.pad_token_id = 3, 0
    return transformers.LlamaForSequenceClassification(like)


def make_roberta() -> nn.Module:
    """A head of several modules, which PEFT copies as a whole for the task."""
    torch.manual_seed(0)
    sizes = {"vocab_size": toys.VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**sizes, intermediate_size=16, max_position_embeddings=32)
    return transformers.RobertaForSequenceClassification(config)


PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WHOLE = {
    "gpt2, tied": (toys.make_gpt2, IDS),
    "llama, tied": (toys.make_llama, IDS),
    "llama, classifier": (make_classifier, IDS),
    "roberta, head of a task": (make_roberta, IDS),
    "t5, three ties": (toys.make_t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
    "vit, parameters above modules": (toys.make_vit, {"pixel_values": PIXELS}),
}


@pytest.mark.parametrize("row", WHOLE)
def test_a_model_trained_whole_acts_alike_in_peft(row, tmp_path):
    make, batch = WHOLE[row]
    model = make()
    base = outputs(model, batch)
    adapter = stir(ad.attach(model, "full"), 0.3)
    wanted = outputs(model, batch)
    folder = given(adapter, tmp_path / "out")
    names = _config(folder)["modules_to_save"]
    assert not [n for n in names for other in names if n.startswith(f"{other}.")]
    same(in_peft(make, folder, batch), wanted, base)
    same(in_addenda(make, folder, batch)[1], wanted, base)


def test_a_parameter_of_the_model_itself_has_no_place(tmp_path):
    adapter = stir(ad.attach(Classifier(), {"body": ad.LoRA(rank=2)}, also_train=["scale"]))
    with pytest.raises(AddendaError, match="scale is a parameter of the model itself"):
        given(adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_module_is_no_copy_where_something_in_it_is_changed_otherwise(tmp_path):
    spec = {"head.dense": ad.LoRA(rank=2), "norm": ad.LNTuning()}
    adapter = stir(ad.attach(Classifier(), spec))
    folder = given(adapter, tmp_path / "out")  # beside each other they are fine
    assert _config(folder)["modules_to_save"] == ["head.norm"]


def test_biases_beside_a_type_that_has_none_are_refused(tmp_path):
    spec = {"body": ad.SHiRA(density=0.2), "body.bias": ad.BitFit()}
    adapter = stir(ad.attach(Classifier(), spec))
    with pytest.raises(AddendaError, match=r"body\.bias: SHIRA trains no biases in place"):
        given(adapter, tmp_path / "out")


def test_a_classifier_of_a_task_is_saved_with_it_trained_or_not(tmp_path):
    adapter = stir(ad.attach(toys.make_bert(), {"query": ad.LoRA(rank=2)}))
    config = _config(given(adapter, tmp_path / "out"))
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    changed = stir(ad.attach(toys.make_bert(), {"query": ad.LoRA(rank=2), "classifier": ad.LoRA(rank=2)}))
    config = _config(given(changed, tmp_path / "changed"))
    assert (config["task_type"], config["modules_to_save"]) == (None, None)


def test_norms_alone_are_ln_tuning_and_beside_others_saved_modules(tmp_path):
    norms = stir(ad.attach(toys.make_bert(), ad.LNTuning()))
    assert _config(given(norms, tmp_path / "norms"))["peft_type"] == "LN_TUNING"
    both = stir(ad.attach(toys.make_bert(), {"query": ad.LoRA(rank=2), "norm": ad.LNTuning()}))
    config = _config(given(both, tmp_path / "both"))
    assert config["peft_type"] == "LORA" and len(config["modules_to_save"]) == 6


def test_norms_of_another_size_are_refused(tmp_path):
    config = peft.LNTuningConfig(target_modules=["norm"])
    by_peft(toys.make_llama, config, tmp_path / "peft", IDS)
    key = "base_model.model.model.norm.ln_tuning_layers.weight"
    with pytest.raises(AddendaError, match=r"ln_tuning_layers.weight is \[9\], and the model's \[8\]"):
        take(toys.make_llama(), edited(tmp_path / "peft", None, lambda t: t.__setitem__(key, torch.ones(9))))
