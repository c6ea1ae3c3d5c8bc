"""DyLoRA (Valipour et al. 2022, arXiv:2210.07558): one training run for every rank?

Claims. (1) One DyLoRA of rank 8, cut to b ranks without further training, does as well at every b as a LoRA that was
trained at rank b. (2) A plain LoRA of rank 8 does not survive the same cut. (3) Covering ranks 1 to 8 costs 4 to 7
times less than a LoRA for each: arithmetic, as a step takes as long.

Arms, on every linear layer (the paper: query and value, which move this model little): LoRA trained at b = 1, 2, 4 and
8; DyLoRA trained once, both forms (all ranks up to the drawn one learn, or only the drawn one: `frozen`), judged at
each b (`|at=b`); LoRA of rank 8 cut to its first b ranks (`|first=b`), and, which the paper leaves out, to the best b
ranks of its change by a singular value decomposition (`|best=b`).
"""

import torch
from torch import Tensor

from addenda.comparing.entries import SplitResult
from addenda.comparing.subject import Subject
from addenda.comparing.trial import judged
from addenda.core.adapter.handle import Adapter
from addenda.exporting.nested import set_rank
from addenda.train.evaluate import evaluate


def at(adapter: Adapter, on: Subject, how: str) -> SplitResult:
    """Return the result of a DyLoRA at another rank: how is "at=2"."""
    set_rank(adapter, _number(how))
    return judged(evaluate(on.model, examples=on.splits["test"]))


def cut(adapter: Adapter, on: Subject, how: str) -> SplitResult:
    """Return the result of a LoRA cut to fewer ranks, and leave it whole: how is "first=2" or "best=2"."""
    whole = copied(adapter)
    name, b = how.partition("=")[0], _number(how)
    try:
        adapter.load_state_dict({"first": first, "best": best}[name](whole, b))
        return judged(evaluate(on.model, examples=on.splits["test"]))
    finally:
        adapter.load_state_dict(whole)


CUTS = {"at": at, "first": cut, "best": cut}


def copied(adapter: Adapter) -> dict[str, Tensor]:
    """Return a copy of what an adapter holds: `state_dict()` gives the live tensors, which `load_state_dict` writes."""
    return {k: t.clone() for k, t in adapter.state_dict().items()}


@torch.no_grad()
def first(whole: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Return the first b ranks, at the scale that they were trained with."""
    small = {k: t.clone() for k, t in whole.items()}
    for path in _paths(whole):
        small[f"{path}/A"][b:] = 0
        small[f"{path}/B"][:, b:] = 0
    return small


@torch.no_grad()
def best(whole: dict[str, Tensor], b: int) -> dict[str, Tensor]:
    """Return the b largest singular directions of B A."""
    small = {k: t.clone() for k, t in whole.items()}
    for path in _paths(whole):
        A, B = whole[f"{path}/A"].double(), whole[f"{path}/B"].double()
        left, core = torch.linalg.qr(B)
        U, S, Vt = torch.linalg.svd(core @ A, full_matrices=False)
        S[b:] = 0
        small[f"{path}/B"].copy_(left @ U * S.sqrt())
        small[f"{path}/A"].copy_(S.sqrt()[:, None] * Vt)
    return small


def _paths(tensors: dict[str, Tensor]) -> list[str]:
    return [k.removesuffix("/A") for k in tensors if k.endswith("/A")]


def _number(how: str) -> int:
    return int(how.partition("=")[2])
