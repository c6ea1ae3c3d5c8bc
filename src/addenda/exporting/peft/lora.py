"""PEFT's LORA: W + s B A with s = lora_alpha / r, or / √r with use_rslora; ranks and alphas may differ by site.

Read: LoRA and rsLoRA at every kind of layer, DoRA (`dora`), PiSSA and OLoRA (`residual`), tokens (`tokens`). Written:
these, and every other change that is a product of thin matrices, with its scale in B.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method
from addenda.core.site.site import Site, owners_of
from addenda.exporting.deltas import factors
from addenda.exporting.install import Forms
from addenda.exporting.peft import dora, layout, residual, tokens
from addenda.exporting.peft.conversion import (
    Config,
    Conversion,
    Live,
    Place,
    Saved,
    Written,
    expect,
    number,
    pattern_value,
    refuse,
)
from addenda.exporting.peft.folder import pattern_key
from addenda.exporting.peft.thin import exact_rank, narrow, trimmed
from addenda.exporting.routes import Route
from addenda.methods.dora import DoRA
from addenda.methods.lora import LoRA

_VARIANTS = {
    "alora_invocation_tokens": "it acts only behind certain tokens (aLoRA), and a change of weights acts everywhere",
    "use_qalora": "its inputs are averaged in groups (QALoRA)",
    "use_bdlora": "its factors are block-diagonal and stored as blocks (BD-LoRA)",
    "layer_replication": "its model has more layers than the base (layer_replication)",
    "megatron_config": "its layers are Megatron's",
    "kasa_config": "it takes the smallest singular values out of the base (KaSA)",
    "velora_config": "it carries tensors of a training by VeLoRA",
    "monteclora_config": "it carries a sampler beside its factors (MonteCLoRA)",
    "arrow_config": "it chooses among several adapters for every token (Arrow)",
    "lora_bias": "its B has a bias, which is no change of a weight (lora_bias)",
}


@dataclass(frozen=True)
class Piece:
    """One site that is to be written as ΔW = s B A. magnitude: of a DoRA, as PEFT has it."""

    site: Site
    B: Tensor  # m × r
    A: Tensor  # r × n
    scale: float = 1.0
    places: tuple[Place, ...] = ()
    magnitude: Tensor | None = None


class LoraConversion(Conversion):
    """LORA in all its forms that are a change of weights."""

    type = "LORA"
    suffixes = (layout.A, layout.B, layout.EMBEDDED_A, layout.EMBEDDED_B, dora.MAGNITUDE, tokens.IN_LORA)
    reads = frozenset([
        "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "fan_in_fan_out",
        "use_dora", "target_parameters", "trainable_token_indices", "bias",
    ])  # fmt: skip
    ignores = frozenset(["lora_dropout", "qalora_group_size", "loftq_config", "eva_config"])

    def check(self, config: Config) -> None:
        for key, reason in _VARIANTS.items():
            if config.get(key):
                raise AddendaError(
                    f"This LORA adapter of PEFT was made with {key}: {reason}, so it has no form in addenda. Merge it "
                    "in PEFT where PEFT can (merge_and_unload, then save_pretrained) and extract the change: addenda "
                    "extract."
                )
        residual.check(config)
        parameters = config.get("target_parameters") or []
        if not isinstance(parameters, list) or not all(isinstance(p, str) for p in parameters):
            raise AddendaError(f"target_parameters of a PEFT config is a list of paths, got {str(parameters)[:80]}.")
        super().check(config)

    def place(
        self, model: nn.Module, config: Config, sites: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[list[Saved], list[str], list[str]]:
        owners = owners_of(model)
        rows = {path: t for path, t in sites.items() if tokens.IN_LORA in t}
        rest = {path: t for path, t in sites.items() if path not in rows}
        saved, missing, problems = layout.placed(model, config, rest, owners)
        more = tokens.placed(model, rows, owners)
        return saved + more[0], missing + more[1], problems + more[2]

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        problems: list[str] = []
        for s in saved:
            if tokens.IN_LORA in s.tensors:
                problems += tokens.read(s, tokens.indices(config, s.known_as), forms, tokens.IN_LORA)
                continue
            rank, alpha = ranks(config, s.known_as)
            expected = layout.shapes(s, rank) | (dora.shapes(s) if config.get("use_dora") else {})
            reason = _unreadable(s) or (dora.obstacle(s.site, s.raw) if config.get("use_dora") else None)
            wrong = [f"{s.path}: {reason}"] if reason else expect(s, expected)
            problems += wrong
            if not wrong:
                forms.sites[s.path] = _form(s, config, rank, alpha, forms.notes)
        refuse(problems, "This LORA adapter of PEFT does not fit")

    def route(self, method: Method, site: Site) -> Route | None:
        if isinstance(method, DoRA):
            reason = dora.obstacle(site) or layout.obstacle(site)
            return Route("exact", "LORA with use_dora") if reason is None else None
        rank = exact_rank(method, site)
        if rank is None:
            return None
        if reason := layout.obstacle(site):
            return Route("refused", reason)
        if isinstance(method, LoRA) and method.origin == "zero":
            return Route("exact", "LORA with use_rslora" if method.scaling == "rs" else "LORA")
        return Route("exact", f"LORA of rank {rank}")

    def write(self, live: Sequence[Live]) -> Written:
        if any(isinstance(e.method, DoRA) for e in live):
            sites = {e.path: dora.obstacle(e.site) for e in live}
            refuse([f"{p}: {reason}" for p, reason in sites.items() if reason], "PEFT has one use_dora for all sites")
        stretched = all(isinstance(e.method, LoRA) and e.method.scaling == "rs" for e in live)
        turned = any(isinstance(e.method, DoRA) for e in live)
        pieces = {e.path: _piece(e, turned) for e in live}
        return written(pieces, use_rslora=stretched and all(e.method.origin == "zero" for e in live))


def _form(s: Saved, config: Config, rank: int, alpha: float, notes: list[str]) -> tuple[Method, dict[str, Tensor]]:
    """Return the method and the tensors of a site whose tensors have the right shapes."""
    stretched = bool(config.get("use_rslora"))
    scale = alpha / (math.sqrt(rank) if stretched else rank)
    B, A = layout.factors(s, rank)
    taken = residual.taken_out(config, s, rank, scale)
    if taken is not None:  # what was trained beside the rest of W; s (B A − B0 A0) is the change of W itself
        B, A = torch.cat([B, -taken[0]], 1), torch.cat([A, taken[1]])
        notes.append(f"{s.path}: its change of the whole W, of rank {len(A)}")
    B, A = narrow(B, A)
    if config.get("use_dora"):
        return dora.form(s, B, A, scale)
    plain = taken is None and A.shape[-2] == rank and scale > 0
    if plain:
        return LoRA(rank=rank, alpha=float(alpha), scaling="rs" if stretched else "classic"), {"A": A, "B": B}
    return LoRA(rank=A.shape[-2]), {"A": A, "B": scale * B}


def _unreadable(s: Saved) -> str | None:
    """Return why a LORA at this site is no change of its weight, or None."""
    return None if s.site.kind.name == "parameter" else layout.obstacle(s.site)


def ranks(config: Config, path: str) -> tuple[int, float]:
    """Return the rank and alpha that a config says of a site."""
    rank = pattern_value(config.get("rank_pattern"), path, number(config, "r", int, 8), "rank_pattern")
    alpha = pattern_value(config.get("alpha_pattern"), path, number(config, "lora_alpha", float, 8), "alpha_pattern")
    rank, alpha = number({"r": rank}, "r", int), number({"lora_alpha": alpha}, "lora_alpha", float)
    if not 1 <= rank <= 1 << 20:
        raise AddendaError(f"The config of this PEFT adapter gives {path} the rank {rank}.")
    return rank, alpha


def _piece(live: Live, turned: bool) -> Piece:
    """Return what is written for a site. turned: as a DoRA, whatever it is."""
    method, p = live.method, live.values()
    if isinstance(method, DoRA):
        return Piece(live.site, p["B"], p["A"], method.scale, live.places, dora.magnitude(live.site, p))
    if isinstance(method, LoRA) and method.origin == "zero":
        piece = Piece(live.site, p["B"], p["A"], method.scale, live.places)
    else:
        B, A = narrow(*trimmed(*(t.cpu() for t in factors(live.site, live.tensors))))
        piece = Piece(live.site, B, A, 1.0, live.places)
    if not turned:
        return piece
    lengths = dora.lengths(live.site, piece.scale * piece.B.double() @ piece.A.double())
    return Piece(piece.site, piece.B, piece.A, piece.scale, piece.places, lengths)


def written(pieces: Mapping[str, Piece], use_rslora: bool = False) -> Written:
    """Return a LORA config and tensors. What most sites have stands in r and lora_alpha, the rest in patterns of paths.

    Raises AddendaError for layers that PEFT's LORA changes otherwise, with the reasons.
    """
    refuse([f"{p}: {reason}" for p, x in pieces.items() if (reason := layout.obstacle(x.site))], "No form in PEFT")
    modules: list[str] = []
    made = Written({}, modules=modules)
    found: dict[str, tuple[int, float]] = {}
    parameters: list[str] = []
    nested: dict[str, list[tuple[str, dict[str, Tensor]]]] = {}  # raw parameters by their module's path
    for piece in pieces.values():
        for place in piece.places or (Place(piece.site.path, piece.site.module, piece.site.kind.name == "parameter"),):
            tensors, rank = layout.laid_out(place, piece.site, piece.B, piece.A)
            found[place.path] = rank, piece.scale * (math.sqrt(rank) if use_rslora else rank)
            if piece.magnitude is not None:
                tensors[dora.MAGNITUDE] = piece.magnitude
            if place.raw:
                parameters.append(place.path)
                owner, _, leaf = place.path.rpartition(".")
                nested.setdefault(owner, []).append((leaf, tensors))
            else:
                modules.append(place.path)
                made.tensors |= {f"{place.path}.{k}": t for k, t in tensors.items()}
    for owner, items in nested.items():
        module = next(x.site.module for x in pieces.values() if x.site.path.rpartition(".")[0] == owner)
        order = [n for n, _ in module.named_parameters(recurse=False)]
        for depth, (_, tensors) in enumerate(sorted(items, key=lambda item: -order.index(item[0]))):
            made.tensors |= {f"{owner}{'.base_layer' * depth}.{k}": t for k, t in tensors.items()}
    rank, alpha = _most([r for r, _ in found.values()]), _most([a for _, a in found.values()])
    turned = any(x.magnitude is not None for x in pieces.values())
    tied = any(len(x.places) > 1 for x in pieces.values())
    transposed = any(x.site.kind.transposed for x in pieces.values())
    if transposed and parameters:
        raise AddendaError(
            f"PEFT's LORA takes no raw parameters ({parameters[0]}) beside transformers' Conv1D layers. Export them "
            "apart, or to 'merged'."
        )
    made.config |= {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {pattern_key(p, found): r for p, (r, _) in found.items() if r != rank},
        "alpha_pattern": {pattern_key(p, found): _plain(a) for p, (_, a) in found.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": use_rslora,
        "use_dora": turned,
        "init_lora_weights": True,
        "modules_to_save": None,
        "fan_in_fan_out": transposed,
    }
    if parameters:
        made.config["target_parameters"] = sorted(parameters)
    if tied:
        made.config["ensure_weight_tying"] = True
    return made


def _most(values: Sequence[Any]) -> Any:
    """Return what occurs most often, of equals the first; 8 of nothing, which is PEFT's own default."""
    return max(dict.fromkeys(values), key=values.count) if values else 8


def _plain(alpha: float) -> float | int:
    """Return a whole number as one: readers of a config want no 8.0."""
    return int(alpha) if math.isfinite(alpha) and alpha == int(alpha) else alpha
