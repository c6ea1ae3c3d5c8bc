"""Positions that a caller gives: which entries of each site a sparse change has, checked before anything is built."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.method.contract import Method, WeightMethod
from addenda.core.site.site import Site

Positions = Tensor | Sequence[int]  # flat, in the matrix (m × n) as a site shows it, or in the vector


def placed(
    plan: list[tuple[Site, Method]], positions: Mapping[str, Positions] | None
) -> tuple[list[tuple[Site, Method]], dict[str, Tensor]]:
    """Return the plan for given positions, and these by path: int64 on the CPU, rising.

    Raises AddendaError listing paths that are no site of such a method, sites without a position, positions that are
    no whole numbers, outside of the weight, or named twice.
    """
    if positions is None:
        return plan, {}
    takes = {site.path: site for site, m in plan if _takes(m)}
    if not takes:
        kinds = ", ".join(dict.fromkeys(m.name or "full copy" for _, m in plan))
        raise AddendaError(
            f"positions= is for a method that takes positions as given, such as sparse; {kinds} does not."
        )
    problems = [f"{path} is no site of it.{nearest(path, takes)}" for path in positions if path not in takes]
    found: dict[str, Tensor] = {}
    for path, site in takes.items():
        if path not in positions:
            problems.append(f"{path} has no position; leave it out with exclude=")
        else:
            made = _checked(site, positions[path])
            if isinstance(made, str):
                problems.append(f"{path}: {made}")
            else:
                found[path] = made
    if problems:
        more = f" … and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AddendaError(f"{len(problems)} of the given positions cannot be: {'; '.join(problems[:8])}{more}.")
    return [(s, m.placed(len(found[s.path])) if _takes(m) else m) for s, m in plan], found  # type: ignore[attr-defined]


def _takes(method: Method) -> bool:
    return isinstance(method, WeightMethod) and method.has("placed")


def _checked(site: Site, given: Positions) -> Tensor | str:
    """Return a site's positions, sorted, or what is wrong with them."""
    try:
        flat = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        return f"expected flat positions, got {str(given)[:60]}"
    if flat.dim() != 1 or (
        flat.numel() and (flat.is_floating_point() or flat.is_complex() or flat.dtype == torch.bool)
    ):
        kind = str(flat.dtype).removeprefix("torch.")
        return f"expected flat positions as whole numbers in one row, got {list(flat.shape)} of {kind}"
    if not len(flat):
        return "there is no position; leave the site out"
    flat, size = flat.to("cpu", torch.int64).sort().values, site.weight.numel()
    if int(flat[0]) < 0 or int(flat[-1]) >= size:
        return f"positions are from 0 to {size - 1:,}, got {int(flat[0]):,} to {int(flat[-1]):,}"
    twice = flat[1:][flat.diff() == 0]
    return f"position {int(twice[0]):,} is named twice" if len(twice) else flat
