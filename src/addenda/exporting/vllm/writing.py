"""Writing low-rank changes as the folder that vLLM serves, or refusing, with every site that it could not serve."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method, Replace
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.kinds import CONV, CONV1D, EMBEDDING, PARAMETER, kind_of
from addenda.core.site.site import Point, Site
from addenda.core.state.state import record_of
from addenda.exporting.pairs import Pair, is_low_rank
from addenda.exporting.peft.folder import PREFIX, pattern_key, write_folder
from addenda.exporting.routes import Route
from addenda.exporting.vllm.architectures import CLASSIFIERS, HEAD, is_classifier, outer_modules
from addenda.exporting.vllm.places import WITH_EXPERTS, Place, architecture_of, by_site, places
from addenda.exporting.vllm.rules import RANKS, check

_MERGED = "Export it as 'merged', which every engine serves"


def route(method: Method, site: Site, config: Any = None) -> Route:
    """Return how a method's change of a site passes to vLLM. config: of the model; without it, as far as one can tell.

    Whether a site of this very model is served, `write` decides.
    """
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    if isinstance(method, HiddenMethod) or isinstance(site, Point):
        return Route("refused", "it changes activations, and vLLM adds products of two matrices; no export can hold it")
    if architecture and outer_modules(architecture) is None:
        return Route("refused", f"a {architecture} is not known to be served with LoRA. {_MERGED}")
    if type(method) is Replace:
        if site.path.rpartition(".")[0].rpartition(".")[2] in CLASSIFIERS:
            return Route("exact", "modules_to_save")
        return Route("refused", f"trained as a whole, and of such vLLM takes a classifier's score only. {_MERGED}")
    if reason := _never(site) or _not_there(site, architecture):
        return Route("refused", f"{reason}. {_MERGED}")
    note = ""
    if len(site.weight.shape) > 2:
        note = f" for each expert ({', '.join(n.removesuffix('ForCausalLM') for n in WITH_EXPERTS)})"
    elif site.kind == EMBEDDING and not architecture:
        note = ", where vLLM's model takes one at its embedding (LLaMA, Qwen3, …)"
    if is_low_rank(method):
        return Route("exact", f"LoRA of its rank{note}")
    return Route("approximate", f"LoRA of the rank= or energy= asked for{note}, with its error")


@torch.no_grad()
def write(
    adapter: Adapter,
    folder: Path,
    pairs: Mapping[str, Pair],
    *,
    uniform: bool = False,
    max_lora_rank: int | None = None,
) -> None:
    """Write an adapter's changes, as pairs by path, and its classifier's head into an empty folder that is there.

    Scales are folded in (alpha = rank at every layer), names are those of the unfused model, and ranks and alphas that
    differ stand in patterns of whole paths. uniform: pad all pairs with zeros to one rank that vLLM allows, for
    versions that read no patterns. max_lora_rank: what the engine will be started with. Tensors are float32: vLLM
    casts them to its model's dtype. Experts are written one by one (see `places`), and an embedding that is the head
    too as both.

    Raises AddendaError that lists every site which vLLM would refuse, or serve as the base without a word, and a rank
    above max_lora_rank; nothing is written then.
    """
    root, _, record = record_of(adapter.model, adapter.name)
    architecture = architecture_of(root)
    if outer_modules(architecture) is None:
        raise AddendaError(
            f"A {architecture} is not known to be served with LoRA by vLLM 0.32. {_MERGED}; or as 'peft', which is the "
            "same format without this check."
        )
    problems = [*_heads(root, record.also_train), *_too_high(pairs, max_lora_rank or RANKS[-1])]
    known = by_site(root)
    problems += [f"{path}: {_why_not(root, pair.site)}" for path, pair in pairs.items() if path not in known]
    if problems:
        raise AddendaError(
            f"vLLM cannot serve {adapter.name!r} as it is: {'; '.join(problems[:12])}"
            f"{f' … and {len(problems) - 12} more' if len(problems) > 12 else ''}. {_MERGED}."
        )
    named: dict[str, Pair] = {}
    for path, pair in pairs.items():
        for name, place in known[path].items():
            named[name] = _part(pair, place)
    _fill(root, named)
    if uniform:
        rank = next(r for r in RANKS if r >= max(p.rank for p in named.values()))
        named = {name: padded(p, rank) for name, p in named.items()}
    heads = _head(root, adapter, record.also_train)
    tensors = {f"{PREFIX}{key}": t for key, t in heads.items()}
    for name, pair in named.items():
        if pair.site.kind == EMBEDDING:
            found = {"lora_embedding_A": pair.B.T, "lora_embedding_B": pair.A.T}
        else:
            found = {"lora_A.weight": pair.A, "lora_B.weight": pair.B}
        tensors |= {f"{PREFIX}{name}.{key}": t for key, t in found.items()}
    write_folder(folder, _config(root, named, heads), tensors)
    if wrong := check(folder, max_lora_rank=max_lora_rank, config=root):
        raise AddendaError(f"What was written for vLLM does not pass its rules: {'; '.join(wrong[:8])}.")


def padded(pair: Pair, rank: int) -> Pair:
    """Return a pair with zeros up to a rank: the same product."""
    more = rank - pair.rank
    return replace(pair, B=F.pad(pair.B, (0, more)), A=F.pad(pair.A, (0, 0, 0, more)))


def _part(pair: Pair, place: Place) -> Pair:
    """Return the part of a site's pair that belongs to a place: an expert's, and of its rows those."""
    B, A = (pair.B, pair.A) if place.expert is None else (pair.B[place.expert], pair.A[place.expert])
    B = B if place.rows is None else B[place.rows[0] : place.rows[1]]
    site = replace(pair.site, kind=EMBEDDING) if place.embedding else pair.site
    return replace(pair, site=site, B=B, A=A)


def _fill(root: nn.Module, named: dict[str, Pair]) -> None:
    """Add pairs of zeros for the experts of a layer that are not changed, where others are."""
    at = {name: place for name, place in places(root).items() if place.expert is not None}
    layers = {name.rpartition(".experts.")[0]: named[name] for name in at if name in named}
    for name, place in at.items():
        pair = layers.get(name.rpartition(".experts.")[0])
        if pair is not None and name not in named:
            (m, n), r = place.shape, pair.rank
            named[name] = replace(pair, B=torch.zeros(m, r), A=torch.zeros(r, n))


def _config(root: nn.Module, named: Mapping[str, Pair], heads: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config of these pairs, in which alpha is the rank everywhere."""
    ranks = [pair.rank for pair in named.values()]
    most = max(dict.fromkeys(ranks), key=ranks.count)
    others = {pattern_key(name, named): pair.rank for name, pair in named.items() if pair.rank != most}
    source = getattr(getattr(root, "config", None), "_name_or_path", "") or ""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if heads else None,
        "base_model_name_or_path": None if Path(source).is_absolute() else source or None,
        "inference_mode": True,
        "peft_version": "0.21.2",  # the version whose format this is
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": sorted(named),
        "modules_to_save": sorted({path.split(".")[-2] for path in heads}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }


