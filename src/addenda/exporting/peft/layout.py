"""How the two factors of LORA lie in a folder, for every kind of layer.

    linear, Conv1D       lora_A (r × n), lora_B (m × r)
    convolution          lora_A (r × inputs × kernel), lora_B (m × r/groups × 1…): A sees the inputs of all groups, each
                         group's rows of B see their own r/groups of its outputs
    embedding            lora_embedding_A (r × rows), lora_embedding_B (width × r): ΔW = (B A)ᵀ
    raw matrix           lora_A (r × n), lora_B (m × r), as it is stored
    raw stack of E       lora_A (E·r × n), one expert after the other; lora_B (m × r·E), interleaved: the E columns of
                         rank 1 first. n and m change places where the module says `is_transposed`

Modules that PEFT wraps stand under their own path. Of several raw parameters of one module the last one (in the
module's order) stands under the module's path, the one before it under "….base_layer", and so on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.site.kinds import CONV1D, EMBEDDING, LINEAR, kind_of
from addenda.core.site.site import Owners, Site, site_at
from addenda.exporting.peft.conversion import Config, Place, Saved

A, B = "lora_A.weight", "lora_B.weight"
EMBEDDED_A, EMBEDDED_B = "lora_embedding_A", "lora_embedding_B"
BARRED = ("LORA", "ADALORA")  # types that PEFT loads at no module which `barred` names
_INNER = ".base_layer"
_MHA_OUTPUT = torch.nn.modules.linear.NonDynamicallyQuantizableLinear
_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")  # model types, as PEFT's tuners_utils has them


def obstacle(site: Site) -> str | None:
    """Return why PEFT's LORA cannot change this weight as we do, or None."""
    module: Any = site.module
    if site.kind.name == "conv":
        if any(d != 1 for d in module.dilation) and any(k != 1 for k in module.kernel_size):
            return "PEFT's LORA of a convolution leaves its dilation out, so it is another layer; export to 'merged'"
        if module.padding_mode != "zeros" and module.padding not in ("valid", (0,) * len(module.kernel_size)):
            return (
                f"PEFT's LORA of a convolution pads with zeros where the layer has padding_mode="
                f"{module.padding_mode!r}, so it is another change at the borders; export to 'merged'"
            )
    if isinstance(module, (nn.MultiheadAttention, _MHA_OUTPUT)):
        return "PEFT changes an nn.MultiheadAttention only as a whole; export to 'merged'"
    if site.kind.name == "parameter" and len(site.weight.shape) < 2:
        return "a vector is no product of two matrices; export to 'merged'"
    if site.kind.name == "parameter" and not wrapped(site):
        return "PEFT has no place for a parameter of the model itself; export to 'merged'"
    if len(site.weight.shape) == 3 and len(site.weight) == 1 and getattr(module, "is_transposed", False):
        return "PEFT 0.21.2 turns the change of a transposed stack of one expert the wrong way; export to 'merged'"
    return None


def barred(path: str, config: object) -> str | None:
    """Return why PEFT loads no LORA and no ADALORA at this module of a model with this config, or None."""
    name, kind = path.rpartition(".")[2], getattr(config, "model_type", None)
    if kind in _MAMBAS and name in ("out_proj", "conv1d"):
        return f"PEFT loads no LORA at the {name} of a {kind}; leave it out (exclude=), or export to 'merged'"
    return None


def wrapped(site: Site) -> str:
    """Return the path of the module that PEFT wraps for a site: itself, or the owner of a raw parameter."""
    return site.path.rpartition(".")[0] if site.kind.name == "parameter" else site.path


def places(site: Site, owners: Owners) -> tuple[Place, ...]:
    """Return where PEFT puts a change of this weight: modules that are called with it, or the parameter itself."""
    if site.kind.name != "parameter":
        return (Place(site.path, site.module),)
    found = []
    for path, module, name in owners[id(site.weight)]:
        called = name == "weight" and kind_of(module) in (LINEAR, CONV1D, EMBEDDING)
        found.append(Place(path, module) if called else Place(f"{path}.{name}" if path else name, module, True))
    return tuple(found)


