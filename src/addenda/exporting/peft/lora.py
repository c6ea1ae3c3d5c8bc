"""PEFT's LORA: W + s B A with s = lora_alpha / r, or / √r with use_rslora; ranks and alphas may differ by site."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from addenda.core.method.contract import Method
from addenda.core.site.kinds import EMBEDDING
from addenda.core.site.site import Site
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import (
    Config,
    Conversion,
    Live,
    Saved,
    Written,
    expect,
    number,
    pattern_value,
    refuse,
)
from addenda.exporting.routes import Route
from addenda.methods.lora import LoRA

A, B = "lora_A.weight", "lora_B.weight"
EMBEDDED_A, EMBEDDED_B = "lora_embedding_A", "lora_embedding_B"  # r × vocabulary, width × r


class LoraConversion(Conversion):
    """Plain LoRA, rsLoRA, and everything that is written as a product of two matrices."""

    type = "LORA"
    suffixes = (A, B, EMBEDDED_A, EMBEDDED_B)
    reads = frozenset(
        ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "fan_in_fan_out"]
    )
    ignores = frozenset(["lora_dropout", "modules_to_save", "qalora_group_size", "loftq_config"])

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems = []
        for s in saved:
            rank, alpha = ranks(config, s.path)
            shapes, problem = self._shapes(s, rank), []
            problem += expect(s, shapes)
            problems += problem
            if problem:
                continue
            scaling = "rs" if config.get("use_rslora") else "classic"
            method = LoRA(rank=rank, alpha=float(alpha), scaling=scaling)
            if s.site.kind == EMBEDDING:
                forms.sites[s.path] = method, {"A": s.tensors[EMBEDDED_B].T, "B": s.tensors[EMBEDDED_A].T}
            else:
                forms.sites[s.path] = method, {"A": s.tensors[A].flatten(1), "B": s.tensors[B].flatten(1)}
        refuse(problems, "This LORA adapter of PEFT does not fit")

    def _shapes(self, s: Saved, rank: int) -> dict[str, Sequence[int]]:
        m, n = s.site.shape
        if s.site.kind == EMBEDDING:
            return {EMBEDDED_A: (rank, m), EMBEDDED_B: (n, rank)}
        kernel = tuple(s.site.weight.shape[2:]) if s.site.kind.name == "conv" else ()
        inputs = s.site.weight.shape[1] if kernel else n
        return {A: (rank, inputs, *kernel), B: (m, rank, *(1 for _ in kernel))}

    def route(self, method: Method, site: Site) -> Route | None:
        if isinstance(method, LoRA) and method.origin == "zero":
            return Route("exact", "LORA")
        return None

    def write(self, live: Sequence[Live]) -> Written:
        pairs = {}
        for each in live:
            p = each.values()
            pairs[each.path] = each.site, p["B"], p["A"], each.method.scale
        return written(pairs)


def ranks(config: Config, path: str) -> tuple[int, float]:
    """Return the rank and alpha that a config says of a site."""
    rank = pattern_value(config.get("rank_pattern"), path, number(config, "r", int, 8), "rank_pattern")
    alpha = pattern_value(config.get("alpha_pattern"), path, number(config, "lora_alpha", float, 8), "alpha_pattern")
    return number({"r": rank}, "r", int), number({"lora_alpha": alpha}, "lora_alpha", float)


def written(pairs: Mapping[str, tuple[Site, Tensor, Tensor, float]]) -> Written:
    """Return a LORA config and tensors of ΔW = s B A by path: (site, B: m × r, A: r × n, s).

    What most sites have stands in r and lora_alpha, the rest in patterns of whole paths.
    """
    ranks = {path: a.shape[0] for path, (_, _, a, _) in pairs.items()}
    alphas = {path: s * ranks[path] for path, (_, _, _, s) in pairs.items()}
    rank, alpha = _most(ranks.values()), _most(alphas.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {p: r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {p: _plain(a) for p, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "fan_in_fan_out": any(site.kind.transposed for site, *_ in pairs.values()),
    }
    made = Written(config)
    for path, (site, b, a, _) in pairs.items():
        if site.kind == EMBEDDING:
            made.tensors |= {f"{path}.{EMBEDDED_A}": b.T, f"{path}.{EMBEDDED_B}": a.T}
            continue
        if site.kind.name == "conv":
            kernel = tuple(site.weight.shape[1:])
            a, b = a.reshape(len(a), *kernel), b.reshape(*b.shape, *(1 for _ in kernel[1:]))
        made.tensors |= {f"{path}.{A}": a, f"{path}.{B}": b}
    return made


def _most(values: Any) -> Any:
    """Return what occurs most often, of equals the first."""
    listed = list(values)
    return max(dict.fromkeys(listed), key=listed.count)


def _plain(alpha: float) -> float | int:
    """Return a whole number as one: readers of a config want no 8.0."""
    return int(alpha) if math.isfinite(alpha) and alpha == int(alpha) else alpha
