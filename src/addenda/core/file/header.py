"""The contents of an adapter file, checked for form but not against any model. `core.file.save` says what they mean."""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.visible import label
from addenda.core.disk.access import parse_json, path_of, reading, shown
from addenda.core.file import container
from addenda.core.file import trained_on as trainings
from addenda.core.file import vocabulary as vocabularies
from addenda.core.packed.bits import code_bytes
from addenda.core.packed.few_bits import FewBits
from addenda.core.state.trained_on import TrainedOn
from addenda.core.state.vocabulary import Vocabulary

SCHEMA = 2  # 1 had no digest
BEFORE_DIGEST = b'{"__metadata__":{"addenda":"{\\"schema\\": 2, \\"sha256\\": \\"'  # how a file with one begins
PEFT = "adapter_config.json"  # the file by which PEFT knows its folders
IMPORTED = "which is imported, not loaded: addenda.import_adapter(model, path), or addenda import PATH --out FILE."
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_KEYS = frozenset(("schema", "seed", "step", "methods", "basis", "sites", "pools", "head", "labels"))
_KEYS_2 = _KEYS | {"sha256", "note", "vocabulary", "trained_on"}
_KEYS_OF_METHOD = frozenset(("name", "options"))
_KEYS_OF_METHOD_2 = _KEYS_OF_METHOD | {"ignorable"}
_KEYS_OF_SITE = frozenset((
    "path", "kind", "shape", "dtype", "method", "trainable", "frozen", "form", "hash", "sample", "checks", "packed",
))  # fmt: skip
_KEYS_OF_SITE_2 = _KEYS_OF_SITE | {"origin"}
Checksum = tuple[float, float] | str
_LABELS, _LABEL = 100_000, 4096  # how many a file may name, and how long each may be
_PATH = 1000  # characters of a module's path
HEAD = -1  # what stands for a method where a head is trained as a whole copy


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """A method as a file stores it."""

    name: str
    options: Mapping[str, Any]
    ignorable: tuple[str, ...] = field(default=(), compare=False)  # options that mean what a file without them means

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a file stores it."""
        more = {"ignorable": list(self.ignorable)} if self.ignorable else {}
        return {"name": self.name, "options": dict(self.options), **more}


@dataclass(frozen=True, slots=True)
class SiteEntry:
    """A site as a file stores it: what the base has there, and the names of the adapter's tensors."""

    path: str
    kind: str
    shape: tuple[int, ...]  # as the base stores it
    dtype: str
    method: int  # its place among the methods of the file; below 0 for a head
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    form: str | None  # what a plain base must be put into, to be this one
    hash: str | None  # of the base's bytes; None for a head, which replaces them
    sample: tuple[float, ...] | None
    checks: Mapping[str, Checksum]  # of tensors that are computed again
    packed: Mapping[str, tuple[int, ...]]  # the shapes of those that are in codes
    origin: str | None = None  # the path by which its random tensors are drawn, where that is another

    @property
    def is_head(self) -> bool:
        """Whether a head is trained here as a whole copy, by no method of the file."""
        return self.method == HEAD

    def count(self, key: str, tensors: Mapping[str, Tensor]) -> int:
        """Return how many numbers a trained tensor is, in codes or not."""
        shape = self.packed.get(key)
        return tensors[f"{self.path}/{key}"].numel() if shape is None else math.prod(shape)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a file stores it, its keys in the order in which they are written."""
        entry: dict[str, Any] = {
            "path": self.path,
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "method": self.method,
            "trainable": list(self.trainable),
            "frozen": list(self.frozen),
        }
        if self.form is not None:
            entry["form"] = self.form
        if self.hash is not None and self.sample is not None:
            entry |= {"hash": self.hash, "sample": list(self.sample)}
        entry["checks"] = {k: c if isinstance(c, str) else list(c) for k, c in self.checks.items()}
        if self.origin is not None:
            entry["origin"] = self.origin
        if self.packed:
            entry["packed"] = {k: list(shape) for k, shape in self.packed.items()}
        return entry


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in an adapter file that is no tensor."""

    schema: int
    seed: int
    step: int
    methods: tuple[MethodEntry, ...]
    basis: bool  # whether tensors that could be computed again are stored too
    sites: tuple[SiteEntry, ...]
    pools: tuple[tuple[str, ...], ...]  # the names of the tensors that all sites of a method train together
    head: Mapping[str, Any]  # the options of heads; empty in older files
    labels: tuple[str, ...]  # of a classifier's outputs, in their order, where they are known
    note: Mapping[str, Any] = field(default_factory=dict)  # whatever its writer wants to tell; readers may ignore it
    sha256: str | None = field(default=None, compare=False)  # of the file that it was read from
    vocabulary: Vocabulary | None = None  # what is new in it, where it has grown
    trained_on: TrainedOn | None = None  # tokenizer and adapters beside it, where they are known

    @property
    def heads(self) -> tuple[SiteEntry, ...]:
        """The heads that are trained as whole copies."""
        return tuple(s for s in self.sites if s.is_head)

    @property
    def has_codes(self) -> bool:
        """Whether a matrix is held in codes."""
        return any(s.packed for s in self.sites)

    def bits(self, site: SiteEntry) -> int | None:
        """Return the bits of a site's matrices, or None where they are in full precision."""
        return (self.head if site.is_head else self.methods[site.method].options).get("bits")

    def to_json(self) -> dict[str, Any]:
        """Return the header as a file stores it, keys in the order of writing. What older files lack is left out.

        Where the digest will be there are zeros.
        """
        header: dict[str, Any] = {"schema": self.schema}
        if self.schema > 1:
            header["sha256"] = "0" * container.DIGITS
        header |= {
            "seed": self.seed,
            "step": self.step,
            "methods": [m.to_json() for m in self.methods],
            "basis": self.basis,
            "sites": [s.to_json() for s in self.sites],
            "pools": [list(names) for names in self.pools],
        }
        if self.head:
            header["head"] = dict(self.head)
        if self.labels:
            header["labels"] = list(self.labels)
        if self.vocabulary is not None:
            header["vocabulary"] = vocabularies.to_json(self.vocabulary)
        if self.trained_on is not None:
            header["trained_on"] = trainings.to_json(self.trained_on)
        if self.note:
            header["note"] = dict(self.note)
        return header


