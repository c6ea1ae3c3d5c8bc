"""The names of kohya's keys mean the modules that other programs mean by them."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.exporting.kohya.names import PARTS, flat_names, original_names, part_of, split
from diffusion import make_dit, make_text_encoder, make_unet, weights


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("lora_unet_a_b.lora_up.weight", ("lora_unet", "a_b", "lora_up.weight")),
        ("lora_te_text_model_x.alpha", ("lora_te", "text_model_x", "alpha")),
        ("lora_te2_x.hada_w1_a", ("lora_te2", "x", "hada_w1_a")),
        ("lycoris_x_0.lokr_w1", ("lycoris", "x_0", "lokr_w1")),
        ("lora_unetx.alpha", None),
        ("lora_unet_x", None),
        ("unet.x.lora_up.weight", None),
        ("lora_te9_x.alpha", None),
        ("", None),
    ],
)
def test_a_key_has_three_parts(key, parts):
    assert split(key) == parts
    assert parts is None or parts[0] in PARTS


def test_two_modules_may_have_one_flat_name():
    inner = nn.Sequential()
    inner.c, inner.d = nn.Linear(2, 2), nn.ReLU()
    model = nn.Sequential()
    model.a_b, model.a = nn.Sequential(), nn.Sequential()
    model.a_b.c, model.a.b = nn.Linear(2, 2), inner
    assert flat_names(model, "lycoris") == {"a_b_c": ["a_b.c", "a.b.c"]}


def test_adapters_are_no_modules_of_the_model(tiny):
    before = flat_names(tiny, "lycoris")
    ad.attach(tiny, "lora:rank=2")
    assert flat_names(tiny, "lycoris") == before and "layers_0_self_attn_q_proj" in before


def test_text_encoders_are_called_as_they_were():
    first, second = make_text_encoder(), make_text_encoder(projection=True)
    name = "text_model_encoder_layers_0_self_attn_q_proj"
    assert flat_names(first, "lora_te1")[name][0].endswith("encoder.layers.0.self_attn.q_proj")
    assert flat_names(second, "lora_te2")[name] == ["text_model.encoder.layers.0.self_attn.q_proj"]
    assert (part_of(first), part_of(second)) == ("lora_te", "lora_te2")
    assert part_of(nn.Linear(1, 1)) == "lycoris"


UNETS = {
    "sdxl": {},
    "sd": {"linear": False, "addition_embed_type": None},
    "three levels": {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
    },
    "attention first": {
        "block_out_channels": (8, 8, 8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "two layers": {"layers_per_block": 2},
}


@pytest.mark.parametrize("case", UNETS)
def test_the_original_names_are_those_that_diffusers_converts(case):
    unet = make_unet(**UNETS[case])
    convert = pytest.importorskip("diffusers.loaders.single_file_utils").convert_ldm_unet_checkpoint
    names = original_names(unet)
    marks = {path: torch.full((1,), float(i)) for i, path in enumerate(weights(unet))}
    original = {name: path for name, path in names.items() if path in marks}
    assert sorted(original.values()) == sorted(marks), "every weight has one name"
    root = "model.diffusion_model."
    checkpoint = {f"{root}{name}.{end}": marks[path] for name, path in original.items() for end in ("weight", "bias")}
    converted = convert(checkpoint, dict(unet.config))
    found = {key.removesuffix(".weight"): t for key, t in converted.items() if key.endswith(".weight")}
    assert {path: float(t) for path, t in found.items()} == {path: float(t) for path, t in marks.items()}


def test_where_the_original_layout_is_not_known_there_are_no_names_of_it():
    assert original_names(make_dit()) == {}
    types = {"down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D")}
    odd = make_unet(**types, up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"))
    assert original_names(odd) == {}
    assert original_names(nn.Linear(1, 1)) == {}
