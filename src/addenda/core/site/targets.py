"""Targets: how a user names sites.

A target is a role ("attention", "mlp", "linear", "embedding", "conv", "norm", "bias", "parameters", "weights"), a glob
over paths ("*.q_proj", "q_proj" for any module so called), a regular expression ("re:layers\\.[0-3]\\..*_proj"), a
predicate (path, module) -> bool, or a list of these. Roles are read from the structure of the model: what is repeated
in a ModuleList, or in a Sequential of modules that hold others, is a block; inside a block what lies under something
called attention is attention, what makes the scales and shifts of a norm is neither, and the rest is MLP. Output heads
and routers are left out of "linear", and so is the step of a state-space layer (Mamba's dt_proj), whose weight is read
without a call. "norm" is every parameter of the modules whose class is called a norm (T5LayerNorm, BatchNorm2d,
GroupNormAct …), "bias" every parameter of that name, "parameters" every one. "weights" is every one too, but the weight
of a layer that is called with it, and is nobody else's, as that layer, which is how it is changed at least cost.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.modules.ours import CHILD, is_ours
from addenda.core.site.kinds import CONV, CONV1D, EMBEDDING, LINEAR, kind_of
from addenda.core.site.site import Owners, Site, is_norm, owners_of, refusal, site_at

Target = str | Callable[[str, nn.Module], bool]
ROLES = ("attention", "mlp", "linear", "embedding", "conv", "norm", "bias", "parameters", "weights")
_PARAMETERS = {"norm": "parameter of a module called …Norm", "bias": "parameter called bias"}
_PARAMETERS |= dict.fromkeys(("parameters", "weights"), "parameter")
_HEADS = {
    "lm_head",
    "score",
    "classifier",
    "qa_outputs",
    "head",
    "heads",
    "fc",
    "embed_out",
    "cls",
    "pooler",
    "logits_proj",
}
_A_HEAD = re.compile(r"(?!pre_|multi_)\w+_(classifier|head)|head_dist")  # class_labels_classifier, contact_head
_MLP = re.compile(r"(^|_)(mlp|ffn?|feed_?forward)", re.I)
_MODULATED = re.compile(r"Ada\w*Norm|Norm(Zero|Single|Continuous)")
_ROUTERS = {"gate", "router", "shared_expert_gate"}


def listed(targets: Target | Iterable[Target]) -> list[Target]:
    """Return several targets, or the only one, as a list. Raises AddendaError for what is none."""
    given: list[Any] = [targets]
    if isinstance(targets, Iterable) and not isinstance(targets, str) and not callable(targets):
        given = [*targets]
    if wrong := [t for t in given if not (isinstance(t, str) or callable(t))]:
        raise AddendaError(
            "A target is a role, a name, a pattern, or a function of (path, module), and targets=, exclude= and "
            f"also_train= take one or several; got {wrong[0]!r}."
        )
    return given


def resolve(model: nn.Module, targets: Target | Iterable[Target], exclude: Iterable[Target] = ()) -> list[Site]:
    """Return the sites that targets name, in the model's order, each once.

    Raises AddendaError when a target, or one of a list of them, matches nothing (with what there is, grouped), and when
    a named site cannot be adapted (with all reasons).
    """
    included, omitted = listed(targets), listed(exclude)
    selection: dict[str, bool] = {}
    for target in included:
        paths = matching(model, target)
        if not paths:
            raise AddendaError(_nothing(model, target))
        selection.update(dict.fromkeys(paths, True))
    for target in omitted:
        paths = set(matching(model, target))
        if not paths:
            raise AddendaError("exclude: " + _nothing(model, target))
        selection = {p: True for p in selection if p not in paths}
    if not selection:
        raise AddendaError(f"Nothing is left: exclude={omitted!r} takes away all that targets={included!r} name.")
    order, owners = {path: i for i, path in enumerate(all_paths(model))}, owners_of(model)
    sites = [site_at(model, path, owners) for path in sorted(selection, key=lambda p: order.get(p, len(order)))]
    problems = [f"{s.path}: {reason}" for s in sites if (reason := refusal(model, s, owners))]
    if problems:
        raise AddendaError(f"{len(problems)} of {len(sites)} sites cannot be adapted: {'; '.join(problems[:8])}.")
    return _once(sites)


def exactly(model: nn.Module, paths: Iterable[str]) -> list[Target]:
    """Return the targets that name these paths and no others. Raises AddendaError for a path that is none."""
    given = list(paths)
    known = dict.fromkeys(all_paths(model))
    if missing := [p for p in given if p not in known]:
        near = nearest(missing[0], known, 1)
        raise AddendaError(
            f"{len(missing)} of {len(given)} paths name no layer and no parameter of this {type(model).__name__}, e.g. "
            f"{missing[0]!r}.{near}"
        )
    return [f"re:{re.escape(path)}" for path in given]


def refuse_foreign(model: nn.Module) -> None:
    """Raise AddendaError for a model with layers of PEFT in it, whose own matrices would be taken for sites."""
    paths = [
        path
        for path, m in model.named_modules()
        if any(c.__module__.startswith("peft.tuners.") for c in type(m).__mro__)
    ]
    if paths:
        raise AddendaError(
            f"This {type(model).__name__} carries an adapter of PEFT ({len(paths)} of its modules, e.g. {paths[0]}), "
            "whose matrices are no part of the base. Take it off first: model = model.merge_and_unload() keeps its "
            "change in the weights, model = model.unload() does not; what PEFT has saved addenda.import_adapter takes."
        )


def matching(model: nn.Module, target: Target) -> list[str]:
    """Return the paths that one target names."""
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
    """Group paths by pattern: indices replaced by *."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path), []).append(path)
    return groups


