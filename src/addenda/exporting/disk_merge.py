"""The work of a merge on disk: adapters matched with a folder, its bytes checked, W + ΔW written weight by weight."""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.base.threads import side_by_side
from addenda.core.disk.access import amount_of, shown
from addenda.core.disk.atomic import readable, write_atomically
from addenda.core.file.header import Header, read
from addenda.core.file.methods import methods_of
from addenda.core.file.rename import renamed
from addenda.core.forward.adapted import effective_weight
from addenda.core.merge.merge import MergeReport
from addenda.core.merge.write import rounded_to
from addenda.core.method.contract import Method
from addenda.core.packed.tensor import Packed
from addenda.core.site.site import Site
from addenda.exporting.folder_model import FolderModel, written_config
from addenda.exporting.stored import StoredAdapter, one_of, refuse_hidden
from addenda.models.checkpoint_writer import Added, CheckpointWriter
from addenda.models.named_weights import Unit
from addenda.models.skeleton import filled

_WORKERS = 2  # threads: one reads, hashes or writes while the other computes
_KEPT = 31 << 20  # bytes; no page of them is touched
_AT_WORK = 6  # bytes in memory for each byte of a weight that is changed
Edit = tuple[StoredAdapter, Site, Method]
Loss = tuple[float, float]  # the squares of what rounding lost, and of the change
MergeProgress = Callable[[int, int, str], None]  # (done, total, what)


@dataclass(frozen=True)
class DiskMergeReport(MergeReport):
    """The result of a merge on disk: as a `MergeReport`, and where it is."""

    folder: str = ""
    checked: bool = False  # whether outputs were compared: the base with the adapters, and the merged folder
    effect: float | None = None  # ‖outputs with the adapters − without‖ / ‖without‖
    logits: float | None = None  # the largest difference of the main output, the logits where there are any

    def __str__(self) -> str:
        text = f"{self.folder}: {super().__str__()}"
        if self.logits is None or self.effect is None:
            return text
        moved = f"the adapter moves the main output by {self.effect:.1%} of its size"
        return f"{text}\n{moved}; the largest difference of merged from that is {self.logits:.2e}"


