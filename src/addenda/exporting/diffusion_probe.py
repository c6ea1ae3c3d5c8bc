"""A batch to try a diffusion model on: noise, a time step, and whatever its config says that it is conditioned on."""

from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream

_SIDE = 16  # of the latent image, where a model takes any size
_TEXT = 5  # tokens


def diffusion_batch(model: nn.Module, rows: int = 2) -> dict[str, Any] | None:
    """Return arguments for a UNet or a DiT of diffusers by its config, always the same; None for other models."""
    names, config = {c.__name__ for c in type(model).__mro__}, getattr(model, "config", None)
    if "UNet2DConditionModel" in names:
        return _unet(config, rows)
    return _dit(config, rows) if "DiTTransformer2DModel" in names else None


def _unet(config: Any, rows: int) -> dict[str, Any] | None:
    if config.encoder_hid_dim_type or config.class_embed_type or config.num_class_embeds:
        return None  # images, classes and more that it may want beside
    rng, side, width = Stream(0, "probe"), 2 ** len(config.down_block_types), config.cross_attention_dim
    side = max(_SIDE, side)
    batch: dict[str, Any] = {
        "sample": rng.normal(rows, config.in_channels, side, side),
        "timestep": torch.full((rows,), 500),
        "encoder_hidden_states": rng.normal(rows, _TEXT, width if isinstance(width, int) else width[0]),
    }
    if config.addition_embed_type == "text_time":
        times = 6 * config.addition_time_embed_dim  # the sizes and the crop of an image
        text = rng.normal(rows, config.projection_class_embeddings_input_dim - times)
        sizes = torch.tensor([side, side, 0, 0, side, side]).float().expand(rows, 6)
        batch["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
    elif config.addition_embed_type is not None:
        return None
    return batch


def _dit(config: Any, rows: int) -> dict[str, Any]:
    rng, side = Stream(0, "probe"), config.sample_size
    labels = torch.arange(rows) % config.num_embeds_ada_norm
    sample: Tensor = rng.normal(rows, config.in_channels, side, side)
    return {"hidden_states": sample, "timestep": torch.full((rows,), 500), "class_labels": labels}
