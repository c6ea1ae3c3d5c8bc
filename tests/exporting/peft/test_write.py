"""addenda → PEFT: every method that passes exactly acts alike there, alone and beside others."""

import json

import pytest
import torch
import transformers
from torch import nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.site.site import site_at
from addenda.core.site.targets import resolve
from addenda.exporting.install import install
from addenda.exporting.peft.table import conversion_for
from peft_checks import kernel_of_boft
from peft_folders import CONFIG, given, in_addenda, in_peft, outputs, same
from shared import EVERY, HIDDEN, METHODS, NAMES, attach, stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def make_untied() -> nn.Module:
    return toys.make_llama(tie_word_embeddings=False, hidden_size=16, intermediate_size=24)


def make_grouped() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))


SIGNAL = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
LARGE = {"full", "bitfit", "ln-tuning"}  # names of methods that need no targets of linear layers


def _exact(name: str) -> bool:
    model = make_untied()
    method = METHODS[name]
    targets = method.targets if name in LARGE | {"trainable-tokens"} else "linear"
    return all(conversion_for(method, s)[1].kind == "exact" for s in resolve(model, targets))


EXACT = [name for name in NAMES if name != "bitfit" and _exact(name)]


def test_what_is_low_rank_sparse_or_a_copy_passes():
    assert set(EXACT) >= {
        "lora", "rslora", "pissa", "olora", "lora-ga", "milora", "eva", "adalora", "dylora", "delora", "dora", "vera",
        "mosl", "vb-lora", "lora-xs", "shira", "patch", "full", "ln-tuning", "trainable-tokens",
    }  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_every_method_that_passes_exactly_acts_alike_in_peft(name, tmp_path, monkeypatch):
    if name == "boft":
        kernel_of_boft(monkeypatch)
    model = make_untied()
    base = outputs(model, IDS)
    targets = None if name in LARGE | {"trainable-tokens"} else "linear"
    adapter = stir(attach(model, name, IDS, targets=targets), 0.2)
    wanted = outputs(model, IDS)
    folder = given(adapter, tmp_path / "out")
    same(in_peft(make_untied, folder, IDS), wanted, base)
    same(in_addenda(make_untied, folder, IDS)[1], wanted, base)


SEQUENCES = {"input_ids": IDS, "decoder_input_ids": IDS}


def llama():
    return toys.make_llama()


ROWS = {
    "gpt2": (toys.make_gpt2, IDS, {"c_attn": ad.LoRA(rank=2), "c_fc": ad.LoRA(rank=3, alpha=5)}, {}),
    "bert with its head": (toys.make_bert, IDS, {"linear": ad.LoRA(rank=2)}, {"also_train": ["classifier"]}),
    "bert biases": (toys.make_bert, IDS, {"bias": "bitfit"}, {}),
    "bert lora and biases": (toys.make_bert, IDS, {"value": ad.LoRA(rank=2), "value.bias": "bitfit"}, {}),
    "grouped conv": (make_grouped, SIGNAL, {"0": ad.LoRA(rank=2, alpha=3), "3": ad.LoRA(rank=2)}, {}),
    "tied embedding": (llama, IDS, {"model.embed_tokens.weight": ad.LoRA(rank=2), "q_proj": ad.LoRA(rank=1)}, {}),
    "tied head": (llama, IDS, {"q_proj": ad.LoRA(rank=2)}, {"also_train": ["model.embed_tokens"]}),
    "tied tokens": (llama, IDS, {"model.embed_tokens.weight": "trainable-tokens:tokens=5+10+15"}, {}),
    "three places of one table": (
        toys.make_t5, SEQUENCES, {"shared.weight": ad.LoRA(rank=2), "q": ad.LoRA(rank=2)}, {},
    ),
    "a table of three places": (toys.make_t5, SEQUENCES, {"q": ad.LoRA(rank=2)}, {"also_train": ["shared"]}),
    "experts": (
        toys.make_mixtral,
        IDS,
        {"*.gate_up_proj": ad.LoRA(rank=2), "*.down_proj": ad.LoRA(rank=3), "q_proj": ad.LoRA(rank=1)},
        {},
    ),
    "all low rank": (
        make_untied,
        IDS,
        {
            "q_proj": ad.LoRA(rank=2, alpha=6), "k_proj": ad.LoRA(rank=2, scaling="rs"), "v_proj": ad.DyLoRA(rank=3),
            "o_proj": ad.AdaLoRA(rank=3, target_rank=2), "up_proj": ad.LoRA(rank=2, origin="pissa"),
            "down_proj": ad.DeLoRA(rank=2),
        },
        {},
    ),
    "dora among lora": (
        make_untied, IDS, {"q_proj": ad.DoRA(rank=2), "k_proj": ad.LoRA(rank=2), "mlp.*": ad.LoRA(rank=1)}, {},
    ),
    "lora, tokens, norms, head": (
        make_untied,
        IDS,
        {
            "q_proj": ad.LoRA(rank=2), "model.embed_tokens": "trainable-tokens:tokens=5+10+15", "norm": "ln-tuning",
        },
        {"also_train": ["lm_head"]},
    ),
    "shira and norms": (make_untied, IDS, {"q_proj": "shira:density=0.1", "norm": "ln-tuning"}, {}),
    "adalora of two ranks": (
        make_untied, IDS,
        {"q_proj": ad.AdaLoRA(rank=3, target_rank=2), "o_proj": ad.AdaLoRA(rank=2, target_rank=1)}, {},
    ),
}  # fmt: skip


