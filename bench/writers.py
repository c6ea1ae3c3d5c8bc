"""Pairs of writers: two processes that at once write to one place. One wins whole or the last whole one stands.

Each pair runs one command of `bench.full_disk` twice, on other inputs, into the same `out`, the second at once or a
moment later. At least one must end well. What is there must be what one of the two writes alone, byte for byte apart
from times, and never of both; who is refused says so in one message; nothing hidden is left, and the file of somebody
else is as it was. In "save" two processes save two adapters to one file by turns while a third reads it all the time.

`--arms` names commands, between |; --rounds is how many pairs each has.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench import full_disk as disks
from bench.full_disk import COMMANDS, TEXT, THEIRS, forked

SAVES, DELAYS = 100, (0.0, 0.4)  # seconds after which the second begins, at most
SAME = ("page", "doors")  # what both would write is the same


def run(given) -> tuple[dict, str]:
    names = given.arms.split("|") if given.arms else ["save", *(n for n in COMMANDS if n not in SAME)]
    folder, found = Path(tempfile.mkdtemp(prefix="writers-")), dict(given.earlier)
    try:
        if (reason := forked(disks.can_mount, folder)) is not None:
            raise SystemExit(f"No disk can be mounted here ({reason}), so that nothing was measured.")
        disks.warm()
        for which, first in (("in", 0), ("other", 20)):
            if problem := forked(disks.prepare, folder / which, first):
                raise SystemExit(problem)
        for name in names:
            found[name] = forked(saves, folder) if name == "save" else measured(folder, name, 1 if given.quick else 2)
            print(name, found[name], file=sys.stderr, flush=True)
        return found, table(found)
    finally:
        shutil.rmtree(folder)


def table(found: dict) -> str:
    lines = ["| command | pairs | both ended well | one was refused | faults |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, row in found.items():
        lines.append(f"| {name} | {row['pairs']} | {row['both']} | {row['refused']} | {len(row['faults'])} |")
    sums = [sum(row[k] for row in found.values()) for k in ("pairs", "both", "refused")]
    lines.append(f"| all | {' | '.join(map(str, sums))} | {sum(len(r['faults']) for r in found.values())} |")
    return "\n".join(lines)


def measured(folder: Path, name: str, pairs: int) -> dict:
    """Return how pairs of one command have ended."""
    alone = [forked(disks.trial, folder, name, None, None, which)["files"] for which in ("in", "other")]
    rows = [forked(pair, folder, name, alone, i) for i in range(pairs)]
    faults = [f"pair {i}: {fault}" for i, row in enumerate(rows) for fault in row["faults"]]
    counts = {k: sum(row[k] for row in rows) for k in ("both", "refused")}
    return {"pairs": pairs, **counts, "faults": faults}


def pair(folder: Path, name: str, alone: list[dict], number: int) -> dict:
    """Run a command on two inputs at once; return what was wrong. alone: what each writes by itself."""
    kind, arguments = COMMANDS[name]
    disk, out = disks.mounted(folder), folder / "disk" / f"out{disks.suffix_of(name)}"
    (disk / THEIRS).write_text(TEXT)
    delay = random.Random(f"{name} {number}").uniform(*DELAYS) if number else 0.0
    children, tolds = [], [folder / "told 0", folder / "told 1"]
    for which, told in zip(("in", "other"), tolds, strict=True):
        if children:
            time.sleep(delay)
        children.append(disks.cli(arguments(folder / which, out), told))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    faults = [] if 0 in codes else ["nobody has won"]
    for code, told in zip(codes, tolds, strict=True):
        text = disks.told_of(told)
        lines = [line for line in text.splitlines() if line.startswith("addenda: ")]
        if code not in (0, 2) or "Traceback" in text or len(lines) != (code == 2):
            faults.append(f"ended with {code}: {text[-900:]}")
    after = disks.state(disk)
    files = {n: disks.normal(n, data) for n, data in after.items() if n != THEIRS}
    if files not in alone:
        near = min(alone, key=lambda one: sum(files.get(n) != text for n, text in one.items()))
        mixed = [n for n in sorted({*files, *near}) if files.get(n) != near.get(n)]
        faults.append(f"there is what neither writes alone: {mixed}")
    if codes.count(0) == 1 and files in alone and kind != "file" and alone.index(files) != codes.index(0):
        faults.append("there is what was refused")
    if after.get(THEIRS) != TEXT.encode():
        faults.append(f"{THEIRS} is not what it was")
    return {"both": codes.count(0) == 2, "refused": codes.count(2), "faults": faults}


def saves(folder: Path) -> dict:
    """Have two processes save an adapter each to one file, many times, and read the file all the while."""
    from addenda.core.file.header import read, write

    disk = disks.mounted(folder)
    file, faults, reads = disk / "a.safetensors", [], 0
    sources = [folder / which / "a.safetensors" for which in ("in", "other")]
    wanted = {source.read_bytes() for source in sources}
    shutil.copyfile(sources[0], file)
    children = []
    for source in sources:
        if (child := disks.fork()) == 0:
            code = 1
            try:
                header, tensors = read(source)
                for _ in range(SAVES):
                    write(file, header, tensors)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    left = set(children)
    while left:
        reads += 1
        if file.read_bytes() not in wanted:
            faults.append("a read found neither")
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            left.discard(done)
            if status:
                faults.append(f"a writer ended with {os.waitstatus_to_exitcode(status)}")
    if sorted(p.name for p in disk.iterdir()) != [file.name]:
        faults.append(f"left: {sorted(p.name for p in disk.iterdir())}")
    return {"pairs": 1, "both": 1, "refused": 0, "saves": 2 * SAVES, "reads": reads, "faults": faults[:20]}
