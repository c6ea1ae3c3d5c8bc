"""What a combination has come to: how far each site is from the exact weighted sum, and how large it is."""

import math
from dataclasses import dataclass, field

from addenda.core.adapter.handle import Adapter


@dataclass(frozen=True)
class Combined:
    """One site. error: ‖result − Σ w ΔW‖ / ‖Σ w ΔW‖; lost: the part of that which storing took, of ‖rule's result‖.

    form: "rank 16", "sparse", "copy". squares: (‖result − Σ‖², ‖Σ‖²).
    """

    path: str
    form: str
    error: float
    lost: float
    numbers: int
    squares: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class CombineReport:
    """What `combine` has attached, idle: the adapter, the weights by name, and every site.

    error: over all sites together. before: the numbers that the sources train.
    """

    adapter: Adapter
    how: str
    weights: dict[str, float]
    sites: tuple[Combined, ...]
    before: int
    notes: tuple[str, ...] = field(default=())

    @property
    def error(self) -> float:
        """The distance of all sites together from the exact weighted sum, relative to that; inf where that is 0."""
        off, whole = (sum(s.squares[i] for s in self.sites) for i in (0, 1))
        return 0.0 if off == 0 else math.sqrt(off / whole) if whole else math.inf

    @property
    def numbers(self) -> int:
        """How many numbers the combined adapter holds."""
        return sum(s.numbers for s in self.sites)

    def __str__(self) -> str:
        weights = ", ".join(f"{w:g} × {n[:24]}" for n, w in self.weights.items())
        head = f"{self.how}: {weights[:60] + ' …' if len(weights) > 62 else weights}"
        size = f"{self.numbers:,} numbers ({self.numbers / max(self.before, 1):.2f} of the sources')"
        worst = sorted(self.sites, key=lambda s: -s.error)[:8]
        lines = [head, f"{self.adapter.name}: {len(self.sites)} sites, {size}",
                 f"from the exact weighted sum: {self.error:.2e} of it",
                 f"  {'site':<44}{'form':>10}{'error':>10}{'lost':>10}"]  # fmt: skip
        lines += [f"  {_short(s.path):<44}{s.form:>10}{s.error:>10.1e}{s.lost:>10.1e}" for s in worst]
        if len(self.sites) > len(worst):
            lines.append(f"  … and {len(self.sites) - len(worst)} sites with smaller errors")
        return "\n".join([*lines, *self.notes])


def _short(path: str, width: int = 43) -> str:
    return path if len(path) <= width else f"…{path[1 - width :]}"
