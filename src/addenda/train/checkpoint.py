"""Checkpoints: a folder `checkpoint-STEP` with the adapter, its step and what a resumed run must have in common.

    adapter.safetensors   the adapter, heads included, as `core.file.save` writes it; never a weight of the base
    addenda.json          the step of its schedules, the run's settings and identity, and what was chosen by measuring
    optimizer.safetensors, scheduler.safetensors, rng_state.safetensors     states, as `core.file.states` writes them
    trainer_state.json    transformers' own: the losses and evaluations so far
    best.safetensors      with early_stop: the values of the best evaluation so far

Nothing in it is a pickle, and none is ever read. Of several processes each has an rng_state_RANK.safetensors.

A folder takes its name only when everything in it is on disk, so a kill leaves a whole checkpoint or none; addenda.json
has the SHA-256 of all files, and its own. One that a disk has damaged is passed over for the one before it, and stays
until the run has come to its step again. The folder that they lie in has an addenda.json too, written before the first
step: the identity and the choices of the run. What this run has not written (another program's `checkpoint-500`) is
never read, replaced or deleted.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from addenda.core.adapter.grow import other_rows
from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import writes
from addenda.core.disk.access import DiskError, reading, sha256_of
from addenda.core.disk.atomic import flush_folder
from addenda.core.disk.unfinished import discard
from addenda.core.disk.whole import flush
from addenda.core.file.fingerprint import fingerprint
from addenda.core.file.header import Header, read
from addenda.core.file.methods import methods_of
from addenda.core.file.save import save
from addenda.core.file.sealed import is_sealed, read_sealed, write_sealed
from addenda.core.file.vocabulary import key_of, rows_in
from addenda.core.method.contract import Method
from addenda.core.site.site import site_at
from addenda.core.state.state import Record, record_of

FILE, NOTE, STATE, BEST = "adapter.safetensors", "addenda.json", "trainer_state.json", "best.safetensors"
OPTIMIZER, SCHEDULER, SCALER = "optimizer.safetensors", "scheduler.safetensors", "scaler.safetensors"
RESUMES = (OPTIMIZER, SCHEDULER, STATE)  # without them a run goes on with other numbers
OLD = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # pickles, of versions before: known, never opened
PLAIN = ("optimizer.pt", "scheduler.pt", STATE)  # what a plain Trainer calls them


class NoneWholeError(AddendaError):
    """Raised where a run is to be gone on with, and all of its checkpoints are damaged."""


def random_file(process: int, processes: int) -> str:
    """Return the name of the file with a process' random generators."""
    return "rng_state.safetensors" if processes == 1 else f"rng_state_{process}.safetensors"


def write(
    adapter: Adapter,
    folder: str | Path,
    settings: dict | None = None,
    choices: dict | None = None,
    *,
    identity: dict | None = None,
    looks: list | None = None,
    here: bool = True,
    without_base: bool = False,
) -> None:
    """Write the adapter and its step into a folder. Every process calls it; here: whether this one writes.

    Of a sharded model all of them take part, since tensors are gathered, and the first writes. without_base: as in
    `save`.
    """
    if not (here or adapter.sharded):
        return
    folder = Path(folder)
    note = {"step": adapter.step_count, "settings": settings or {}, "choices": choices or {}}
    note |= {k: v for k, v in (("identity", identity), ("looks", looks)) if v}
    if writes(adapter.sharded):  # first: it says whose the folder is
        write_sealed(folder / NOTE, note)
    save(adapter, folder / FILE, latent=True, partial=True, without_base=without_base)


def restore(adapter: Adapter, folder: str | Path) -> int:
    """Put a checkpoint's values into the attached adapter, strictly, and set its schedules; return the step.

    Raises AddendaError when the folder is no checkpoint of addenda, or of other methods, seed, sites or shapes.
    """
    note = note_of(folder)
    tensors = fitting(adapter, folder)
    adapter.load_state_dict(tensors)
    adapter.draw(note["step"])
    return note["step"]


