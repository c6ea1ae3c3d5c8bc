"""A composition as JSON, for files: what it does by name, and nothing that could be run.

    {"stack": ["de", "task"], "skip": "own", "leave_out": "first:2"}
    {"stack": [{"split": ["de", "fi"], "by": "separator:2", "pooled": 0}, "task"]}

A part is a name, null, or another one. Known are stack, average (weights), fuse (by), and split (sizes, or by "types"
or "separator:ID"); compositions that depend on a batch, or on a function, have no form.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from addenda.compose.split import Split
from addenda.compose.stack import Average, Composition, Fuse, Stack
from addenda.core.base.errors import AddendaError

_OPTIONS = {"stack": {"skip"}, "average": {"weights"}, "fuse": {"by"}, "split": {"sizes", "by", "pooled"}}
_DEEPEST, _MOST, _LONGEST = 8, 64, 200  # compositions in each other, parts of one, characters of a text


def to_json(composition: Composition) -> dict[str, Any]:
    """Return a composition as JSON. Raises AddendaError for one that depends on a batch or a function."""
    made = _plain(composition)
    if composition.leave_out:
        some = composition.leave_out
        named = {n: _layers(s) for n, s in some.items()} if isinstance(some, Mapping) else _layers(some)
        made["leave_out"] = named
    return made


def _layers(some: Any) -> Any:
    return some if isinstance(some, str) else list(some)


def _plain(c: Composition) -> dict[str, Any]:
    kind = type(c).__name__.lower()
    made: dict[str, Any] = {kind: [_plain(p) if isinstance(p, Composition) else p for p in c.parts]}
    if isinstance(c, Stack):
        return made | ({"skip": c.skip} if c.skip != "last" else {})
    if isinstance(c, Average):
        return made | {"weights": list(c.weights)}
    if isinstance(c, Fuse):
        return made | {"by": c.by}
    if isinstance(c, Split) and (c.by is None or isinstance(c.by, str)):
        made |= {"sizes": list(c.sizes)} if c.by is None else {"by": c.by}
        return made | ({} if c.pooled is None else {"pooled": c.pooled})
    why = "tokens by a tensor or a function" if isinstance(c, Split) else "rows of a batch"
    assert not isinstance(c, Split) or callable(c.by) or isinstance(c.by, Tensor)
    raise AddendaError(f"{c!r} picks {why}, which no file can hold. Split by='separator:ID', by='types' or by sizes.")


def of_json(raw: Any) -> Composition:
    """Build a composition from JSON that anybody may have written. Raises AddendaError where it is malformed."""
    if not isinstance(raw, dict):
        raise AddendaError(f"A composition is an object of JSON such as {{'stack': ['de', 'task']}}, got {_said(raw)}.")
    rest = {k: v for k, v in raw.items() if k != "leave_out"}
    made = _built(rest, 0)
    if "leave_out" in raw:
        some = raw["leave_out"]
        each = some.values() if isinstance(some, dict) else [some]
        named = all(map(_is_word, some)) if isinstance(some, dict) else True
        if not some or len(each) > _MOST or not named or not all(map(_are_layers, each)):
            raise AddendaError(f"leave_out of a composition is layers, or layers by name, got {_said(some)}.")
        made = made.without(some)
    return made


def _built(raw: dict, depth: int) -> Composition:
    kinds = [k for k in raw if k in _OPTIONS]
    if len(kinds) != 1 or depth > _DEEPEST:
        raise AddendaError(
            f"A composition is one of {', '.join(_OPTIONS)}, at most {_DEEPEST} in each other, got {_said(raw)}."
        )
    (kind,) = kinds
    options = {k: v for k, v in raw.items() if k != kind}
    if unknown := sorted(options.keys() - _OPTIONS[kind]):
        raise AddendaError(f"A composition {kind!r} has no {_said(unknown[0])}; it may have {sorted(_OPTIONS[kind])}.")
    listed = raw[kind]
    if not isinstance(listed, list) or not 1 <= len(listed) <= _MOST:
        raise AddendaError(f"The parts of {kind!r} are a list of 1 to {_MOST}, got {_said(listed)}.")
    parts = [_built(p, depth + 1) if isinstance(p, dict) else p for p in listed]
    if wrong := [p for p in parts if not (p is None or isinstance(p, (str, Composition)))]:
        raise AddendaError(f"A part of {kind!r} is a name, null or a composition, got {_said(wrong[0])}.")
    for key, fits in (("weights", _are_weights), ("sizes", _are_sizes)):
        if key in options and not fits(options[key]):
            raise AddendaError(f"{key} of {kind!r} is a list of numbers, got {_said(options[key])}.")
    for key in ("skip", "by"):
        if key in options and not _is_word(options[key]):
            most = f"at most {_LONGEST} characters"
            raise AddendaError(f"{key} of {kind!r} is a text of {most}, got {_said(options[key])}.")
    if kind == "stack":
        return Stack(*parts, **options)
    if kind == "average":
        return Average(*parts, weights=options.get("weights"), normalize=False)
    if kind == "fuse":
        if "by" not in options:
            raise AddendaError("A composition 'fuse' says by which adapter: 'by'.")
        return Fuse(*parts, by=options["by"])
    return Split(*parts, **options)


def _are_weights(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(v) is float or (type(v) is int and abs(v) < 10**300)
        for v in value  # else it is no float
    )


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(v is None or type(v) in (int, float) for v in value)


def _are_layers(value: Any) -> bool:
    return _is_word(value) or (isinstance(value, list) and bool(value) and all(type(v) is int for v in value))


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST


def _said(value: Any) -> str:
    return repr(value)[:100]
