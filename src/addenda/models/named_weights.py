"""A folder's weights by the names that its model has for them, and back into the tensors of its files.

transformers renames what it reads (older names, the prefix of a model with a head) and converts some of it: experts
that lie one by one become a stack, fused projections are split. Which it does is asked of transformers itself, for
every tensor of a file, as it does when it loads. What is converted together is a `Unit`: the tensors of some files on
one side, weights of the model on the other, and nothing else is needed for either.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import shown
from addenda.models.checkpoint_files import CheckpointFiles
from addenda.models.skeleton import give_dtypes, names_of, untie


@dataclass
class Unit:
    """What is converted together. sources: names in files, in transformers' order; targets: names in the model."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    converter: Any = None  # a transformers WeightConverter; None where a name is all that differs
    patterns: tuple[str, ...] = ()  # of each source, the converter's pattern that it fits
    renamed: tuple[str, ...] = ()  # the sources' names between renaming and conversion


@dataclass
class NamedWeights:
    """The weights of a folder under the names of its model, whose skeleton has the dtypes and ties of the folder."""

    files: CheckpointFiles
    model: nn.Module
    units: tuple[Unit, ...]
    unit_of: Mapping[str, Unit]  # by name in the model
    names: Mapping[str, tuple[str, ...]]  # for every parameter all its names
    missing: tuple[str, ...]  # parameters that no file has, under none of their names
    unread: tuple[str, ...] = field(default=())  # tensors of files that the model does not have

    @classmethod
    def of(cls, files: CheckpointFiles, model: nn.Module) -> "NamedWeights":
        """Match a folder's files with a skeleton, which is given the files' dtypes and ties.

        Raises AddendaError listing weights of other shapes than the model has.
        """
        units, unread = _units(files, model)
        shapes = {name: p for name, p in model.state_dict(keep_vars=True).items()}
        unit_of, dtypes, problems = {}, {}, []
        for unit in units:
            for name, tensor in zip(unit.targets, _converted(unit, _blanks(unit, files), model), strict=True):
                if tuple(tensor.shape) != tuple(shapes[name].shape):
                    problems.append(f"{label(name)}: {[*tensor.shape]} in the file, {[*shapes[name].shape]} wanted")
                unit_of[name], dtypes[name] = unit, tensor.dtype
        if problems:
            raise AddendaError(
                f"{len(problems)} weights in {shown(files.folder)} have other shapes than its config.json says: "
                f"{'; '.join(problems[:4])}. Weights and config.json do not belong together; get both from one source."
            )
        made = cls(files, model, tuple(units), unit_of, {}, (), tuple(unread))
        for group in dict.fromkeys(names_of(model).values()):  # as transformers: tied where both are there and equal
            first, *others = [name for name in group if name in unit_of] or [group[0]]
            for other in others:
                if not made._equal(first, other):
                    untie(model, other)
        give_dtypes(model, dtypes)
        made.names = names_of(model)
        groups = dict.fromkeys(made.names.values())
        made.missing = tuple(group[0] for group in groups if not any(name in unit_of for name in group))
        return made

    def holder(self, name: str) -> str | None:
        """Return the name, of all that a parameter has, under which the files have it; None where they do not."""
        return next((n for n in self.names.get(name, (name,)) if n in self.unit_of), None)

    def read(self, unit: Unit) -> dict[str, Tensor]:
        """Return a unit's weights by their names in the model."""
        tensors = [self.files.read(name) for name in unit.sources]
        return dict(zip(unit.targets, _converted(unit, tensors, self.model), strict=True))

    def weight(self, name: str) -> Tensor:
        """Return one weight by its name in the model. Raises KeyError where no file has it."""
        holder = self.holder(name)
        if holder is None:
            raise KeyError(name)
        return self.read(self.unit_of[holder])[holder]

    def back(self, unit: Unit, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that files hold, by their names there, of a unit's weights: the inverse of `read`."""
        if unit.converter is None:
            return {unit.sources[0]: weights[unit.targets[0]]}
        return dict(zip(unit.sources, _reverted(unit, weights, self.model), strict=True))

    def check_back(self, unit: Unit) -> None:
        """Raise AddendaError where a unit's weights, converted back unchanged, are not the bytes in the files."""
        if unit.converter is None:
            return
        try:
            back = self.back(unit, self.read(unit))
            equal = all(_same(back[name], self.files.read(name)) for name in unit.sources)
        except AddendaError:
            raise
        except Exception as error:  # of whatever class: transformers has no way back here
            raise AddendaError(_no_way_back(unit, f"{type(error).__name__}: {error}")) from error
        if not equal:
            raise AddendaError(_no_way_back(unit, "what comes back has other bits"))

    def _equal(self, one: str, other: str) -> bool:
        return _same(self.weight_under(one), self.weight_under(other))

    def weight_under(self, name: str) -> Tensor:
        return self.read(self.unit_of[name])[name]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def _no_way_back(unit: Unit, reason: str) -> str:
    return (
        f"transformers converts {label(unit.sources[0])} (and {len(unit.sources) - 1} more) as it loads them, and they "
        f"cannot be written back as they lay ({reason[:300]}). Use merge(model) and save_pretrained in memory."
    )


# -- what transformers does with names ---------------------------------------------------------------------------------


def _units(files: CheckpointFiles, model: Any) -> tuple[list[Unit], list[str]]:
    """Return the units of all tensors that the model has, and the names of those that it does not have."""
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, loading.WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, list[tuple[str, str | None, str]]] = {}
    unread = []
    for name in sorted(files.tensors, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, known)
        between = loading.rename_source_key(name, renamings, [])[0]
        if target not in known and name in known:
            target, pattern = loading.rename_source_key(name, [], [], prefix, known)
        if target in known:
            groups.setdefault(target, []).append((name, pattern, between))
        else:
            unread.append(name)
    units = []
    for target, members in groups.items():
        names, patterns, between = zip(*members, strict=True)
        if patterns[0] is None:
            unread += names[:-1]  # of two names for one weight the last is what stays
            units.append(Unit(names[-1:], (target,)))
            continue
        unit = Unit(names, (target,), deepcopy(by_pattern[patterns[0]]), patterns, between)
        converted = _convert(unit, _blanks(unit, files), model)
        unit.targets = tuple(converted)
        units.append(unit)
    return units, unread


