"""Method × door: how every method passes every door, found out by asking the doors and by trying."""

from functools import cache

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from addenda.core.adapter.assign import unfit
from addenda.core.adapter.build import build_tensors
from addenda.core.adapter.calibration import stand_in
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import catalogue, info
from addenda.core.method.contract import Method
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.site import Site, site_at
from addenda.exporting.deltas import delta
from addenda.exporting.doors import DOORS, Door
from addenda.exporting.routes import Route
from addenda.reducing.delta import low_rank

SIDE, RANK = 64, 8  # of the layer on which an approximation's error is measured, and of the LoRA


class _Stack(nn.Module):
    """A module with a raw matrix and a stack of them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(SIDE, SIDE))
        self.experts = nn.Parameter(torch.empty(2, SIDE, SIDE))


@cache
def _model() -> nn.Module:
    layers = {
        "linear": nn.Linear(SIDE, SIDE, bias=False),
        "biased": nn.Linear(SIDE, SIDE),
        "conv1d": Conv1D(SIDE, SIDE),
        "conv": nn.Conv2d(16, SIDE, 2),
        "embedding": nn.Embedding(SIDE, SIDE),
        "norm": nn.LayerNorm(SIDE),
        "raw": _Stack(),
    }
    model = nn.ModuleDict(layers)
    for path, p in model.named_parameters():
        p.data = Stream(0, "doors", path).normal(*p.shape, std=SIDE**-0.5)
    return model


@cache
def kinds() -> dict[str, Site]:
    """Return a small site of every kind of layer, with the same numbers on every machine."""
    named = {"linear with a bias": "biased", "raw matrix": "raw.matrix", "stacked experts": "raw.experts"}
    named |= {name: name for name in ("linear", "conv1d", "conv", "embedding")}
    named |= {"weight of a norm": "norm.weight", "bias": "biased.bias"}
    order = ("linear", "linear with a bias", "conv1d", "conv", "embedding", "raw matrix", "stacked experts")
    return {kind: site_at(_model(), named[kind]) for kind in (*order, "weight of a norm", "bias")}


def usual(method: Method) -> str:
    """Return the kind of layer that a method is for, if nobody says where it goes."""
    return {"bias": "bias", "norm": "weight of a norm", "embedding": "embedding"}.get(str(method.targets), "linear")


def error_of(method: Method, rank: int = RANK) -> float | None:
    """Return ‖ΔW − B A‖ / ‖ΔW‖ of a method on a layer of 64 × 64, its trained tensors moved by N(0, 0.02²).

    None where no such layer can take it.
    """
    site = kinds()["linear"]
    try:
        sample = stand_in(method, site.matrix.float())
        tensors = build_tensors([(site, method)], 0, seen=None if sample is None else {site.path: sample})[site.path]
    except AddendaError:
        return None
    with torch.no_grad():
        for name, p in tensors.named_parameters():
            p.add_(Stream(1, "doors", name).normal(*p.shape, std=0.02))
        return low_rank(delta(site, tensors.eval()), rank=rank).error


def route_of(door: Door, method: Method, kind: str) -> Route | None:
    """Return how a method passes a door at one kind of layer; None where the method cannot be there at all.

    One that changes activations stands behind a linear layer, whatever the kind.
    """
    if isinstance(method, HiddenMethod):
        return door.route(method, site_at(_model(), "biased@output"))
    site = kinds()[kind]
    return None if unfit(site, method) else door.route(method, site)


def page() -> str:
    """Return the table as Markdown: docs/doors.md, which a test compares with this."""
    head = " | ".join(f"[{d.name}](#{d.name})" for d in DOORS.values())
    lines = [
        "# Doors",
        "",
        "What leaves, and how. This page is written by `addenda methods --doors docs/doors.md` from what the doors say "
        "and from what is tried while it is written: every method with its default options, at the kind of layer that "
        "it is for. *exact*: the other program computes what is computed here, up to rounding. *≈ 0.41*: it goes as a "
        f"LoRA; the number is ‖ΔW − BA‖ / ‖ΔW‖ at rank {RANK} of a layer of {SIDE} × {SIDE} whose trained tensors were "
        "moved at random, the worst that can be: what training finds is nearer to low rank, and `addenda export "
        "--energy 0.99` says how near yours is. *no*: refused, and the reason stands below.",
        "",
        f"| method | {head} |",
        f"| --- |{' --- |' * len(DOORS)}",
    ]
    reasons: dict[str, dict[str, list[str]]] = {name: {} for name in DOORS}
    for entry in catalogue():
        method, cells = entry.build(), []
        for door in DOORS.values():
            route = route_of(door, method, usual(method))
            cells.append(_cell(route, method))
            if route is not None and route.kind == "refused":
                reasons[door.name].setdefault(route.why, []).append(entry.name)
        lines.append(f"| `{entry.name}` | {' | '.join(cells)} |")
    for door in DOORS.values():
        lines += ["", f"## {door.name}", "", f"{door.title}."]
        lines += [f"- {', '.join(f'`{m}`' for m in methods)}: {why}" for why, methods in reasons[door.name].items()]
        lines += ["", "LoRA at other kinds of layer:", ""]
        lora = info("lora").build()
        lines += [f"- {kind}: {route_of(door, lora, kind) or 'cannot be there'}" for kind in kinds()]
    return "\n".join(lines) + "\n"


def _cell(route: Route | None, method: Method) -> str:
    if route is None:
        return "–"
    if route.kind == "refused":
        return "no"
    if route.kind == "exact":
        return f"exact ({route.why})" if route.why else "exact"
    error = error_of(method)
    return "≈" if error is None else f"≈ {error:.2f}"
