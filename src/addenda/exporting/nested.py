"""What a trained DyLoRA is good for: its first b ranks are an adapter for every b. Choose b, search it, cut there."""

from collections.abc import Callable

import torch
from torch import nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.options import said
from addenda.core.modules.borrow import training_mode
from addenda.core.state.state import record_of
from addenda.exporting.plain import beside
from addenda.methods.dylora import DyLoRA
from addenda.methods.lora import LoRA


def set_rank(adapter: Adapter, rank: int) -> None:
    """Choose the rank that acts when the model is not training, at every DyLoRA site; it is saved with the adapter.

    Raises AddendaError when the adapter has no DyLoRA site or the rank is not within one's range.
    """
    for _, t, _ in _sites(adapter, rank):
        t.stored()["active"].fill_(rank)


@torch.no_grad()
def search_rank(
    adapter: Adapter, judge: Callable[[nn.Module], float], tolerance: float = 0.0
) -> tuple[dict[int, float], int]:
    """Judge every rank that was trained for; return the results, and the smallest within `tolerance` of the best.

    judge: a score of the model in evaluation mode, higher is better. Nothing is trained, and the rank is left as it
    was. Raises AddendaError when the adapter is not acting, or has no DyLoRA site, or a score is not a number.
    """
    sites, (_, state, _) = _sites(adapter), record_of(adapter.model, adapter.name)
    if adapter.name not in state.active or state.merged is not None:
        raise AddendaError(
            f"{adapter.name!r} is idle or merged, so every rank would score the same. Call switch or unmerge first."
        )
    ranks = sorted(set.intersection(*(set(m.ranks) for _, _, m in sites)))
    before = [t.stored()["active"].clone() for _, t, _ in sites]
    scores = {}
    try:
        with training_mode(adapter.model, False):
            for b in ranks:
                set_rank(adapter, b)
                scores[b] = float(judge(adapter.model))
    finally:
        for (_, t, _), b in zip(sites, before, strict=True):
            t.stored()["active"].copy_(b)
    if not scores or any(s != s for s in scores.values()):
        raise AddendaError(f"A search wants a number for each rank that all sites were trained for, got {scores}.")
    best = max(scores.values())
    return scores, min(b for b, s in scores.items() if s >= best - tolerance)


def export(adapter: Adapter, rank: int, name: str = "lora") -> Adapter:
    """Attach a plain LoRA of the first `rank` ranks beside the adapter, idle, to be saved or switched to.

    It computes what the adapter computes at that rank, up to rounding (the sums have fewer terms); heads trained with
    it come along. Raises AddendaError as `attach` does, when the rank is out of range, and when other methods have
    sites in the adapter.
    """
    forms, sites = {}, _sites(adapter, rank)
    if bits := {m.bits for _, _, m in sites if m.bits}:
        raise AddendaError(
            f"{adapter.name!r} is in {said(min(bits))}, with codes for all its ranks together; a part of them would "
            "get others. Nothing was exported."
        )
    for path, t, m in sites:
        A, B = t.stored()["A"], t.stored()["B"]  # of a stack: one for every matrix
        plain = LoRA(rank=rank, alpha=float(m.alpha or m.rank), dropout=m.dropout)
        forms[path] = plain, {"A": A[..., :rank, :], "B": B[..., :rank]}
    return beside(adapter, forms, name, "DyLoRA")


def _sites(adapter: Adapter, rank: int | None = None) -> list[tuple[str, SiteTensors, DyLoRA]]:
    """Return the DyLoRA sites, all of which can take this rank."""
    sites = [(path, t, t.method) for path, t in adapter.sites() if isinstance(t.method, DyLoRA)]
    if not sites:
        raise AddendaError(f"{adapter.name!r} has no DyLoRA site whose rank could be set.")
    least = min(m.rank for _, _, m in sites)
    if rank is not None and not 1 <= rank <= least:
        raise AddendaError(f"rank must be from 1 to {least}, got {rank}.")
    return sites