def _blanks(unit: Unit, files: CheckpointFiles) -> list[Tensor]:
    entries = [files.tensors[name] for name in unit.sources]
    return [torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries]


def _converted(unit: Unit, tensors: Sequence[Tensor], model: Any) -> list[Tensor]:
    """Return the model's weights of a unit's tensors, in the order of its targets."""
    if unit.converter is None:
        return [tensors[0]]
    converted = _convert(unit, tensors, model)
    return [converted[name] for name in unit.targets]


def _convert(unit: Unit, tensors: Sequence[Tensor], model: Any) -> dict[str, Tensor]:
    converter = deepcopy(unit.converter)
    for name, pattern, tensor in zip(unit.sources, unit.patterns, tensors, strict=True):
        converter.add_tensor(unit.targets[0], name, pattern, tensor)
    result = converter.convert(unit.targets[0], model=model, config=model.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in result.items()}


def _reverted(unit: Unit, weights: Mapping[str, Tensor], model: Any) -> list[Tensor]:
    """Return the tensors of files that a unit's weights come from, in the order of its sources."""
    reverse = unit.converter.reverse_transform()
    first = ""
    for name in unit.targets:
        renamed, pattern = reverse.rename_source_key(name)
        if pattern is None:
            raise AddendaError(_no_way_back(unit, f"{name} has no name there"))
        first = first or renamed
        reverse.add_tensor(first, name, pattern, weights[name])
    result = reverse.convert(first, model=model, config=model.config)
    found = {name: t[0] if isinstance(t, list) else t for name, t in result.items()}
    prefix = f"{model.base_model_prefix}."
    named = [next((n for n in (b, prefix + b, b.removeprefix(prefix)) if n in found), None) for b in unit.renamed]
    if None in named or len(set(named)) < len(found):
        raise AddendaError(_no_way_back(unit, f"its names would be {', '.join(list(found)[:3])}"))
    return [found[n].contiguous() for n in named if n is not None]
