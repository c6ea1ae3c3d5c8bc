"""Reading a folder of PEFT: every tensor of it finds its place on the model, or nothing is attached."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.visible import label
from addenda.core.site.kinds import kind_of
from addenda.core.site.targets import called, grouped
from addenda.exporting.install import Forms
from addenda.exporting.peft import copies
from addenda.exporting.peft.conversion import Config, Conversion, Saved, is_quick, matches
from addenda.exporting.peft.folder import PREFIX, ROOT, PeftFolder, read_folder
from addenda.exporting.peft.table import CONVERSIONS, why_not


def read(path: str | Path, model: nn.Module) -> Forms:
    """Return the adapter of a PEFT folder as methods and tensors at the sites of a model.

    Raises AddendaError for a type of PEFT that has no counterpart, for options that are not read, and with all that
    does not fit: keys without a module, names of adapters in keys, factors that lack, shapes that config and model
    contradict, modules that the config names and that have no tensors.
    """
    folder = read_folder(path)
    conversion = CONVERSIONS.get(folder.type)
    if conversion is None:
        raise AddendaError(f"{folder.path.name} is a {label(folder.type, 60)} adapter of PEFT: {why_not(folder.type)}.")
    conversion.check(folder.config)
    sites, others, shared, problems = _sorted(folder, conversion)
    saved, missing, more = conversion.place(model, folder.config, sites)
    names = [n for n, _ in model.named_modules()]
    for pattern, paths in grouped(missing).items():
        problems.append(f"the model has no {pattern[:200]} ({len(paths)} modules).{nearest(paths[0], names, 1)}")
    problems += more + _unlike_targets(model, folder.config, saved, sites)
    forms = Forms()
    problems += copies.read(model, folder.config, others, forms)
    if problems:
        raise AddendaError(
            f"The PEFT adapter in {folder.path.name} does not fit this {type(model).__name__}, and nothing was "
            f"attached. {len(problems)} problems: {'; '.join(problems[:12])}{' …' if len(problems) > 12 else ''}."
        )
    conversion.read(folder.config, saved, shared, forms)
    return forms


def _sorted(
    folder: PeftFolder, conversion: Conversion
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Return the tensors of sites by path, whole copies by path, shared ones by name, and what is no key of PEFT."""
    sites: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    problems = []
    endings = "|".join(re.escape(s) for s in sorted(conversion.suffixes, key=len, reverse=True))
    named = re.compile(rf"(.+)\.({endings})")
    stems = {s.split(".")[0] for s in conversion.suffixes}
    for key, tensor in folder.tensors.items():
        rest = key.removeprefix(PREFIX)
        whole = not tensor.is_floating_point() and "indices" not in rest
        if whole and (named.fullmatch(rest) or key.removeprefix(ROOT) in conversion.shared):  # a head may count batches
            problems.append(f"{key} holds whole numbers ({str(tensor.dtype).removeprefix('torch.')})")
        if key.removeprefix(ROOT) in conversion.shared:
            shared[key.removeprefix(ROOT)] = tensor
        elif not key.startswith(PREFIX):
            problems.append(f"{key} does not begin with {PREFIX}")
        elif found := named.fullmatch(rest):
            sites.setdefault(found[1], {})[found[2]] = tensor
        elif name := next((part for part in rest.split(".") if part in stems), None):
            problems.append(
                f"{key}: behind {name} stands {rest.rpartition(f'{name}.')[2] or 'nothing'!r}, the name of an adapter "
                "perhaps, which PEFT leaves out of a saved key"
            )
        else:
            copies[rest] = tensor
    return sites, copies, shared, problems


def _unlike_targets(
    model: nn.Module, config: Config, saved: Sequence[Saved], sites: Mapping[str, Mapping[str, Tensor]]
) -> list[str]:
    """Return the modules that the config names and that have no tensors, and those that have tensors without a name."""
    targets = config.get("target_modules")
    if not (isinstance(targets, list) and targets) and not _sensible(targets):
        return []
    found = {s.known_as: s for s in saved}
    adapted = {id(s.site.weight) for s in saved}
    problems = []
    if not (config.get("exclude_modules") or config.get("layers_to_transform") is not None):
        absent = [
            path
            for path, module in called(model)
            if kind_of(module) is not None
            and _targeted(targets, path)
            and path not in sites
            and id(module._parameters.get("weight")) not in adapted
        ]
        problems += [f"the config names {p} ({len(paths)} modules), which has no tensors"
                     for p, paths in grouped(absent).items()]  # fmt: skip
    extra = [
        name
        for name, s in found.items()
        if not s.raw and not any("token" in k for k in s.tensors) and name in sites and not _targeted(targets, name)
        and not config.get("ensure_weight_tying")
    ]  # fmt: skip
    if isinstance(targets, list) and (layers := config.get("layers_to_transform")) not in (None, []):
        numbers = layers if isinstance(layers, list) else [layers]
        beyond = [n for n in found if n in sites and n not in targets and _layer(config, n) not in (None, *numbers)]
        problems += [f"{p} ({len(paths)} modules) has tensors in layers that the config's layers_to_transform does not "
                     "name, so that PEFT would leave them out" for p, paths in grouped(beyond).items()]  # fmt: skip
    problems += [f"{p} ({len(paths)} modules) has tensors, and the config's target_modules does not name it, so that "
                 "PEFT would leave it out" for p, paths in grouped(extra).items()]  # fmt: skip
    return problems


def _layer(config: Config, path: str) -> int | None:
    """Return the number by which layers_to_transform knows a path's layer; None where a pattern of its own says it."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return None if config.get("layers_pattern") or found is None else int(found[1])


def _sensible(targets: object) -> bool:
    """Return whether target_modules is an expression that can be looked at: no word of PEFT's own, and quick."""
    return isinstance(targets, str) and targets not in ("all-linear", "dummy-target-modules") and is_quick(targets)


def _targeted(targets: Any, path: str) -> bool:
    """Return whether target_modules names a path as PEFT reads it: by its end, or a whole expression."""
    if isinstance(targets, str):
        return matches(f"(?:{targets})$", path, "target_modules")
    return any(path == t or path.endswith(f".{t}") for t in targets)
