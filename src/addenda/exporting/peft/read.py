"""Reading a folder of PEFT: every tensor of it finds its place on the model, or nothing is attached."""

import re
from pathlib import Path

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.site.kinds import kind_of
from addenda.core.site.site import owners_of, site_at
from addenda.core.site.targets import called, grouped
from addenda.exporting.install import Forms
from addenda.exporting.peft.conversion import Config, Conversion, Saved
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
        raise AddendaError(f"{folder.path.name} is a {folder.type[:60]} adapter of PEFT: {why_not(folder.type)}.")
    conversion.check(folder.config)
    sites, copies, shared, problems = _sorted(folder, conversion)
    saved, missing = _placed(model, sites)
    names = [n for n, _ in model.named_modules()]
    for pattern, paths in grouped(missing).items():
        problems.append(f"the model has no {pattern[:200]} ({len(paths)} modules).{nearest(paths[0], names, 1)}")
    problems += _without_tensors(model, folder.config, {s.path for s in saved}, conversion)
    forms = Forms()
    problems += _heads(model, folder.config, copies, forms)
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


def _placed(model: nn.Module, sites: dict[str, dict[str, Tensor]]) -> tuple[list[Saved], list[str]]:
    saved, missing, owners = [], [], owners_of(model)
    for path, tensors in sites.items():
        try:
            saved.append(Saved(site_at(model, path, owners), tensors))
        except AddendaError:
            missing.append(path)
    return saved, missing


def _without_tensors(model: nn.Module, config: Config, known: set[str], conversion: Conversion) -> list[str]:
    """Return the modules that the config's list of targets names and that the folder has no tensors of."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return []  # an expression, or fewer than the list says
    absent = [
        path
        for path, module in called(model)
        if kind_of(module) is not None
        and any(path == t or path.endswith(f".{t}") for t in targets)
        and path not in known
    ]
    return [f"the config names {p} ({n} modules), which has no tensors" for p, n in
            ((pattern, len(paths)) for pattern, paths in grouped(absent).items())]  # fmt: skip


def _heads(model: nn.Module, config: Config, copies: dict[str, Tensor], forms: Forms) -> list[str]:
    """Put the modules that were trained whole into `forms`; return what does not fit."""
    names, problems = config.get("modules_to_save") or [], []
    parameters = dict(model.named_parameters())
    for path, tensor in copies.items():
        if not any(re.search(rf"(^|\.){re.escape(str(n))}\.", path) for n in names):
            problems.append(f"{path} is no tensor of this type, and the config's modules_to_save does not name it")
        elif path not in parameters:
            problems.append(f"the model has no {path}.{nearest(path, parameters, 1)}")
        elif parameters[path].shape != tensor.shape:
            problems.append(f"{path} is {list(tensor.shape)}, and the model's {list(parameters[path].shape)}")
        else:
            forms.heads[path] = {"value": tensor}
    for name in names:
        if not any(re.search(rf"(^|\.){re.escape(str(name))}\.", path) for path in copies):
            problems.append(f"the config's modules_to_save names {name}, which has no tensors")
    return problems
