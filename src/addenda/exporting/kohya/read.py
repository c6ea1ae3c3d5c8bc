"""Reading a file of kohya or LyCORIS: every key of a model's part finds its module, or nothing is attached."""

from pathlib import Path

import torch
from torch import nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.visible import label
from addenda.core.disk.access import shown
from addenda.core.site.kinds import CONV, LINEAR
from addenda.core.site.site import owners_of, site_at
from addenda.exporting.install import Forms
from addenda.exporting.kohya.file import KohyaFile, read_file
from addenda.exporting.kohya.forms import MisfitError, form_of
from addenda.exporting.kohya.names import FOREIGN, ORIGINAL, flat_names, original_names, part_of


@torch.no_grad()
def read(path: str | Path, model: nn.Module, part: str | None = None) -> Forms:
    """Return the adapter of a file as methods and tensors at the sites of a model: a UNet, a text encoder, …

    part: which of the file's parts this model is ("lora_unet", "lora_te1", …); needed where a file has several. The
    others belong to other models, and notes say that they are left out.

    Raises AddendaError listing all that does not fit: keys without a module, or with two; factors that lack; alphas
    without factors; shapes; methods of LyCORIS that have no counterpart, by name.
    """
    file = read_file(path)
    chosen = _chosen(file, model, part)
    known, owners, forms = flat_names(model, chosen), owners_of(model), Forms()
    problems, missing, notes = [], [], {}
    keys: dict[str, str] = {}  # by path: the name in the file
    for name, tensors in file.parts[chosen].items():
        paths = known.get(name, [])
        if not paths:
            missing.append(name)
            continue
        if len(paths) > 1:
            problems.append(f"{chosen}_{name} is {' or '.join(paths)}: flattened, their names are the same")
            continue
        (at,) = paths
        if at in keys:
            problems.append(f"{chosen}_{name} and {chosen}_{keys[at]} are both {at}")
            continue
        keys[at] = name
        try:
            site = site_at(model, at, owners)
            if site.kind not in (LINEAR, CONV):
                raise MisfitError(
                    f"{site.kind.name} layers are not changed by these files, which know linear ones and convolutions"
                )
            form = form_of(site, tensors)
        except (MisfitError, AddendaError) as error:
            problems.append(f"{chosen}_{label(name)}: {str(error).rstrip('.')}")
            continue
        forms.sites[at] = form.method, form.tensors
        if form.note:
            notes.setdefault(form.note, []).append(at)
    problems += _without_module(model, missing, known, chosen)
    if problems:
        listing = "; ".join(problems[:12]) + (" …" if len(problems) > 12 else "")
        raise AddendaError(
            f"{shown(file.path)} does not fit this {type(model).__name__}, and nothing was attached. {len(problems)} "
            f"problems: {listing}{'' if listing.endswith(('?', '.')) else '.'}"
        )
    forms.notes += [f"{note}: written out as a LoRA ({len(at)} sites, e.g. {at[0]})" for note, at in notes.items()]
    forms.notes += [f"{other} ({len(m)} modules) is of another model, and left out" for other, m in file.parts.items()
                    if other != chosen]  # fmt: skip
    return forms


def _chosen(file: KohyaFile, model: nn.Module, part: str | None) -> str:
    """Return the part of the file that the model is. Raises AddendaError where that is not said or not there."""
    listing = ", ".join(f"{name} ({len(modules)} modules)" for name, modules in file.parts.items())
    if part is not None:
        if part not in file.parts:
            raise AddendaError(f"{shown(file.path)} has no part {part!r}; it has {listing}.{nearest(part, file.parts)}")
        return part
    if len(file.parts) == 1:
        return next(iter(file.parts))
    likely = part_of(model)
    fitting = [name for name in file.parts if name.startswith(likely)]
    hint = f", for this {type(model).__name__} perhaps part={fitting[0]!r}" if fitting else ""
    raise AddendaError(
        f"{shown(file.path)} holds changes of {len(file.parts)} models: {listing}. Say which of them this model is"
        f"{hint}; the others are read into their own models, each by a call of its own."
    )


def _without_module(model: nn.Module, missing: list[str], known: dict[str, list[str]], part: str) -> list[str]:
    """Return what is wrong with names that no module has, in few lines."""
    if not missing:
        return []
    first = missing[0]
    reason = nearest(first, known, 1)
    if any(FOREIGN.match(n) for n in missing):
        reason = " These are original names of a transformer (Flux, SD3), and diffusers' names are read."
    elif any(ORIGINAL.match(n) for n in missing) and not original_names(model):
        reason = (
            " These are names of the original layout, which is known for UNets of (CrossAttn)DownBlock2D and "
            "(CrossAttn)UpBlock2D, as SD and SDXL are."
        )
    some = ", ".join(f"{part}_{label(n)}" for n in missing[:4])
    return [f"{len(missing)} names have no module in the model: {some}{' …' if len(missing) > 4 else ''}.{reason}"]
