"""The base's own bits while a change is merged into it, and how they are restored."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward.acting import blocks
from addenda.core.forward.slots import slots_of
from addenda.core.site.site import owners_of, site_at
from addenda.core.state import copies as cast
from addenda.core.state.state import State


def apart(state: State, names: Iterable[str] | None = None) -> None:
    """Raise AddendaError where one of these adapters (None: any) acts in a block of another thread or task."""
    for block in list(state.blocks):
        acting = set(block.names) if names is None else set(block.names) & set(names)
        if not block.closed and block not in blocks() and (acting or names is None):
            labels = ", ".join(map(repr, sorted(acting))) or "the base alone"
            if block.is_callers:  # which a switch or a merge inside has left
                raise AddendaError(f"This runs inside of a `with` block of {labels}. Call it behind its end.")
            raise AddendaError(f"Another thread or task is in a `with` block of {labels}. Wait for its end.")


@contextmanager
def still_merged(state: State) -> Iterator[None]:
    """Keep what a merge has set aside where a `with` block that undoes it is interrupted: `unmerge` can go on."""
    merged, converted = state.merged, state.cast
    try:
        yield
    except Exception:
        raise
    except BaseException:  # Ctrl-C: half of the base has its bits back by now
        state.merged, state.cast = merged, converted
        raise


@torch.no_grad()
def restore(root: nn.Module, state: State) -> None:
    """Undo a merge: write the base's own bits back, and everything that the merge converted to another dtype."""
    with still_merged(state):
        take_out(root, state)
        cast.put_back(root, state.cast)
        state.cast = {}


def take_out(root: nn.Module, state: State) -> None:
    """Write back the bits that the base had before the change was written into it."""
    owners, merged = owners_of(root), state.merged or {}
    with still_merged(state):
        state.merged = None  # whatever else comes: what cannot be written was not written before either
        for path, kept in merged.items():
            try:
                site = site_at(root, path, owners)
            except AddendaError:
                continue
            replaced = kept.adapted and slots_of(site.module) is None  # by a module that has other bits
            if not replaced and kept.fits(site.weight):
                kept.into(site)
        state.fingerprints.clear()  # those of the copies that end here
