"""`addenda merge`."""

import pytest
import torch
import transformers

import addenda as ad
from shared import call, stir
from tiny_models import make_llama, make_tokenizer


@pytest.fixture
def folder(tmp_path):
    make_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "model")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    stir(ad.attach(model, "lora:rank=2"), 0.3).save(tmp_path / "a.safetensors")
    return tmp_path


def test_merge_and_what_it_says(folder, capsys):
    call("merge", "--model", folder / "model", "--adapter", folder / "a.safetensors", "--out", folder / "out")
    said = capsys.readouterr()
    assert "merged 14 sites in float32" in said.out and "largest difference" in said.out
    assert "14 weights compared with those of training" in said.err
    merged = transformers.LlamaForCausalLM.from_pretrained(folder / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(1, 13)[None]
    assert (merged(ids).logits - model(ids).logits).abs().max() > 1e-3
    ad.load(model, folder / "a.safetensors")
    assert (merged(ids).logits - model(ids).logits).abs().max() < 1e-5
    call("merge", "-m", folder / "model", "-a", folder / "a.safetensors", "-o", folder / "out", code=2)
    assert "is there already" in capsys.readouterr().err


def test_no_check_says_so_and_several_files_add_up(folder, capsys):
    files = ("-a", folder / "a.safetensors", "-a", folder / "a.safetensors")
    call("merge", "-m", folder / "model", *files, "-o", folder / "out", "--no-check", "--dtype", "bfloat16")
    assert "not checked" in capsys.readouterr().out
    key = "model.layers.0.mlp.up_proj.weight"
    one = transformers.LlamaForCausalLM.from_pretrained(folder / "model")
    W = one.state_dict()[key].clone()
    ad.load(one, folder / "a.safetensors")
    ad.merge(one)
    twice = transformers.LlamaForCausalLM.from_pretrained(folder / "out").state_dict()[key]
    assert torch.allclose(twice.float(), W + 2 * (one.state_dict()[key] - W), rtol=1e-2, atol=1e-6)


def test_a_refusal_is_a_sentence(folder, capsys):
    call("merge", "-m", folder / "model", "-a", folder / "b.safetensors", "-o", folder / "out", code=2)
    assert "There is no file" in capsys.readouterr().err and not (folder / "out").exists()


def test_another_base_is_not_said_to_be_the_one_of_training(folder, capsys):
    make_llama(seed=1).save_pretrained(folder / "other")
    call("merge", "-m", folder / "other", "-a", folder / "a.safetensors", "-o", folder / "out", code=2)
    said = capsys.readouterr().err
    assert "was trained on other base weights" in said and "is the one of training" not in said
    assert not (folder / "out").exists()
