"""Which trackers a run reports to: what a user may name, and where a run is logged."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from addenda.core.base.errors import AddendaError, nearest

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",),
            "mlflow": ("mlflow",)}  # fmt: skip
Trackers = str | Iterable[str]


@dataclass(frozen=True)
class Tracking:
    """Where a run is logged: by which trackers, in which folder, under which name, in which group of runs."""

    trackers: tuple[str, ...]
    folder: Path
    run: str
    group: str

    @classmethod
    def under(cls, out: Path | None, trackers: tuple[str, ...], run: str = "") -> "Tracking | None":
        """Return where a run in `out` is logged, by its own name or that of `out`; None without trackers."""
        if out is None or not trackers:
            return None
        group = out.resolve().name
        return cls(trackers, out / "trackers", run or group, group)


def trackers_of(report_to: Trackers) -> tuple[str, ...]:
    """Return the names of trackers, each once; "none" is none. Raises AddendaError for unknown and absent ones."""
    if not isinstance(report_to, Iterable) or not all(isinstance(n, str) for n in report_to):
        raise AddendaError(f"report_to= takes {', '.join(PACKAGES)}, several in a list, or 'none'; got {report_to!r}.")
    named = report_to.split(",") if isinstance(report_to, str) else [*report_to]
    names = tuple(dict.fromkeys(n.strip() for n in named if n.strip() not in ("", "none")))
    for name in names:
        if name not in PACKAGES:
            raise AddendaError(
                f"report_to= takes {', '.join(PACKAGES)} or none, and not {name!r}.{nearest(name, tuple(PACKAGES))}"
            )
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise AddendaError(f"report_to={name!r} wants a package that is not installed: pip install {name}")
    return names
