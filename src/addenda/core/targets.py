"""Targets: how a user names sites.

A target is a role ("attention", "mlp", "linear", "embedding", "conv", "norm", "bias", "parameters"), a glob over paths
("*.q_proj", "q_proj" for any module so called), a regular expression ("re:layers\\.[0-3]\\..*_proj"), a predicate
(path, module) -> bool, or a list of these. Roles are read from the structure of the model: what is repeated in a
ModuleList is a block; inside a block what lies under something called attention is attention, the rest is MLP;
output heads and routers are left out of "linear". "norm" is every parameter of the modules whose class is called
…Norm, "bias" every parameter of that name, "parameters" every one.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable

from torch import nn

from addenda.core.errors import AddendaError, nearest
from addenda.core.sites import CONV, CONV1D, EMBEDDING, LINEAR, Site, kind_of, owners_of, refusal, site_at

Target = str | Callable[[str, nn.Module], bool]
ROLES = ("attention", "mlp", "linear", "embedding", "conv", "norm", "bias", "parameters")
_HEADS = {"lm_head", "score", "classifier", "qa_outputs", "head", "heads", "fc", "embed_out", "cls", "pooler"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}


def resolve(model: nn.Module, targets: Target | Iterable[Target], exclude: Iterable[Target] = ()) -> list[Site]:
    """The sites that targets name, in the model's order, each once.

    Raises AddendaError when a target, or one of a list of them, matches nothing (with what there is, grouped), and when
    a named site cannot be adapted (with all reasons).
    """
    wanted = [targets] if isinstance(targets, str) or callable(targets) else list(targets)
    left_out = [exclude] if isinstance(exclude, str) or callable(exclude) else list(exclude)
    found: dict[str, bool] = {}
    for target in wanted:
        paths = matching(model, target)
        if not paths:
            raise AddendaError(_nothing(model, target))
        found.update(dict.fromkeys(paths, True))
    for target in left_out:
        paths = set(matching(model, target))
        if not paths:
            raise AddendaError("exclude: " + _nothing(model, target))
        found = {p: True for p in found if p not in paths}
    if not found:
        raise AddendaError(f"Nothing is left: exclude={left_out!r} takes away all that targets={wanted!r} name.")
    order, owners = {path: i for i, path in enumerate(all_paths(model))}, owners_of(model)
    sites = [site_at(model, path, owners) for path in sorted(found, key=lambda p: order.get(p, len(order)))]
    problems = [f"{s.path}: {why}" for s in sites if (why := refusal(model, s, owners))]
    if problems:
        raise AddendaError(f"{len(problems)} of {len(sites)} sites cannot be adapted: {'; '.join(problems[:8])}.")
    return _once(sites)


def matching(model: nn.Module, target: Target) -> list[str]:
    """The paths that one target names."""
    if callable(target):
        return [path for path, module in called(model) if target(path, module)]
    if target in ROLES:
        return _role(model, target)
    if target.startswith("re:"):
        try:
            pattern = re.compile(target[3:])
        except re.error as error:
            raise AddendaError(f"The target {target!r} is no regular expression: {error}.") from None
        return [path for path in all_paths(model) if pattern.fullmatch(path)]
    globs = (target, f"*.{target}")
    exact = [path for path in all_paths(model) if any(fnmatch.fnmatchcase(path, g) for g in globs)]
    modules = {path for path, _ in called(model)}
    return [p for p in exact if p in modules] or exact


def grouped(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths by pattern: indices replaced by *."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path), []).append(path)
    return groups


def called(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in model.named_modules() if path and kind_of(m) is not None]


def all_paths(model: nn.Module) -> list[str]:
    """Every path that can be a site: called modules and raw parameters, adapter tensors left out."""
    paths = []
    for path, module in model.named_modules(remove_duplicate=True):
        if "addenda" in path.split("."):
            continue
        if path and kind_of(module) is not None:
            paths.append(path)
        paths += [f"{path}.{name}" if path else name for name in module._parameters]
    return paths


def _role(model: nn.Module, role: str) -> list[str]:
    if role in ("norm", "bias", "parameters"):
        seen, paths = set(), []
        for path in all_paths(model):
            owner, _, leaf = path.rpartition(".")
            tensor = model.get_submodule(owner)._parameters.get(leaf)
            norm = type(model.get_submodule(owner)).__name__.endswith("Norm")
            fits = {"norm": norm, "bias": leaf == "bias"}.get(role, True)
            if tensor is not None and fits and id(tensor) not in seen:
                seen.add(id(tensor))
                paths.append(path)
        return paths
    kinds = {"embedding": (EMBEDDING,), "conv": (CONV,)}.get(role, (LINEAR, CONV1D))
    found = [(path, m) for path, m in called(model) if kind_of(m) in kinds]
    if role in ("embedding", "conv"):
        return [path for path, _ in found]
    blocks = [f"{path}." for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    inside = [(p, m) for p, m in found if not _head(model, p, m, blocks) and not _router(model, p)]
    if role == "linear":
        return [path for path, _ in inside]
    attention = {path for path, _ in inside if _under_attention(model, path)}
    return [p for p, _ in inside if (p in attention) == (role == "attention") and any(p.startswith(b) for b in blocks)]


def _head(model: nn.Module, path: str, module: nn.Module, blocks: list[str]) -> bool:
    get_output = getattr(model, "get_output_embeddings", None)
    if get_output is not None and get_output() is module:
        return True
    return not any(path.startswith(b) for b in blocks) and bool(_HEADS & set(path.split(".")))


def _router(model: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return leaf in _ROUTERS and any("expert" in name for name in model.get_submodule(parent)._modules)


def _under_attention(model: nn.Module, path: str) -> bool:
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        owner = model.get_submodule(".".join(parts[:depth]))
        if isinstance(owner, nn.ModuleList):
            return False
        cls = re.sub(r"\w*(layer|block)$", "", type(owner).__name__, flags=re.I)  # a whole block is no attention
        if re.search(r"att(n|ention)", f"{parts[depth - 1]} {cls}", re.I):
            return True
    return False


def _once(sites: list[Site]) -> list[Site]:
    """Drop a second path to the same tensor (tied raw parameters), which the first one carries along."""
    seen: set[int] = set()
    return [s for s in sites if not (id(s.weight) in seen or seen.add(id(s.weight)))]


def _nothing(model: nn.Module, target: Target) -> str:
    groups = grouped(path for path, _ in called(model))
    leaves = {path.rpartition(".")[2] for path, _ in called(model)} | set(ROLES)
    listed = "; ".join(f"{pattern} ({len(paths)})" for pattern, paths in list(groups.items())[:40]) or "nothing"
    hint = nearest(target, leaves) if isinstance(target, str) else ""
    return (
        f"The target {target!r} matches nothing in this {type(model).__name__}.{hint} Roles: {', '.join(ROLES)}. "
        f"Modules that can be adapted: {listed}."
    )