def placed(
    model: nn.Module, config: Config, sites: Mapping[str, Mapping[str, Tensor]], owners: Owners
) -> tuple[list[Saved], list[str], list[str]]:
    """Return the sites that the keys of LORA name, what the model lacks, and other problems.

    Weights that several modules share are one site where all of these have the same change.
    """
    saved, missing, problems = [], [], []
    names = config.get("target_parameters") or []
    for path, tensors in sites.items():
        bare, inner = path.replace(f"{_INNER}.", "."), 0  # what is inside of a wrapped attention
        while bare.endswith(_INNER):
            bare, inner = bare.removesuffix(_INNER), inner + 1
        try:
            module = model.get_submodule(bare)
        except AttributeError:
            missing.append(bare)
            continue
        wrapped = [n for n, _ in module.named_parameters(recurse=False) if _named(names, f"{bare}.{n}")]
        try:
            if isinstance(module, nn.MultiheadAttention | _MHA_OUTPUT) and not wrapped:
                problems.append(
                    f"{bare} is of an nn.MultiheadAttention, where PEFT 0.21.2 adds the change of out_proj twice and "
                    "others may not. Merge it in PEFT and extract the change: addenda extract"
                )
            elif not wrapped and not inner:
                saved.append(Saved(site_at(model, bare, owners), tensors, bare))
            elif inner < len(wrapped):
                site = site_at(model, f"{bare}.{wrapped[-1 - inner]}", owners)
                saved.append(Saved(site, tensors, raw=True))
            else:
                problems.append(
                    f"{path} stands {inner + 1} deep, and the config's target_parameters name {len(wrapped)} of {bare}"
                )
        except AddendaError:
            missing.append(bare)
    return _joined(saved, owners, model, problems), missing, problems


def _named(names: Sequence[str], path: str) -> bool:
    return any(path == n or path.endswith(f".{n}") for n in names)


def _joined(saved: list[Saved], owners: Owners, model: nn.Module, problems: list[str]) -> list[Saved]:
    """Put the modules that share a weight together as one site of the parameter."""
    groups: dict[int, list[Saved]] = {}
    for s in saved:
        groups.setdefault(id(s.site.weight), []).append(s)
    joined = []
    for key, group in groups.items():
        holders = owners[key]
        if len(holders) == 1:
            joined += group
            continue
        first = group[0]
        names = ", ".join(path for path, _, _ in holders)
        if len(group) < len(holders):
            problems.append(
                f"{names} share a weight, and the adapter changes it for {first.path} alone, which no change of one "
                "weight does. Untie them first (model.config.tie_word_embeddings = False, and a copy of the weight)"
            )
            continue
        sides = [_sides(s.tensors) for s in group]
        if any(not _same(sides[0], other) for other in sides[1:]):
            problems.append(f"{names} share a weight, and the adapter changes it in {len(group)} ways")
            continue
        site = site_at(model, f"{holders[0][0]}.{holders[0][2]}", owners)
        joined.append(Saved(site, first.tensors, first.known_as, first.raw))
    return joined