def fitting(adapter: Adapter, folder: str | Path, base: bool = True) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of this adapter. base: compare the base's bytes at its sites too.

    Raises AddendaError when it is of other methods, seed, heads or base weights.
    """
    header, tensors = read(Path(folder) / FILE)
    record = record_of(adapter.model, adapter.name).record
    own = list(dict.fromkeys(m for p, m in record.methods.items() if p not in record.also_train))
    problems = []
    there, copy = methods_of(header, Path(folder) / FILE)
    if there != own:
        problems.append(f"the method is {_all(there)} there and {_all(own)} here")
    if header.seed != record.seed:
        problems.append(f"the seed is {header.seed} there and {record.seed} here")
    heads = {s.path for s in header.heads}
    if heads != set(record.also_train):
        problems.append(f"also_train is {sorted(heads)} there and {sorted(record.also_train)} here")
    copies = [record.methods[p] for p in record.also_train][:1]
    if copies and copies[0] != copy:
        problems.append(f"heads are trained with {copy.options()} there and {copies[0].options()} here")
    if header.has_codes:
        problems.append("its matrices are codes there")
    problems += _other_places(record, header, base)
    rows = rows_in(header.vocabulary, tensors)
    if adapter.vocabulary is not None or header.vocabulary is not None:
        told = other_rows(adapter.model, header.vocabulary, rows)
        problems += [f"its new tokens are others: {told}"] if told else []
    if base and not problems:
        problems = _other_base(adapter, header)
    if problems:
        raise AddendaError(
            f"The checkpoint {folder} belongs to another adapter: {'; '.join(problems)}. Attach the same method with "
            "the same options, on the same base, or start again with resume=False or in another folder."
        )
    return {k: t for k, t in tensors.items() if k not in {key_of(table) for table in rows}}


def _other_places(record: Record, header: Header, paths: bool) -> list[str]:
    """Return what differs in the paths by which random tensors are drawn, and, if asked, in those of sites."""
    there, here = {s.path for s in header.sites}, set(record.methods)
    if paths and (lost := sorted(there - here)):
        more = f", where this model has {min(here - there)}" if here - there else ""
        return [
            f"{len(lost)} of its {len(there)} sites are not here, e.g. {lost[0]}{more} (where modules have other names "
            f"now, load(model, {FILE!r}, rename=…) begins a new run)"
        ]
    drawn = {s.path: s.origin or s.path for s in header.sites if s.path in here}
    other = [path for path, origin in drawn.items() if origin != record.origins.get(path, path)]
    return [f"random tensors were drawn for other paths there at {len(other)} sites, e.g. {other[0]}"] if other else []


def _all(methods: list[Method]) -> str:
    return ", ".join(map(str, methods)) or "none"


def _other_base(adapter: Adapter, header: Header) -> list[str]:
    """Return the sites where the base's own bytes are not those that the checkpoint was trained on."""
    root, state, _ = record_of(adapter.model, adapter.name)
    known, other = {s.path: s for s in header.sites if not s.is_head}, []
    for path in [p for p, _ in adapter.sites() if p in known]:
        site, entry = site_at(root, path), known[path]
        dtype = str(site.weight.dtype).removeprefix("torch.")
        if entry.dtype != dtype:
            other.append(f"{path} ({entry.dtype} there, {dtype} here)")
        elif entry.hash != fingerprint(state, site):
            other.append(path)
    return [f"the base has other weights at {len(other)} of {len(known)} sites, e.g. {other[0]}"] if other else []


def note_of(folder: str | Path) -> dict[str, Any]:
    """Read what `write` noted. Raises AddendaError where there is no such note."""
    try:
        note = read_sealed(Path(folder) / NOTE)
        wanted = {"step": int, "settings": dict}
        kinds = wanted | {"choices": dict, "identity": dict, "looks": list, "files": dict}
        wrong = [k for k, kind in kinds.items() if (k in note or k in wanted) and type(note.get(k)) is not kind]
        if wrong or note["step"] < 0:
            raise AddendaError(f"{' and '.join(wrong) or 'step'} missing, or of another kind than expected")
    except AddendaError as error:
        raise AddendaError(
            f"{folder} is not a checkpoint of addenda ({NOTE}: {error}). Give a folder that addenda wrote."
        ) from None
    return note


