"""Parts of a model, and what one dry forward shows of them: whose output is whose input."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from addenda.core.base.errors import AddendaError


@dataclass(frozen=True)
class Part:
    """A part of the model that starts with one module's input and ends with another's output."""

    block: str  # the path of the block around it, or ""
    first: str
    last: str
    role: str = ""  # its name, see `core.site.structure`, or "" where modules were named


@dataclass
class DryForward:
    """The record of one forward: each module call in order, with the storages of its first input and its output."""

    ins: dict[str, int] = field(default_factory=dict)
    outs: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # of the norms and other modules, as their calls ended
    norms: set[str] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)  # so that no storage's id is used twice

    def norm_before(self, part: Part) -> str | None:
        """Return the norm whose output the part reads, unless that output is the residual too."""
        if part.first not in self.ins:
            raise AddendaError(f"{part.first} did not run in a trial forward, so what stands before it is not known.")
        makers = [n for n in self.norms if self.outs.get(n) == self.ins[part.first] and self.ins.get(n) is not None]
        norms = [n for n in makers if self.order.index(n) < self.order.index(part.first)]
        return None if not norms or self._after_the_sum(part) else norms[-1]

    def norm_after(self, part: Part) -> str | None:
        """Return the norm over the sum of the part's output and the residual, in models that normalise after it."""
        if part.last not in self.outs:
            raise AddendaError(f"{part.last} did not run in a trial forward, so what stands behind it is not known.")
        if not self._after_the_sum(part):
            return None
        later = self.order[self.order.index(part.last) + 1 :]
        return next((n for n in later if n in self.norms and n.startswith(f"{part.block}.")), None)

    def _after_the_sum(self, part: Part) -> bool:
        """Return whether the block's output is that of a norm in it."""
        norms = [n for n in self.norms if n.startswith(f"{part.block}.") and n in self.outs]
        return bool(part.block) and any(self.outs[n] == self.outs.get(part.block) for n in norms)


class OnDemand:
    """A dry forward that runs when it is first asked for, and once."""

    def __init__(self, run: Callable[[], DryForward]):
        self.run = run
        self.known: DryForward | None = None

    def __call__(self) -> DryForward:
        if self.known is None:
            self.known = self.run()
        return self.known
