"""The names of kohya's keys, and the modules of a model that they mean.

    lora_unet_down_blocks_0_attentions_1_proj_in.lora_down.weight
    └─ part ─┘└──── a module's path, flat ─────┘ └── suffix ───┘

A flat path has underscores for dots, and underscores of its own, so it cannot be read back by itself: the model's own
modules are flattened, and what two of them share is ambiguous. Text encoders are called as transformers had them up to
version 4, with a `text_model` at the top, which its CLIPTextModel has lost since. UNets have two sets of names, those
of diffusers (down_blocks_0_…) and the original ones (input_blocks_1_…), in which sd-scripts trains SDXL.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from addenda.core.modules.ours import is_ours
from addenda.core.site.kinds import kind_of

PARTS = ("lora_unet", "lora_transformer", "lora_te", "lora_te1", "lora_te2", "lora_te3", "lycoris")
_PART = re.compile(rf"({'|'.join(sorted(PARTS, reverse=True))})_([^.]+)\.(.+)")
ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed_\d|label_emb|out_\d)(_|$)")
FOREIGN = re.compile(r"(double_blocks|single_blocks|joint_blocks|final_layer|img_in|txt_in)(_|$)")
_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_AROUND = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}


def split(key: str) -> tuple[str, str, str] | None:
    """Return (part, flat path, suffix) of a key, or None where it is no key of this format."""
    found = _PART.fullmatch(key)
    return None if found is None else (found[1], found[2], found[3])


def part_of(model: nn.Module) -> str:
    """Return the part by which files mean such a model; LyCORIS' own for one that sd-scripts does not know."""
    names = [c.__name__ for c in type(model).__mro__]
    if any(n.startswith("UNet") for n in names):
        return "lora_unet"
    if any("Transformer2D" in n or n.endswith(("Transformer3DModel", "TransformerModel")) for n in names):
        return "lora_transformer"
    if "CLIPTextModelWithProjection" in names:
        return "lora_te2"  # SDXL's second; its first is a CLIPTextModel, and called lora_te1 in its files
    return "lora_te" if any(n.startswith(("CLIPText", "T5Encoder")) for n in names) else "lycoris"


def flat_names(model: nn.Module, part: str) -> dict[str, list[str]]:
    """Return the paths that each flat name means in a model: one, or several where it is ambiguous."""
    found: dict[str, list[str]] = {}
    for name, path in _named(model, part):
        paths = found.setdefault(name.replace(".", "_"), [])
        if path not in paths:
            paths.append(path)
    return found


def _named(model: nn.Module, part: str) -> Iterator[tuple[str, str]]:
    """Yield (a name with dots, the path) of every module with a weight, under each of its names."""
    paths = [p for p, m in model.named_modules() if kind_of(m) is not None and not is_ours(p)]
    top = text_prefix(model, part)
    for path in paths:
        yield path, path
        if top:
            yield top + path, path
    if part == "lora_unet":
        known = set(paths)
        original = _AROUND | original_names(model)
        yield from ((name, path) for name, path in original.items() if path in known)


def text_prefix(model: nn.Module, part: str) -> str:
    """Return what stands before a path in the names of a text encoder that has no `text_model` at its top."""
    clip = any(c.__name__ == "CLIPTextModel" for c in type(model).__mro__)
    return "text_model." if part.startswith("lora_te") and clip and "text_model" not in model._modules else ""


def original_names(model: nn.Module) -> dict[str, str]:
    """Return the paths of a diffusers UNet by their names in the original layout; none for blocks of other kinds.

    Levels are counted through: each layer of a level is an input block, and so is the convolution that ends it; the
    output blocks are those of the layers alone, the last of a level having the convolution too.
    """
    config: Any = getattr(model, "config", None)
    down, up = (tuple(getattr(config, f"{side}_block_types", None) or ()) for side in ("down", "up"))
    children = [getattr(model, name, None) for name in ("down_blocks", "mid_block", "up_blocks")]
    plain = set(down) <= set(_DOWN) and set(up) <= set(_UP) and down and up
    middle = getattr(config, "mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn"
    if not (plain and middle and all(isinstance(c, nn.Module) for c in children)):
        return {}
    blocks: dict[str, str] = {}
    levels, _, ups = children
    n = 0
    for i, level in enumerate(levels):  # type: ignore[arg-type]
        for j in range(len(level.resnets)):
            n += 1
            blocks |= _layer(level, f"input_blocks.{n}", f"down_blocks.{i}", j)
        if getattr(level, "downsamplers", None):
            n += 1
            blocks[f"input_blocks.{n}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
    blocks |= {"middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0"}
    blocks["middle_block.2"] = "mid_block.resnets.1"
    n = 0
    for i, level in enumerate(ups):  # type: ignore[arg-type]
        for j in range(len(level.resnets)):
            blocks |= _layer(level, f"output_blocks.{n}", f"up_blocks.{i}", j)
            if j == len(level.resnets) - 1 and getattr(level, "upsamplers", None):
                at = 2 if _attentions(level) else 1
                blocks[f"output_blocks.{n}.{at}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
            n += 1
    return dict(_inside(model, blocks | _AROUND))


def _attentions(level: Any) -> Any:
    return getattr(level, "attentions", None)


def _layer(level: Any, name: str, path: str, j: int) -> dict[str, str]:
    blocks = {f"{name}.0": f"{path}.resnets.{j}"}
    return blocks | ({f"{name}.1": f"{path}.attentions.{j}"} if _attentions(level) else {})


def _inside(model: nn.Module, blocks: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the names of all that is in these blocks: a residual block's own, and as they are below an attention."""
    names = {path: name for name, path in blocks.items()}
    layers = {path: name for name, path in _RESNET.items()}
    for path, _ in model.named_modules():
        if path in names:
            yield names[path], path
            continue
        block = next((b for b in _above(path) if b in names), None)
        if block is None:
            continue
        below = path[len(block) + 1 :]
        if ".resnets." not in f".{block}.":
            yield f"{names[block]}.{below}", path
        elif below in layers:
            yield f"{names[block]}.{layers[below]}", path


def _above(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path