def _methods(spec: dict) -> dict:
    """Names with options as methods; a target that others name more exactly stays for the rest."""
    return {t: ad.core.method.catalogue.build(m) if isinstance(m, str) else m for t, m in spec.items()}


@pytest.mark.parametrize("row", ROWS)
def test_adapters_of_several_methods_and_kinds_of_layer_act_alike_in_peft(row, tmp_path):
    make, batch, spec, more = ROWS[row]
    model = make()
    base = outputs(model, batch)
    adapter = stir(ad.attach(model, _methods(spec), **more), 0.4)
    wanted = outputs(model, batch)
    folder = given(adapter, tmp_path / "out")
    same(in_peft(make, folder, batch), wanted, base)
    same(in_addenda(make, folder, batch)[1], wanted, base)


def test_rank_stabilised_stays_so_and_alphas_stay_whole(tmp_path):
    model = make_untied()
    adapter = stir(ad.attach(model, ad.LoRA(rank=2, alpha=6, scaling="rs"), targets="linear"))
    config = json.loads((given(adapter, tmp_path / "out") / CONFIG).read_text(encoding="utf-8"))
    assert (config["use_rslora"], config["lora_alpha"], config["r"], config["alpha_pattern"]) == (True, 6, 2, {})


def test_patterns_name_the_whole_path_where_another_ends_alike(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 8), nn.ModuleDict({"a": nn.Linear(8, 8)})

        def forward(self, x):
            return self.b["a"](torch.tanh(self.a(x)))

    x = torch.randn(3, 8)
    model = Both()
    base = outputs(model, x)
    forms = {p: (ad.LoRA(rank=r), {"A": torch.randn(r, 8), "B": torch.randn(8, r)}) for p, r in (("a", 3), ("b.a", 1))}
    adapter = install(model, forms, name="both", activate=True)
    wanted = outputs(model, x)
    folder = given(adapter, tmp_path / "out")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    assert config["target_modules"] == ["a", "b.a"] and [*config["rank_pattern"]] in (["^a"], ["b.a"])
    same(in_peft(Both, folder, x), wanted, base)


def test_every_method_has_a_route_at_every_kind_of_site(tiny_conv):
    models = [make_untied(), toys.make_gpt2(), toys.make_mixtral(), tiny_conv]
    paths = [
        "model.layers.0.mlp.up_proj",
        "transformer.h.0.mlp.c_fc",
        "model.layers.0.mlp.experts.gate_up_proj",
        "conv2",
    ]
    places = [site_at(m, p) for m, p in zip(models, paths, strict=True)]
    places += [site_at(models[0], "model.embed_tokens"), site_at(models[2], "model.layers.0.mlp.gate.weight")]
    for name in EVERY:
        for site in places:
            conversion, route = conversion_for(METHODS[name], site)
            assert (conversion is not None) == (route.kind == "exact") and route.why
            assert name not in HIDDEN or route.kind == "refused"


