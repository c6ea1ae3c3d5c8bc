"""LoRA-FA: A stays as it was drawn, B alone is trained (Zhang et al. 2023, arXiv 2308.03303).

    y = x Wᵀ + s (x Aᵀ) Bᵀ:   the gradient of B needs x Aᵀ (r numbers a token); that of A would need x (n numbers)

Making this optimizer sets requires_grad of the right factors to False, and it stays so: the fused layers then keep no
input for backward, which is where the memory is saved. `adapter.requires_grad_()` lets A train again. Heads and other
trainable tensors are trained as ever.

PEFT's version multiplies B's gradient by (A Aᵀ)⁻¹ / s² before Adam, as the nearest step to full fine-tuning would. Not
here: rows of a Kaiming A are nearly orthogonal and of one length, in PiSSA they are orthogonal, and a diagonal (A Aᵀ)⁻¹
only rescales columns of B, which Adam divides out again.

Cost: half of LoRA's moments, and no inputs kept. The change cannot leave the r directions of A's rows: not for a rank
that is only just enough.
"""

import torch

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.optim.pairs import paired, trained
from addenda.optim.plain import adamw
from addenda.optim.registry import optimizer


@optimizer("lora-fa", paper="Zhang et al. 2023, arXiv:2308.03303")
def lora_fa(adapter: Adapter, rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW for the left factors alone; the right ones are frozen, and their layers keep no input."""
    sites = paired(adapter, "lora-fa")
    if not trained(adapter, [site.right for site in sites]):
        raise AddendaError(
            f"'lora-fa' trains the left factors of adapter {adapter.name!r}, and requires_grad of all of them is off. "
            "Call adapter.requires_grad_() first."
        )
    for site in sites:
        site.right.requires_grad_(False)
        site.right.grad = None
    return adamw(adapter, rate, weight_decay)
