"""What a run leaves beside its adapter: `run.json` to repeat it, and a model card; and by what these are known as ours.

run.json holds the SHA-256 of the adapter, of the card and of itself. A file of theirs that is another now is somebody's
own: an adapter is not written over, a card that was edited is left as it is. One that cannot be read any more is
damaged, and the same call writes it again.
"""

import hashlib
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.base.markdown import code
from addenda.core.disk.access import read_json, reading, sha256_of, strict
from addenda.core.disk.atomic import write_atomically
from addenda.core.disk.place import check_free, holds
from addenda.core.file.header import read
from addenda.core.file.identity import plain
from addenda.core.file.sealed import is_sealed, read_sealed, write_sealed
from addenda.models.machine import hardware, versions
from addenda.train import checkpoint
from addenda.train.fit import FitResult
from addenda.train.progress import judged

ADAPTER, CARD, RUN = "adapter.safetensors", "README.md", "run.json"
_FIELDS = {"command": str, "base": str, "options": dict, "data": dict, "losses": list, "steps": int}
_SIGNS = ("---\n", "\nlibrary_name: addenda\n")  # of a card of ours


def read_run(folder: Path) -> dict[str, Any] | None:
    """Read run.json; None where there is none, it is damaged, or not of such a run."""
    file = folder / RUN
    try:
        with reading(file), file.open("rb") as f:
            sealed = is_sealed(f.read(64))
        run = read_sealed(file) if sealed else read_json(file)  # which older versions wrote
    except AddendaError:
        return None
    fine = isinstance(run, dict) and all(isinstance(run.get(k), kind) for k, kind in _FIELDS.items())
    return run if fine else None


def check_ours(folder: Path) -> None:
    """Raise AddendaError where a name that a run writes is taken by something else.

    A file of ours that a disk has damaged is no such thing: a run that goes on writes it again.
    """
    names = {
        RUN: lambda p: read_run(folder) is not None or _is_empty(p) or _was_run(p),
        ADAPTER: lambda p: is_adapter(p) or _is_damaged(p),
        CARD: lambda p: _is_empty(p) or holds(p, *_SIGNS),
    }
    check_free(folder, names | {"checkpoints": Path.is_dir})


def _is_empty(file: Path) -> bool:
    return file.is_file() and file.stat().st_size == 0


def _was_run(file: Path) -> bool:
    """Return whether a file beside checkpoints of ours begins as a run.json does, damaged as it may be."""
    signs = ('"sha256": "', '"created": "', '"command": "')
    return bool(_checkpoints(file.parent)) and any(holds(file, sign) for sign in signs)


def _is_damaged(file: Path) -> bool:
    """Return whether a file, beside a run or checkpoints of ours, was an adapter and cannot be read any more."""
    run = read_run(file.parent)
    ours = run is not None or bool(_checkpoints(file.parent))
    return ours and file.is_file() and (_is_empty(file) or holds(file, "addenda")) and not checkpoint.has_adapter(file)


def is_adapter(file: Path) -> bool:
    """Return whether an adapter file is of the run in its folder: by the hash in run.json, or by its checkpoints."""
    run = read_run(file.parent)
    said = (run or {}).get("files")
    if run is not None and not isinstance(said, dict):  # of a version that noted no hashes
        return checkpoint.has_adapter(file)
    if isinstance(said, dict) and said.get(ADAPTER) == sha256_of(file):
        return True
    near = [p / ADAPTER for p in _checkpoints(file.parent)]
    return any(_alike(file, other) for other in near if other.is_file())


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of the run in a folder, those of a lottery's second phase too."""
    phases = [folder / "checkpoints", *sorted((folder / "lottery").glob("sparse-*"))]
    return [p for phase in phases for p in checkpoint.all_of(phase) if checkpoint.is_own(p)]


def _alike(a: Path, b: Path) -> bool:
    """Return whether two adapter files are of one run: methods, seed, sites and the base's bytes at them."""
    try:
        (one, _), (other, _) = read(a), read(b)
    except AddendaError:
        return False
    sites = [[(s.path, s.hash) for s in header.sites if s.hash is not None] for header in (one, other)]
    return one.seed == other.seed and one.methods == other.methods and sites[0] == sites[1]


def is_finished(folder: Path, made: FitResult) -> bool:
    """Return whether a call has found its run finished, with its run.json: that is not written again then."""
    run = read_run(folder)
    if made.tokens or run is None or not isinstance(run.get("files"), dict):
        return False
    return run["steps"] == made.steps and run["losses"] == plain(made.losses)


def mend(folder: Path, adapter: Adapter, heads: bool = True) -> None:
    """Write again what a finished run has lost since: its adapter, where it is another one now, and its card.

    heads: as in `Adapter.save`.
    """
    run = read_run(folder)
    if run is None:
        return
    if not (folder / ADAPTER).is_file() or run["files"].get(ADAPTER) != sha256_of(folder / ADAPTER):
        adapter.save(folder / ADAPTER, heads=heads)
    if not (folder / CARD).is_file() or _is_empty(folder / CARD):
        write_atomically(folder / CARD, card_of(adapter, run).encode("utf-8", "backslashreplace"))


def write_all(folder: Path, adapter: Adapter, *, base: str, options: dict, data: dict, made: FitResult, before, after):
    """Write run.json, then the card, unless a card that was edited stands there."""
    known = (read_run(folder) or {}).get("files")
    known = known if isinstance(known, dict) else {}
    run = run_of(base=base, options=options, data=data, made=made, before=before, after=after)
    card = card_of(adapter, run).encode("utf-8", "backslashreplace")
    edited = CARD in known and (folder / CARD).is_file() and known[CARD] != sha256_of(folder / CARD)
    card_hash = known[CARD] if edited else hashlib.sha256(card).hexdigest()
    run["files"] = {ADAPTER: sha256_of(folder / ADAPTER), CARD: card_hash}
    write_sealed(folder / RUN, strict(run))
    if not edited:
        write_atomically(folder / CARD, card)


