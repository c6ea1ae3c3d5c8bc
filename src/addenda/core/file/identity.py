"""What a run is: everything that decides its numbers, written down before its first step, and compared by whoever goes
on with it.

An identity is plain JSON by name: the base (architecture, configuration, weights by SHA-256), data by hash, every
option that changes numbers, what "auto" chose, and the versions that compute. `tune`, `compare`, `compress` and the
recipes each say what theirs holds, and which entries may grow; the comparison is here. An entry that may not change is
an error that lists every difference. One that may (more steps, more seeds, more methods) takes effect, and is kept in
the record as a *look*: whoever reads the result should know that the run was lengthened after it was seen.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import whole
from addenda.core.modules.ours import is_ours
from addenda.core.modules.wrappers import unwrap
from addenda.core.packed.tensor import Packed, parts_of

COMPUTES = ("addenda", "torch", "transformers")  # versions that change numbers
_NAMES = {"id2label", "label2id", "architectures", "transformers_version", "quantization_config", "use_cache", "dtype"}

Grows = Mapping[str, Callable[[Any, Any], bool]]  # by name of an entry: whether (there, now) is the same, and more


@dataclass(frozen=True)
class Difference:
    """One entry of an identity that is not the same."""

    name: str
    there: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {_brief(self.there)}, now {_brief(self.now)}"


def plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples, text for paths and the like, sets in order."""
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    return json.loads(json.dumps(value, default=str))


def differences(there: Any, now: Any, name: str = "") -> list[Difference]:
    """Every entry that is not equal, however deep, by its path with dots."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [k for k in dict.fromkeys([*there, *now]) if there.get(k) != now.get(k)]
        return [d for k in keys for d in differences(there.get(k), now.get(k), f"{name}.{k}" if name else k)]
    return [] if there == now else [Difference(name, there, now)]


def goes_on(what: str, there: dict, now: dict, *, grows: Grows | None = None, way: str) -> list[Difference]:
    """What of an identity has grown, where nothing else of it differs.

    what: whose it is, for the message, such as "The checkpoint X"; way: what to do else, a sentence. Raises
    AddendaError that lists every other difference.
    """
    grows, now = grows or {}, plain(now)
    entries = [Difference(k, there.get(k), now.get(k)) for k in grows if there.get(k) != now.get(k)]
    grown = [d for d in entries if _is_more(grows[d.name], d)]
    same = {d.name for d in grown}
    rest, here = ({k: v for k, v in side.items() if k not in same} for side in (there, now))
    other = differences(rest, here)
    if other:
        more = f" (What may grow: {', '.join(grows)}.)" if grows else ""
        raise AddendaError(f"{what} belongs to another run: {'; '.join(map(str, other))}. {way}{more}")
    return grown


def look(grown: list[Difference], seen: str) -> dict:
    """What a record keeps of a change: when, after what had been seen, and each entry as it was and is.

    Of an object, the names in it.
    """
    when = datetime.now(UTC).isoformat(timespec="seconds")
    changed = {d.name: [list(v) if isinstance(v, dict) else v for v in (d.there, d.now)] for d in grown}
    return {"when": when, "seen": seen, "changed": changed}


def _is_more(rule: Callable[[Any, Any], bool], d: Difference) -> bool:
    try:
        return bool(rule(d.there, d.now))
    except (TypeError, ValueError, AttributeError, KeyError):  # another kind of value
        return False


def larger(there: Any, now: Any) -> bool:
    """A rule for numbers."""
    return now > there


def longer(there: Any, now: Any) -> bool:
    """A rule for lists and objects: all that was there is there now, in the same place or under the same name."""
    if isinstance(there, dict):
        return all(k in now and now[k] == v for k, v in there.items())
    return len(now) > len(there) and now[: len(there)] == there


def _brief(value: Any) -> str:
    text = repr(value)
    if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef"):
        return f"{value[:12]}…"
    return text if len(text) <= 200 else f"{text[:160]}…{text[-30:]}"


def versions() -> dict[str, str]:
    """Of what computes; another one gives other bits."""
    found = {}
    for name in COMPUTES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def base_of(model: nn.Module) -> dict[str, Any]:
    """The frozen model under its adapters: class, dtypes, configuration and weights, the latter two as SHA-256.

    Adapters, tensors that are not stored, and what a configuration says of names, versions and caches do not count.
    Every process of a sharded model must call it.
    """
    model = unwrap(model)
    made, dtypes, forms, known = hashlib.sha256(), {}, set(), {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or is_ours(name):
            continue
        dtypes[str(tensor.dtype).removeprefix("torch.")] = dtypes.get(str(tensor.dtype).removeprefix("torch."), 0) + 1
        if isinstance(tensor, Packed):
            forms.add(type(tensor).__name__)
        made.update(f"{name}\x1f{tuple(tensor.shape)}\x1f{tensor.dtype}\x1e".encode())
        for part in parts_of(tensor):
            key = part.data_ptr(), tuple(part.shape), part.dtype
            if key not in known or not key[0]:
                known[key] = _bytes(part)  # of tied tensors once
            made.update(known[key])
    config = getattr(model, "config", None)
    said = _settings(config.to_dict()) if hasattr(config, "to_dict") else {}
    return {
        "class": type(model).__name__,
        "dtypes": dict(sorted(dtypes.items())),
        "packed": sorted(forms),
        "config": digest(said),
        "weights": made.hexdigest(),
    }


def _bytes(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's own bytes."""
    import torch

    if tensor.is_meta:
        return b"meta"
    held = whole(tensor).cpu().contiguous().view(-1)
    return hashlib.sha256(held.view(torch.uint8).numpy().data).digest() if held.numel() else b""


def _settings(value: Any) -> Any:
    """A configuration without what changes no number."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _NAMES and not str(k).startswith("_") and k != "torch_dtype"}
        return {str(k): _settings(v) for k, v in sorted(kept.items(), key=lambda item: str(item[0]))}
    return [_settings(v) for v in value] if isinstance(value, (list, tuple)) else value


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