def _sides(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with those of an embedding as a linear layer of the same weight has them."""
    swapped = {B: tensors[EMBEDDED_A].T, A: tensors[EMBEDDED_B].T} if EMBEDDED_A in tensors else {}
    return swapped or dict(tensors)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items())


def shapes(s: Saved, rank: int) -> dict[str, Sequence[int]]:
    """Return the names and shapes that a site's two factors have in a folder."""
    stored = tuple(s.site.weight.shape)
    if s.raw and len(stored) == 3:
        inputs, outputs = stored[1:] if getattr(s.site.module, "is_transposed", False) else stored[:0:-1]
        return {A: (stored[0] * rank, inputs), B: (outputs, stored[0] * rank)}
    if s.raw:
        return {A: (rank, stored[1]), B: (stored[0], rank)}
    if EMBEDDED_A in s.tensors or s.site.kind == EMBEDDING:
        return {EMBEDDED_A: (rank, stored[0]), EMBEDDED_B: (stored[1], rank)}
    if s.site.kind.name == "conv":
        groups, kernel = int(s.site.module.groups), stored[2:]  # type: ignore[arg-type]
        return {A: (rank, stored[1] * groups, *kernel), B: (stored[0], rank // groups, *(1 for _ in kernel))}
    m, n = stored[::-1] if kind_of(s.site.module) == CONV1D else stored[:2]
    return {A: (rank, n), B: (m, rank)}


def factors(s: Saved, rank: int) -> tuple[Tensor, Tensor]:
    """Return (B: m × r, A: r × n) of a site as its own kind sees it, from tensors of the right shapes; float32.

    Raises AddendaError for the change of a grouped convolution that reaches across groups.
    """
    t = {k: v.float() for k, v in s.tensors.items()}
    if EMBEDDED_A in t:
        return t[EMBEDDED_A].T, t[EMBEDDED_B].T
    a, b = t[A], t[B]
    if s.raw and len(s.site.weight.shape) == 3:
        experts = len(s.site.weight)
        a, b = a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts).permute(2, 0, 1)
        return (a.mT, b.mT) if getattr(s.site.module, "is_transposed", False) else (b, a)
    if s.site.kind.name == "conv":
        groups = int(s.site.module.groups)  # type: ignore[arg-type]
        return (b.flatten(1), a.flatten(1)) if groups == 1 else _ungrouped(s, a, b.flatten(1), groups)
    turned = s.site.kind.name == "parameter" and not s.raw and kind_of(s.site.module) == CONV1D
    return (a.T, b.T) if turned else (b, a)


def _ungrouped(s: Saved, a: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the factors of a grouped convolution, whose A must keep to each group's own inputs."""
    rank, width = len(a) // groups, a.shape[1] // groups
    blocks = a.reshape(groups, rank, groups, width, -1)
    own = blocks.diagonal(0, 0, 2).permute(3, 0, 1, 2)  # of each group its own inputs
    if torch.count_nonzero(blocks) != torch.count_nonzero(own):
        raise AddendaError(
            f"{s.path} is a convolution of {groups} groups, and PEFT's LORA of it reads the inputs of all groups for "
            "each: no weight of this layer does that. Leave the layer out, or train it as a module of its own."
        )
    own = own.flatten(2)
    if bool((own == own[:1]).all()):
        return b, own[0]
    rows = len(b) // groups
    spread = torch.block_diag(*(b[g * rows : (g + 1) * rows] for g in range(groups)))
    return spread, own.flatten(0, 1)


def laid_out(place: Place, site: Site, b: Tensor, a: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return the tensors that PEFT has at a place for ΔW = B A, as the site sees it, and the rank that it has there."""
    rank, kind = a.shape[-2], kind_of(place.module)
    if place.raw and a.dim() == 3:
        if getattr(place.module, "is_transposed", False):
            b, a = a.mT, b.mT
        return {A: a.flatten(0, 1), B: b.permute(1, 2, 0).flatten(1)}, rank
    if place.raw:
        return {A: a, B: b}, rank
    if kind == EMBEDDING:
        return {EMBEDDED_A: b.T, EMBEDDED_B: a.T}, rank
    if kind == CONV1D and site.kind.name == "parameter":
        return {A: b.T, B: a.T}, rank
    if site.kind.name == "conv":
        groups, kernel = int(place.module.groups), tuple(site.weight.shape[2:])  # type: ignore[arg-type]
        wide = torch.block_diag(*[a.reshape(rank, -1)] * groups) if groups > 1 else a
        inputs = site.weight.shape[1] * groups
        return {A: wide.reshape(rank * groups, inputs, *kernel), B: b.reshape(*b.shape, *(1 for _ in kernel))}, (
            rank * groups
        )
    return {A: a, B: b}, rank
