"""Equal commands on one machine: six of `addenda tune`, six of `addenda compare`, each a process of its own.

A tiny Llama, 48 steps, so that the attention is measured. The cache is empty at first, and the first two commands of
each kind run at the same time: both measure, and one decides. Files must be equal byte for byte, and records apart from
the fields of time and memory that are listed here.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import tiny

CALLS, STEPS = 6, 48
TIMES = {  # fields of time and memory, in files of these names
    "run.json": (
        "created",
        "tokens_per_second",
        "step_seconds",
        "seconds",
        "peak_memory_above_model",
        "README.md",
        "sha256",
    ),
    "config.json": ("created", "predicted_seconds", "measured_step_seconds"),
    "trials": ("seconds", "attach_seconds", "step_seconds", "tokens_per_second", "peak_bytes"),
}
PAGES = ("README.md", "report.html")  # they show such fields
COMMON = ("--model", "../model", "--data", "../sums.jsonl", "--dtype", "float32", "--batch", "8", "--out", "out")
COMMANDS = {
    "tune": (*COMMON, "--method", "lora:dropout=0.1", "--steps", str(STEPS), "--eval", "0.25"),
    "compare": (*COMMON, "--methods", "lora,shira", "--budget", f"steps={STEPS}", "--seeds", "1", "--rates", "3", "-y"),
}


def run(given) -> tuple[dict, str]:
    with tempfile.TemporaryDirectory(prefix="addenda-equal-") as place:
        tiny.write(Path(place))
        found: dict[str, Any] = {name: calls(name, options, Path(place)) for name, options in COMMANDS.items()}
    lines = ["| command | calls | files | equal bytes | equal but for time and memory | pages | attention |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for name, row in found.items():
        cells = (name, *(row[k] for k in ("calls", "files", "equal_bytes", "equal_records", "pages", "attention")))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    differing = [f"{name}: {file}" for name, row in found.items() for file in row["differing"]]
    assert not differing, differing
    return found | {"fields_of_time_and_memory": TIMES}, "\n".join(lines)


def calls(name: str, options: tuple[str, ...], place: Path) -> dict[str, Any]:
    """Run a command six times, the first two at once on an empty cache, and compare what each has written."""
    folders = [place / f"{name}-{i}" for i in range(CALLS)]
    root = Path(__file__).parents[1]
    variables = os.environ | {"ADDENDA_CACHE": str(place / f"cache-{name}"), "PYTHONPATH": str(root / "src")}
    for group in (folders[:2], *([f] for f in folders[2:])):
        running = []
        for folder in group:
            folder.mkdir()
            command = [sys.executable, "-m", "addenda", name, *options]
            running.append(subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL))
        assert all(process.wait() == 0 for process in running)
    measured = list((place / f"cache-{name}" / "attention").glob("*.json"))
    assert len(measured) == 1, measured
    each = [contents(folder / "out") for folder in folders]
    names = sorted(set().union(*each))
    bytes_alike = [n for n in names if len({hash_of(c[n][0]) if n in c else None for c in each}) == 1]
    rest = [n for n in names if n not in bytes_alike]
    alike = [n for n in rest if Path(n).name not in PAGES and all(c.get(n, [0, 1])[1] == each[0][n][1] for c in each)]
    pages = [n for n in rest if Path(n).name in PAGES]
    return {
        "calls": CALLS, "files": len(names), "equal_bytes": len(bytes_alike), "equal_records": len(alike),
        "pages": len(pages), "attention": json.loads(measured[0].read_text())["name"],
        "with_equal_bytes": bytes_alike, "with_equal_records": alike,
        "differing": [n for n in rest if n not in alike and n not in pages],
    }  # fmt: skip


def contents(folder: Path) -> dict[str, tuple[bytes, Any]]:
    """Return the files of a run by name: their bytes, and of records what is there apart from times."""
    found = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = str(file.relative_to(folder)), file.read_bytes()
        fields = TIMES.get("trials" if file.parent.name == "trials" else file.name)
        found[name] = data, hash_of(data) if fields is None else without(json.loads(data), fields)
    return found


def without(value: Any, fields: tuple[str, ...]) -> Any:
    """Return JSON without the entries of these names, however deep."""
    if isinstance(value, dict):
        return {k: without(v, fields) for k, v in value.items() if k not in fields}
    return [without(v, fields) for v in value] if isinstance(value, list) else value


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
