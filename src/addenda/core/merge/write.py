"""Writing W + ΔW into the base: each site rounded once, and read back.

Where the base's weights are packed there are four ways: onto the values that the adapter was trained on, or onto those
that were lost when they were packed; and either of them plain, or packed again.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.forward.adapted import effective_weight
from addenda.core.forward.slots import slots_of
from addenda.core.modules.wrappers import unwrap
from addenda.core.packed.tensor import Packed
from addenda.core.site.kinds import PARAMETER
from addenda.core.site.site import Site, owners_of, site_at
from addenda.core.state.state import Kept, State, apply_active

Base = Literal["as-trained", "full-precision"]


@dataclass(frozen=True)
class Writing:
    """The way in which changed weights are written. full: the model with the weights before they were packed."""

    base: Base
    again: bool
    full: nn.Module | None
    rounding: str
    seed: int

    def __str__(self) -> str:
        return f"{self.base}, packed again" if self.again else self.base

    @property
    def plain(self) -> bool:
        """Whether this is the only way that plain weights have."""
        return self.base == "as-trained" and not self.again

    def others(self) -> "list[Writing]":
        """Return all ways to compare, where one was asked for that is not the plain one."""
        if self.plain and self.full is None:
            return []
        bases: list[Base] = ["as-trained", *(["full-precision"] if self.full is not None else [])]
        return [replace(self, base=b, again=again) for b in bases for again in (False, True) if self.again or not again]


def write(root: nn.Module, state: State, how: Writing) -> tuple[dict[str, float], float, float]:
    """Write the changed weights: (error at each site, over all of them, packed sites' distance from training)."""
    owners, names = owners_of(root), state.active
    state.merged, errors = {}, {}
    lost = size = drift = trained = 0.0
    for path in dict.fromkeys(p for n in names for p in state.records[n].methods):
        site = site_at(root, path, owners)
        index, original, start, exact = _change(site)
        packed = original if isinstance(original, Packed) else None
        target = exact
        if packed is not None and how.base == "full-precision":
            assert how.full is not None
            plain = plain_weight(how.full, path, packed).detach().to(exact.device, exact.dtype)
            start, target = plain, plain + (exact - start)
        change = torch.linalg.vector_norm(target - start)
        if packed is not None and how.again:
            rounded = packed.again(target.to(packed.dtype))
            written = rounded.dense(exact.dtype)
        else:
            rounded = rounded_to(target, site.weight.dtype, how.rounding, Stream(how.seed, "rounding", path))
            written = rounded.to(exact.dtype)
        state.merged[path] = Kept(original, index)
        Kept(rounded, index).into(site)
        if packed is None:
            written = (site.weight.detach() if index is None else site.weight.detach().view(-1)[index]).to(exact.dtype)
        error = torch.linalg.vector_norm(written - target)
        errors[path] = float(error / change) if change > 0 else 0.0
        lost, size = lost + float(error) ** 2, size + float(change) ** 2
        if packed is not None:
            drift += float(torch.linalg.vector_norm(written - exact)) ** 2
            trained += float(torch.linalg.vector_norm(exact)) ** 2
        if packed is None and _more_than_rounding(float(error), target, site.weight.dtype):
            raise AddendaError(
                f"The merge was undone: what stands at {path} is not W + ΔW. It is {float(error):.2e} away, which "
                f"rounding to {site.weight.dtype} cannot be."
            )
    if how.base == "full-precision" and not how.again:  # where no adapter acts the packed weights become plain too
        assert how.full is not None
        for path, packed in packed_weights(root).items():
            plain = plain_weight(how.full, path, packed).detach().to(packed.device, packed.dtype, copy=True)
            site = site_at(root, path, owners)
            state.merged[path] = Kept(site.weight, adapted=False)
            Kept(plain).into(site)
    apply_active(root, state, names)
    return errors, (lost / size) ** 0.5 if size else 0.0, (drift / trained) ** 0.5 if trained else 0.0


def _more_than_rounding(error: float, aim: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a finite error is above one step of the dtype everywhere."""
    kind = torch.finfo(dtype)
    bound = kind.eps * float(torch.linalg.vector_norm(aim)) + kind.smallest_normal * kind.eps * aim.numel() ** 0.5
    return math.isfinite(error) and error > bound


def packed_weights(root: nn.Module) -> dict[str, Packed]:
    """Return the packed weights of a model by the path of their module."""
    return {p: w for p, m in root.named_modules() if isinstance(w := m._parameters.get("weight"), Packed)}


def plain_weight(full: nn.Module, path: str, like: Tensor) -> Tensor:
    """Return a model's plain weight at a path. Raises AddendaError where it has none of the shape of `like`."""
    try:
        weight = site_at(unwrap(full), path).weight
    except AddendaError:
        weight = None
    if weight is None or weight.shape != like.shape or isinstance(weight, Packed):
        raise AddendaError(
            f"The {type(unwrap(full)).__name__} that was given has no plain weight of shape {tuple(like.shape)} at "
            f"{path}. Give the model as it was before its weights were packed."
        )
    return weight


def _change(site: Site) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return a site's change: (flat positions or None for all, a copy of the base there, its values, the new ones).

    Values are in float32 at least. Only what changes is touched: a sparse change of a contiguous weight is its few
    entries.
    """
    slots = slots_of(site.module)
    assert slots is not None
    live, W = slots.live[site.parameter], site.weight.detach()
    if W.is_meta:
        raise AddendaError(
            f"{site.path} is on the meta device, without values (offloaded?), so nothing can be merged into it. Bring "
            "the whole model into memory first."
        )
    for t in live:
        t.refuse_absent(W)
    wide = torch.promote_types(W.dtype, torch.float32)
    if isinstance(W, Packed):
        return None, site.weight, W.dense(wide), effective_weight(site, live, wide)
    plain = W.is_contiguous() and not site.kind.transposed and (W.dim() == 2 or site.kind != PARAMETER)
    if not (plain and live and all(t.method.has("sparse") for t in live)):
        return None, W.clone(), W.to(wide), effective_weight(site, live, wide)
    parts = [t.method.sparse(t.tensors(), site.shape) for t in live]
    index, values = parts[0][0].long(), parts[0][1].detach().to(wide)
    if len(parts) > 1:  # where masks overlap the changes add up
        positions, place = torch.cat([i for i, _ in parts]).long().unique(return_inverse=True)
        sums = torch.cat([v.detach().to(wide) for _, v in parts])
        index, values = positions, values.new_zeros(len(positions)).index_add_(0, place, sums)
    entries = W.view(-1)[index]
    return index, entries, entries.to(wide), entries.to(wide) + values


def rounded_to(exact: Tensor, dtype: torch.dtype, rounding: str, rng: Stream) -> Tensor:
    """Cast once. Stochastic: up with a probability equal to the distance, for bfloat16 and float16."""
    if rounding == "nearest" or dtype not in (torch.bfloat16, torch.float16):
        return exact.to(dtype)
    down = exact.to(dtype)
    down = torch.where(down.float() > exact, torch.nextafter(down, torch.full_like(down, -torch.inf)), down)
    up = torch.nextafter(down, torch.full_like(down, torch.inf))
    share = ((exact - down.float()) / (up.float() - down.float())).nan_to_num(0.0)
    return torch.where(rng.uniform(*exact.shape).to(exact.device) < share, up, down)