def is_own(folder: Path) -> bool:
    """Return whether `fit` wrote this checkpoint, or began to: by its note, or else by the names of all files in it.

    One that was killed before the note was written holds nothing, or nothing but the adapter.
    """
    with reading(folder):
        if folder.is_symlink() or not folder.is_dir():
            return False
        names = {p.name for p in folder.iterdir()}
    try:
        return bool(note_of(folder)["settings"])
    except AddendaError:
        begun = folder.name.startswith(".") and FILE not in names
        return all(map(_is_ours, names)) and (NOTE in names or begun or has_adapter(folder / FILE))


def _is_ours(name: str) -> bool:
    """Return whether a name is one that a checkpoint's file has, or has while it is written."""
    known = (FILE, NOTE, STATE, OPTIMIZER, SCHEDULER, SCALER, BEST, *OLD)
    begun = name.startswith(".") and any(name.startswith(f".{n}.") for n in known)
    return name in known or begun or re.fullmatch(r"\.?rng_state(_\d+)?\.(safetensors(\..*)?|pth)", name) is not None


def has_adapter(file: Path) -> bool:
    """Return whether a file is an adapter file of addenda."""
    try:
        read(file)
    except AddendaError:
        return False
    return True


def latest(out: str | Path) -> Path | None:
    """Return the newest checkpoint of `fit`'s in a folder, damaged or not; None where there is none."""
    found = [p for p in all_of(out) if is_own(p)]
    return found[-1] if found else None


def newest(out: str | Path, also: Iterable[str] = ()) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of `fit`'s in a folder, or None, and what is wrong with each newer one.

    also: files that must be there. Raises NoneWholeError where there are checkpoints, and all are damaged.
    """
    damaged = []
    for folder in reversed([p for p in all_of(out) if is_own(p)]):
        wrong = damage(folder, also)
        if wrong is None:
            return folder, damaged
        damaged.append(f"{folder.name} {wrong}")
    if damaged:
        raise NoneWholeError(
            f"No checkpoint in {out} is whole: {'; '.join(damaged)}. Put back what is missing, or start again with "
            "resume=False (--no-resume), which deletes them, or in another folder (--out)."
        )
    return None, []


def check_resumable(folder: Path) -> None:
    """Raise AddendaError where a plain Trainer would go on from this folder with a new optimizer or schedule."""
    held = [(name, [name, name.replace(".pt", ".bin")]) for name in PLAIN]  # the other name is of older versions
    missing = [name for name, names in held if not any((folder / n).is_file() for n in names)]
    if missing:
        raise AddendaError(
            f"The checkpoint {folder} lacks {' and '.join(missing)}, and the Trainer would silently begin them anew: "
            "the run would end with other numbers. Put back what is missing (save_only_model=True leaves it out), "
            "resume from another checkpoint, or start again without resume_from_checkpoint."
        )


def damage(folder: Path, also: Iterable[str] = ()) -> str | None:
    """Return what is wrong with a checkpoint, as the end of a sentence; None where it is whole.

    A file gone, emptied or changed: a run that went on from it would end with other numbers, or with an error.
    """
    try:
        with reading(folder):
            names = {p.name for p in folder.iterdir() if p.is_file()}
        if any(name in names for name in OLD):
            return "is of an older version of addenda, which wrote pickles: these are not opened"
        if NOTE not in names:
            return f"lacks {NOTE}"
        known = note_of(folder).get("files", {})
        wanted = dict.fromkeys((FILE, *RESUMES, *also, *known))
        missing = [name for name in wanted if name not in names]
        wrong = [name for name in wanted if name in names and known.get(name) != sha256_of(folder / name)]
    except DiskError as error:
        return f"cannot be read ({error})"
    except AddendaError as error:
        return f"has {NOTE} damaged or changed" if (folder / NOTE).is_file() else f"cannot be read ({error})"
    what = [f"lacks {' and '.join(missing)}"] if missing else []
    what += [f"has {' and '.join(wrong)} damaged or changed"] if wrong else []
    return " and ".join(what) or None


def all_of(out: str | Path) -> list[Path]:
    """Return folders named as checkpoints are, by step, oldest first; whoever wrote them."""
    out = Path(out)
    found = (
        [p for p in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,18}", p.name)] if out.is_dir() else []
    )
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step at which a checkpoint was written: 40 of "checkpoint-40"."""
    return int(folder.name.split("-")[1])


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return the losses and evaluations up to a checkpoint that is whole, as transformers' Trainer keeps them."""
    with reading(folder / STATE):
        return json.loads((folder / STATE).read_text("utf-8"))["log_history"]


