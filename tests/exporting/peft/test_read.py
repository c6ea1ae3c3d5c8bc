"""Folders that are damaged, that contradict themselves or the model, or that say what is not read: refused, whole."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import toys
from addenda.core.base.errors import AddendaError
from peft_folders import CONFIG, WEIGHTS, by_peft, edited, outputs, take
from shared import bits, same_bits

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING, ONE = "base_model.model.model.embed_tokens", torch.ones(1, 8)
CATASTROPHE = "(a+)+" * 8


def make_untied() -> nn.Module:
    return toys.make_llama(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A LoRA with a head, by PEFT."""
    folder = tmp_path_factory.mktemp("peft") / "saved"
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    by_peft(make_untied, config, folder, IDS)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "folder"))


def refused(folder: Path, words: str, make=make_untied) -> str:
    """Assert that a folder is refused with these words, and that nothing of it stays on the model."""
    model = make()
    before, classes = bits(model), [type(m) for m in model.modules()]
    base = outputs(model, IDS) if make is make_untied else None
    with pytest.raises(AddendaError, match=words) as error:
        take(model, folder)
    assert same_bits(before, bits(model)) and [*before] == [*model.state_dict()]
    assert classes == [type(m) for m in model.modules()]
    assert base is None or torch.equal(base, outputs(model, IDS))
    return str(error.value)


def pop(key: str):
    return lambda tensors: tensors.pop(key)


def put(key: str, tensor: torch.Tensor):
    return lambda tensors: tensors.__setitem__(key, tensor)


def rename(old: str, new: str):
    def change(tensors: dict) -> None:
        for key in [*tensors]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


DAMAGED = {
    "another rank in the config": ({"r": 3}, None, r"\[2, 8\], and the config and the model say \[3, 8\]"),
    "one pattern": ({"rank_pattern": {"v_proj": 1}}, None, r"v_proj: lora_A.weight is \[2, 8\]"),
    "another shape": (None, put(f"{Q0}.lora_A.weight", torch.ones(2, 9)), r"\[2, 9\]"),
    "a factor missing": (None, pop(f"{Q0}.lora_B.weight"), "layers.0.self_attn.q_proj lacks lora_B.weight"),
    "a module without tensors": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, None, "k_proj .*no tensors"),
    "a regex without tensors": ({"target_modules": r".*\.(q_proj|v_proj|o_proj)"}, None, "o_proj .*no tensors"),
    "tensors without a name": ({"target_modules": ["q_proj"]}, None, "v_proj .*has tensors, and .*does not name it"),
    "saved modules without tensors": ({"modules_to_save": ["lm_head", "norm"]}, None, "modules_to_save names .*norm"),
    "unnamed copies": (None, put("base_model.model.model.norm.weight", torch.ones(8)), "does not name it"),
    "a head of another size": (None, put("base_model.model.lm_head.weight", torch.ones(31, 8)), "was resized"),
    "the adapter's name in keys": (None, rename("lora_A.weight", "lora_A.default.weight"), "name of an adapter"),
    "another model's keys": (None, rename("self_attn", "attention"), "model has no .*attention"),
    "no prefix": (None, rename("base_model.model.model", "model"), "does not begin with base_model"),
    "layers without a name": ({"layers_to_transform": [0]}, None, r"\*.self_attn.q_proj .*layers_to_transform"),
    "whole numbers": (None, put(f"{Q0}.lora_A.weight", torch.ones(2, 8, dtype=torch.int32)), "whole numbers .int32"),
    "no number": (None, put(f"{Q0}.lora_A.weight", torch.full((2, 8), float("nan"))), "not finite"),
    "an unknown option": ({"use_sorcery": 3}, None, "use_sorcery='3', which addenda does not read"),
    "an unknown start": ({"init_lora_weights": "magic"}, None, "no start that addenda knows"),
    "a rank that is none": ({"r": "two"}, None, "where a number is wanted"),
    "a rank of nothing": ({"r": 0}, None, "the rank 0"),
    "a pattern that never ends": ({"rank_pattern": {CATASTROPHE: 3}}, None, "could take for ever"),
    "a pattern that is none": ({"rank_pattern": {"[": 3}}, None, "no path or expression"),
    "patterns that are none": ({"alpha_pattern": [1]}, None, "a dict by path"),
    "parameters that are none": ({"target_parameters": "x"}, None, "a list of paths"),
    "names that are none": ({"modules_to_save": "lm_head"}, None, "a list of names"),
    "a type that is none": ({"peft_type": 7}, None, "no config of PEFT"),
    "a type without a counterpart": ({"peft_type": "RANDLORA"}, None, "RANDLORA adapter of PEFT: it pairs its bases"),
    "prompts": ({"peft_type": "PREFIX_TUNING"}, None, "lengthens the sequence"),
    "aLoRA": ({"alora_invocation_tokens": [5]}, None, "aLoRA"),
    "QALoRA": ({"use_qalora": True}, None, "QALoRA"),
    "BD-LoRA": ({"use_bdlora": {"nblocks": 2}}, None, "BD-LoRA"),
    "KaSA": ({"kasa_config": {"beta": 1}}, None, "KaSA"),
    "VeLoRA": ({"velora_config": {"num_groups": 2}}, None, "VeLoRA"),
    "MonteCLoRA": ({"monteclora_config": {"N": 2}}, None, "MonteCLoRA"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, None, "Arrow"),
    "more layers": ({"layer_replication": [[0, 2], [1, 2]]}, None, "layer_replication"),
    "Megatron": ({"megatron_config": {"x": 1}}, None, "Megatron"),
    "a bias of B": ({"lora_bias": True}, None, "lora_bias"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, None, "path_initial_model_for_weight_conversion"),
    "CorDA": ({"init_lora_weights": "corda"}, None, "CorDA"),
    "LoftQ": ({"init_lora_weights": "loftq"}, None, "LoftQ"),
    "PiSSA by chance": ({"init_lora_weights": "pissa_niter_4"}, None, "depend on chance"),
    "DoRA without magnitudes": ({"use_dora": True}, None, "lacks lora_magnitude_vector"),
    "tokens of no config": (None, put(f"{EMBEDDING}.token_adapter.trainable_tokens_delta", ONE), "list of tokens"),
}  # fmt: skip


