"""The difference of two checkpoints as an adapter file: a weight at a time, no model in memory.

    base ┐
         ├─ tuned − base of one weight ──► `reducing.delta` ──► an adapter file of the base
    tuned ┘

Vectors (norms, biases) and the heads of classifiers become whole copies; every other weight takes the form asked for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from addenda.core.adapter.build import template
from addenda.core.adapter.fit import fitting_tensors, not_sane
from addenda.core.adapter.load import load
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.largest import narrow
from addenda.core.disk.access import path_of, shown
from addenda.core.disk.whole import free_place, whole
from addenda.core.file.fingerprint import hash_of, sample
from addenda.core.file.header import HEAD, SCHEMA, Header, SiteEntry, packed_as
from addenda.core.file.methods import described
from addenda.core.file.spool import Spool
from addenda.core.forward.tensors import SiteTensors
from addenda.core.merge.judge import distance, divergence
from addenda.core.merge.outputs import run
from addenda.core.method.contract import Method, Params, Replace
from addenda.core.packed.few_bits import FewBits
from addenda.core.site.site import Site
from addenda.core.state.state import State
from addenda.data.labels import named
from addenda.exporting.checkpoint_pair import Changed, CheckpointPair
from addenda.exporting.merge_check import loaded
from addenda.exporting.probe import probe_of
from addenda.exporting.reduce import check_form
from addenda.exporting.reduce_report import OutputError, ReducedSite, error_of, rows_of, some
from addenda.exporting.reduced import form_of
from addenda.methods.patch import Patch
from addenda.models.skeleton import filled
from addenda.reducing.delta import difference

To = Literal["lora", "sparse", "bits", "patch"]
Mark = tuple[str, tuple[float, ...]]  # of a base's weight: its hash, and a sample of its numbers
ExtractProgress = Callable[[int, str], None]  # (how many weights that differ are done, the path of the last)


@dataclass(frozen=True)
class ExtractReport:
    """What `extract` has written. outputs: None where nothing was compared.

    sites: the weights in the form asked for, with their errors; copies: the paths of those that are whole copies.
    """

    path: Path
    to: str
    sites: tuple[ReducedSite, ...]
    copies: tuple[str, ...]
    bytes: int
    outputs: OutputError | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def error(self) -> float:
        """The error of the weights over all sites together, ‖tuned − base − made‖ / ‖tuned − base‖."""
        return error_of(self.sites)

    def __str__(self) -> str:
        lines = rows_of(self.sites)
        lines.append(
            f"{len(self.sites)} weights as {self.to}: {self.bytes:,} bytes; error {self.error:.4f} of the change"
        )
        lines += [str(self.outputs)] if self.outputs is not None else []
        lines += [f"as whole copies: {some(self.copies)}"] if self.copies else []
        return "\n".join([*lines, *self.notes])


@checked()
@torch.no_grad()
def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    to: To = "lora",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    count: int | None = None,
    bits: int | None = None,
    check: bool = True,
    probe: object | None = None,
    progress: ExtractProgress | None = None,
) -> ExtractReport:
    """Write what a tuned checkpoint has changed of its base, as an adapter file of the base that `load` takes.

    base, tuned: folders of transformers with safetensors, of one architecture; the base may lack the head of a
    classifier. out: a file that does not exist yet. to, rank, energy, density, count, bits: as in `reduce`; the patch
    is lossless. A tuned checkpoint that was saved in a narrower dtype is compared with the base rounded to it. Weights
    that are tied in the base are one site. Tensors are written as they are made, so that the disk holds the file twice
    until it is whole. progress: called with (done, path).

    check: load the tuned model, and then the base with what was extracted, and compare their outputs on `probe` (by
    default a small batch by the model's config). Only this needs a model in memory.

    Raises AddendaError, and nothing is written, for a target that exists, folders that are no checkpoints of one model
    (all of the differences), models that are the same, a grown vocabulary, and options that the form does not read.
    """
    given = {"rank": rank, "energy": energy, "density": density, "count": count, "bits": bits}
    check_form(to, given)
    place = free_place(out)
    folders = path_of(base, "base").resolve(), path_of(tuned, "tuned").resolve()
    if folders[0] == folders[1]:
        raise AddendaError(f"{shown(folders[0])} is named as base and as tuned; there is no difference.")
    pair = CheckpointPair.of(*folders)
    batch = (probe_of(pair.model) if probe is None else probe) if check else None
    with whole(place, folder=False) as beside:
        with Spool(beside.with_name("tensors")) as spool:
            made = _Extracted(pair, to, given, spool)
            for changed in pair.changed():
                made.add(changed)
                if progress:
                    progress(len(made.entries), changed.site.path)
            made.check()
            spool.write(beside, made.header())
        outputs = _compared(pair, beside, batch, to) if check else None
        size = beside.stat().st_size
    notes = [] if check else ["outputs: not compared, as check=False says"]
    if buffers := pair.buffers():
        notes.append(f"not in the file, as no adapter holds buffers: {some(buffers)}")
    if made.unchanged:
        notes.append(f"no change that the form could hold: {some(made.unchanged)}")
    return ExtractReport(place, to, tuple(made.rows), tuple(made.copies), size, outputs, tuple(notes))


@dataclass
class _Extracted:
    """What was made of the weights so far: what the header of the file says of it. The tensors are in the spool."""

    pair: CheckpointPair
    to: str
    given: dict[str, Any]
    spool: Spool
    rows: list[ReducedSite] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    entries: list[SiteEntry] = field(default_factory=list)
    methods: list[Method] = field(default_factory=list)

    def add(self, changed: Changed) -> None:
        """Put one weight's change into its form."""
        site, W, tuned = changed.site, changed.base, changed.tuned
        names = self.pair.base.weights.names
        matrix = site.kind.to_matrix(tuned)
        if W is None or self.pair.is_copied(changed.name) or matrix.dim() not in (2, 3):
            self.copies.append(site.path)
            self._add(site, Replace(), {"value": matrix}, None)
            return
        if self.to == "patch" and W.dtype != tuned.dtype:
            raise AddendaError(
                f"{changed.name} is {W.dtype} in the base and {tuned.dtype} in the tuned one, and a patch holds "
                "numbers of one dtype. Save both in one dtype, or take another form."
            )
        if self.to == "patch" and matrix.dim() == 2 and matrix.is_contiguous():  # numbers lie in the matrix's order
            self._add_patch(changed, self._mark(site, changed.name, W))
            return
        reference = W.to(tuned.dtype).to(W.dtype) if tuned.dtype.itemsize < W.dtype.itemsize else W
        live = SiteTensors(Replace(), {"value": nn.Parameter(matrix, False)}, {}, {})
        with filled(self.pair.model, {changed.name: reference}, names):
            form = form_of(site, [live.eval()], self.to, self.given, None)
        if form is None:
            self.unchanged.append(site.path)
            return
        (method, params), row = form
        self.rows.append(row)
        if self.to == "patch":
            params["values"] = params["values"].to(W.dtype)
        self._add(site, method, params, self._mark(site, changed.name, W))

    def _mark(self, site: Site, name: str, W: Tensor) -> Mark:
        """Return what tells the base at a site from others."""
        with filled(self.pair.model, {name: W}, self.pair.base.weights.names):
            return hash_of(site.weight), tuple(sample(State(), site))

    def _add_patch(self, changed: Changed, mark: Mark) -> None:
        """Put a matrix's change into a patch piece by piece, with nothing as large as the matrix in memory."""
        site, at, count, square = changed.site, 0, 0, 0.0
        total = site.shape[0] * site.shape[1]
        keys = {k: f"{site.path}/{k}" for k in ("values", "index")}
        for W, tuned in changed.pieces():
            found = difference(W, tuned)
            square += float((tuned.double() - W.double()).square().sum())
            if reason := not_sane(found.values, total):
                raise AddendaError(f"{changed.name} in {shown(self.pair.tuned.folder)} {reason}, and no file takes it.")
            self.spool.append(keys["values"], found.values)
            self.spool.append(keys["index"], narrow(found.index + at, total))
            at, count = at + len(W), count + len(found.index)
        if not square:
            for key in keys.values():
                self.spool.drop(key)
            self.unchanged.append(site.path)
            return
        self.rows.append(ReducedSite(site.path, f"{count:,} entries", count, 0.0, 1.0, square**0.5, False))
        self._enter(site, Patch(count=count), ("values",), ("index",), {}, mark)

    def _add(self, site: Site, method: Method, params: Params, mark: Mark | None) -> None:
        trained = template(site, method)._parameters
        own: Params = {k: nn.Parameter(t, False) if k in trained else t for k, t in params.items()}
        fitting_tensors([(site, method)], {site.path: own}, f"What was extracted from {self.pair.tuned.folder}")
        shapes = {}
        for key, t in own.items():
            stored = packed_as(f"{site.path}/{key}", t) if isinstance(t, FewBits) else {f"{site.path}/{key}": t}
            if isinstance(t, FewBits):
                shapes[key] = tuple(t.shape)
            for name, tensor in stored.items():
                self.spool.put(name, tensor)
        self._enter(site, method, tuple(k for k in own if k in trained), tuple(k for k in own if k not in trained),
                    shapes, mark)  # fmt: skip

    def _enter(
        self,
        site: Site,
        method: Method,
        trained: tuple[str, ...],
        frozen: tuple[str, ...],
        packed: dict[str, tuple[int, ...]],
        mark: Mark | None,
    ) -> None:
        """Say of a site what the header says of it. mark: of the base there; None for a whole copy."""
        if mark is not None and method not in self.methods:
            self.methods.append(method)
        self.entries.append(
            SiteEntry(
                path=site.path,
                kind=site.kind.name,
                shape=tuple(site.stored),
                dtype=str(site.weight.dtype).removeprefix("torch."),
                method=HEAD if mark is None else self.methods.index(method),
                trainable=trained,
                frozen=frozen,
                form=None,
                hash=mark and mark[0],
                sample=mark and mark[1],
                checks={},
                packed=packed,
            )
        )

    def check(self) -> None:
        """Raise AddendaError where there is nothing to write."""
        if not self.entries:
            raise AddendaError(
                f"Nothing differs between {shown(self.pair.base.folder)} and {shown(self.pair.tuned.folder)}: they are "
                "the same model. Was the tuned one saved?"
            )

    def header(self) -> Header:
        """Return the header of the file."""
        labels = (named(self.pair.tuned.config) or ()) if any(map(self.pair.is_head, self.copies)) else ()
        return Header(
            schema=SCHEMA,
            seed=0,
            step=0,
            methods=described(self.methods),
            basis=False,
            sites=tuple(self.entries),
            pools=(),
            head=Replace().options(defaults=True) if self.copies else {},
            labels=tuple(labels),
        )


def _compared(pair: CheckpointPair, file: Path, batch: object, to: str) -> OutputError:
    """Compare the tuned model with the base and the file on it. Raises AddendaError where a patch is not exact."""
    dtype = pair.base.dtype
    live = run(loaded(pair.tuned.folder, pair.tuned.architecture, dtype, pair.tuned.config), batch, called="probe").main
    model = loaded(pair.base.folder, pair.base.architecture, dtype, pair.base.config)
    base = run(model, batch, called="probe").main
    stored = {t.dtype for t in pair.base.weights.files.tensors.values() if t.dtype.is_floating_point}
    load(model, file, name="extracted", base="exact" if stored == {dtype} else "compatible")
    made = run(model, batch, called="probe").main
    gap, moved = (float((t - live).double().abs().max()) for t in (made, base))
    if to == "patch" and not gap <= 1e-5 * float(live.double().abs().max()):
        raise AddendaError(f"What was extracted acts otherwise than the tuned model: outputs differ by {gap:.2e}.")
    kl, top1 = divergence(live, made) if live.dim() > 1 else (None, None)
    relative = distance(made - base, live - base) if moved else (0.0 if gap == 0 else math.inf)
    return OutputError(relative, gap, moved, kl, top1)
