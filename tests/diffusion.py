"""Tiny random models of diffusers and CLIP text encoders, and batches; skipped where diffusers is not there."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn


def make_unet(linear: bool = True, **options: Any) -> Any:
    """A UNet as SDXL's is built, with two levels of one layer: (2, 4, 8, 8) to the same."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed here")
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    attention = {"cross_attention_dim": 8, "attention_head_dim": 2, "use_linear_projection": linear}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    added |= {"projection_class_embeddings_input_dim": 24 + 8}
    return diffusers.UNet2DConditionModel(**(sizes | blocks | attention | added | options)).eval()


def unet_batch() -> dict[str, Any]:
    torch.manual_seed(1)
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.arange(12.0).reshape(2, 6)}
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([10, 10]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "added_cond_kwargs": added,
    }


def make_dit() -> Any:
    """A small DiT with classes: (2, 4, 8, 8) to (2, 8, 8, 8)."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed here")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    return diffusers.DiTTransformer2DModel(**sizes, norm_num_groups=4, sample_size=8, num_embeds_ada_norm=10).eval()


def dit_batch() -> dict[str, Any]:
    torch.manual_seed(1)
    labels = torch.tensor([1, 2])
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([7, 7]), "class_labels": labels}


def make_text_encoder(projection: bool = False) -> Any:
    """A CLIP text encoder, as SD has one and SDXL a second one with a projection."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "projection_dim": 8}
    more = {"num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(transformers.CLIPTextConfig(**sizes, **more)).eval()


def spread(module: nn.Module, seed: int = 0, std: float = 0.3) -> None:
    """Give every parameter random values, so that no start at zero hides anything."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(p.dtype) * std


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of two dimensions or more, by the path of its module."""
    return {n.removesuffix(".weight"): p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
