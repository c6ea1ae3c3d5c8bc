"""Where a change can live: kinds of layer, and the sites of a model.

A *site* is one weight of one module. A kind of layer knows how its stored weight is seen as an m × n matrix and how
its product is computed with any weight; nothing else in the library branches on a layer's type.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import is_sharded
from addenda.core.modules.ours import is_ours
from addenda.core.packed.tensor import values_of
from addenda.core.site.kinds import CONV, CONV1D, EMBEDDING, LINEAR, OUTPUT, PARAMETER, Kind, kind_of


@dataclass(frozen=True)
class Site:
    """One weight of one module, and its path: "model.layers.0.mlp.up_proj", or "….experts.gate_up_proj"."""

    path: str
    module: nn.Module
    parameter: str
    kind: Kind
    ties: tuple[tuple[nn.Module, str], ...] = field(default=())  # further owners of the same parameter
    beside: dict[str, "Site"] = field(default_factory=dict, compare=False)  # those that its method looks at, by name
    origin: str = ""  # its path in the model of training, where that is another: its random tensors are drawn by it

    @property
    def key(self) -> str:
        """The path by which random tensors are drawn: the one of training."""
        return self.origin or self.path

    @property
    def weight(self) -> Tensor:
        """The base's tensor, as stored and never changed (a merged weight while merged)."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None
        return weight

    @property
    def weight_path(self) -> str:
        """The path of `weight` as a site of its own."""
        return self.path

    @property
    def tensor_path(self) -> str:
        """The path of `weight` as a parameter of the model."""
        return self.path if self.kind == PARAMETER else f"{self.path}.{self.parameter}"

    @property
    def matrix(self) -> Tensor:
        """The values as (m, n); a packed weight is unpacked for this."""
        return self.kind.to_matrix(values_of(self.weight.detach()))

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n) of one matrix; a vector counts as one column. For an activation: (width,)."""
        s = self.kind.to_matrix(self.weight.detach()).shape
        return (s[-2], s[-1]) if len(s) > 1 else (s[0] if s else 1, 1)

    @property
    def stored(self) -> list[int]:
        """The shape that a file stores."""
        return list(self.weight.shape)

    @property
    def copies(self) -> int:
        """The number of matrices that are stacked here: the number of experts, else 1."""
        s = self.kind.to_matrix(self.weight.detach()).shape
        return int(torch.Size(s[:-2]).numel()) if len(s) > 2 else 1

    @property
    def changed(self) -> int:
        """The identity of what is changed, which no two sites of one adapter may share."""
        return id(self.weight)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module that takes part in the change."""
        return (self.module, *(owner for owner, _ in self.ties))


@dataclass(frozen=True)
class Point(Site):
    """A module's output: the site of a hidden method. Its path says what is read, see `core.method.hidden`.

    weight: the base's weight nearest to it, a Linear's own, or the last one inside a block: it gives device and dtype,
    and its bits stand for the base in files.
    """

    width: int = 0  # the last dimension of the activation
    reads: str = "output"  # or "input", "again", "source"
    source: nn.Module | None = None  # whose input is read
    owner: nn.Module | None = None  # the module of `weight`
    leaf: str = "weight"  # its name there
    anchor: str = ""  # the path of `weight`
    back: nn.Module | None = None  # whose input gets the inverse of the change

    @property
    def weight(self) -> Tensor:
        weight = None if self.owner is None else self.owner._parameters[self.leaf]
        assert weight is not None
        return weight

    @property
    def weight_path(self) -> str:
        return self.anchor

    @property
    def tensor_path(self) -> str:
        return f"{self.anchor}.{self.leaf}"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def stored(self) -> list[int]:
        return [self.width]

    @property
    def copies(self) -> int:
        return 1

    @property
    def changed(self) -> int:
        return id(self.module)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.module, *(m for m in (self.source, self.back) if m is not None))


Owners = dict[int, list[tuple[str, nn.Module, str]]]  # id of a parameter -> (path of the module, module, name)


def owners_of(model: nn.Module) -> Owners:
    """Return every parameter's owners in the model's order: more than one where weights are tied."""
    owners: Owners = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((path, module, name))
    return owners