def run_of(*, base: str, options: dict, data: dict, made: FitResult, before, after) -> dict:
    """Return the content of run.json: everything that is needed to run it again, and what came out."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "base": base,
        "options": options,
        "data": data,
        "versions": versions(),
        "hardware": hardware(),
        "trainable": made.adapter.trainable,
        "before": before,
        "after": after,
        "evaluations": made.evaluations,
        "losses": made.losses,
        "steps": made.steps,
        "unit": made.unit,
        "tokens": made.tokens,
        "tokens_per_second": round(made.tokens_per_second, 1),
        "step_seconds": made.step_seconds,
        "seconds": made.seconds,
        "peak_memory_above_model": made.peak_memory,
        "resumed_from": made.resumed_from,
        "best_step": made.best_step,
        "choices": made.choices,
        "looks": made.looks,
    }


def card_of(adapter: Adapter, run: dict) -> str:
    """Return the content of README.md: what the Hub reads, as YAML, then a page for people."""
    options, data = run["options"], run["data"]
    after = run["after"] or {}
    front = ModelCardData(
        base_model=_hub_name(run["base"], "models"),
        datasets=_hub_name(data["train"], "datasets"),
        library_name="addenda",
        metrics=["accuracy"] if after.get("accuracy") is not None else None,
        pipeline_tag=TAGS.get(data["form"], "text-generation"),
        tags=["adapter", "addenda"],
    )
    return f"---\n{front.to_yaml()}\n---\n{_page(adapter, run, options, data)}"


def _page(adapter: Adapter, run: dict, options: dict, data: dict) -> str:
    kinds = ", ".join(dict.fromkeys(str(m) for p, m in adapter.methods.items() if m.name))
    memory = run["peak_memory_above_model"]
    first, last = run["losses"][0], run["losses"][-1]
    outputs = f", num_labels={len(data['labels'])}" if data["labels"] else ""
    trust = ", trust_remote_code=True" if options.get("trust_remote_code") else ""
    skipped = f", {data['skipped']} corrupt images left out" if data.get("skipped") else ""
    packed = [f"addenda.quantize(model, {options['quantize']!r})"] if options.get("quantize") else []
    command = f"--model {shlex.quote(run['base'])} --adapter adapter.safetensors --dtype {options['dtype']}"
    command += " --trust-remote-code" if trust else ""
    does = "eval --data FILE" if data["form"] in AUTO else "generate 'A prompt'"
    begun = options.get("start")
    where = "of the file that it began with" if begun and not options["targets"] else code(options["targets"])
    table = {
        "method": code(kinds),
        "targets": f"{where}, {len(adapter.methods)} sites, {run['trainable']:,} trained numbers",
        **({"began with": f"{code(begun)}, SHA-256 `{options['start_sha256'][:16]}…`"} if begun else {}),
        "data": f"{code(data['train'])}, {data['examples']:,} examples{skipped}, SHA-256 `{data['digest'][:16]}…`",
        "training": f"{run['steps']} steps of {options['batch']}, rate {options['rate']:g}, seed {options['seed']}",
        "loss": f"{first[1]:.4f} at step {first[0]}, {last[1]:.4f} at step {last[0]}",
        **{when: judged(run[when]) for when in ("before", "after") if run[when]},
    }
    if run["tokens"]:  # a call that found the run finished has measured none
        table["speed"] = f"{run['step_seconds']:.3f} s a step, {run['tokens_per_second']:,.0f} {run['unit']}/s"
    table["memory above the model"] = "unknown" if memory is None else f"{memory / 2**20:,.0f} MiB"
    bar = r"\|"
    lines = [
        f"# An adapter of {code(Path(run['base']).name)}",
        "",
        f"A small change to the frozen model {code(run['base'])}, trained with addenda.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {what} | {said.replace('|', bar)} |" for what, said in table.items()),
        "",
        "## Use",
        "",
        "```python",
        "import addenda",
        f"from transformers import {AUTO.get(data['form'], 'AutoModelForCausalLM')} as Auto",
        "",
        f"model = Auto.from_pretrained({run['base']!r}, dtype={options['dtype']!r}{outputs}{trust})",
        *packed,
        'addenda.load(model, "adapter.safetensors")',
        "```",
        "",
        _MASKED if data["form"] == "text" else f"On the command line: {code(f'addenda {does} {command}')}.",
        "",
        "`run.json` holds all options, versions and the data's hash; the same command repeats the run.",
    ]
    return "\n".join(lines) + "\n"


def _hub_name(given: str, kind: str) -> str | None:
    """Return what a model or data set is called on the Hub; None for a folder, a file or a thing in memory.

    A folder in the Hub's cache (models--org--name) is what it was fetched as.
    """
    cached = next((part for part in Path(given).parts if part.startswith(f"{kind}--")), None)
    name = given if cached is None else cached.removeprefix(f"{kind}--").replace("--", "/")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if cached or ("/" in name and not Path(name).exists()) else None


# by form of data
AUTO = {
    "label": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
    "text": "AutoModelForMaskedLM",
}
TAGS = {"label": "text-classification", "image": "image-classification", "text": "fill-mask"}
_MASKED = (
    "The head over tokens is no part of it: the one of training stands beside it (`head.safetensors`), where the model "
    "has none of its own. A classifier on the same encoder takes the adapter as it is."
)