def called(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (path, module) of every module that is called with its weight, in the model's order; see `kinds`."""
    return [(path, m) for path, m in model.named_modules() if path and kind_of(m) is not None]


def all_paths(model: nn.Module) -> list[str]:
    """Return every path that can be a site: called modules and raw parameters, adapter tensors left out."""
    paths = []
    for path, module in model.named_modules(remove_duplicate=True):
        if is_ours(path):
            continue
        if path and kind_of(module) is not None:
            paths.append(path)
        own = [name for name, p in module._parameters.items() if p is not None]  # a layer without a bias has None there
        paths += [f"{path}.{name}" if path else name for name in own]
    return paths


def _role(model: nn.Module, role: str) -> list[str]:
    if role == "weights":
        owners = owners_of(model)
        return [_by_layer(model, path, owners) for path in _role(model, "parameters")]
    if role in ("norm", "bias", "parameters"):
        tensor_ids, paths = set(), []
        for path in all_paths(model):
            owner, _, leaf = path.rpartition(".")
            tensor = model.get_submodule(owner)._parameters.get(leaf)
            fits = {"norm": is_norm(model.get_submodule(owner)), "bias": leaf == "bias"}.get(role, True)
            if tensor is not None and fits and id(tensor) not in tensor_ids:
                tensor_ids.add(id(tensor))
                paths.append(path)
        return paths
    kinds = {"embedding": (EMBEDDING,), "conv": (CONV,)}.get(role, (LINEAR, CONV1D))
    layers = [(path, m) for path, m in called(model) if kind_of(m) in kinds]
    if role in ("embedding", "conv"):
        return [path for path, _ in layers]
    lists = stacks(model)
    body = [p for p, m in layers if not (_head(model, p, m, lists) or _router(model, p) or _step(model, p))]
    if role == "linear":
        return body
    attention = _Attention.of(model)
    body = [p for p in body if any(outer in lists for outer in _around(p))]
    if role == "attention":
        return [p for p in body if attention.holds(p)]
    return [p for p in body if not attention.holds(p) and not under_norm(model, p)]


def _by_layer(model: nn.Module, path: str, owners: Owners) -> str:
    """Return the path of the layer that is called with a parameter as its weight, or the parameter's own."""
    layer, _, leaf = path.rpartition(".")
    if leaf != "weight" or not layer or kind_of(model.get_submodule(layer)) is None:
        return path
    site = site_at(model, layer, owners)
    return layer if site.path == layer and refusal(model, site, owners) is None else path


def _head(model: nn.Module, path: str, module: nn.Module, lists: dict[str, nn.Module]) -> bool:
    get_output = getattr(model, "get_output_embeddings", None)
    if get_output is not None and get_output() is module:
        return True
    around = [outer for outer in _around(path) if outer in lists]
    if any(isinstance(lists[outer], nn.ModuleList) for outer in around):
        return False
    named = path.split(".") if not around else [around[-1].rpartition(".")[2]]  # a Sequential may be the head itself
    return any(part in _HEADS or _A_HEAD.fullmatch(part) for part in named)


def _router(model: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return leaf in _ROUTERS and any("expert" in name for name in model.get_submodule(parent)._modules)


def _step(model: nn.Module, path: str) -> bool:
    """Return whether a layer is a state-space layer's step: kernels read its weight, so a change would go unseen."""
    parent, _, leaf = path.rpartition(".")
    return leaf == "dt_proj" and "A_log" in model.get_submodule(parent)._parameters


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's lists of repeated parts by path: ModuleLists, and Sequentials of modules that hold others."""
    return {path: m for path, m in model.named_modules() if path and is_stack(m)}


def is_stack(module: nn.Module) -> bool:
    """Return whether a module is a list of repeated parts."""
    elements = [m for name, m in module._modules.items() if not is_ours(name) and m is not None]
    if isinstance(module, nn.ModuleList):
        return bool(elements)
    return isinstance(module, nn.Sequential) and bool(elements) and all(map(_holds, elements))


def _holds(module: nn.Module) -> bool:
    return kind_of(module) is None and not is_norm(module) and bool(set(module._modules) - {CHILD})


@dataclass(frozen=True)
class _Attention:
    """The paths of the modules called attention in a model, and of those that hold more than an attention.

    A list inside attention (diffusers' to_out, heads one by one) belongs to it. A list whose elements hold attention is
    one of blocks, and whatever is around it is more than attention, however it is called; so is what holds both an
    attention and an MLP.
    """

    called: frozenset[str]
    larger: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> "_Attention":
        called = {path for path, m in model.named_modules() if _is_attention(path.rpartition(".")[2], m)}
        mlps = [path for path, m in model.named_modules() if _MLP.search(path.rpartition(".")[2]) and _layers(m)]
        lists, larger = stacks(model), set()
        for path in called:
            for outer in list(_around(path))[1:]:  # an element of a list may be an attention itself
                if outer in lists:
                    larger |= {outer, *_around(outer)}
            for outer in _around(path):
                if outer in called and any(p.startswith(f"{outer}.") and not p.startswith(f"{path}.") for p in mlps):
                    larger.add(outer)
        return cls(frozenset(called), frozenset(larger))

    def holds(self, path: str) -> bool:
        """Return whether the nearest module around a layer called attention, or holding blocks, is an attention."""
        around = next((p for p in _around(path) if p in self.called or p in self.larger), None)
        return around is not None and around not in self.larger


def _is_attention(name: str, module: nn.Module) -> bool:
    if not name or isinstance(module, nn.ModuleList) or kind_of(module) is not None:
        return False
    cls = re.sub(r"\w*(layer|block)(\d+D\w*)?$", "", type(module).__name__, flags=re.I)  # a whole block is no attention
    if not re.search(r"att(n|ention)", f"{name} {cls}", re.I):
        return False
    return _layers(module)


def _layers(module: nn.Module) -> bool:
    return any(kind_of(m) is not None for m in module.modules())


def _around(path: str) -> Iterator[str]:
    """Yield the paths of the modules around one, from the nearest to the outermost."""
    while path := path.rpartition(".")[0]:
        yield path


def under_norm(model: nn.Module, path: str) -> bool:
    """Return whether a layer makes the scales and shifts of a norm (diffusers' AdaLayerNorm)."""
    for outer in _around(path):
        module = model.get_submodule(outer)
        if is_stack(module):
            return False
        if _MODULATED.search(type(module).__name__):
            return True
    return False


def _once(sites: list[Site]) -> list[Site]:
    """Drop a second path to the same tensor (tied raw parameters), which the first one carries along."""
    tensor_ids: set[int] = set()
    return [s for s in sites if not (id(s.weight) in tensor_ids or tensor_ids.add(id(s.weight)))]


def _nothing(model: nn.Module, target: Target) -> str:
    groups = grouped(path for path, _ in called(model))
    leaves = {path.rpartition(".")[2] for path, _ in called(model)} | set(ROLES)
    listed = "; ".join(f"{pattern} ({len(paths)})" for pattern, paths in list(groups.items())[:40]) or "nothing"
    hint = nearest(target, leaves - {target}) if isinstance(target, str) else ""
    if target in _PARAMETERS:
        hint = f" It names parameters, not modules, and this model has no {_PARAMETERS[str(target)]}."
    return (
        f"The target {target!r} matches nothing in this {type(model).__name__}.{hint} Roles: {', '.join(ROLES)}. "
        f"Modules that can be adapted: {listed}."
    )
