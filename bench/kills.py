"""Commands that are killed and given again: at every file operation, and a thousand times at random moments.

operations  a kill before each system call that changes a file, and with half of each write done; then the same command
moments     SIGKILL at random moments, up to ten times a run; then the same command, undisturbed
Both compare all files with those of an undisturbed run, byte for byte apart from the fields that `tests/kills.py`
lists. The record is written after every few kills, and a campaign that was interrupted goes on: with --out, what is on
record is not done again. `--arms` names parts, or parts of commands: "operations tune lora|moments compress lord".
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OPERATIONS = ("export peft", "merge", "combine", "compress lord", "tune lora", "compare", "compare long runs",
              "transfer")  # fmt: skip


def run(given: Any) -> tuple[dict[str, Any], str]:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import torch

    import kills

    torch.set_num_threads(1)
    record = given.out and given.out / "kills.json"
    about = json.loads(record.read_text()) if record and record.exists() else {}
    found = about.pop("found", {})
    found |= {"fields": kills.FIELDS, "lines": kills.LINES, **{k: found.get(k, {}) for k in ("operations", "moments")}}

    def keep() -> None:
        if record:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(about | {"found": found}, indent=1) + "\n")

    asked = [a.strip() for a in (given.arms or "operations|moments").split("|")]

    def wanted(part: str, names: Any) -> list[str]:
        return [n for n in names if part in asked or f"{part} {n}" in asked]

    with tempfile.TemporaryDirectory(prefix="addenda-kills-") as folder:
        place = kills.Place(Path(folder))
        for name in wanted("operations", OPERATIONS):
            _operations(place, name, found["operations"].setdefault(name, {}), keep)
        names = {n: kills.QUOTA[n] for n in wanted("moments", kills.QUOTA)}
        _moments(place, names, found["moments"], keep)
    return found, _table(found)


def _operations(place: Any, name: str, done: dict[str, Any], keep: Any) -> None:
    """Kill at every operation of one command, from where the record ends."""
    from file_operations import WRITES

    if done.get("finished"):
        return
    case = place.prepared(name)
    operations = case.operations()
    counts = ("at", "kills", "by half", "states", "seconds", "left", "temporary")
    done |= {key: done.get(key, 0) for key in counts} | {"of": len(operations), "faults": done.get("faults", [])}
    while done["at"] < len(operations):
        number, started = done["at"], time.perf_counter()
        writes = operations[number].split()[0] in WRITES
        for half in (False, True) if writes else (False,):
            verdict = case.at_operation(number, half)
            if verdict is None:
                continue
            done["kills"] += 1
            done["by half"] += half
            done["states"] += not verdict.same
            done["left"] += bool(verdict.left)
            done["temporary"] += bool(verdict.temporary)
            if not verdict.fine:
                done["faults"].append(_told(verdict))
        done["at"] += 1
        done["seconds"] = round(done["seconds"] + time.perf_counter() - started, 1)
        if number % 10 == 0:
            keep()
    done["finished"] = True
    keep()


def _moments(place: Any, quota: dict[str, int], done: dict[str, Any], keep: Any) -> None:
    """Kill at random moments until each command's quota is reached, the commands in turns, from where the record ends.

    The n-th run of a command has the seed n.
    """
    cases: dict[str, Any] = {}
    while todo := [n for n in quota if done.get(n, {}).get("kills", 0) < quota[n]]:
        for name in todo:
            if name not in cases:
                cases[name] = place.prepared(name)
            of = done.setdefault(name, {"kills": 0, "runs": 0, "seconds": 0.0, "left": 0, "temporary": 0, "faults": []})
            verdict = cases[name].at_moments(of["runs"], most=min(10, quota[name] - of["kills"]))
            if not verdict.fine:
                of["faults"].append({"seed": of["runs"]} | _told(verdict))
            of["runs"] += 1
            of["kills"] += verdict.kills
            of["seconds"] = round(of["seconds"] + verdict.seconds, 1)
            of["left"] += bool(verdict.left)
            of["temporary"] += bool(verdict.temporary)
            keep()


def _told(verdict: Any) -> dict[str, Any]:
    return {"at": verdict.at, "code": verdict.code, "lost": verdict.lost[:6], "left": verdict.left[:6],
            "said": verdict.said[-600:]}  # fmt: skip


def _table(found: dict[str, Any]) -> str:
    lines = ["| command | kills | of them by half of a write | states of the disk | lost | left behind |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, x in found["operations"].items():
        lines.append(f"| {name} | {x['kills']} | {x['by half']} | {x['states']} | {_lost(x)} | {x['left']} |")
    lines += ["", "| command | SIGKILLs | runs | lost | left behind |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| {n} | {x['kills']} | {x['runs']} | {_lost(x)} | {x['left']} |" for n, x in found["moments"].items()]
    every = found["moments"].values()
    kills, runs, left = (sum(x[key] for x in every) for key in ("kills", "runs", "left"))
    lines.append(f"| all | {kills} | {runs} | {sum(map(_lost, every))} | {left} |")
    return "\n".join(lines)


def _lost(part: dict[str, Any]) -> int:
    return sum(bool(f["lost"] or f["code"]) for f in part["faults"])
