"""More adapters than fit into memory: files on a model, as many at a time as a bound allows.

    bank = ad.AdapterBank(model, "adapters/", bytes=200_000_000)
    bank.use("maths")         # read, verified, attached and active; another one has gone if it had to
    bank.prefetch("law")      # read and checked for form in a thread, while the model works
    bank.use("law")

The bound counts the tensors that are on the model (those computed from W or a seed too) and those that were read ahead.
Who was used longest ago goes first, and what acts goes last. All calls are the model's own thread's: a thread of the
bank reads files and nothing else. Adapters that the bank did not bring are neither counted nor touched.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple
from weakref import ref

from torch import Tensor, nn

from addenda.core.adapter.attach import detach, ready
from addenda.core.adapter.handle import Adapter
from addenda.core.adapter.load import place
from addenda.core.adapter.switch import switch
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.ranges import Range
from addenda.core.disk.access import path_of, reading, shown
from addenda.core.file.container import sound
from addenda.core.file.header import IMPORTED, Header, of_peft, read
from addenda.core.file.methods import methods_of
from addenda.core.file.rename import check_map, renamed
from addenda.core.state.state import Record, check_name, find_state, record_of

_AT_LEAST_ONE = Range(1, 2**62, whole=True)


class _Contents(NamedTuple):
    header: Header
    tensors: dict[str, Tensor]
    mark: tuple[int, int]  # of the file when it was read


class AdapterBank:
    """Adapter files of one model, of which a bounded number is in memory. See the module.

    files: {name: file}, or a folder whose *.safetensors are adapters, named by their files. size: how many at most.
    bytes: how many bytes of tensors at most. base, rename: as in `load`, which is as strict here as everywhere.

    Raises AddendaError, before anything is read whole, for no bound, for a bound below one of the adapters, for a file
    that is none of addenda's, and for names that an adapter cannot have or one on the model has.
    """

    def __init__(
        self,
        model: nn.Module,
        files: Mapping[str, str | Path] | str | Path,
        *,
        size: int | None = None,
        bytes: int | None = None,
        base: Literal["exact", "compatible"] = "exact",
        rename: Mapping[str, str] | None = None,
    ):
        for option, value in (("size", size), ("bytes", bytes)):
            if value is not None and (refusal := _AT_LEAST_ONE.refusal(option, value)):
                raise AddendaError(f"{refusal}: a bank holds at least one adapter.")
        if size is None and bytes is None:
            raise AddendaError("A bank has a bound: size= (adapters) or bytes= (of their tensors), or both.")
        if base not in ("exact", "compatible"):
            raise AddendaError(f"base must be 'exact' or 'compatible', got {base!r}.")
        check_map(rename)
        self.model, self.size, self.bytes, self.rename = model, size, bytes, rename
        self.base: Literal["exact", "compatible"] = base
        self.files = _files(files)
        for name in self.files:
            ready(model, name)
        self._stored = {name: _stored_bytes(path) for name, path in self.files.items()}
        large = {n: b for n, b in self._stored.items() if bytes is not None and b > bytes}
        if large:
            raise AddendaError(
                f"bytes={bytes:,} is less than {len(large)} of these adapters take, e.g. {next(iter(large))!r} with "
                f"{next(iter(large.values())):,}. A bank must hold the largest: {max(large.values()):,} or more."
            )
        self._held: OrderedDict[str, int] = OrderedDict()  # bytes on the model, by name, the latest used last
        self._records: dict[str, ref[Record]] = {}  # what says that they are still those of the bank
        self._ahead: OrderedDict[str, Future] = OrderedDict()
        self._reader: ThreadPoolExecutor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters of the bank."""
        return tuple(self.files)

    @property
    def held(self) -> tuple[str, ...]:
        """Those that are on the model, the one used last behind."""
        self._forget_detached()
        return tuple(self._held)

    @property
    def used(self) -> int:
        """The bytes that are counted: of tensors on the model and of those read ahead."""
        return sum(self._held.values()) + sum(self._stored[n] for n in self._ahead)

    def use(self, name: str | None) -> Adapter | None:
        """Make one adapter act, and no other; None: the base. It is read if it is not there, and others go for it.

        Raises AddendaError for an unknown name, and as `load` does; then what acted before acts again.
        """
        if name is None:
            if find_state(self.model) is not None:
                switch(self.model, None)
            return None
        self._check(name)
        self._forget_detached()
        if name not in self._held:
            self._bring(name)
        switch(self.model, name)
        self._held.move_to_end(name)
        return Adapter(self._root(), name)

    def prefetch(self, name: str) -> bool:
        """Begin to read an adapter in a thread, so that `use` need not wait. Others go for it, but not what acts.

        Returns whether it is there or on its way: False where it does not fit beside what acts. What is wrong with the
        file is said by `use`. Raises AddendaError for an unknown name.
        """
        self._check(name)
        self._forget_detached()
        if name in self._held or name in self._ahead:
            return True
        if not self._make_room(self._stored[name], keep=self._acting()):
            return False
        self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="addenda-bank")
        self._ahead[name] = self._reader.submit(_contents, self.files[name], self.rename)
        return True

    def close(self) -> None:
        """Take the bank's adapters off the model and let go of what was read ahead. The bank may be used again."""
        self._forget_detached()
        for name in list(self._held):
            self._evict(name)
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
        self._reader, self._ahead = None, OrderedDict()

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        bound = [f"{limit:,} {of}" for limit, of in ((self.size, "adapters"), (self.bytes, "bytes")) if limit]
        return (
            f"AdapterBank({len(self.files)} files, {len(self._held)} held, {self.used:,} bytes of {', '.join(bound)})"
        )

    # -- in and out ------------------------------------------------------------------------------------------------

    def _bring(self, name: str) -> None:
        """Put an adapter on the model. Where that fails, one that acted and had to go is brought back."""
        ready(self.model, name)  # before somebody goes for it, whose change may be merged
        acted, held = self._acting(), tuple(self._held)
        try:
            self._attach(name)
        except BaseException:
            self._ahead.pop(name, None)
            for gone in (n for n in held if n in acted and n not in self._held):
                self._attach(gone)
            if acted:
                switch(self.model, acted)
            raise

    def _attach(self, name: str) -> None:
        future = self._ahead.get(name)
        if future is None:
            self._make_room(self._stored[name])
        contents = _contents(self.files[name], self.rename) if future is None else future.result()
        if contents.mark != _mark(self.files[name]):  # written anew since it was read ahead
            contents = _contents(self.files[name], self.rename)
        self._ahead.pop(name, None)
        self._make_room(sum(t.nbytes for t in contents.tensors.values()))
        adapter = place(
            self.model, self.files[name], contents.header, contents.tensors, name=name, base=self.base, activate=False
        )
        taken = _bytes_of(adapter)
        if self.bytes is not None and taken > self.bytes:
            detach(self.model, name)
            raise AddendaError(
                f"{name!r} takes {taken:,} bytes on the model, with what it computes from the weights, and this bank "
                f"has bytes={self.bytes:,}. Give it more."
            )
        self._make_room(taken, of=name)
        self._held[name], self._records[name] = taken, ref(record_of(self.model, name).record)

    def _make_room(self, wanted: int, keep: tuple[str, ...] = (), of: str | None = None) -> bool:
        """Let adapters go until one more of so many bytes fits: idle ones, then what was read ahead, then what acts.

        keep: those that stay. Returns whether it fits. of: the one that it is for.
        """
        acting = self._acting()
        idle = [n for n in self._held if n not in acting]
        order = [*idle, *(n for n in self._ahead if n != of), *(n for n in self._held if n in acting)]
        leaving: list[str] = []
        while not self._fits(wanted, leaving):
            candidates = [n for n in order if n not in keep and n not in leaving]
            if not candidates:
                return False
            leaving.append(candidates[0])
        for name in leaving:
            if name in self._ahead:
                self._ahead.pop(name).cancel()
            else:
                self._evict(name)
        return True

    def _fits(self, wanted: int, leaving: list[str]) -> bool:
        sizes = {**self._held, **{n: self._stored[n] for n in self._ahead}}
        left = [b for n, b in sizes.items() if n not in leaving]
        return (self.size is None or len(left) < self.size) and (self.bytes is None or sum(left) + wanted <= self.bytes)

    def _evict(self, name: str) -> None:
        detach(self.model, name)
        del self._held[name], self._records[name]

    def _acting(self) -> tuple[str, ...]:
        host = find_state(self.model)
        return () if host is None else host.state.active

    def _root(self) -> nn.Module:
        host = find_state(self.model)
        assert host is not None
        return host.root

    def _forget_detached(self) -> None:
        """Count those no more that somebody else has taken off the model, be there another of the name by now."""
        host = find_state(self.model)
        for name in list(self._held):
            record = None if host is None else host.state.records.get(name)
            if record is None or record is not self._records[name]():
                del self._held[name], self._records[name]

    def _check(self, name: str) -> None:
        if name not in self.files:
            raise AddendaError(
                f"This bank has no adapter {name!r}.{nearest(name, self.files)} It has "
                f"{', '.join(map(repr, list(self.files)[:20]))}."
            )