def _head(root: nn.Module, adapter: Adapter, paths: tuple[str, ...]) -> dict[str, Tensor]:
    """Return by path every parameter of a head of which one was trained as a whole copy."""
    trained = {path: t.tensors()["value"].detach() for path, t in adapter.sites() if path in paths}
    modules = dict.fromkeys(path.rpartition(".")[0] for path in trained)
    return {
        f"{module}.{name}": trained.get(f"{module}.{name}", p.detach())
        for module in modules
        for name, p in root.get_submodule(module)._parameters.items()
        if p is not None
    }


def _too_high(pairs: Mapping[str, Pair], most: int) -> list[str]:
    high = {path: p.rank for path, p in pairs.items() if p.rank > most}
    if not high:
        return []
    path = max(high, key=lambda k: high[k])
    return [f"{path} has rank {high[path]}, above max_lora_rank={most}; give rank={most} or less for the nearest"]


def _heads(root: nn.Module, paths: tuple[str, ...]) -> list[str]:
    """Return which of the parameters that are trained as whole copies vLLM does not take."""
    problems = []
    for path in paths:
        module, _, _ = path.rpartition(".")
        if module.rpartition(".")[2] not in CLASSIFIERS or not is_classifier(architecture_of(root)):
            problems.append(f"{path} is trained as a whole, and of such vLLM takes a classifier's score only")
        elif module not in places(root):
            problems.append(f"{path} is trained as a whole, and vLLM takes that of one linear layer only")
    return problems


def _why_not(root: nn.Module, site: Site) -> str:
    """Return why vLLM gives this site of a model no LoRA."""
    if reason := _never(site) or _not_there(site, architecture_of(root)):
        return reason
    if site.ties:
        return "it is tied to another layer, and vLLM does not change both in this model"
    return f"it is no layer that vLLM's {architecture_of(root)} takes a LoRA at"


def _never(site: Site) -> str:
    """Return why vLLM changes no such site in any model; "" where it may."""
    if len(site.weight.shape) < 2:
        return "vLLM changes no vector (norm, bias)"
    if site.kind in (CONV, CONV1D):
        return f"vLLM serves no LoRA on a {site.kind.name} layer"
    if site.kind == PARAMETER and len(site.weight.shape) == 2 and kind_of(site.module) is None:
        return "no key of a LoRA names a raw matrix in vLLM"
    return ""


def _not_there(site: Site, architecture: str) -> str:
    """Return why vLLM's model of this name takes no LoRA at this place; "" where it may, or the name is not known."""
    name = site.path.removesuffix(".weight").rpartition(".")[2]
    outer = outer_modules(architecture) or frozenset()
    if architecture and name not in outer and (kind_of(site.module) == EMBEDDING or name == HEAD):
        return f"vLLM's {architecture} takes no LoRA at {name}"
    if architecture and len(site.weight.shape) > 2 and architecture not in WITH_EXPERTS:
        return f"no keys are known by which vLLM reads the experts of a {architecture}"
    return ""