def begin(out: Path, identity: dict, choices: dict, looks: list) -> None:
    """Write down what a run is and how it is computed, before its first step."""
    write_sealed(out / NOTE, {"identity": identity, "choices": choices, "looks": looks})


def begun(out: str | Path) -> dict[str, Any]:
    """Read what `begin` wrote; empty where no run has begun in that folder, the note is damaged, or not a run's."""
    try:
        note = read_sealed(Path(out) / NOTE)
    except AddendaError:
        return {}
    kinds = {"identity": dict, "choices": dict, "looks": list}
    return note if all(isinstance(note.get(k), kind) for k, kind in kinds.items()) else {}


def _has_begun(out: Path) -> bool:
    """Return whether the note in a folder is one of `begin`, damaged or not."""
    try:
        with reading(out / NOTE):
            text = (out / NOTE).read_bytes()
    except AddendaError:
        return False
    return not text or is_sealed(text) or b'"sha256"' in text or b'"identity"' in text or latest(out) is not None


def check_free(out: Path, saves: Iterable[int]) -> None:
    """Raise AddendaError where a name that a run will write is taken by something that `fit` did not write."""
    steps = set(saves)
    taken = [p.name for p in all_of(out) if step_of(p) in steps and not is_own(p)]
    if (out / NOTE).exists() and not _has_begun(out):
        taken.append(NOTE)
    if taken:
        raise AddendaError(
            f"{out} holds {', '.join(taken[:6])}, which this run would write and which is not of such a run. Move it, "
            "or choose another folder (--out)."
        )


def finish(staging: Path, final: Path, keep: int) -> None:
    """Flush a written folder to disk, give it its name, and delete older ones of the run but the last `keep`."""
    known = {p.name: sha256_of(p) for p in sorted(staging.iterdir()) if p.is_file() and p.name != NOTE}
    write_sealed(staging / NOTE, note_of(staging) | {"files": known})
    flush(staging)
    if final.exists():
        if not is_own(final):
            raise AddendaError(f"{final} is not of this run, so it is not replaced. Move it, or choose another folder.")
        discard(final)
    staging.rename(final)
    flush_folder(final.parent)  # before older ones go: a loss of power leaves one of them
    prune(final, keep)


def prune(newest: Path, keep: int) -> None:
    """Delete checkpoints of a run that are older than the last `keep`, the newest among these.

    One of a later step is damaged, and the run has not come to it yet: it stays.
    """
    for old in [p for p in all_of(newest.parent) if step_of(p) <= step_of(newest) and is_own(p)][:-keep]:
        discard(old)


def clear_unfinished(out: Path) -> None:
    """Delete the part of a checkpoint that a killed run has left: its files would be taken into the next one there."""
    for path in out.glob(".checkpoint-*"):
        if is_own(path):
            discard(path)


def clear(out: str | Path) -> None:
    """Delete all checkpoints of `fit`'s in a folder, unfinished ones too, and the note of its run; nothing else."""
    out = Path(out)
    noted = _has_begun(out)
    for path in all_of(out):
        if is_own(path):
            discard(path)
    clear_unfinished(out)
    if noted:
        (out / NOTE).unlink(missing_ok=True)


def drop(out: Path) -> None:
    """Delete what `clear` does, and the folder itself where nothing else is in it."""
    if out.is_dir() and not out.is_symlink():
        clear(out)
        if not any(out.iterdir()):
            out.rmdir()