def site_at(model: nn.Module, path: str, owners: Owners | None = None) -> Site:
    """Return the site that a path names: a module called with its weight, a raw parameter, or a module's output.

    A tied raw parameter is the site of its first owner, whichever owner the path names. owners: `owners_of(model)`,
    to save a pass over the model where many sites are wanted.
    Raises AddendaError when nothing is there or the weight cannot be adapted, with the reason.
    """
    if "@" in path:
        return point_at(model, path)
    if is_ours(path):
        raise AddendaError(f"{path} belongs to an adapter, not to the base.")
    owner_path, _, leaf = path.rpartition(".")
    try:
        owner = model.get_submodule(owner_path)
    except AttributeError:
        raise AddendaError(f"The model has no module {owner_path!r} (wanted for the site {path!r}).") from None
    child = owner._modules.get(leaf)
    if child is not None:
        kind = kind_of(child)
        if kind is None:
            raise AddendaError(
                f"{path} is a {type(child).__name__}; a weight is changed in Linear, Conv1D, conv 1-3d, Embedding "
                "or a raw parameter. Name a parameter of it instead, e.g. "
                + repr(f"{path}.{next((n for n, _ in child.named_parameters()), 'weight')}")
                + "."
            )
        if child._parameters.get("weight") is None:
            parameter = next((n for n, _ in child.named_parameters() if n.startswith(("parametriz", "weight"))), None)
            instead = f"; name one of them instead, e.g. {f'{path}.{parameter}'!r}" if parameter else ""
            raise AddendaError(f"{path} computes its weight from other parameters{instead}.")
        if _read_by_parent(owner) or (kind != LINEAR and _own_forward(child)):
            return site_at(model, f"{path}.weight", owners)
        return Site(path, child, "weight", kind)
    if owner._parameters.get(leaf) is not None:
        if isinstance(owner, nn.RNNBase):
            raise AddendaError(
                f"{path}: a {type(owner).__name__} keeps its weights in a list, out of an adapter's reach."
            )
        holders = (owners or owners_of(model))[id(owner._parameters[leaf])]
        first, module, name = holders[0]
        return Site(
            f"{first}.{name}" if first else name, module, name, PARAMETER, tuple((m, n) for _, m, n in holders[1:])
        )
    raise AddendaError(f"The model has no module and no parameter {path!r}.")


def with_neighbours(model: nn.Module, site: Site, names: tuple[str, ...], owners: Owners | None = None) -> Site:
    """Return the site with those of its siblings of these names that exist, as sites. Raises as `site_at` does."""
    if not names:
        return site
    parent = site.path.rpartition(".")[0]
    present = [n for n in names if model.get_submodule(parent)._modules.get(n) is not None]
    return replace(site, beside={n: site_at(model, f"{parent}.{n}" if parent else n, owners) for n in present})


def point_at(model: nn.Module, path: str) -> Point:
    """Return the place that a path such as "layers.0.mlp@input" names: whose output is changed, @ what is read.

    Behind a ~ may stand a module whose input gets the inverse of the change: "embed@output~lm_head".

    Raises AddendaError where a module is missing, never called, or of a width that cannot be told.
    """
    target, _, spec = path.partition("@")
    reads, undone, back = spec.partition("~")
    modules = {}
    for name in [target, *([] if reads in ("output", "input", "again") else [reads]), *([back] if undone else [])]:
        if not name or is_ours(name):
            raise AddendaError(f"{path}: {name!r} is no module of the base; name one inside the model.")
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError:
            raise AddendaError(f"The model has no module {name!r} (wanted for the site {path!r}).") from None
        if reason := _uncalled(model, name, modules[name]):
            raise AddendaError(f"{path}: {reason}")
    module, source = modules[target], modules.get(reads)
    anchor = _anchor(model, target)
    width = None if anchor is None else _width(module if is_norm(module) else anchor[1])
    if width is None or anchor is None:
        raise AddendaError(
            f"{path}: the width of what a {type(module).__name__} returns cannot be told, as there is no linear layer, "
            "convolution or embedding inside. Name one of those, or a module that holds one."
        )
    for reader in (module if reads in ("input", "again") else None, source, modules.get(back)):
        if reader is not None and (input_width := _input_width(reader)) not in (None, width):
            raise AddendaError(f"{path} would read {input_width} numbers and change {width}; it must be as many.")
    how = reads if source is None else "source"
    anchored, owner, leaf = anchor
    return Point(
        path, module, "output", OUTPUT, width=width, reads=how, source=source, owner=owner, leaf=leaf, anchor=anchored,
        back=modules.get(back),
    )  # fmt: skip