def _files(given: Mapping[str, str | Path] | str | Path) -> dict[str, Path]:
    if isinstance(given, Mapping):
        files = {name: path_of(path) for name, path in given.items()}
    elif isinstance(given, list | tuple):
        raise AddendaError("files is a dict of files by the names of their adapters, or a folder; got a list.")
    else:
        folder = path_of(given, "files")
        with reading(folder):
            files = {p.stem: p for p in sorted(folder.glob("*.safetensors"))} if folder.is_dir() else {}
    if not files:
        raise AddendaError(f"There is no adapter file in {str(given)[:200]}. Name files, or a folder of *.safetensors.")
    for name in files:
        check_name(None, name)
    return files


def _stored_bytes(path: Path) -> int:
    """Return the bytes of a file's tensors. Raises AddendaError for one that is no adapter file of addenda."""
    if of_peft(path):
        raise AddendaError(f"{shown(path)} is an adapter of PEFT, {IMPORTED}")
    with sound(path) as file:
        ours, forms = "addenda" in file.metadata, file.forms.values()
    if not ours:
        raise AddendaError(f"{shown(path)} is no adapter file of addenda.")
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in forms)


def _mark(path: Path) -> tuple[int, int]:
    with reading(path):
        found = path.stat()
    return found.st_mtime_ns, found.st_size


def _contents(path: Path, rename: Mapping[str, str] | None) -> _Contents:
    """Read a file and check it for form: all that needs no model."""
    mark = _mark(path)
    header, tensors = renamed(*read(path), rename, path)
    methods_of(header, path)
    return _Contents(header, tensors, mark)


def _bytes_of(adapter: Adapter) -> int:
    """Return the bytes of everything that an adapter keeps on the model, each storage once."""
    held: dict[int, int] = {}
    for _, tensors in adapter.sites():
        for t in tensors.held().values():
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(held.values())