@dataclass
class DiskMerge:
    """A folder's model, adapters that fit it, and what they change, by the first name of each weight."""

    source: FolderModel
    adapters: list[StoredAdapter]
    edits: Mapping[str, list[Edit]]

    @classmethod
    def of(cls, folder: Path, files: list[Path], rename: Mapping[str, str] | None = None) -> "DiskMerge":
        """Match adapter files with a folder. Raises AddendaError where anything does not fit."""
        read_files = [(path, *renamed(*read(path), rename, path)) for path in files]
        for path, header, _ in read_files:
            refuse_hidden(path, header, methods_of(header, path)[0])
            if header.vocabulary is not None:
                raise AddendaError(
                    f"{path} has {header.vocabulary}, and a merge on disk writes the tables of {shown(folder)} as they "
                    "are. Load the model and the file, and write it whole: export(adapter, 'merged', out), or addenda "
                    "export FILE --to merged. Nothing was written."
                )
        source = FolderModel.of(folder, *_wanted([header for _, header, _ in read_files]))
        names = source.weights.names
        adapters = [StoredAdapter.of(*given, source.model) for given in read_files]
        edits: dict[str, list[Edit]] = {}
        for adapter in adapters:
            for site, method in adapter.plan:
                edits.setdefault(names[site.tensor_path][0], []).append((adapter, site, method))
        for name, several in edits.items():
            if len({site.kind for _, site, _ in several}) > 1:
                raise AddendaError(
                    f"{name} is changed as a {' and as a '.join(site.kind.name for _, site, _ in several)}: adapters "
                    "of one model hold a weight in one way. Merge them one after the other."
                )
        merging = cls(source, adapters, edits)
        source.check_complete(merging.added())
        absent = [n for n in edits if source.weights.holder(n) is None and n not in merging.added()]
        if absent:
            raise AddendaError(f"{shown(folder)} has no weights at {', '.join(absent[:6])}, which an adapter changes.")
        return merging

    def added(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of weights that only an adapter has, by name: heads that the folder lacks."""
        return {
            name: tuple(edits[0][1].stored)
            for name, edits in self.edits.items()
            if self.source.weights.holder(name) is None and edits[0][0].entries[edits[0][1].path].is_head
        }

    def check_base(self, base: str, progress: MergeProgress | None) -> None:
        """Raise AddendaError where the bytes of the folder are not those that the adapters were trained on."""
        weights = self.source.weights
        wanted = [(n, e) for n, e in self.edits.items() if any(a.entries[s.path].hash for a, s, _ in e)]

        def look(item: tuple[str, list[Edit]]) -> list[tuple[StoredAdapter, str]]:
            name, edits = item
            W = weights.weight(name)
            found = [(a, a.mismatch(site, W, weights.names, base)) for a, site, _ in edits]
            return [(a, text) for a, text in found if text]

        mismatches: list[tuple[StoredAdapter, str]] = []
        with side_by_side(_WORKERS) as map_jobs:
            for i, found in enumerate(map_jobs(look, wanted)):
                mismatches += found
                if progress:
                    progress(i + 1, len(wanted), "base")
        for adapter in self.adapters:
            if sites := [text for a, text in mismatches if a is adapter]:
                raise AddendaError(adapter.other_base(base, sites, self.source.folder))

    def write(
        self, folder: Path, dtype: torch.dtype | None, rounding: str, seed: int, progress: MergeProgress | None
    ) -> DiskMergeReport:
        """Write weights, index and configuration into an empty folder."""
        weights, files = self.source.weights, self.source.weights.files
        kind = dtype or self.source.dtype
        added = {n: Added(shape, kind) for n, shape in self.added().items()}
        dropped = weights.unread if self.source.changes else ()
        writer = CheckpointWriter(files, folder, dtype=dtype, added=added, dropped=dropped)
        free = shutil.disk_usage(folder).free
        if writer.size > free:
            raise AddendaError(
                f"The disk is too full: the merged weights take {amount_of(writer.size)}, and {amount_of(free)} are "
                f"free at {shown(folder.parent)}. Make room, or choose another --out."
            )
        by_unit: dict[int, tuple[Unit, list[str]]] = {}
        for name in self.edits:
            for other in weights.names[name]:
                if unit := weights.unit_of.get(other):
                    by_unit.setdefault(id(unit), (unit, []))[1].append(other)
        for unit, _ in by_unit.values():
            weights.check_back(unit)
        losses: dict[str, Loss] = {}
        torch.empty(_KEPT, dtype=torch.uint8)  # glibc keeps pieces up to the size of one that was freed, for the next

        def work(item: tuple[Unit, list[str]]) -> dict[str, Loss]:
            unit, names = item
            values, lost = weights.read(unit), {}
            for name in names:
                target = writer.dtype_of(unit.sources[0])
                values[name], part = self._changed(name, values[name], target, rounding, seed)
                lost |= part
            for name, tensor in weights.back(unit, values).items():
                writer.write(name, tensor)
            return lost

        with writer, side_by_side(self._workers(by_unit.values())) as map_jobs:
            for i, lost in enumerate(map_jobs(work, [*by_unit.values()])):
                losses |= lost
                if progress:
                    progress(i + 1, len(by_unit), "weights")
            for name, place in added.items():
                blank = torch.zeros(place.shape, dtype=place.dtype)
                value, lost = self._changed(name, blank, place.dtype, rounding, seed)
                losses |= lost
                writer.write(name, value)
            writer.copy_rest()
        writer.write_index()
        write_atomically(folder / "config.json", (readable(written_config(self.source, dtype)) + "\n").encode())
        return _report(losses, kind)

    def _workers(self, units: Iterable[tuple[Unit, list[str]]]) -> int:
        """Return how many weights are changed at a time.

        One where that takes as much memory as a shard, and where a weight reads others, or is read under the name of
        another while that is changed: neighbours, and ties of which the files hold both.
        """
        files = self.source.weights.files
        largest = max(sum(files.tensors[n].size for n in unit.sources) for unit, _ in units)
        beside = any(site.beside for edits in self.edits.values() for _, site, _ in edits)
        twice = any(
            sum(n in self.source.weights.unit_of for n in self.source.weights.names[name]) > 1 for name in self.edits
        )
        room = max(shard.size for shard in files.shards.values())
        return 1 if beside or twice or largest * _AT_WORK * _WORKERS > room else _WORKERS

    def _changed(
        self, name: str, W: Tensor, dtype: torch.dtype, rounding: str, seed: int
    ) -> tuple[Tensor, dict[str, Loss]]:
        """Return W + ΔW in a dtype, and by site the squares of what rounding lost and of the change."""
        weights = self.source.weights
        edits = self.edits[weights.names[name][0]]
        near = [s.tensor_path for _, site, _ in edits for s in site.beside.values()]
        with filled(self.source.model, {n: weights.weight(n) for n in near} | {name: W}, weights.names):
            live = [a.at(site, method) for a, site, method in edits]
        site, wide = edits[0][1], torch.promote_types(W.dtype, torch.float32)
        plain = not any(isinstance(t, Packed) for tensors in live for t in tensors.held().values())
        single = W.dim() < 3 or not (plain and all(t.stacked for t in live))
        result, lost, size = torch.empty(W.shape, dtype=dtype), 0.0, 0.0
        for e in range(1 if single else len(W)):
            part = W if single else W[e : e + 1]
            acting = tuple(live) if single else tuple(one_of(t, e) for t in live)
            with filled(self.source.model, {name: part}, weights.names):
                exact = effective_weight(site, acting, wide)
            if rounding == "nearest":
                rounded = exact.to(dtype)
            else:
                key = (site.path,) if single else (site.path, str(e))
                rounded = rounded_to(exact, dtype, rounding, Stream(seed, "rounding", *key))
            if dtype == exact.dtype:  # nothing is lost, so that how large the change is does not matter
                size += float(not torch.equal(exact, part)) + float(exact.sum()) * 0.0  # NaN where it is not finite
            else:
                lost += float(torch.linalg.vector_norm(rounded.to(exact.dtype).sub_(exact))) ** 2
                size += float(torch.linalg.vector_norm(exact.sub_(part))) ** 2
            if single:
                result = rounded
            else:
                result[e] = rounded[0]
        return result, {site.path: (lost, size)}


def _wanted(headers: list[Header]) -> tuple[list[str], int | None, tuple[str, ...]]:
    """Return all paths of sites, how many outputs a trained head has, and their names."""
    heads = [s.shape[0] for h in headers for s in h.heads if len(s.shape) == 2 and s.path.endswith("weight")]
    labels = next((h.labels for h in headers if h.labels), ())
    outputs = len(labels) or (heads[-1] if heads else None)
    return [s.path for h in headers for s in h.sites], outputs, labels


def _report(losses: Mapping[str, Loss], dtype: torch.dtype) -> DiskMergeReport:
    errors = {path: (lost / size) ** 0.5 if size else 0.0 for path, (lost, size) in losses.items()}
    lost, size = (sum(pair[i] for pair in losses.values()) for i in (0, 1))
    if size == 0:
        raise AddendaError("The adapter changes no weight: it was not trained, and nothing was written.")
    total = (lost / size) ** 0.5
    report = DiskMergeReport(errors, total, str(dtype).removeprefix("torch."))
    if not math.isfinite(total) or not math.isfinite(size):
        raise AddendaError(
            f"Nothing was written: the changed weights are not finite in {report.dtype}. Ways out: dtype='float32', or "
            "keep the adapter beside the base."
        )
    return report
