"""What a reduction says of itself: errors of weights by site, the error of outputs, sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from addenda.core.adapter.handle import Adapter

_SHOWN = 8  # sites in a report's text


@dataclass(frozen=True)
class ReducedSite:
    """What became of one site. error: ‖ΔW − made‖ / ‖ΔW‖; energy: the share kept, of the outputs' where weighed.

    size: ‖ΔW‖. numbers: those that the form holds there, positions left out.
    """

    path: str
    form: str
    numbers: int
    error: float
    energy: float
    size: float
    weighed: bool = False


@dataclass(frozen=True)
class OutputError:
    """How far the reduced adapter's outputs are from the live ones' on the probe batch."""

    relative: float  # ‖reduced − live‖ / ‖live − base‖
    largest: float  # the largest difference
    moved: float  # the largest that the live ones make
    kl: float | None = None  # mean KL(live ‖ reduced) in nats, of logits
    top1: float | None = None  # share of positions with the same likeliest output

    def __str__(self) -> str:
        text = f"outputs: {self.relative:.2%} of what the change moves is lost (largest {self.largest:.2e}"
        text += f" of {self.moved:.2e})"
        return text if self.kl is None else f"{text}\nKL {self.kl:.2e} nats, top-1 agreement {self.top1:.2%}"


@dataclass(frozen=True)
class ReduceReport:
    """What `reduce` has made. bytes: of its tensors, and of those it was made of. outputs: None without a batch.

    copies: what came along whole: heads and vectors. unchanged: sites whose ΔW is zero; the new adapter has none there.
    """

    adapter: Adapter = field(repr=False)
    to: str
    sites: tuple[ReducedSite, ...]
    bytes: tuple[int, int]
    outputs: OutputError | None
    copies: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The error of the weights over all sites together."""
        return error_of(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the adapter, for JSON."""
        outputs = None if self.outputs is None else dict(vars(self.outputs))
        return {
            "to": self.to, "error": self.error, "outputs": outputs, "bytes": list(self.bytes),
            "sites": [dict(vars(s)) for s in self.sites], "copies": list(self.copies),
            "unchanged": list(self.unchanged),
        }  # fmt: skip

    def __str__(self) -> str:
        lines = rows_of(self.sites)
        if any(s.weighed for s in self.sites):
            lines.append("* of the outputs' energy on the batches")
        made, was = self.bytes
        lines.append(f"{len(self.sites)} sites as {self.to}: {made:,} bytes of {was:,}; error {self.error:.4f} of ΔW")
        lines += [str(self.outputs)] if self.outputs is not None else ["outputs: not compared, as there is no probe="]
        lines += [f"as whole copies: {some(self.copies)}"] if self.copies else []
        lines += [f"unchanged, and left out: {some(self.unchanged)}"] if self.unchanged else []
        return "\n".join(lines)


def error_of(sites: Sequence[ReducedSite]) -> float:
    """Return the error of all sites together, ‖ΔW − made‖ / ‖ΔW‖; 0 of none."""
    total = sum(s.size**2 for s in sites)
    return (sum((s.error * s.size) ** 2 for s in sites) / total) ** 0.5 if total else 0.0


def rows_of(sites: Sequence[ReducedSite]) -> list[str]:
    """Return the lines of a table of the sites with the largest errors, and how many more there are."""
    worst = sorted(sites, key=lambda s: -s.error)[:_SHOWN]
    rows = [("site", "form", "error", "energy kept")]
    rows += [(short(s.path), s.form, f"{s.error:.4f}", f"{s.energy:.4f}" + "*" * s.weighed) for s in worst]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(sites) > _SHOWN:
        lines.append(f"… and {len(sites) - _SHOWN} sites with less error")
    return lines


def some(names: Sequence[str], most: int = 4) -> str:
    """Return the first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def short(path: str, most: int = 36) -> str:
    """Return a path for a table's column: the end of a long one."""
    return path if len(path) <= most else f"…{path[1 - most :]}"
