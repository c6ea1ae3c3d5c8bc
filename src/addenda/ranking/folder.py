"""A reranker that no weight can hold, as a folder: base, adapters, and the composition in which they act.

    reranker.json              what is here, and how it acts; nothing of it is code
    base/                      the base as transformers saves it; or no base, and only its hash
    tokenizer/
    adapters/NAME.safetensors

    {"schema": 1, "base": {"folder": "base", "sha256": "<64 hex>"},
     "tokenizer": {"sha256": "<64 hex>", "entries": 250002},
     "adapters": {"de": {"sha256": "<64 hex>"}, "task": {"sha256": "<64 hex>"}},
     "composition": {"stack": ["de", "task"]}, "settings": {"max_length": 256, "stride": null, "batch": 32}}

All of it is checked before a weight is read: names and numbers, every file by its hash, and no file of another folder.
The base's hash leaves out the heads that an adapter replaces, so that a head drawn anew makes no other base.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from addenda.compose.stack import Composition
from addenda.compose.written import of_json, to_json
from addenda.core.adapter.handle import Adapter
from addenda.core.adapter.load import load
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import refuse_sharded
from addenda.core.disk.access import amount_of, is_sha256, path_of, read_json, reading, sha256_of, shown, writing
from addenda.core.disk.atomic import readable, write_atomically
from addenda.core.disk.whole import free_place, whole
from addenda.core.file.fingerprint import hash_of
from addenda.core.file.tokenizer import mark
from addenda.core.modules.ours import is_ours
from addenda.core.site.site import owners_of, site_at
from addenda.core.state.state import acting_again, apply_active, record_of, state_of
from addenda.exporting.cross_encoder import write_tokenizer
from addenda.models.load import load_model
from addenda.models.pretrained import quiet, tokenizer_in

Base = Literal["copy", "hash"]
FILE = "reranker.json"
_KEYS = {"schema", "base", "tokenizer", "adapters", "composition", "settings"}
_SETTINGS = {"max_length": (1, 1 << 20), "stride": (0, 1 << 20), "batch": (1, 1 << 16)}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST = 64  # adapters


@dataclass(frozen=True)
class FolderReport:
    """What was written, and why it is no merged model."""

    path: Path
    adapters: tuple[str, ...]
    bytes: int
    base: Base
    reason: str | None = None

    def __str__(self) -> str:
        why = f"it cannot be merged, since {self.reason}" if self.reason else "not merged"
        base = "the base" if self.base == "copy" else "the base's hash"
        adapters = f"{len(self.adapters)} adapter{'s' * (len(self.adapters) > 1)} ({', '.join(self.adapters)})"
        return (
            f"{why}; written as {base}, {adapters} and their composition to {self.path}; {amount_of(self.bytes)}. "
            "Reranker.load opens it, sentence-transformers does not"
        )


@dataclass(frozen=True)
class Opened:
    """A reranker out of its folder: model with adapters, of which none acts yet; tokenizer; composition; settings."""

    model: nn.Module
    tokenizer: Any
    composition: Composition
    settings: dict[str, Any]


@checked()
def save_folder(
    model: nn.Module,
    tokenizer: Any,
    composition: Composition,
    out: str | Path,
    *,
    base: Base = "copy",
    max_length: int | None = None,
    stride: int | None = None,
    batch: int = 32,
    reason: str | None = None,
) -> FolderReport:
    """Write a model's adapters with their composition, and the base or its hash, into a folder that is not there yet.

    max_length, stride, batch: of the reranker, see `ranking.reranker`. reason: why it is not merged, for the report.
    Raises AddendaError, with nothing written, for a composition that no file can hold, an adapter that is not on the
    model, a merged change, and a place that is taken.
    """
    root, state = state_of(model)
    place = free_place(out)
    refuse_sharded(root, "nothing can be exported from it")
    if base not in ("copy", "hash"):
        raise AddendaError(f"base is 'copy' or 'hash', got {base!r}.")
    if state.merged is not None:
        raise AddendaError("A change is merged into the base. Call unmerge(model) first.")
    written = to_json(composition)
    names = composition.names()
    for name in names:
        record_of(root, name)
    settings = _settings({"max_length": max_length, "stride": stride, "batch": batch})
    found = mark(tokenizer)
    entry: dict[str, Any] = {
        "schema": 1,
        "base": {**({"folder": "base"} if base == "copy" else {}), "sha256": _hash_of_base(root, names)},
        "tokenizer": {"sha256": found.sha256, "entries": found.entries},
        "adapters": {},
        "composition": written,
        "settings": settings,
    }
    with whole(place, folder=True) as folder:
        for name in names:
            file = Adapter(root, name).save(_file(folder, name))
            entry["adapters"][name] = {"sha256": sha256_of(file)}
        write_tokenizer(tokenizer, folder / "tokenizer")
        if base == "copy":
            host: Any = root
            if not callable(getattr(host, "save_pretrained", None)):
                raise AddendaError(f"A {type(root).__name__} has no save_pretrained. Write its hash: base='hash'.")
            with acting_again(root, state):
                apply_active(root, state, ())
                with writing(folder), quiet():
                    host.save_pretrained(folder / "base")
        write_atomically(folder / FILE, (readable(entry) + "\n").encode())
        _described(folder)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return FolderReport(place, tuple(names), size, base, reason)


@checked()
def read_folder(
    path: str | Path, *, base: str | Path | None = None, device: str | None = None, dtype: str = "float32"
) -> Opened:
    """Open a folder that `save_folder` has written. base: the folder of the base, where only its hash is in there.

    Raises AddendaError, before a weight is read, for what is missing, changed or malformed, and then for a base, a
    tokenizer or adapters that are not those of the folder.
    """
    folder = path_of(path)
    entry, composition = _described(folder)
    inside = "folder" in entry["base"]
    if not inside and base is None:
        raise AddendaError(
            f"{shown(folder)} holds the hash of its base, not the base. Name the base's folder: base='…' (--base)."
        )
    loaded = load_model(folder / "base" if inside and base is None else path_of(base or "", "base"), task="label",
                        labels=1, dtype=dtype, device=device)  # fmt: skip
    tokenizer = tokenizer_in(folder / "tokenizer")
    found = mark(tokenizer)
    if found.sha256 != entry["tokenizer"]["sha256"]:
        raise AddendaError(
            f"The tokenizer in {shown(folder)} is not the one that was written there ({found.entries:,} tokens, then "
            f"{entry['tokenizer']['entries']:,}). Export the reranker again."
        )
    for name in entry["adapters"]:
        load(loaded.model, _file(folder, name), name=name, activate=False, tokenizer=tokenizer)
    actual = _hash_of_base(loaded.model, composition.names())
    if actual != entry["base"]["sha256"]:
        raise AddendaError(
            f"The base in {loaded.source} is not the one of {shown(folder)}: its weights have the SHA-256 "
            f"{actual[:12]}…, and {entry['base']['sha256'][:12]}… was written. Load the base that it was trained on."
        )
    return Opened(loaded.model, tokenizer, composition, entry["settings"])


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder that says of itself that it is such a reranker."""
    return (Path(path).expanduser() / FILE).is_file()


