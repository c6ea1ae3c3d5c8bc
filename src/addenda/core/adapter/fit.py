"""Whether given tensors are those that a method has at a site: names, kinds, shapes, and numbers that make sense."""

from pathlib import Path

import torch
from torch import Tensor, nn

from addenda.core.adapter.build import Assigned, numbers, template
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import FLOATING
from addenda.core.method.contract import Params, WeightMethod
from addenda.core.packed.tensor import Packed

_PIECE = 1 << 22  # numbers that are looked at at once: of large copies no temporary is as large as they are


def fitting_tensors(plan: Assigned, stored: dict[str, Params], path: str | Path) -> None:
    """Raise AddendaError where names, kinds or shapes are not those of a fresh `init`, or values are not sane."""
    problems, templates = [], {}
    for site, method in plan:  # a formula, before anything is made
        expected = numbers(site, method)
        actual = sum(t.numel() for t in stored[site.path].values() if isinstance(t, nn.Parameter))
        if expected != actual:
            problems.append(f"{site.path}: expected {expected:,} trained numbers, the file has {actual:,}")
    if problems:
        raise AddendaError(f"{path} holds tensors that do not fit, and nothing was loaded: {'; '.join(problems[:8])}.")
    for site, method in plan:
        key = (method, site.kind, tuple(site.stored))
        if key not in templates:
            fresh = template(site, method)
            templates[key] = {k: form_of(t, k in fresh._parameters) for k, t in fresh.stored().items()}, fresh.matrices
        (expected, matrices), actual = templates[key], stored[site.path]
        form = {k: form_of(t, isinstance(t, nn.Parameter)) for k, t in actual.items()}
        if form != expected:
            problems.append(f"{site.path}: expected {form_text(expected)}, the file has {form_text(form)}")
            continue
        problems += [f"{site.path}/{k} is no matrix and cannot be codes" for k, t in actual.items()
                     if isinstance(t, Packed) and k not in matrices]  # fmt: skip
        placed = isinstance(method, WeightMethod) and method.has("sparse")
        for k, t in actual.items():
            if reason := not_sane(t, site.weight.numel()) or (placed and unsorted(t)):
                problems.append(f"{site.path}/{k} {reason}")
        if reason := method.check_values(actual):
            problems.append(f"{site.path}: {reason}")
    if problems:
        raise AddendaError(f"{path} holds tensors that do not fit, and nothing was loaded: {'; '.join(problems[:8])}.")


def not_sane(t: Tensor, size: int) -> str | None:
    """Return what is wrong with a tensor's numbers, or None. size: of the weight into which whole numbers point."""
    if t.is_floating_point():
        pieces = t.detach().flatten().split(_PIECE)
        # a finite sum has finite terms; one that is not may come of large ones, and each is looked at
        finite = all(bool(p.sum().isfinite()) or bool(torch.isfinite(p).all()) for p in pieces)
        return None if finite else "holds values that are not finite"
    in_range = t.dtype not in (torch.int32, torch.int64) or not t.numel() or 0 <= int(t.min()) <= int(t.max()) < size
    return None if in_range else "holds positions outside the weight"


def unsorted(t: Tensor) -> str | None:
    """Return what is wrong with the order of positions, or None; of a stack each matrix has its own."""
    rising = t.dtype not in (torch.int32, torch.int64) or t.dim() < 1 or bool((t.diff() > 0).all())
    return None if rising else "holds positions that do not rise, or one twice"


def form_of(t: Tensor, trained: bool) -> tuple:
    """Return a tensor's shape, its kind (every floating dtype is one), and whether it is trained."""
    return tuple(t.shape), "float" if t.dtype in FLOATING else str(t.dtype).removeprefix("torch."), trained


def form_text(form: dict) -> str:
    """Return the tensors of a site, by name, as an error shows them."""
    return ", ".join(f"{k} {kind} {list(shape)}" for k, (shape, kind, _) in form.items()) or "nothing"
