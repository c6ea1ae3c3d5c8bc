"""The child module `addenda` of an adapted module: its adapters, and which of them act for whom."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward import acting
from addenda.core.forward.acting import Acting, Blocks, Here
from addenda.core.forward.mixed import Mixed
from addenda.core.forward.tensors import SiteTensors
from addenda.core.forward.writing import in_save_pretrained, loss
from addenda.core.modules.classes import Adapted
from addenda.core.modules.late_backward import History, first, told, used
from addenda.core.site.kinds import PARAMETER, Kind
from addenda.core.site.site import Point, Site


class Slots(nn.Module):
    """The adapters of one module, and which of them act for whom: see `core.forward.acting`."""

    def __init__(self):
        super().__init__()
        self.kinds: dict[str, Kind] = {}
        self._own = self.traced = Acting()  # by the model's state; and what a compiled forward takes for that
        self.blocks: Blocks | None = None  # by block; None where no block is
        self.here = Here()
        self.history = History()  # the model's: what acted when

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("blocks", "here", "history", "traced")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.blocks, self.here, self.history, self.traced = None, Here(), History(), self._own

    @property
    def own(self) -> Acting:
        """What acts by the model's state."""
        return self._own

    @own.setter
    def own(self, acts: Acting) -> None:
        self._own = self.traced = acts

    def train(self, mode: bool = True) -> "Slots":
        """Set the mode of all that is in here, and of what stands in for it in compiled forwards."""
        for group in self.traced.live.values():
            for tensors in group:
                tensors.training = mode
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Slots":
        self.traced = self._own  # stand-ins are no modules of this one, and would stay where they are
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> "Slots":
        """Return a replica, which runs in a thread of its own with what acts here."""
        replica: Any = super()._replicate_for_data_parallel()
        replica.own, replica.blocks, replica.here = self.acting(), None, Here()
        return replica

    def acting(self) -> Acting:
        """Return what acts in the running forward; in one that is computed again in backward, what acted in it."""
        if torch.compiler.is_compiling():
            if acting.tasks.blocks:
                raise AddendaError("A compiled forward cannot tell in which asyncio task's `with` block it runs.")
            acting.note_compiled()
            return self.here.acting or self.traced
        if acting.gate.closed:
            acting.wait()
        if first():
            return self._own if self.blocks is None else self._chosen()
        return used(self, self._chosen)

    def _chosen(self) -> Acting:
        block = None if self.blocks is None else told(acting.Block)
        if self.blocks is not None and block is not None:  # a reentrant checkpoint's forward ran in this block
            return self.blocks.get(block, self._own)
        acts = self.within() or self._own
        if (then := self.history.then()) is not None and then != acts.mark:
            raise AddendaError(
                "Backward computes a part of a forward again in which other adapters acted than do now, so that its "
                "gradients would be those of another function. Call backward before switch, and inside of the `with` "
                "block of the forward; or use checkpoints with use_reentrant=False, which know what acted."
            )
        return acts

    def within(self) -> Acting | None:
        """Return what acts by the blocks around the running code, or None outside of blocks."""
        for block in reversed(acting.blocks()) if self.blocks is not None else ():
            acts = self.blocks.get(block)
            if acts is not None and not block.over():
                return acts
        return None

    @property
    def live(self) -> dict[str, tuple[SiteTensors, ...]]:
        return self.acting().live

    @live.setter
    def live(self, value: dict[str, tuple[SiteTensors, ...]]) -> None:
        self.own = replace(self.own, live=value)

    @property
    def each(self) -> dict[str, Mixed]:
        return self.acting().each

    @property
    def readers(self) -> int:
        return self.acting().readers

    @property
    def seen(self) -> Tensor | None:
        return self.here.seen

    @property
    def waiting(self) -> int:
        return self.here.waiting

    @property
    def now(self) -> dict[tuple[str, bool], Tensor] | None:
        return self.here.now

    def acts_here(self) -> bool:
        """Return whether a change acts for the code that asks, blocks included."""
        acts = self.within() or self.own
        return any(acts.live.values()) or bool(acts.each)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return what torch's does; where a model is written whole, for other libraries to read, nothing.

        Raises AddendaError where that would lose a change: see `core.state.save_pretrained`.
        """
        whole = options.get("destination")
        if whole is not None and in_save_pretrained():
            if self.acts_here():
                raise AddendaError(loss(", ".join(map(repr, self._modules)), "save_pretrained"))
            return whole
        return super().state_dict(*args, **options)

    def add(self, adapter: str, site: Site, tensors: SiteTensors) -> None:
        if adapter not in self._modules:
            self._modules[adapter] = nn.Module()
        self._modules[adapter]._modules[site.parameter] = tensors
        if not isinstance(site, Point):
            tensors.fits = tuple(site.stored)
        else:
            tensors.path, tensors.width, tensors.reads = site.path, site.width, site.reads
            source = None if site.source is None else slots_of(site.source)
            tensors.source = () if source is None else (source,)
        self.kinds[site.parameter] = site.kind

    def remove(self, adapter: str) -> None:
        self._modules.pop(adapter, None)
        parameters = {p for holder in self._modules.values() for p in holder._modules}
        self.kinds = {p: k for p, k in self.kinds.items() if p in parameters}
        self.live = {p: () for p in self.kinds}

    def held(self, adapter: str, parameter: str) -> SiteTensors | None:
        """Return an adapter's tensors at this parameter, or None."""
        tensors = self._modules[adapter]._modules.get(parameter) if adapter in self._modules else None
        return tensors if isinstance(tensors, SiteTensors) else None

    def arranged(
        self,
        adapters: Sequence[str],
        mix: Callable[..., "Mixed | tuple[SiteTensors, ...]"],
        in_turn: tuple[str, ...] | None,
    ) -> Acting:
        """Return what acts in a block: `mix` of the adapters' tensors at each parameter, `in_turn` at raw ones.

        in_turn None: `mix` at these too. What it gives as a tuple acts one after another.
        """
        acts = self.activated(())
        for parameter, kind in self.kinds.items():
            tensors = [self.held(a, parameter) for a in adapters]
            if kind == PARAMETER and in_turn is not None:
                acts.live[parameter] = tuple(t for a in in_turn if (t := self.held(a, parameter)) is not None)
            elif any(t is not None for t in tensors):
                mixed = mix(tensors)
                if isinstance(mixed, Mixed):
                    acts.each[parameter] = mixed
                else:
                    acts.live[parameter] = mixed
        return acts

    def activated(self, adapters: tuple[str, ...]) -> Acting:
        """Return what acts where the adapters act one after another."""
        tensors = {p: [self.held(a, p) for a in adapters] for p in self.kinds}
        live = {p: tuple(h for h in group if h is not None) for p, group in tensors.items()}
        return Acting(live, mark=adapters)

    def done(self) -> None:
        """Count down one change that has read this module's input; after the last one the input is let go of."""
        self.here.waiting -= 1
        if self.here.waiting <= 0:
            self.here.seen = None


def slots_of(module: nn.Module) -> Slots | None:
    """Return what an adapted module holds of its adapters; None for a module without any."""
    slots = module._modules.get("addenda") if isinstance(module, Adapted) else None
    return slots if isinstance(slots, Slots) else None
