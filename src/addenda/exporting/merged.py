"""Merging on disk: a folder whose weights are W + ΔW, written shard by shard, without the model in memory."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.disk.access import path_of, shown
from addenda.core.disk.whole import free_place, whole
from addenda.core.merge.merge import UNSEEN_LIMIT
from addenda.exporting.disk_merge import DiskMerge, DiskMergeReport, MergeProgress
from addenda.exporting.merge_check import compare_folders
from addenda.exporting.other_files import copy_others
from addenda.exporting.probe import probe_of
from addenda.models.checkpoint_files import INDEX

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@checked()
@torch.no_grad()
def merge_on_disk(
    model: str | Path,
    adapter: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    base: Literal["exact", "compatible"] = "exact",
    rename: Mapping[str, str] | None = None,
    allow_loss: float | None = None,
    check: bool = True,
    probe: object | None = None,
    seed: int = 0,
    progress: MergeProgress | None = None,
) -> DiskMergeReport:
    """Write a model's folder with the change of one adapter, or the sum of several, in its weights.

    model: a folder of transformers with safetensors; adapter: files of addenda, whose changes add up; out: a folder
    that does not exist yet. Every shard is written like the base's, a tensor at a time; names, ties, stacked and
    transposed weights are those of the folder. Trained heads take the place of the base's, or are added, and a base
    that becomes a classifier by one is written as that class. Tokenizer and all other files are copied; weights in
    other formats, pickles and adapters are not.

    The base's bytes must be those of training, as they are or rounded to the dtype of training; base="compatible"
    admits what `load` admits. rename: as in `load`, for each of the files. dtype: of all weights of the result, where
    not the folder's. rounding, allow_loss: as in `merge`. progress: called with (done, total, what).

    check: load the base with the adapters, and then the result, and compare their outputs on a batch, within the limits
    of `merge`; only this needs the model in memory. Without it rounding may take a quarter of the change. probe: the
    batch, as `verify` of `merge`; by default a small one by the model's config.

    Raises AddendaError, and nothing stays behind, for a target that exists, files or weights that are missing or do not
    fit, a quantised or pickled folder, methods that change activations, a base trained on other bytes, and a merge that
    loses too much.
    """
    folder = path_of(model, "model").resolve()
    target = free_place(out)
    if target.resolve().is_relative_to(folder):
        raise AddendaError(f"{shown(target)} lies in {shown(folder)}, which is read. Choose another --out.")
    kept = None if dtype is None else _dtype_of(dtype)
    if rounding not in ("nearest", "stochastic"):
        raise AddendaError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}.")
    if base not in ("exact", "compatible"):
        raise AddendaError(f"base must be 'exact' or 'compatible', got {base!r}.")
    if not isinstance(adapter, (str, Path, Iterable)):
        adapter = path_of(adapter, "adapter")  # raises, and says what it is
    files = [path_of(f, "adapter") for f in ([adapter] if isinstance(adapter, (str, Path)) else adapter)]
    if not files:
        raise AddendaError("adapter= names no file, so there is nothing to merge.")
    merging = DiskMerge.of(folder, files, rename)
    batch = (probe_of(merging.source.model) if probe is None else probe) if check else None
    merging.check_base(base, progress)
    with whole(target, folder=True) as temporary:
        report = merging.write(temporary, kept, rounding, seed, progress)
        notes = [*report.notes]
        left = copy_others(folder, temporary, [*merging.source.weights.files.shards, INDEX, "config.json"])
        if left:
            notes.append(f"left behind: {', '.join(left[:8])}{' …' if len(left) > 8 else ''}")
        if check:
            report = _judged(report, merging, temporary, batch, kept or merging.source.dtype, base, allow_loss)
        else:
            report = _unseen(report, allow_loss)
            notes.append("outputs: not checked, as check=False says")
        return replace(report, folder=str(target), notes=(*report.notes, *notes))


def _dtype_of(given: str | torch.dtype) -> torch.dtype:
    name = str(given).removeprefix("torch.")
    if name not in DTYPES:
        raise AddendaError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}.{nearest(name, DTYPES)}")
    return DTYPES[name]


# -- judging -----------------------------------------------------------------------------------------------------------


def _unseen(report: DiskMergeReport, allow_loss: float | None) -> DiskMergeReport:
    if not report.total <= max(UNSEEN_LIMIT, allow_loss or 0.0):
        raise _refused(report, f"rounding to {report.dtype} takes too much, and no outputs were compared (check=False)")
    return report


def _judged(
    report: DiskMergeReport,
    merging: DiskMerge,
    folder: Path,
    batch: object,
    dtype: torch.dtype,
    base: str,
    allow_loss: float | None,
) -> DiskMergeReport:
    excused = min(allow_loss, 2 * report.total) if allow_loss else 0.0
    found = compare_folders(merging.source, folder, merging.adapters, batch, dtype=dtype, base=base, excused=excused)
    v = found.verdict
    if not v.within:
        raise _refused(
            report,
            f"of {v.compared} outputs {v.worst!r} moves by {v.moved:.2e}, more than the limit of {v.limit:.2e} (twice "
            f"the larger of the noise of {report.dtype}, {v.noise:.2e}, and its rounding"
            + (f", and {excused:.0%} of what the change itself moves)" if excused else ")"),
        )
    return replace(
        report, kl=v.kl, noise_kl=v.noise_kl, top1=v.top1, output=v.output, noise_output=v.noise_output,
        compared=v.compared, worst=v.worst, moved=v.moved, limit=v.limit, notes=found.notes, checked=True,
        effect=found.effect, logits=found.logits,
    )  # fmt: skip


def _refused(report: DiskMergeReport, reason: str) -> AddendaError:
    return AddendaError(
        f"Nothing was written: {reason} (rounding took {report.total:.1%} of the change). Ways out: dtype='float32' "
        "(--dtype float32); rounding='stochastic'; allow_loss=1.0 to accept what rounding takes; or keep the adapter "
        "beside the base."
    )
