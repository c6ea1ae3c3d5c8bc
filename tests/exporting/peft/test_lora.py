"""PEFT's LORA family, both ways, row by row: PEFT → addenda, addenda → PEFT, and PEFT → addenda → PEFT."""

import peft
import pytest
import torch
from torch import nn

import toys
from peft_folders import by_peft, given, in_addenda, in_peft, outputs, same

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_untied() -> nn.Module:
    return toys.make_llama(tie_word_embeddings=False)


def make_conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding=1), nn.Tanh(), nn.Unflatten(2, (2, 4)), nn.Conv2d(8, 6, 3, stride=1, padding=1),
        nn.Tanh(), nn.Unflatten(3, (2, 2)), nn.Conv3d(6, 6, 1), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


def make_conv2d() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5))


LLAMA = (toys.make_llama, IDS)
UNTIED = (make_untied, IDS)
GPT2 = (toys.make_gpt2, IDS)
BERT = (toys.make_bert, IDS)
MIXTRAL = (toys.make_mixtral, IDS)
CONV2D = (make_conv2d, torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
CONV = (make_conv, torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)))


def lora(**options):
    return peft.LoraConfig(**({"r": 2, "lora_alpha": 8, "target_modules": ATTENTION} | options))


READ = {
    "lora": (LLAMA, lambda: lora()),
    "rslora": (LLAMA, lambda: lora(use_rslora=True)),
    "patterns": (
        LLAMA,
        lambda: lora(rank_pattern={"k_proj": 1, "layers.1.self_attn.q_proj": 3}, alpha_pattern={r".*\.v_proj": 3}),
    ),
    "rslora patterns": (LLAMA, lambda: lora(use_rslora=True, rank_pattern={"k_proj": 1}, alpha_pattern={"q_proj": 5})),
    "rank above the width": (LLAMA, lambda: lora(r=8)),
    "expression": (LLAMA, lambda: lora(target_modules=r".*layers\.[01]\.mlp\.(up|down)_proj")),
    "all linear": (LLAMA, lambda: lora(target_modules="all-linear")),
    "gpt2": (GPT2, lambda: lora(target_modules=["c_attn", "c_fc", "mlp.c_proj"], fan_in_fan_out=True)),
    "bert classifier": (BERT, lambda: lora(target_modules=["query", "value"], task_type="SEQ_CLS")),
    "bert saved modules": (
        BERT,
        lambda: lora(target_modules=["query"], modules_to_save=["classifier", "pooler", "LayerNorm"]),
    ),
    "embedding and head": (UNTIED, lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "tied": (LLAMA, lambda: lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    "tied saved": (LLAMA, lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "saved head": (UNTIED, lambda: lora(modules_to_save=["lm_head"])),
    "bias of its layers": (GPT2, lambda: lora(target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)),
    "all biases": (BERT, lambda: lora(target_modules=["query"], bias="all")),
    "conv": (CONV, lambda: lora(target_modules=["0", "3", "6", "8"])),
    "moe": (
        MIXTRAL,
        lambda: lora(target_parameters=["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]),
    ),
    "moe one parameter": (
        MIXTRAL,
        lambda: lora(
            target_modules=[], target_parameters=["experts.down_proj"], rank_pattern={"0.mlp.experts.down_proj": 3}
        ),
    ),
    "dora": (LLAMA, lambda: lora(use_dora=True)),
    "dora rslora": (LLAMA, lambda: lora(use_dora=True, use_rslora=True, rank_pattern={"k_proj": 1})),
    "dora gpt2": (GPT2, lambda: lora(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)),
    "dora conv": (CONV, lambda: lora(target_modules=["0", "3", "6", "8"], use_dora=True)),
    "pissa": (LLAMA, lambda: lora(init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])),
    "pissa gpt2": (GPT2, lambda: lora(init_lora_weights="pissa", target_modules=["c_attn"], fan_in_fan_out=True)),
    "pissa wide": (LLAMA, lambda: lora(init_lora_weights="pissa", r=4)),
    "pissa dora": (LLAMA, lambda: lora(init_lora_weights="pissa", use_dora=True, target_modules=["up_proj"])),
    "olora": (LLAMA, lambda: lora(init_lora_weights="olora", target_modules=["q_proj", "up_proj"], lora_alpha=1)),
    "gaussian": (LLAMA, lambda: lora(init_lora_weights="gaussian")),
    "orthogonal": (LLAMA, lambda: lora(init_lora_weights="orthogonal")),
    "mica": (LLAMA, lambda: lora(init_lora_weights="mica")),
    "tokens": (UNTIED, lambda: lora(trainable_token_indices=[5, 3, 10])),
    "tokens tied": (LLAMA, lambda: lora(trainable_token_indices={"embed_tokens": [5, 3, 10]})),
    "mixed": (
        UNTIED,
        lambda: lora(trainable_token_indices={"embed_tokens": [5, 10]}, modules_to_save=["lm_head", "norm"]),
    ),
    "trainable tokens": (UNTIED, lambda: peft.TrainableTokensConfig(token_indices=[10, 5, 6])),
    "trainable tokens tied": (LLAMA, lambda: peft.TrainableTokensConfig(token_indices=[10, 5, 6])),
    "norms": (LLAMA, lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "norms with bias": (
        BERT,
        lambda: peft.LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["classifier"]),
    ),
    "adalora": (LLAMA, lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=ATTENTION)),
    "adalora gpt2": (
        GPT2,
        lambda: peft.AdaLoraConfig(
            init_r=3, total_step=10, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "adalora conv": (CONV2D, lambda: peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=["0", "3"])),
    "vera": (LLAMA, lambda: peft.VeraConfig(r=3, d_initial=1.0, target_modules=["q_proj", "v_proj", "up_proj"])),
    "vera wide": (LLAMA, lambda: peft.VeraConfig(r=16, d_initial=1.0, target_modules=["q_proj", "down_proj"])),
    "delora": (LLAMA, lambda: peft.DeloraConfig(r=2, delora_lambda=2.0, target_modules=ATTENTION)),
    "shira": (LLAMA, lambda: peft.ShiraConfig(r=1, target_modules=["q_proj", "up_proj"])),
}  # fmt: skip


@pytest.mark.parametrize("row", READ)
def test_a_folder_of_peft_acts_alike_here_and_after_a_way_back(row, tmp_path):
    (make, batch), config = READ[row]
    base = outputs(make(), batch)
    wanted = by_peft(make, config(), tmp_path / "peft", batch, size=0.3)
    adapter, found = in_addenda(make, tmp_path / "peft", batch)
    same(found, wanted, base)
    same(in_peft(make, given(adapter, tmp_path / "back"), batch), wanted, base)


@pytest.mark.parametrize("row", ["lora", "dora", "pissa", "mixed"])
def test_on_a_base_in_half_precision_the_difference_is_of_its_rounding(row, tmp_path):
    (make, batch), config = READ[row]
    base = outputs(make().bfloat16(), batch)
    wanted = by_peft(lambda: make().bfloat16(), config(), tmp_path / "peft", batch, size=0.3)
    adapter, found = in_addenda(lambda: make().bfloat16(), tmp_path / "peft", batch)
    same(found, wanted, base, limit=2.0**-4)
    same(in_peft(lambda: make().bfloat16(), given(adapter, tmp_path / "back"), batch), wanted, base, limit=2.0**-4)
