"""The structure of a folder's model without its weights: every module, name, shape, dtype and tie, in no memory.

A weight of a skeleton is one zero, seen as many times as its shape has entries. It is on the CPU, so that all that
looks at modules and shapes works as on a loaded model; `filled` puts real values at one weight for a while.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label

_IN_MEMORY = "Load the model, and use merge(model) and save_pretrained in memory."


def skeleton(config: Any, architecture: str | None = None) -> nn.Module:
    """Return the model that a configuration describes, in evaluation mode, without weights.

    architecture: the name of a class of transformers, where not the first that the configuration names. Raises
    AddendaError where that is missing or code of the folder's own, and for weights in another library's few bits.
    """
    import transformers

    if getattr(config, "quantization_config", None) is not None:
        raise AddendaError(
            "The model's weights are quantised (quantization_config in its config.json), and no change can be written "
            "into them as they lie. Take the folder that they were quantised from, and quantise the result again."
        )
    listed = getattr(config, "architectures", None)
    names = [architecture] if architecture else listed if isinstance(listed, list) and listed else []
    cls = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not isinstance(cls, type):
        known = f"is a {label(names[0])}, which transformers does not have" if names else "names no architecture"
        raise AddendaError(f"The model {known}, so its structure is not known without running code. {_IN_MEMORY}")
    try:
        with torch.device("meta"):
            model: nn.Module = cls(config)  # type: ignore[call-arg]
    except Exception as error:  # of whatever class: what a model does with numbers that are not there
        reason = next(iter(str(error).splitlines()), "")[:300]
        raise AddendaError(
            f"The structure of this {cls.__name__} could not be made without its weights ({type(error).__name__}: "
            f"{reason}). {_IN_MEMORY}"
        ) from error
    give_dtypes(model, {})
    return model.eval()


def give_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Replace every parameter by a blank of its shape, and of the dtype given for its name, if one is."""
    blanks: dict[int, nn.Parameter] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in dict.fromkeys(names_of(model).values()):
        p = parameters[group[0]]
        blanks[id(p)] = _blank(p, next((dtypes[name] for name in group if name in dtypes), p.dtype))
    for module in model.modules():
        for leaf, p in module._parameters.items():
            if p is not None:
                module._parameters[leaf] = blanks[id(p)]


def _blank(like: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(like.shape), requires_grad=False)


def names_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return, for every name of a parameter, all names of the same one: several where weights are tied."""
    groups: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(p), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def untie(model: nn.Module, name: str) -> None:
    """Give a tied name a parameter of its own."""
    module, leaf = _owner(model, name)
    p = module._parameters[leaf]
    assert p is not None
    module._parameters[leaf] = _blank(p, p.dtype)


@contextmanager
def filled(model: nn.Module, values: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Put values at weights, by name, under all their names, inside a `with` block. names: `names_of(model)`."""
    before = []
    try:
        for name, value in values.items():
            parameter = nn.Parameter(value, requires_grad=False)
            for each in names[name]:
                module, leaf = _owner(model, each)
                before.append((module, leaf, module._parameters[leaf]))
                module._parameters[leaf] = parameter
        yield
    finally:
        for module, leaf, p in before:
            module._parameters[leaf] = p


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
