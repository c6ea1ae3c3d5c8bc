"""What vLLM would make of a folder is read by its own rules, and acts as the adapter that was written."""

import json

import pytest
import torch
from bench.served import here, llama, moved
from safetensors.torch import load_file, save_file

import addenda as ad
from addenda.exporting.install import install
from addenda.exporting.vllm import read


@pytest.fixture
def written(tmp_path):
    """A model, its adapter, and the folder of that."""
    model = llama()
    adapter = moved(ad.attach(model, ad.LoRA(rank=4, alpha=8), targets="linear", name="a"))
    ad.export(adapter, "vllm", tmp_path / "out")
    return model, adapter, tmp_path / "out"


def changed(folder, config=None, tensors=None):
    at, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    at.write_text(json.dumps(json.loads(at.read_text()) | (config or {})))
    if tensors is not None:
        save_file(tensors(load_file(weights)), weights)


def test_scales_are_alpha_over_rank_or_its_root_by_the_first_pattern_that_matches(written):
    model, _, folder = written
    one = read(folder, model).sites["model.layers.1.mlp.up_proj"][1]["B"]
    changed(folder, {"use_rslora": True, "lora_alpha": 8, "alpha_pattern": {"layers.1.mlp.up_proj": 6, "up_proj": 1}})
    other = read(folder, model).sites["model.layers.1.mlp.up_proj"][1]["B"]
    torch.testing.assert_close(other, one * 6 / 4**0.5)
    first = read(folder, model).sites["model.layers.0.self_attn.q_proj"][1]["B"]
    assert first.shape == (64, 4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks
def test_a_folder_of_peft_is_read_as_peft_acts(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"],
                             rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3})  # fmt: skip
    trained = peft.get_peft_model(model, config).eval()
    for p in trained.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    trained.save_pretrained(tmp_path / "peft")
    ids = [[3, 7, 1, 9, 30]]
    expected = here(trained, ids)[0]
    base = llama()
    forms = read(tmp_path / "peft", base)
    before = here(base, ids)[0]
    install(base, forms.sites, name="a", activate=True)
    torch.testing.assert_close(here(base, ids)[0], expected, rtol=0, atol=1e-5)
    assert (before - expected).abs().max() > 0.01


def test_gate_and_up_that_share_no_factor_are_read_as_the_sum_of_their_ranks(mixtral, tmp_path):
    adapter = moved(ad.attach(mixtral, ad.LoRA(rank=2), targets="*.experts.gate_up_proj", name="a"))
    ad.export(adapter, "vllm", tmp_path / "out")
    changed(tmp_path / "out", tensors=lambda t: {k: v * 2 if "w3.lora_A" in k else v for k, v in t.items()})
    method, p = read(tmp_path / "out", mixtral).sites["model.layers.0.mlp.experts.gate_up_proj"]
    assert method.rank == 4
    change = (p["B"] @ p["A"])[1]
    before = adapter_change(adapter)[1]
    torch.testing.assert_close(change[:16], before[:16])
    torch.testing.assert_close(change[16:], 2 * before[16:])


def adapter_change(adapter):
    from addenda.exporting.pairs import low_rank

    pair = low_rank(adapter)["model.layers.0.mlp.experts.gate_up_proj"]
    return pair.B @ pair.A


def test_what_vllm_would_serve_as_the_base_is_refused(written):
    model, _, folder = written
    changed(folder, tensors=lambda t: {k.replace("model.model.model", "model.model"): v for k, v in t.items()})
    with pytest.raises(ad.AddendaError, match="the base answers without a word"):
        read(folder, model)


def test_one_weight_that_is_changed_in_two_ways_is_refused(tmp_path):
    model = llama(tie_word_embeddings=True)
    adapter = moved(ad.attach(model, ad.LoRA(rank=3), targets="model.embed_tokens.weight", name="a"))
    ad.export(adapter, "vllm", tmp_path / "out")
    changed(tmp_path / "out", tensors=lambda t: {k: v * 2 if "lm_head.lora_A" in k else v for k, v in t.items()})
    with pytest.raises(ad.AddendaError, match="share one weight"):
        read(tmp_path / "out", model)
