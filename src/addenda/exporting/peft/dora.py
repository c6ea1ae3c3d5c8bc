"""LORA with use_dora: PEFT stores the magnitudes themselves, addenda their offsets from ‖W_i‖; so W is needed.

PEFT   lora_magnitude_vector (m), of a convolution (1 × m × 1…)      addenda   magnitude = vector − ‖W_i‖
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from addenda.core.method.contract import Method, Params
from addenda.core.site.kinds import EMBEDDING
from addenda.core.site.site import Site
from addenda.exporting.peft.conversion import Saved
from addenda.methods.dora import DoRA

MAGNITUDE = "lora_magnitude_vector"


def obstacle(site: Site, raw: bool = False) -> str | None:
    """Return why PEFT's DoRA cannot be ours at this weight, or None."""
    if site.kind == EMBEDDING:
        return (
            "PEFT's DoRA of an embedding scales its columns, addenda's its rows; use LoRA there, or export to 'merged'"
        )
    if raw or site.kind.name == "parameter":
        return "PEFT's DoRA takes no raw parameters; export to 'merged'"
    if site.kind.name == "conv" and site.module.groups != 1:
        return "PEFT's DoRA of a grouped convolution multiplies factors that do not fit; export to 'merged'"
    return None


def shapes(s: Saved) -> dict[str, Sequence[int]]:
    """Return the name and shape that the magnitudes of a site have in a folder."""
    return {MAGNITUDE: _shape(s.site)}


def form(s: Saved, B: Tensor, A: Tensor, scale: float) -> tuple[Method, Params]:
    """Return the method and tensors of a site, given its two factors."""
    rank = A.shape[0]
    offset = s.tensors[MAGNITUDE].float().flatten() - _lengths(s.site.matrix.float())
    if not scale > 0:
        B, scale = B * scale, 1.0
    return DoRA(rank=rank, alpha=float(scale * rank)), {"A": A, "B": B, "magnitude": offset}


def magnitude(site: Site, p: Params) -> Tensor:
    """Return the magnitudes of a DoRA as PEFT stores them."""
    start = p["square"].float().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return (start + p["magnitude"].float()).reshape(_shape(site))


def lengths(site: Site, change: Tensor) -> Tensor:
    """Return the magnitudes with which a DoRA of this change (m × n) is the plain change: the rows' own lengths."""
    return _lengths(site.matrix.cpu().double() + change).float().reshape(_shape(site))


def _shape(site: Site) -> tuple[int, ...]:
    return (1, site.shape[0], *(1 for _ in site.weight.shape[2:])) if site.kind.name == "conv" else (site.shape[0],)


def _lengths(matrix: Tensor) -> Tensor:
    return matrix.cpu().square().sum(1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