def _uncalled(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Return why this module's forward is never called with activations, or None."""
    if getattr(type(module), "forward", None) is nn.Module.forward:
        return f"a {type(module).__name__} is never called itself; name what is in it"
    if kind_of(module) == CONV:
        return "the channels of a convolution are not its last dimension; name the module around it"
    if isinstance(module, nn.Sequential):
        return "an nn.Sequential runs whatever is in it; name its last module"
    parent = model.get_submodule(path.rpartition(".")[0])
    if _read_by_parent(parent):
        return f"its parent, a {type(parent).__name__}, reads its weights without calling it; name the parent"
    return None


def _layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the called layers inside, without adapters, embeddings first, so that the last is a product if any is."""
    layers = [
        (path, m)
        for path, m in module.named_modules()
        if kind_of(m) is not None and not is_ours(path) and m._parameters.get("weight") is not None
    ]
    return sorted(layers, key=lambda item: kind_of(item[1]) != EMBEDDING)


def _width(layer: nn.Module) -> int | None:
    """Return the last dimension of a layer's or a norm's output."""
    weight = layer._parameters.get("weight")
    if is_norm(layer):
        return weight.shape[-1] if weight is not None else (getattr(layer, "normalized_shape", None) or [None])[-1]
    return None if weight is None else weight.shape[0 if kind_of(layer) in (LINEAR, CONV) else 1]


def _input_width(module: nn.Module) -> int | None:
    """Return the last dimension of a linear layer's or a norm's input; None for others."""
    weight, kind = module._parameters.get("weight"), kind_of(module)
    if weight is None or not (is_norm(module) or kind in (LINEAR, CONV1D)):
        return None
    return weight.shape[0] if kind == CONV1D else weight.shape[-1]


def _anchor(model: nn.Module, path: str) -> tuple[str, nn.Module, str] | None:
    """Return (path, owner, name) of the weight nearest to a module: the last inside it, or in a module around it."""
    while True:
        layers = _layers(model.get_submodule(path))
        if layers:
            below, layer = layers[-1]
            return ".".join(filter(None, (path, below))), layer, "weight"
        if not path:
            return None
        path = path.rpartition(".")[0]


def is_norm(module: nn.Module) -> bool:
    """Return whether a class is called a norm and has only vectors; an activation may be part of it (timm's)."""
    if "norm" not in type(module).__name__.lower() or kind_of(module) is not None:
        return False
    vectors = [p for p in module._parameters.values() if p is not None]
    child_parameters = [p for name, m in module.named_children() if not is_ours(name) for p in m.parameters()]
    return not child_parameters and (
        isinstance(module, nn.LayerNorm) or all(p.numel() == max(p.shape, default=1) for p in vectors)
    )


def _read_by_parent(parent: nn.Module) -> bool:
    """Return whether the parent reads its children's `.weight` without calling them: then the attribute is the site."""
    return isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))


def _own_forward(module: nn.Module) -> bool:
    """Return whether a subclass does more than its kind's product (a scaled embedding, a standardised convolution)."""
    defining = next(
        c for c in type(module).__mro__ if "forward" in vars(c) and c.__module__ != "addenda.core.forward.adapted"
    )
    return defining.__module__.split(".")[0] != "torch" and defining.__name__ != "Conv1D"


_DISPATCHED = (
    "a device map put it there: take its hooks off (accelerate.hooks.remove_hook_from_submodules(model)), attach, and "
    "dispatch the model again"
)


def has_another_forward(module: nn.Module) -> bool:
    """Return whether the instance has a forward that is not its class's, which hooks may leave there when taken off."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    if getattr(forward, "__self__", None) is not module:
        return True
    own, found = type(module).forward, getattr(forward, "__func__", None)
    adapted = getattr(found, "own_forward_of", None)  # one of `core.forward.adapted`
    base: type = getattr(own, "own_forward_of", type(module))
    return found is not own and (adapted is None or adapted.forward is not base.forward)


def refusal(model: nn.Module, site: Site, owners: Owners | None = None) -> str | None:
    """Return why the core cannot adapt this site with any method, or None."""
    w = site.weight
    if nn.parameter.is_lazy(w):
        return "its weight has no shape yet; run the model once first"
    if not w.is_floating_point():
        return (
            f"its weight is {w.dtype}, and only floating weights can be changed; where another library has quantised "
            "it, addenda.adopt(model) makes it one that can"
        )
    if w.is_meta:
        if any(hasattr(m, "_hf_hook") for m in site.modules):
            return f"its weight is not in memory (offloaded); {_DISPATCHED}"
        return (
            "its weight is on the meta device, without values; load the model with its weights "
            "(from_pretrained without device_map, or to_empty and load_state_dict)"
        )
    if is_sharded(w):
        return "its weight is sharded (DTensor): attach first, then shard"
    if site.kind == EMBEDDING and getattr(site.module, "max_norm", None) is not None:
        return "an Embedding with max_norm rewrites its own weight during the forward"
    if site.kind == OUTPUT:
        replaced = [m for m in site.modules if has_another_forward(m)]
        if any(hasattr(m, "_hf_hook") for m in replaced):
            return f"its forward is accelerate's; {_DISPATCHED}"
        return "its forward was replaced on the instance, so a change would not act" if replaced else None
    if site.kind != PARAMETER and has_another_forward(site.module):
        if hasattr(site.module, "_hf_hook"):
            return f"its forward is accelerate's, so a change would not act; {_DISPATCHED}"
        return (
            "its forward was replaced on the instance, so a change would not act; "
            f"name the parameter '{site.path}.{site.parameter}' instead"
        )
    holders = (owners or owners_of(model))[id(w)]
    if site.kind != PARAMETER and len(holders) > 1:
        other_paths = [path for path, module, _ in holders if module is not site.module]
        return (
            f"its weight is tied to {', '.join(other_paths)}, which would not follow; "
            f"name the parameter '{site.path}.{site.parameter}' to change both"
        )
    return None