def _file(folder: Path, name: str) -> Path:
    return folder / "adapters" / f"{name}.safetensors"


def _hash_of_base(root: nn.Module, names: list[str]) -> str:
    """Return the SHA-256 of the base's own weights, without the heads that these adapters replace."""
    owners, replaced = owners_of(root), set()
    for name in names:
        replaced |= {id(site_at(root, path, owners).weight) for path in record_of(root, name).record.also_train}
    sha = hashlib.sha256()
    for path, p in sorted([*root.named_parameters(), *_buffers(root)], key=lambda item: item[0]):
        if not is_ours(path) and id(p) not in replaced:
            sha.update(f"{path}\x1f{tuple(p.shape)}\x1f{p.dtype}\x1f{hash_of(p.detach())}\x1e".encode())
    return sha.hexdigest()


def _buffers(root: nn.Module) -> list:
    stored = root.state_dict()
    return [(n, b) for n, b in root.named_buffers() if n in stored]


# -- reading what anybody may have written -----------------------------------------------------------------------------


def _described(folder: Path) -> tuple[dict[str, Any], Composition]:
    """Return what a folder says of itself, checked, with all files there as they were written."""
    with reading(folder):
        there = folder.is_dir()
    if not there:
        raise AddendaError(f"There is no folder {shown(folder)}.")
    if not (folder / FILE).is_file():
        raise AddendaError(f"{shown(folder)} has no {FILE}, so it is no reranker that addenda has written.")
    raw = read_json(folder / FILE)
    try:
        return _checked(raw, folder)
    except AddendaError as error:
        raise AddendaError(f"{shown(folder / FILE)}: {error}") from None


