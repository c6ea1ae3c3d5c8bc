"""Numbers as people read them: percent, points, counts, sizes, rates, durations."""

import re
from collections.abc import Iterable, Sequence


def percent(x: float | None) -> str:
    """Return a share in percent: 0.5414 → "54.1"."""
    return "–" if x is None else f"{x * 100:.1f}"


def whole(x: float) -> str:
    """Return a share in whole percent, with its sign: 0.5414 → "54 %"."""
    return f"{x * 100:.0f}\N{NO-BREAK SPACE}%"


def points(x: float) -> str:
    """Return percentage points: −0.031 → "−3.1", with a true minus and no negative zero."""
    text = f"{abs(x) * 100:.1f}"
    return text if float(text) == 0 else ("+" if x > 0 else "−") + text


def nats(x: float) -> str:
    """Return a difference of losses: −0.0312 → "−0.031", with a true minus and no negative zero."""
    text = f"{abs(x):.3f}"
    return text if float(text) == 0 or x != x else ("+" if x > 0 else "−") + text


def count(n: float | None) -> str:
    """Return a number in three figures: 1234567 → "1.23 M"."""
    return "–" if n is None else _scaled(n, 1000, ("", "k", "M", "G"))


def size(n: float | None) -> str:
    """Return bytes in decimal units, three figures: 8_400_000 → "8.40 MB"."""
    return "–" if n is None else _scaled(n, 1000, ("B", "kB", "MB", "GB"))


def rate(r: float) -> str:
    """Return a learning rate: 0.00033 → "3.3e-4"; side by side these compare best by their exponents."""
    digits, exponent = f"{r:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def duration(seconds: float | None) -> str:
    """Return a duration in words: 0.412 → "412 ms", 75 → "1 min 15 s", 7400 → "2 h 3 min"."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def minutes(seconds: float) -> str:
    """Return a time beside one that was given in minutes: "40 seconds", "14 minutes", "210 minutes"."""
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def about(seconds: float) -> str:
    """Return how long something will take, roughly: "40 seconds", "14 minutes", "3.5 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _scaled(n: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while power < len(units) - 1 and n >= 999.5 * base**power:
        power += 1
    text = f"{n:.0f}" if power == 0 else f"{n / base**power:#.3g}".rstrip(".")
    return f"{text} {units[power]}".rstrip()


def tick(text: str) -> str:
    """Return a size or count without trailing zeros: "1.20 GB" → "1.2 GB", "1.00 M" → "1 M"."""
    return re.sub(r"\.?0+(?= |$)", "", text) if "." in text else text


def known(value: object) -> object:
    """Return a value, or a dash where nothing is known."""
    return "–" if value is None else value


def listed(names: Iterable[str]) -> str:
    """Return names in a sentence: "a, b and c"; the empty string for none."""
    *first, last = list(names) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def lower(text: str) -> str:
    """Return a text with a small first letter, for the middle of a sentence."""
    return text[:1].lower() + text[1:]
