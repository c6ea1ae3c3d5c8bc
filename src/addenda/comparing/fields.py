"""What the files of a record hold, field by field, and what is wrong with one that anybody may have written.

Every value that is read later is of its kind and bounded: text has a length, numbers are finite, objects a depth. null
is allowed wherever a number may be missing. Fields that are not named here are kept, and only bounded.
"""

from collections.abc import Callable, Mapping
from typing import Any

from addenda.comparing.entries import Config

Check = Callable[[Any, str], list[str]]  # (value, where) → problems

DEEP, NAME, LONG, MOST = 40, 2000, 200_000, 1e18
ITEMS = 1_000_000  # of a test split
ARMS = 500


def text(most: int = LONG) -> Check:
    """Return a check for text of at most so many characters."""

    def check(value: Any, where: str) -> list[str]:
        if not isinstance(value, str):
            return [_wrong(where, "text", value)]
        return [f"{where}: text of {len(value):,} characters, and at most {most:,} are read"] * (len(value) > most)

    return check


def number(value: Any, where: str) -> list[str]:
    """Return a problem where a value is no finite number; null may stand for one."""
    good = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST)
    return [] if good else [_wrong(where, "a number", value)]


def whole(value: Any, where: str) -> list[str]:
    """Return a problem where a value is no whole number of at least 0; null may stand for one."""
    good = value is None or (type(value) is int and 0 <= value < MOST)
    return [] if good else [_wrong(where, "an integer of at least 0", value)]


def positive(value: Any, where: str) -> list[str]:
    """Return a problem where a value is no number above 0; null may stand for one."""
    return number(value, where) or ([] if value is None or value > 0 else [_wrong(where, "a positive number", value)])


def share(value: Any, where: str) -> list[str]:
    """Return a problem where a value is no number from 0 to 1; null may stand for one."""
    return number(value, where) or ([] if value is None or 0 <= value <= 1 else [_wrong(where, "from 0 to 1", value)])


def percents(value: Any, where: str) -> list[str]:
    """Return a problem where a value is no number above 0 and up to 100; null may stand for one."""
    return positive(value, where) or ([] if value is None or value <= 100 else [_wrong(where, "at most 100", value)])


def answers(value: Any, where: str) -> list[str]:
    """Return a problem where a value is no string of one 0 or 1 for each item."""
    good = isinstance(value, str) and 0 < len(value) <= ITEMS and not set(value) - {"0", "1"}
    return [] if good else [_wrong(where, f"a string of 0 and 1, at most {ITEMS:,}", value)]


def counted(value: Any, where: str) -> list[str]:
    """Return a problem where a number of seeds, or the like, is none."""
    return [] if type(value) is int and 0 < value < MOST else [_wrong(where, "an integer of at least 1", value)]


def flag(value: Any, where: str) -> list[str]:
    """Return a problem where a value is neither true nor false."""
    return [] if isinstance(value, bool) else [_wrong(where, "true or false", value)]


def each(check: Check, most: int = 1_000_000) -> Check:
    """Return a check for a list of such values."""

    def check_all(value: Any, where: str) -> list[str]:
        if not isinstance(value, list) or len(value) > most:
            return [_wrong(where, "a list", value)]
        return _first(p for i, v in enumerate(value) for p in check(v, f"{where}[{i}]"))

    return check_all


def by_name(check: Check, most: int = 10_000) -> Check:
    """Return a check for an object with such values under any names."""

    def check_all(value: Any, where: str) -> list[str]:
        if not isinstance(value, dict) or len(value) > most:
            return [_wrong(where, "an object", value)]
        return _first(p for k, v in value.items() for p in [*text(NAME)(k, where), *check(v, f"{where}.{k[:80]}")])

    return check_all


def fields(known: Mapping[str, Check]) -> Check:
    """Return a check for an object; of its fields those that are named must pass where they are there."""

    def check_all(value: Any, where: str) -> list[str]:
        if not isinstance(value, dict):
            return [_wrong(where, "an object", value)]
        return [p for k, check in known.items() if k in value for p in check(value[k], f"{where}.{k}".lstrip("."))]

    return check_all


def maybe(check: Check) -> Check:
    """Return a check that null passes too."""
    return lambda value, where: [] if value is None else check(value, where)


def point(check: Check) -> Check:
    """Return a check for a pair [step, value]."""

    def check_all(value: Any, where: str) -> list[str]:
        if not isinstance(value, list) or len(value) != 2 or value[0] is None:
            return [_wrong(where, "a pair [step, value]", value)]
        return [*whole(value[0], f"{where}[0]"), *check(value[1], f"{where}[1]")]

    return check_all


def _two(check: Check) -> Check:
    """Return a check for a list of two such values."""
    both = each(check)
    return lambda value, where: both(value, where) or [_wrong(where, "a pair", value)] * (len(value) != 2)


def _either(one: Check, other: Check) -> Check:
    return lambda value, where: one(value, where) and other(value, where)


def anything(value: Any, where: str) -> list[str]:
    """Return no problem: what is only bounded, see `bounded`."""
    return []


def bounded(value: Any) -> list[str]:
    """Return a problem where a value is deeper than what a record holds; walked without recursion."""
    level = [value]
    for _ in range(DEEP):
        level = [v for held in level for v in (held.values() if isinstance(held, dict) else held)
                 if isinstance(v, (dict, list))] if level else level  # fmt: skip
    return [f"it is nested more than {DEEP} deep"] if level else []