def test_what_peft_computes_otherwise_is_refused_with_the_reason(tiny_conv, tmp_path):
    adapter = stir(ad.attach(tiny_conv, ad.LoRA(rank=2), targets="conv"))
    with pytest.raises(AddendaError, match=r"conv2.*pads with zeros where the layer has padding_mode='circular'"):
        given(adapter, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_types_that_mix_are_refused_with_both_names(tmp_path):
    adapter = stir(ad.attach(make_untied(), {"q_proj": "shira:density=0.1", "o_proj": "vera:rank=16"}))
    with pytest.raises(AddendaError, match=r"2 types of PEFT \(SHIRA, VERA\)"):
        given(adapter, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def _small(name: str, config: str, **sizes) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()


def make_whisper() -> nn.Module:
    sizes = {"vocab_size": toys.VOCAB, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 8}
    widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_start_token_id": 1, "pad_token_id": 0}
    return _small("WhisperForConditionalGeneration", "WhisperConfig", **sizes, **heads, **widths)


def make_wav2vec2() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ears = {"conv_dim": [8], "conv_kernel": [4], "conv_stride": [4], "num_conv_pos_embeddings": 4}
    groups = {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    return _small("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **sizes, **ears, **groups)


def make_llava() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": toys.VOCAB, **sizes}
    eyes = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **sizes}
    return _small(
        "LlavaForConditionalGeneration", "LlavaConfig", text_config=text, vision_config=eyes, image_token_index=1
    )


NOISE = torch.Generator().manual_seed(0)
TASKS = {
    "whisper": (make_whisper, {"input_features": torch.randn(1, 4, 16, generator=NOISE), "decoder_input_ids": IDS[:1]}),
    "wav2vec2": (make_wav2vec2, {"input_values": torch.randn(1, 64, generator=NOISE)}),
    "llava": (make_llava, {"input_ids": IDS[:, 1:] + 2}),
}


@pytest.mark.parametrize("row", TASKS)
def test_a_model_that_peft_would_call_otherwise_for_its_task_has_none(row, tmp_path):
    make, batch = TASKS[row]
    model = make()
    base = outputs(model, batch)
    adapter = stir(ad.attach(model, ad.LoRA(rank=2), targets=["*q_proj", "*v_proj"]), 0.4)
    folder = given(adapter, tmp_path / "out")
    assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["task_type"] is None
    same(in_peft(make, folder, batch), outputs(model, batch), base)


def test_a_task_that_peft_calls_as_the_model_is_named(tmp_path):
    for make, task in ((toys.make_t5, "SEQ_2_SEQ_LM"), (toys.make_gpt2, "CAUSAL_LM"), (toys.make_bert, "SEQ_CLS")):
        folder = given(stir(ad.attach(make(), ad.LoRA(rank=2), targets="linear")), tmp_path / task)
        assert json.loads((folder / CONFIG).read_text(encoding="utf-8"))["task_type"] == task


def make_mamba() -> nn.Module:
    return _small(
        "MambaForCausalLM", "MambaConfig", vocab_size=toys.VOCAB, hidden_size=8, num_hidden_layers=1, state_size=2
    )


OUT = "backbone.layers.0.mixer.out_proj"


@pytest.mark.parametrize("method", [ad.LoRA(rank=2), ad.AdaLoRA(rank=3, target_rank=2), ad.DoRA(rank=2)], ids=repr)
def test_lora_where_peft_loads_none_in_a_mamba_is_refused_before_and_at_the_export(method, tmp_path):
    model = make_mamba()
    assert [*ad.passage(model, method, "peft", targets=["*in_proj", "*out_proj"]).refused] == [OUT]
    adapter = stir(ad.attach(model, method, targets=["*in_proj", "*out_proj"]))
    with pytest.raises(AddendaError, match="PEFT loads no LORA at the out_proj of a mamba; leave it out"):
        ad.export(adapter, "peft", tmp_path / "out")


def test_no_way_leads_to_a_lora_that_peft_does_not_load(tmp_path):
    raw = stir(ad.attach(make_mamba(), ad.LoRA(rank=1), targets=["*conv1d.weight", "*in_proj"]))
    other = stir(ad.attach(make_mamba(), "miss:rank=2", targets="linear"))
    given(other, tmp_path / "in its own form PEFT loads it")
    for adapter, options in ((raw, {}), (other, {"rank": 2})):
        with pytest.raises(AddendaError, match=r"PEFT loads no LORA at the (out_proj|conv1d) of a mamba"):
            ad.export(adapter, "peft", tmp_path / "out", **options)
    mixed = stir(ad.attach(make_mamba(), {"*out_proj": "lora-xs:rank=2", "*in_proj": "lora:rank=2"}))
    with pytest.raises(AddendaError, match="PEFT loads no LORA at the out_proj"):
        given(mixed, tmp_path / "mixed")


def test_a_raw_parameter_of_the_model_itself_is_refused(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.matrix, self.layer = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x @ self.matrix.T)

    adapter = stir(ad.attach(Own(), ad.LoRA(rank=2), targets=["matrix", "layer"]))
    with pytest.raises(AddendaError, match=r"matrix.*PEFT has no place for a parameter of the model itself"):
        ad.export(adapter, "peft", tmp_path / "out", probe=torch.randn(3, 8))