def metadata_of(header: Header, size: int) -> dict[str, str]:
    """Return what a file of safetensors is told besides its tensors: the header, in the schema of this version.

    size: bytes of these tensors. Raises AddendaError for a header that `read` would refuse, or take for another: no
    file is written that cannot be read again.
    """
    try:
        text = json.dumps(replace(header, schema=SCHEMA).to_json(), allow_nan=False)
        again = json.dumps(_header(parse_json(text, room=size)).to_json())
        if again != text:
            raise ValueError("something in it would be read as something else")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AddendaError(
            f"The adapter was not saved: what its file would say of it could not be read again ({label(error, 600)}). "
            "Names, labels and numbers of a model must be such as text and JSON can hold."
        ) from None
    return {"addenda": text}


def write(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> Path:
    """Write a file of a header and tensors, as `read` returns them, with the digest of its bytes."""
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    container.write(path, metadata_of(header, size), tensors, BEFORE_DIGEST)
    return path


def read(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """Read the header and the tensors of a file, checked for form but not against any model.

    Raises AddendaError for a file that is missing, damaged, of another make or of a newer schema.
    """
    path = path_of(path)
    with reading(path):
        folder, exists = path.is_dir(), path.is_file()
    if of_peft(path):
        raise AddendaError(f"{shown(path)} is an adapter of PEFT, {IMPORTED}")
    if folder:
        files = sorted(p.name for p in path.glob("*.safetensors"))[:4]
        there = f"In it: {', '.join(files)}" if files else "No .safetensors file is in it"
        raise AddendaError(f"{shown(path)} is a folder, and an adapter is a file. {there}.")
    if not exists:
        raise AddendaError(f"There is no file {shown(path)}.{_hint(path)}")
    try:
        with open(path, "rb") as f:
            if f.read(4) == b"GGUF":
                raise AddendaError(f"{shown(path)} is a GGUF file, {IMPORTED}")
        with container.opened(path) as file:
            header, tensors = _contents(file, path)
    except OSError as error:
        with reading(path):
            raise error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(error, shown(path)) from None
    if header.sha256 is None:
        warnings.warn(
            f"{shown(path)} is of schema 1, which has no digest: nothing proves that its bytes are those that were "
            "saved. Saved again, it is of the present schema.",
            stacklevel=3,
        )
    return header, tensors


def read_bytes(data: bytes, name: str) -> tuple[Header, dict[str, Tensor]]:
    """Read what `read` does out of a file's bytes, which some other file holds. name: what to call it.

    Raises AddendaError for bytes that are no whole adapter file with a digest.
    """
    try:
        header, tensors = _contents(container.Opened(BytesIO(data), len(data)), name)
        if header.sha256 is None:
            raise ValueError("it has no digest")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(error, name) from None
    return header, tensors


def _contents(file: container.Opened, path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    text = file.metadata.get("addenda")
    if text is None:
        if any(key.startswith("base_model.model.") for key in file.forms):
            raise AddendaError(f"{shown(path)} is an adapter of PEFT, {IMPORTED}")
        raise AddendaError(
            f"{path} is a safetensors file, but not an adapter of addenda (no 'addenda' header). "
            "One of another program is imported first: addenda import."
        )
    tensors, digest = file.proven(BEFORE_DIGEST)
    if further := sorted(file.metadata.keys() - {"addenda"}):
        raise ValueError(f"there is more than a header of addenda: {further[:4]}")
    header = replace(_header(parse_json(text, room=file.size)), sha256=digest)
    if header.schema > 1 and digest is None:
        raise ValueError("a header of schema 2 begins with its schema and its sha256, and this one does not")
    _check_tensors(header, tensors)
    return header, tensors


def _damaged(error: Exception, name: str) -> AddendaError:
    reason = label(error, 600)  # the names in it are the file's own
    if not isinstance(error, ValueError):
        reason = f"{type(error).__name__}: {reason}"
    return AddendaError(f"{name} is damaged or no adapter file: {reason}. Fetch or save it again.")


def of_peft(path: Path) -> bool:
    """Return whether a folder is an adapter of PEFT, or a file the weights of one. False where it is unreadable."""
    try:
        weights = path.name in ("adapter_model.safetensors", "adapter_model.bin", PEFT)
        folder = path.parent if weights and not path.is_dir() else path
        return (folder / PEFT).is_file()
    except OSError:
        return False


def _hint(path: Path) -> str:
    siblings = [p.name for p in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
    return nearest(path.name, siblings) or (f" In that folder: {', '.join(siblings[:8])}." if siblings else "")


def _header(raw: Any) -> Header:
    """Build the header from a file's JSON. Raises ValueError, KeyError or TypeError where that is malformed."""
    schema = raw["schema"]
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise ValueError(f"schema {label(schema, 40)}, this version of addenda reads up to {SCHEMA}; upgrade it")
    _only(raw, _KEYS if schema == 1 else _KEYS_2, "the header")
    if not (type(raw["seed"]) is int and type(raw["step"]) is int and raw["step"] >= 0):
        raise ValueError("seed and step must be whole numbers")
    if type(raw["basis"]) is not bool:
        raise ValueError("basis must be true or false")
    note = raw.get("note", {})
    if not isinstance(note, dict):
        raise ValueError("the note must be entries by name")
    if not (isinstance(raw["methods"], list) and isinstance(raw["sites"], list)):
        raise ValueError("methods and sites must be lists")
    head, labels, pools = raw.get("head", {}), raw.get("labels", []), raw.get("pools", [])
    if not isinstance(head, dict):
        raise ValueError("the options of heads must be by name")
    if not (_names(labels) and all(labels)):
        raise ValueError("labels must be a list of names")
    if len(labels) > _LABELS or any(len(name) > _LABEL for name in labels):
        raise ValueError(f"{len(labels):,} labels of up to {max(map(len, labels)):,} characters are of no classifier")
    if not _once(labels):
        raise ValueError("labels must be different names, one for each output")
    if not (isinstance(pools, list) and all(map(_names, pools))):
        raise ValueError("the tensors of a pool must have names of their own")
    if len(raw["methods"]) > len(raw["sites"]):
        raise ValueError(f"{len(raw['methods']):,} methods are more than its {len(raw['sites']):,} sites")
    methods = tuple(_method(m, _KEYS_OF_METHOD if schema == 1 else _KEYS_OF_METHOD_2) for m in raw["methods"])
    sites = tuple(_site(s, len(methods), _KEYS_OF_SITE if schema == 1 else _KEYS_OF_SITE_2) for s in raw["sites"])
    if not (sites and _once([s.path for s in sites])):
        raise ValueError("sites must be there, each once")
    if unused := set(range(len(methods))) - {s.method for s in sites}:
        raise ValueError(f"{len(unused):,} of its {len(methods):,} methods are at no site")
    if head and not any(s.is_head for s in sites):
        raise ValueError("there are options of heads, and no head")
    return Header(
        schema=schema,
        seed=raw["seed"],
        step=raw["step"],
        methods=methods,
        basis=raw["basis"],
        sites=sites,
        pools=tuple(map(tuple, pools)),
        head=head,
        labels=tuple(labels),
        note=note,
        vocabulary=vocabularies.of_json(raw["vocabulary"]) if "vocabulary" in raw else None,
        trained_on=trainings.of_json(raw["trained_on"]) if "trained_on" in raw else None,
    )


def _only(raw: Any, known: frozenset[str], where: str) -> None:
    """Raise ValueError for keys that nobody here understands: what they ask for would not be done."""
    if unknown := sorted(raw.keys() - known):
        raise ValueError(
            f"{where} has unknown keys: {', '.join(k[:80] for k in unknown[:4])}; only 'note' is free. Where a newer "
            "version of addenda has written it, upgrade"
        )


def _method(raw: Any, keys: frozenset[str]) -> MethodEntry:
    _only(raw, keys, "a method")
    options, ignorable = raw["options"], raw.get("ignorable", [])
    if not isinstance(raw["name"], str) or not isinstance(options, dict):
        raise ValueError("a method needs a name and options")
    if not (_names(ignorable) and _once(ignorable) and options.keys() >= set(ignorable)):
        raise ValueError("what may be ignored of a method must be options of it, each once")
    return MethodEntry(raw["name"], options, tuple(ignorable))


def _site(raw: Any, methods: int, keys: frozenset[str]) -> SiteEntry:
    """Build the entry of a site, which has none but these keys, from its JSON, in a file of so many methods."""
    path, method, checks, packed = raw["path"], raw["method"], raw["checks"], raw.get("packed", {})
    _only(raw, keys, f"site {path!r:.200}")
    if not (isinstance(path, str) and isinstance(raw["kind"], str) and isinstance(checks, dict)):
        raise ValueError("a site needs a path and a kind")
    if len(path) > _PATH or label(path, _PATH) != path:
        raise ValueError(f"no module of a model is called {label(path)!r}")
    if not (type(method) is int and HEAD <= method < methods):
        raise ValueError(f"{path}: method {method!r} is not listed")
    trainable, frozen = raw["trainable"], raw["frozen"]
    if not (_names(trainable) and _names(frozen) and _once([*trainable, *frozen])):
        raise ValueError(f"{path}: names of tensors must be text, each once")
    if not all(isinstance(c, str) or _numbers(c, 2) for c in checks.values()):
        raise ValueError(f"{path}: a checksum must be a hash or two numbers")
    form, hashed, sample = raw.get("form"), raw.get("hash"), raw.get("sample")
    if "form" in raw and not isinstance(form, str):
        raise ValueError(f"{path}: the form of a base must be text")
    bare = method == HEAD and hashed is None
    if not bare and not (isinstance(hashed, str) and _numbers(sample)):
        raise ValueError(f"{path}: the base's hash and sample must be there")
    if not (isinstance(raw["dtype"], str) and _sizes(raw["shape"])):
        raise ValueError(f"{path}: dtype and shape must be there")
    if "origin" in raw and (not isinstance(raw["origin"], str) or raw["origin"] in ("", path)):
        raise ValueError(f"{path}: the path of training, where it is told, must be another")
    if not isinstance(packed, dict):
        raise ValueError(f"{path}: the shapes of codes must be by name")
    trained = set(trainable)
    for key, shape in packed.items():
        if key not in trained:
            raise ValueError(f"{path}: packed {key!r} is not among the trained tensors")
        if not (shape and _sizes(shape)):
            raise ValueError(f"{path}/{key} is packed, and its shape must be whole numbers above 0")
    return SiteEntry(
        path=path,
        kind=raw["kind"],
        shape=tuple(raw["shape"]),
        dtype=raw["dtype"],
        method=method,
        trainable=tuple(trainable),
        frozen=tuple(frozen),
        form=form,
        hash=None if bare else hashed,
        sample=None if bare else tuple(sample),
        checks={k: c if isinstance(c, str) else tuple(c) for k, c in checks.items()},
        packed={k: tuple(shape) for k, shape in packed.items()},
        origin=raw.get("origin"),
    )


def _check_tensors(header: Header, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError where the tensors are not those that the header tells of."""
    named: set[str] = set()
    for s in header.sites:
        keys = [*s.trainable, *s.frozen, *(s.checks if header.basis else ()), *(f"{k}.moments" for k in s.packed)]
        named.update(f"{s.path}/{k}" for k in keys)
    for i, names in enumerate(header.pools):
        keys = [f".{i}/{k}" for k in names]
        if not (_once(keys) and named.isdisjoint(keys)):
            raise ValueError("the tensors of a pool must have names of their own")
        named.update(keys)
    if header.vocabulary is not None:
        named.update(map(vocabularies.key_of, header.vocabulary.tables))
    if named != set(tensors):
        missing, unexpected = sorted(named - set(tensors)), sorted(set(tensors) - named)
        raise ValueError(f"tensors and header disagree (missing {missing[:4]}, unexpected {unexpected[:4]})")
    for s in header.sites:
        for key, shape in s.packed.items():
            _check_codes(f"{s.path}/{key}", shape, header.bits(s), tensors)
    for s in header.heads:  # whoever makes a head of this size must find as many numbers
        claimed, stored = math.prod(s.shape), sum(s.count(k, tensors) for k in s.trainable)
        if claimed != stored:
            raise ValueError(f"{s.path} is said to be {list(s.shape)}, {claimed:,} numbers, and {stored:,} are there")
    if header.vocabulary is not None:
        vocabularies.check_rows(header.vocabulary, tensors, FLOATING)
    trained = [tensors[f"{s.path}/{k}"] for s in header.sites for k in s.trainable if k not in s.packed]
    trained += [tensors[f".{i}/{k}"] for i, names in enumerate(header.pools) for k in names]
    if not all(t.dtype in FLOATING for t in trained):
        raise ValueError("trained tensors must be float64, float32, bfloat16 or float16")


def _check_codes(key: str, shape: tuple[int, ...], bits: object, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError where codes and moments are not those of a matrix of this shape, or of a stack of them."""
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"{key} is packed, and its bits must be from 1 to 8, got {bits!r}")
    codes, moments, stack = tensors[key], tensors[f"{key}.moments"], tensors[key].dim() == 2
    lead = shape[:1] if stack else ()
    expected = [*lead, code_bytes(math.prod(shape[len(lead) :]), bits)]
    if codes.dtype != torch.uint8 or list(codes.shape) != expected:
        raise ValueError(f"{key} must be {expected} bytes of codes for {[*shape]} in {bits} bits, got {[*codes.shape]}")
    if moments.dtype != torch.float32 or list(moments.shape) != [*lead, 2]:
        raise ValueError(f"{key}.moments must be {[*lead, 2]} float32 numbers")
    if not bool(torch.isfinite(moments).all()) or bool((moments[..., 1] < 0).any()):
        raise ValueError(f"{key}.moments must be finite, and the deviation at least 0")


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _once(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 < n < 2**40 for n in value)


def _numbers(value: object, count: int | None = None) -> bool:
    if not isinstance(value, list) or not all(type(v) in (int, float) for v in value):
        return False
    return count in (None, len(value))


def packed_as(key: str, packed: FewBits) -> dict[str, Tensor]:
    """Return the two tensors that a file stores of a matrix in few bits."""
    return {key: packed.codes.cpu().contiguous(), f"{key}.moments": packed.moments.cpu().contiguous()}
