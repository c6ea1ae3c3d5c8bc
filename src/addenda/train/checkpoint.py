"""Checkpoints: a folder `checkpoint-STEP` with the adapter, its step and what a resumed run must have in common.

    adapter.safetensors   the adapter, heads included, as `core.files` writes it; never a weight of the base
    addenda.json          the step of its schedules, the settings of the run, and what was chosen by measuring
    optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json      transformers' own

A folder takes its name only when everything in it is on disk, so a kill leaves a whole checkpoint or none.
"""

import json
import os
import re
import shutil
from pathlib import Path

from addenda.core.adapter import Adapter
from addenda.core.atomic import write_atomically
from addenda.core.errors import AddendaError
from addenda.core.files import methods_of, save
from addenda.core.form import read
from addenda.core.method import Method
from addenda.core.sharded import writes
from addenda.core.state import record_of

FILE, NOTE, STATE = "adapter.safetensors", "addenda.json", "trainer_state.json"


def write(
    adapter: Adapter,
    folder: str | Path,
    settings: dict | None = None,
    choices: dict | None = None,
    *,
    here: bool = True,
) -> None:
    """The adapter and its step into an existing or new folder. Every process calls it; here: whether this one writes.

    Of a sharded model all of them take part, since tensors are gathered, and the first writes.
    """
    if not (here or adapter.sharded):
        return
    folder = Path(folder)
    save(adapter, folder / FILE, latent=True)
    note = {"step": adapter.step_count, "settings": settings or {}, "choices": choices or {}}
    if writes(adapter.sharded):
        write_atomically(folder / NOTE, json.dumps(note, indent=1).encode())


def restore(adapter: Adapter, folder: str | Path) -> int:
    """Put a checkpoint's values into the attached adapter, strictly, and set its schedules; returns the step.

    Raises AddendaError when the folder is no checkpoint of addenda, or of other methods, seed, sites or shapes.
    """
    folder = Path(folder)
    note = note_of(folder)
    header, tensors = read(folder / FILE)
    _, _, record = record_of(adapter.model, adapter.name)
    own = list(dict.fromkeys(m for p, m in record.methods.items() if p not in record.also_train))
    problems = []
    there, copy = methods_of(header, folder / FILE)
    if there != own:
        problems.append(f"the method is {_all(there)} there and {_all(own)} here")
    if header["seed"] != record.seed:
        problems.append(f"the seed is {header['seed']} there and {record.seed} here")
    heads = {s["path"] for s in header["sites"] if s["method"] == -1}
    if heads != set(record.also_train):
        problems.append(f"also_train is {sorted(heads)} there and {sorted(record.also_train)} here")
    copies = [record.methods[p] for p in record.also_train][:1]
    if copies and copies[0] != copy:
        problems.append(f"heads are trained with {copy.options()} there and {copies[0].options()} here")
    if any(s["packed"] for s in header["sites"]):
        problems.append("its matrices are codes there")
    if problems:
        raise AddendaError(
            f"The checkpoint {folder} belongs to another adapter: {'; '.join(problems)}. Attach the same method with "
            "the same options, or start again with resume=False or in another folder."
        )
    adapter.load_state_dict(tensors)
    adapter.draw(note["step"])
    return note["step"]


def _all(methods: list[Method]) -> str:
    return ", ".join(map(str, methods)) or "none"


def note_of(folder: str | Path) -> dict:
    """What `write` noted. Raises AddendaError where there is no such note."""
    path = Path(folder) / NOTE
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(note["step"], int) or not isinstance(note["settings"], dict):
            raise ValueError("step and settings expected")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AddendaError(
            f"{folder} is not a checkpoint of addenda ({NOTE}: {error}). Give a folder that addenda wrote."
        ) from None
    return note


def latest(out: str | Path) -> Path | None:
    """The newest whole checkpoint of a folder, or None."""
    found = [p for p in all_of(out) if (p / STATE).is_file() and (p / NOTE).is_file()]
    return found[-1] if found else None


def all_of(out: str | Path) -> list[Path]:
    """Checkpoints by step, oldest first."""
    out = Path(out)
    found = [p for p in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)] if out.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def finish(staging: Path, final: Path, keep: int) -> None:
    """Flush a written folder to disk, give it its name, and delete older ones but the last `keep`."""
    for path in [*staging.iterdir(), staging]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    for old in all_of(final.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def clear(out: str | Path) -> None:
    """Delete all checkpoints of a folder, unfinished ones too."""
    for path in [*all_of(out), *Path(out).glob(".checkpoint-*")]:
        shutil.rmtree(path, ignore_errors=True)
    (Path(out) / "best.safetensors").unlink(missing_ok=True)