@pytest.mark.parametrize("row", DAMAGED)
def test_a_folder_that_contradicts_itself_is_refused_whole(row, folder):
    config, tensors, words = DAMAGED[row]
    refused(edited(folder, config, tensors), words)


def test_the_nearest_names_are_given_for_keys_of_another_model(folder):
    error = refused(edited(folder, None, rename("q_proj", "query_proj")), "query_proj")
    assert "q_proj" in error.replace("query_proj", "")


def test_folders_without_sound_files_are_refused(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-40])
    refused(folder, "no sound safetensors")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, "a pickle, which can run code")
    (folder / "adapter_model.bin").unlink()
    refused(folder, f"has no {WEIGHTS}")


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"peft_type": null}', "\x00"])
def test_configs_that_are_none_are_refused(text, folder):
    (folder / CONFIG).write_text(text, encoding="utf-8")
    refused(folder, "JSON|no config of PEFT")


def test_a_huge_config_is_not_read(folder):
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "x": "y" * (1 << 22)}), encoding="utf-8")
    refused(folder, "which no config of PEFT has")
    (folder / CONFIG).unlink()
    refused(folder, f"has no {CONFIG}")


def test_a_change_of_one_of_two_tied_weights_is_refused(tmp_path):
    by_peft(make_untied, peft.LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path / "one", IDS)
    refused(
        tmp_path / "one", "share a weight, and the adapter changes it for model.embed_tokens alone", toys.make_llama
    )
    both = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"])
    by_peft(make_untied, both, tmp_path / "both", IDS)
    refused(tmp_path / "both", "the adapter changes it in 2 ways", toys.make_llama)
    copies = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    by_peft(make_untied, copies, tmp_path / "copies", IDS)
    refused(tmp_path / "copies", "share a weight, and the adapter trains lm_head.weight apart", toys.make_llama)


def test_a_grown_vocabulary_is_refused_and_a_saved_table_is_not_in_the_way(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    wanted = by_peft(make_untied, config, tmp_path / "kept", IDS)
    model = make_untied()
    take(model, tmp_path / "kept")
    assert (outputs(model, IDS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    def grown() -> nn.Module:
        return toys.make_llama(tie_word_embeddings=False, vocab_size=40)

    by_peft(grown, peft.LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path / "grown", IDS)
    refused(tmp_path / "grown", "vocabulary was resized")


def test_raw_parameters_that_the_config_does_not_name_are_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    by_peft(toys.make_mixtral, config, tmp_path / "moe", IDS)
    edited(tmp_path / "moe", {"target_parameters": ["experts.down_proj"]})
    refused(tmp_path / "moe", "stands 2 deep, and the config's target_parameters name 1", toys.make_mixtral)