_VALIDATION = fields({"loss": number, "accuracy": share, "items": maybe(answers)})
_LOOK = fields({"when": text(NAME), "seen": text(NAME), "changed": by_name(each(anything))})
_TAKEN = fields({"seeds": counted, "when": text(NAME), "undecided": each(_two(text(NAME)))})
_UNTIL = fields({
    "looks": each(counted, 1000), "seconds": each(positive, 1000), "max_minutes": positive,
    "stopped": maybe(text(NAME)), "taken": each(_TAKEN, 1000),
})  # fmt: skip
_OPTIONS = fields({  # the numbers and words of a call, whose ranges it checks itself
    "grouped": _either(flag, text(NAME)), "of": text(NAME), "methods": each(text(NAME), ARMS), "budget": text(NAME),
    "full": flag, "skip_corrupt": flag,
    "targets": maybe(_either(text(), each(text(NAME)))), "around": maybe(by_name(positive, ARMS)),
    "columns": maybe(by_name(_either(text(NAME), each(text(NAME))))), "dtype": text(NAME),
    **dict.fromkeys(("quantize", "subset", "general", "model", "data"), maybe(text(NAME))), **dict.fromkeys(
        ("rates", "search_steps", "batch", "within", "max_length", "image_size", "items", "validation"), number),
})  # fmt: skip
_JUDGED = fields({"loss": number, "losses": maybe(each(number, ITEMS))})
_GENERAL = fields({"loss": number, "losses": each(number, ITEMS)})
_TEXT = fields({"name": maybe(text(NAME)), "sha256": maybe(text(NAME)), "python": maybe(text(NAME)), "windows": whole,
                "length": whole})  # fmt: skip
TRIAL = fields({
    "method": text(NAME), "note": maybe(text()), "seed": whole, "rate": positive, "steps": whole, "trainable": whole,
    "attach_seconds": number, "seconds": number, "step_seconds": number, "peak_bytes": number, "adapter_bytes": number,
    "tokens_per_second": number, "images_per_second": number, "losses": maybe(each(point(number))),
    "validation": maybe(each(point(_VALIDATION))), "test": maybe(_JUDGED), "ood": maybe(_JUDGED),
    "general": maybe(_GENERAL), "grouped": maybe(counted),
})  # fmt: skip
_GROUPING = fields({
    "pays": flag, "most": maybe(counted), "runs": maybe(counted), "ratio": positive, "step_seconds": number,
    "pace": number, "peak_bytes": number, "why": maybe(text()),
})  # fmt: skip
METHOD = fields({
    "title": text(NAME), "hypothesis": text(), "options": maybe(by_name(anything)), "trainable": whole,
    "rates": maybe(each(positive, 1000)), "steps": whole, "sites": whole, "void": maybe(text()),
})  # fmt: skip
CONFIG = fields({
    "title": text(NAME), "created": text(NAME), "command": text(), "notes": each(text()), "seeds": each(whole, 100_000),
    "model": fields({"name": text(), "parameters": number, "dtype": maybe(text(NAME)), "quantize": maybe(text(NAME)),
                     "attention": maybe(text(NAME))}),
    "data": fields({
        "name": text(NAME), "description": text(), "metric": text(NAME), "sizes": maybe(by_name(whole)),
        "hashes": maybe(by_name(maybe(text(NAME)))), "example": maybe(by_name(anything)),
        "general": maybe(_TEXT),
    }),
    "budget": fields({"kind": text(NAME), "value": number, "steps": number, "batch": whole}),
    "methods": by_name(METHOD, ARMS), "versions": by_name(anything), "hardware": by_name(anything),
    "search": maybe(fields({
        "kind": text(NAME), "rates": by_name(each(positive, 1000)), "further": whole, "arms": whole,
        "steps": _either(whole, by_name(whole)),
    })),
    "margin": percents, "until": maybe(_UNTIL), "looks": each(_LOOK), "identity": by_name(anything),
    "options": maybe(_OPTIONS), "predicted_seconds": number, "measured_step_seconds": by_name(number),
    "grouped": maybe(by_name(_GROUPING, ARMS)),
})  # fmt: skip


def extended(config: Config) -> list[str]:
    """Return what a comparison needs to go on, and this configuration lacks or has otherwise."""
    problems, search = [], config.search
    for name, method in config.methods.items():
        wanted = {"options": method.options, "rates": method.rates, "steps": method.steps}
        problems += [f"methods.{name}.{k}" for k, value in wanted.items() if value is None]
        problems += [f"methods.{name}.rates"] * (
            method.rates is not None and (None in method.rates or not method.rates)
        )
    if search and not (isinstance(search.steps, Mapping) and search.further is not None and search.rates is not None):
        problems.append("search")
    if (config.data.sizes or {}).get("test") is None:
        problems.append("data.sizes.test")
    if None in config.seeds:
        problems.append("seeds")
    if None in (config.measured_step_seconds or {}).values():
        problems.append("measured_step_seconds")
    if not isinstance((config.identity or {}).get("methods"), dict):
        problems.append("identity.methods")
    return problems


def _wrong(where: str, wanted: str, value: Any) -> str:
    given = (
        "nothing" if value is None else repr(value) if isinstance(value, (bool, int, float)) else type(value).__name__
    )
    given = repr(value[:40]) if isinstance(value, str) else given
    return f"{where}: expected {wanted}, came {given if len(given) < 80 else 'a very long one'}"


def _first(problems: Any) -> list[str]:
    """Return one problem of a list or an object, which stands for all."""
    return [p for p, _ in zip(problems, range(1), strict=False)]
