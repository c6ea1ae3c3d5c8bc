"""addenda → PEFT: every method that passes exactly acts alike there, alone and beside others."""

import json

import pytest
import torch
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
