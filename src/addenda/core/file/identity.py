"""The identity of a run: everything that decides its numbers, compared by whoever goes on with the run.

It is written down before the first step.


An identity is plain JSON by name: the base (architecture, configuration, weights by SHA-256), data by hash, every
option that changes numbers, what "auto" chose, and the versions that compute. `tune`, `compare`, `compress` and the
recipes each say what theirs holds, and which entries may grow; the comparison is here. An entry that may not change is
an error that lists every difference. One that may (more steps, more seeds, more methods) takes effect, and is kept in
the record as a *look*: whoever reads the result should know that the run was lengthened after it was seen.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import is_sharded, whole
from addenda.core.disk.access import is_sha256
from addenda.core.modules.ours import is_ours
from addenda.core.modules.wrappers import unwrap
from addenda.core.packed.tensor import Packed, parts_of

COMPUTES = ("addenda", "torch", "transformers")  # versions that change numbers
_NAMES = {"id2label", "label2id", "architectures", "transformers_version", "quantization_config", "use_cache", "dtype"}

Grows = Mapping[str, Callable[[Any, Any], bool]]  # by name of an entry: whether (there, now) is the same, and more


@dataclass(frozen=True)
class Difference:
    """One entry of an identity that differs between two runs."""

    name: str
    there: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {_brief(self.there)}, now {_brief(self.now)}"


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back: lists for tuples, text for paths and the like, sets in order."""
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    return json.loads(json.dumps(value, default=str))


def differences(there: Any, now: Any, name: str = "") -> list[Difference]:
    """Return every entry that is not equal, however deep, by its path with dots."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [k for k in dict.fromkeys([*there, *now]) if there.get(k) != now.get(k)]
        return [d for k in keys for d in differences(there.get(k), now.get(k), f"{name}.{k}" if name else k)]
    return [] if there == now else [Difference(name, there, now)]


def goes_on(what: str, there: dict, now: dict, *, grows: Grows | None = None, way: str) -> list[Difference]:
    """Return which entries of an identity have grown. Raises AddendaError where anything else of it differs.

    what: whose it is, for the message, such as "The checkpoint X"; way: what to do else, a sentence. Raises
    AddendaError that lists every other difference.
    """
    grows, now = grows or {}, plain(now)
    entries = [Difference(k, there.get(k), now.get(k)) for k in grows if there.get(k) != now.get(k)]
    grown = [d for d in entries if _is_more(grows[d.name], d)]
    grown_names = {d.name for d in grown}
    past, present = ({k: v for k, v in side.items() if k not in grown_names} for side in (there, now))
    changes = differences(past, present)
    if changes:
        hint = f" (What may grow: {', '.join(grows)}.)" if grows else ""
        raise AddendaError(f"{what} belongs to another run: {'; '.join(map(str, changes))}. {way}{hint}")
    return grown


def look(grown: list[Difference], seen: str) -> dict:
    """Return the record of a change: when, after what had been seen, and each entry as it was and is.

    Of an object, the names in it.
    """
    moment = datetime.now(UTC).isoformat(timespec="seconds")
    changed = {d.name: [list(v) if isinstance(v, dict) else v for v in (d.there, d.now)] for d in grown}
    return {"when": moment, "seen": seen, "changed": changed}


def _is_more(rule: Callable[[Any, Any], bool], d: Difference) -> bool:
    try:
        return bool(rule(d.there, d.now))
    except (TypeError, ValueError, AttributeError, KeyError):  # another kind of value
        return False


def larger(there: Any, now: Any) -> bool:
    """Return whether a number has grown: a rule for numbers in `Grows`."""
    return now > there


def longer(there: Any, now: Any) -> bool:
    """Return whether a list or an object has kept all that it had, in place or by name: a rule in `Grows`."""
    if isinstance(there, dict):
        return all(k in now and now[k] == v for k, v in there.items())
    return len(now) > len(there) and now[: len(there)] == there


def _brief(value: Any) -> str:
    text = repr(value)
    if is_sha256(value):
        return f"{value[:12]}…"
    return text if len(text) <= 200 else f"{text[:160]}…{text[-30:]}"


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that compute; another version may give other bits."""
    installed = {}
    for name in COMPUTES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def base_of(model: nn.Module) -> dict[str, Any]:
    """Describe the base under its adapters: class, dtypes, and configuration and weights as SHA-256.

    Adapters, tensors that are not stored, and what a configuration says of names, versions and caches do not count.
    Every process of a sharded model must call it.
    """
    model = unwrap(model)
    sha, dtypes, forms = hashlib.sha256(), {}, set()
    named = [(n, t) for n, t in model.state_dict().items() if isinstance(t, Tensor) and not is_ours(n)]
    parts = [parts_of(tensor) for _, tensor in named]
    hashes = iter(_hashes([part for of in parts for part in of]))
    for (name, tensor), of in zip(named, parts, strict=True):
        dtypes[str(tensor.dtype).removeprefix("torch.")] = dtypes.get(str(tensor.dtype).removeprefix("torch."), 0) + 1
        if isinstance(tensor, Packed):
            forms.add(type(tensor).__name__)
        sha.update(f"{name}\x1f{tuple(tensor.shape)}\x1f{tensor.dtype}\x1e".encode())
        for _ in of:
            sha.update(next(hashes))
    config = getattr(model, "config", None)
    settings = _settings(config.to_dict()) if hasattr(config, "to_dict") else {}
    return {
        "class": type(model).__name__,
        "dtypes": dict(sorted(dtypes.items())),
        "packed": sorted(forms),
        "config": digest(settings),
        "weights": sha.hexdigest(),
    }


def _hashes(parts: list[Tensor]) -> list[bytes]:
    """Return the SHA-256 of each tensor's own bytes, of tied ones once, by as many threads as torch uses."""
    if any(is_sharded(part) for part in parts):  # every process gathers them, in one order
        return [_bytes(part) for part in parts]
    places = [(p.data_ptr(), tuple(p.shape), p.dtype) if p.data_ptr() else i for i, p in enumerate(parts)]
    distinct = dict(zip(places, parts, strict=True))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = dict(zip(distinct, pool.map(_bytes, distinct.values()), strict=True))
    return [found[place] for place in places]


def _bytes(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's own bytes."""
    if tensor.is_meta:
        return b"meta"
    data = whole(tensor).cpu().contiguous().view(-1)
    return hashlib.sha256(data.view(torch.uint8).numpy().data).digest() if data.numel() else b""


def _settings(value: Any) -> Any:
    """Return a configuration without the entries that change no number."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in _NAMES and not str(k).startswith("_") and k != "torch_dtype"}
        return {str(k): _settings(v) for k, v in sorted(kept.items(), key=lambda item: str(item[0]))}
    return [_settings(v) for v in value] if isinstance(value, (list, tuple)) else value


def digest(value: Any) -> str:
    """Return the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
