"""What an adapter was trained on, in its file: tokenizer and language part by hash.

    "trained_on": {"tokenizer": "<64 hex>", "entries": 250002, "beside": [{"name": "en", "sha256": "<64 hex>"}]}

Any of the three may be missing, but not the tokenizer without its entries. The hash of an adapter is of its places,
methods and tensors, so that it is the same for an adapter on a model and for any file of it, whatever its name there.
"""

import hashlib
import json
from typing import Any, Protocol

from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import whole
from addenda.core.base.visible import label
from addenda.core.disk.access import is_sha256
from addenda.core.file.tokenizer import mark
from addenda.core.method.contract import Method
from addenda.core.packed.few_bits import FewBits
from addenda.core.packed.tensor import parts_of
from addenda.core.state.state import record_of
from addenda.core.state.trained_on import Beside, TrainedOn

_KEYS = {"tokenizer", "entries", "beside"}
_MOST = 64  # adapters that acted beside another
_LARGEST = 2**40


class Held(Protocol):
    """An adapter on a model, as `core.adapter.handle.Adapter` is one."""

    model: Any
    name: str

    def sites(self) -> Any: ...
    def pools(self) -> Any: ...


def content_hash(adapter: Held) -> str:
    """Return the SHA-256 of an adapter's places, methods with their options, and tensors.

    It is the same whatever the adapter's name, and in a file. Of options count those that are no defaults, so that one
    which a later version brings changes no hash.
    """
    sha = hashlib.sha256()
    held = [(path, _told(tensors.method), tensors.stored()) for path, tensors in adapter.sites()]
    held += [(name, "pool", pool.stored()) for name, pool in adapter.pools()]
    for path, method, tensors in sorted(held, key=lambda item: item[0]):
        for key in sorted(tensors):
            tensor = tensors[key]
            pieces = [tensor.codes, tensor.moments] if isinstance(tensor, FewBits) else parts_of(tensor)
            sha.update(f"{path}\x1f{method}\x1f{key}\x1f{tuple(tensor.shape)}\x1f{tensor.dtype}\x1e".encode())
            for piece in pieces:
                sha.update(_bytes(piece))
    return sha.hexdigest()


def _told(method: Method) -> str:
    return json.dumps([method.name, method.options()], sort_keys=True, default=str)


def _bytes(piece: Tensor) -> Any:
    import torch

    return whole(piece).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def note_training(adapter: Held, *, tokenizer: Any = None, beside: "list[Held] | tuple[Held, ...]" = ()) -> TrainedOn:
    """Remember what an adapter is trained on, for its file: the tokenizer, and the adapters that act beside it.

    Raises AddendaError where an adapter is said to act beside itself, or twice.
    """
    names = [b.name for b in beside]
    if adapter.name in names or len(set(names)) < len(names):
        raise AddendaError(f"{adapter.name!r} trains beside other adapters, each once; got {names}.")
    found = mark(tokenizer) if tokenizer is not None else None
    noted = TrainedOn(
        tokenizer=None if found is None else found.sha256,
        entries=None if found is None else found.entries,
        beside=tuple(Beside(b.name, content_hash(b)) for b in beside),
    )
    record_of(adapter.model, adapter.name).record.trained_on = noted
    return noted


def trained_on(adapter: Held) -> TrainedOn | None:
    """Return what an adapter was trained on, where that was noted."""
    return record_of(adapter.model, adapter.name).record.trained_on


def difference(noted: TrainedOn, tokenizer: Any) -> str | None:
    """Return how a tokenizer differs from the one of training, or None; None too where that was not noted."""
    if noted.tokenizer is None:
        return None
    found = mark(tokenizer)
    if found.sha256 == noted.tokenizer:
        return None
    return (
        f"it has {found.entries:,} tokens, and that of training {noted.entries:,}; their SHA-256 are "
        f"{found.sha256[:12]}… and {noted.tokenizer[:12]}…"
    )


def to_json(noted: TrainedOn) -> dict[str, Any]:
    """Return what a header stores."""
    entry: dict[str, Any] = {}
    if noted.tokenizer is not None:
        entry |= {"tokenizer": noted.tokenizer, "entries": noted.entries}
    if noted.beside:
        entry["beside"] = [{"name": b.name, "sha256": b.sha256} for b in noted.beside]
    return entry


def of_json(raw: Any) -> TrainedOn:
    """Build what a header stores. Raises ValueError, KeyError or TypeError where that is malformed."""
    if not isinstance(raw, dict) or not raw or not raw.keys() <= _KEYS:
        raise ValueError(f"what it was trained on must have some of {', '.join(sorted(_KEYS))}, and nothing else")
    tokenizer, entries, beside = raw.get("tokenizer"), raw.get("entries"), raw.get("beside", [])
    if (tokenizer, entries) != (None, None) and not (
        is_sha256(tokenizer) and type(entries) is int and 0 < entries < _LARGEST
    ):
        raise ValueError("the tokenizer that it was trained on must be a SHA-256 and a number of tokens")
    if not (isinstance(beside, list) and len(beside) <= _MOST and ("beside" not in raw or beside)):
        raise ValueError(f"what it was trained beside must be a list of 1 to {_MOST} adapters")
    for b in beside:
        if not (isinstance(b, dict) and b.keys() == {"name", "sha256"} and is_sha256(b["sha256"])):
            raise ValueError("what it was trained beside must be names and SHA-256")
        if not (isinstance(b["name"], str) and 0 < len(b["name"]) <= _MOST and label(b["name"], _MOST) == b["name"]):
            raise ValueError("what it was trained beside must have names of adapters")
    if len({b["name"] for b in beside}) < len(beside):
        raise ValueError("it was trained beside two adapters of one name")
    return TrainedOn(tokenizer, entries, tuple(Beside(b["name"], b["sha256"]) for b in beside))
