"""LoRA+: the left factor learns faster than the right one (Hayou et al. 2024, arXiv 2402.12354).

    rate of B = ratio · rate        everything else, A and heads too, at rate

The paper's point: in wide layers, with B from 0, one rate for both makes A or B learn too little. With ratio=1 it is
AdamW, bit for bit. rate is that of A, usually a little lower than LoRA's. Weight decay goes with a tensor's own rate,
as in AdamW, so B decays faster too. PEFT's version puts vectors (biases, DoRA's magnitudes) on B's side and gives
embeddings a rate of 1e-6; here they are trained at rate.

Cost: none beyond AdamW.
"""

import torch

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.optim.pairs import by_decay, can_fuse, paired, trained
from addenda.optim.registry import optimizer


@optimizer("lora+", paper="Hayou et al. 2024, arXiv:2402.12354")
def lora_plus(
    adapter: Adapter, rate: float, weight_decay: float = 0.0, *, ratio: float = 16.0
) -> torch.optim.Optimizer:
    """AdamW with a higher rate for the left factors: ratio times that of all others."""
    if not ratio > 0:
        raise AddendaError(f"lora+ wants a ratio above 0, got {ratio}.")
    lefts = [s.left for s in paired(adapter, "lora+") if s.left.requires_grad]
    rest = trained(adapter, lefts)
    groups = [*by_decay(adapter, rest, weight_decay, lr=rate), {"params": lefts, "lr": rate * ratio}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=rate, weight_decay=weight_decay, fused=can_fuse(lefts + rest)
    )
