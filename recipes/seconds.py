"""Seconds as people give and read them: "90m", "2.5 h"."""

import re

from addenda import AddendaError


def told(seconds: float | None) -> str:
    seconds = seconds or 0.0
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else (
        f"{seconds / 3600:.1f} h"
    )  # fmt: skip


def seconds_of(text: str) -> float:
    """Return the seconds of "90m", "2.5h" or "300s". Raises AddendaError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if not found or not float(found[1]):
        raise AddendaError(f"--within is a time such as 90m, 2.5h or 300s, got {text!r}.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]
