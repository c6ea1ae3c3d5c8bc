"""What a run leaves beside its adapter: `run.json` to repeat it, and a model card."""

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from addenda.core.adapter import Adapter
from addenda.core.atomic import write_atomically
from addenda.train.fit import FitResult
from addenda.train.machine import hardware, versions
from addenda.train.progress import judged


def write_run(folder: Path, *, base: str, options: dict, data: dict, made: FitResult, before, after) -> dict:
    """run.json: everything that is needed to run it again, and what came out."""
    run = {
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
    }
    write_atomically(folder / "run.json", json.dumps(run, indent=1, default=str, ensure_ascii=False).encode())
    return run


def write_card(folder: Path, adapter: Adapter, run: dict) -> None:
    """README.md."""
    options, data = run["options"], run["data"]
    kinds = ", ".join(dict.fromkeys(str(m) for p, m in adapter.methods.items() if m.name))
    judgement = [f"| {when} | {judged(run[when])} |" for when in ("before", "after") if run[when]]
    memory = run["peak_memory_above_model"]
    first, last = run["losses"][0], run["losses"][-1]
    outputs = f", num_labels={len(data['labels'])}" if data["labels"] else ""
    trust = ", trust_remote_code=True" if options.get("trust_remote_code") else ""
    skipped = f", {data['skipped']} corrupt images left out" if data.get("skipped") else ""
    lines = [
        "---",
        "library_name: addenda",
        "tags: [adapter, addenda]",
        "---",
        f"# An adapter of {Path(run['base']).name}",
        "",
        f"A small change to the frozen model `{run['base']}`, trained with addenda.",
        "",
        "| | |",
        "| --- | --- |",
        f"| method | `{kinds}` |",
        f"| targets | `{options['targets']}`, {len(adapter.methods)} sites, {run['trainable']:,} trained numbers |",
        f"| data | `{data['train']}`, {data['examples']:,} examples{skipped}, SHA-256 `{data['digest'][:16]}…` |",
        f"| training | {run['steps']} steps of {options['batch']}, rate {options['rate']:g}, seed {options['seed']} |",
        f"| loss | {first[1]:.4f} at step {first[0]}, {last[1]:.4f} at step {last[0]} |",
        *judgement,
        f"| speed | {run['step_seconds']:.3f} s a step, {run['tokens_per_second']:,.0f} {run['unit']}/s |",
        f"| memory above the model | {'unknown' if memory is None else f'{memory / 2**20:,.0f} MiB'} |",
        "",
        "## Use",
        "",
        "```python",
        "import addenda",
        f"from transformers import {AUTO.get(data['form'], 'AutoModelForCausalLM')} as Auto",
        "",
        f"model = Auto.from_pretrained({run['base']!r}, dtype={options['dtype']!r}{outputs}{trust})",
        'addenda.load(model, "adapter.safetensors")',
        "```",
        "",
        "`run.json` holds all options, versions and the data's hash; the same command repeats the run.",
    ]
    write_atomically(folder / "README.md", ("\n".join(lines) + "\n").encode())


AUTO = {"label": "AutoModelForSequenceClassification", "image": "AutoModelForImageClassification"}  # by form of data