def _checked(raw: Any, folder: Path) -> tuple[dict[str, Any], Composition]:
    if not isinstance(raw, dict) or raw.keys() != _KEYS:
        keys = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise AddendaError(f"it must have {', '.join(sorted(_KEYS))}, and nothing else; got {str(keys)[:200]}.")
    if raw["schema"] != 1 or type(raw["schema"]) is not int:
        raise AddendaError(f"its schema is {str(raw['schema'])[:40]}, and this version reads 1. Upgrade addenda.")
    base, tokenizer, adapters = raw["base"], raw["tokenizer"], raw["adapters"]
    if (
        not isinstance(base, dict)
        or not {"sha256"} <= base.keys() <= {"sha256", "folder"}
        or not is_sha256(base["sha256"])
    ):
        raise AddendaError("the base is a SHA-256, and 'folder' where it is in here.")
    if base.get("folder", "base") != "base":
        raise AddendaError(f"the base is in the folder 'base' or nowhere, got {str(base['folder'])[:100]!r}.")
    if (
        not isinstance(tokenizer, dict)
        or tokenizer.keys() != {"sha256", "entries"}
        or not is_sha256(tokenizer["sha256"])
    ):
        raise AddendaError("the tokenizer is a SHA-256 and a number of entries.")
    if type(tokenizer["entries"]) is not int or tokenizer["entries"] < 1:
        raise AddendaError("the tokenizer's entries are a number.")
    if not isinstance(adapters, dict) or not 1 <= len(adapters) <= _MOST:
        raise AddendaError(f"the adapters are 1 to {_MOST}, by name.")
    for name, said in adapters.items():
        if not _NAME.fullmatch(name):
            raise AddendaError(f"{name[:80]!r} is no name of an adapter.")
        if not isinstance(said, dict) or said.keys() != {"sha256"} or not is_sha256(said["sha256"]):
            raise AddendaError(f"the adapter {name!r} is a SHA-256.")
    settings = _settings(raw["settings"])
    composition = of_json(raw["composition"])
    names = set(composition.names())
    if names != adapters.keys():
        other = sorted(names ^ adapters.keys())[0]
        where = "takes part and is not among the adapters" if other in names else "is there and takes no part"
        raise AddendaError(f"{other[:80]!r} {where}. The composition was edited, or a file is missing.")
    _check_files(folder, adapters, "folder" in base)
    return {**raw, "settings": settings}, composition


def _check_files(folder: Path, adapters: dict[str, Any], base: bool) -> None:
    """Raise AddendaError where a file is missing, a link, or not what was written."""
    for part in ("tokenizer", "adapters", *(("base",) if base else ())):
        if (folder / part).is_symlink() or not (folder / part).is_dir():
            raise AddendaError(f"there is no folder {part!r} beside it. The export is damaged: make it again.")
    for name, said in adapters.items():
        file = _file(folder, name)
        if file.is_symlink() or not file.is_file():
            raise AddendaError(f"there is no file {file.relative_to(folder)} beside it. Make the export again.")
        if sha256_of(file) != said["sha256"]:
            raise AddendaError(
                f"{file.relative_to(folder)} is not the file that was written: its SHA-256 is another. It is damaged, "
                "or another adapter; make the export again."
            )


def _settings(raw: Any) -> dict[str, int | None]:
    if not isinstance(raw, dict) or raw.keys() != _SETTINGS.keys():
        raise AddendaError(f"the settings are {', '.join(_SETTINGS)}.")
    for key, (least, most) in _SETTINGS.items():
        value = raw[key]
        if (value is None and key != "batch") or (type(value) is int and least <= value <= most):
            continue
        raise AddendaError(f"{key} is a number from {least} to {most}, got {str(value)[:40]}.")
    return dict(raw)
