"""The words and numbers that `addenda.combine` takes, checked before anything is read or touched."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from addenda.combining.rules import RULES, Rule, Settings
from addenda.combining.spaces import core, knots
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.ranges import Range

How = Literal[
    "cat", "linear", "svd", "ties", "dare", "della", "magnitude", "task-arithmetic", "sparse-union", "knots", "tsv",
    "iso-c", "core-space",
]  # fmt: skip
SPACES = {"knots": ("ties", knots), "core-space": ("tsv", core)}  # the rule by default, and the coordinates
SUMS = {"cat": RULES["task-arithmetic"], "svd": RULES["task-arithmetic"], "sparse-union": RULES["task-arithmetic"]}
HOWS = (*RULES, *SUMS, *SPACES)
SPECIAL = {"density": Range(0, 1, above=True), "energy": Range(0, 1, above=True), "window": Range(0, 1),
            "rank": Range(1, 2**31, whole=True), "scale": Range(-1e6, 1e6)}  # fmt: skip


def check(how, rule, form, absent, rank, energy, density, window, seed, base) -> None:
    """Raise AddendaError for words that are not known, and for options that this way of combining does not read."""
    words = {"how": (how, HOWS), "form": (form, ("auto", "low-rank", "sparse", "dense")),
             "absent": (absent, ("error", "zero")), "base": (base, ("exact", "compatible"))}  # fmt: skip
    for option, (value, known) in words.items():
        if value not in known:
            raise AddendaError(f"There is no {option}={value!r}.{nearest(value, known)} Known: {', '.join(known)}.")
    if rule is not None and how not in SPACES:
        raise AddendaError(f"rule= acts in a common subspace only: how='core-space' or 'knots'; how={how!r} is none.")
    chosen = rule_of(how, rule)
    unread = [n for n, v in (("density", density), ("window", window)) if v is not None and chosen.density is None]
    unread += ["window"] if window is not None and chosen.name != "della" and "window" not in unread else []
    if seed and chosen.name not in ("dare", "della"):
        unread.append("seed")
    if how in ("cat", "sparse-union"):
        unread += [n for n, v in (("rank", rank), ("energy", energy)) if v is not None]
        unread += ["form"] if form != "auto" else []
    elif form in ("sparse", "dense"):
        unread += [n for n, v in (("rank", rank), ("energy", energy)) if v is not None]
    if unread:
        raise AddendaError(f"{how} does not read {', '.join(f'{n}=' for n in unread)}. Leave it out.")
    if rank is not None and energy is not None:
        raise AddendaError(f"Give rank= or energy=, not both (got rank={rank}, energy={energy}).")


def check_settings(settings: Settings, window: float | None) -> None:
    """Raise AddendaError for a scale of 0, and for a window of probabilities that reaches beyond 0 or 1."""
    if not settings.scale:
        raise AddendaError("scale=0 leaves nothing of any adapter. Give another number.")
    most = 2 * min(settings.density, 1 - settings.density)
    if window is not None and window >= most:
        raise AddendaError(
            f"window={window:g} leaves probabilities outside of 0 to 1 at density={settings.density:g}: it must be "
            f"below {most:g}."
        )


def rule_of(how: str, rule: str | None) -> Rule:
    """Return the rule that acts. Raises AddendaError for one that is not known."""
    if how in SUMS:
        return SUMS[how]
    wanted = (rule or SPACES[how][0]) if how in SPACES else how
    if wanted not in RULES:
        raise AddendaError(f"There is no rule {wanted!r}.{nearest(wanted, RULES)} Known: {', '.join(RULES)}.")
    return RULES[wanted]


def weights_of(
    given: Sequence[float] | Mapping[str, float] | None, names: Sequence[str], rule: Rule
) -> dict[str, float]:
    """Return the weight of each source by name."""
    if given is None:
        return dict.fromkeys(names, 1 / len(names) if rule.mean else 1.0)
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) ^ set(names)):
            raise AddendaError(f"weights name other adapters than are combined: {', '.join(map(repr, unknown))}.")
        given = [given[n] for n in names]
    numbers = isinstance(given, Sequence) and all(
        isinstance(w, (int, float)) and not isinstance(w, bool) for w in given
    )  # fmt: skip
    if not numbers or len(given) != len(names):
        raise AddendaError(f"{len(names)} adapters want {len(names)} weights, got {str(given)[:100]}.")
    if not all(map(math.isfinite, given)) or not any(given):
        raise AddendaError(f"Weights are finite numbers, one of them not 0; got {[*given]}.")
    return dict(zip(names, map(float, given), strict=True))
