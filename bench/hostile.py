"""Hostile files by the thousand: what every reader does with them, and how long and how much memory that takes.

    python -m bench hostile --out records/bench [--arms adapter|peft] [--quick]

Seeds 0 to 99,999 against adapter files, put on a live model with `ad.load`; 0 to 9,999 against each other kind of file
(oracles.py and ranking_oracles.py in tests/attacks say which, and what must be true of what is read); every bit of one
small adapter file. A kill loses at most a batch: where a campaign was is kept in a folder of the system's for such
files, by the state of the source, and the same command goes on. --arms: these kinds alone, the others on record stay;
--quick: a hundredth.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

MANY, OTHERS = 100_000, 10_000
_BITS = "every bit"
_PLACE = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()) / "addenda-hostile"


def run(given) -> tuple[dict[str, Any], str]:
    sys.path.insert(0, "tests")  # what tests share is imported so
    from attacks import campaign
    from attacks.oracles import TARGETS
    from attacks.ranking_oracles import RANKING

    targets = TARGETS | RANKING
    torch.set_num_threads(1)
    names = (given.arms or "|".join((*targets, _BITS))).split("|")
    found: dict[str, Any] = dict(given.earlier)
    work = _PLACE / str(os.getpid())
    for name in names:
        shutil.rmtree(work, ignore_errors=True)
        target = targets["adapter" if name == _BITS else name](work / "sources")
        begun = time.perf_counter()
        if name == _BITS:
            tally = _every_bit(campaign, target, work / "files", 100 if given.quick else 1)
        else:
            count = (MANY if name == "adapter" else OTHERS) // (100 if given.quick else 1)
            tally = _resumed(campaign, target, count, work / "files")
        found[name] = _row(tally, time.perf_counter() - begun)
        print(name, {k: v for k, v in found[name].items() if k != "kinds"}, flush=True)
    shutil.rmtree(work, ignore_errors=True)
    return found, table(found)


def _resumed(campaign, target, count: int, place: Path):
    """Run seeds from 0 to a count, or from where the same source was when it ended."""
    mark = hashlib.sha256()
    for file in sorted([*Path("src").rglob("*.py"), *Path("tests/attacks").rglob("*.py")]):
        mark.update(file.read_bytes())
    journal = _PLACE / f"{target.name} {count} {mark.hexdigest()[:16]}.json"
    tally = campaign.Tally()
    if journal.is_file():
        kept = json.loads(journal.read_text())
        kept["faults"] = [campaign.Attempt(**a) for a in kept["faults"]]
        tally = campaign.Tally(**kept)

    def told(now) -> None:
        journal.write_text(json.dumps(dataclasses.asdict(now)))

    return campaign.run(target, range(tally.files, count), place, tally=tally, told=told)


def _every_bit(campaign, target, place: Path, step: int):
    """Load a small adapter file with every single bit turned, one after the other."""
    from attacks.mutate import Mutant

    sizes = {i: len(s["adapter.safetensors"]) for i, s in enumerate(target.sources) if len(s) == 1}
    source = min(sizes, key=lambda i: sizes[i])
    data = target.sources[source]["adapter.safetensors"]

    class Bits:
        """The target as it is, with one file for each bit."""

        def __getattr__(self, name: str) -> Any:
            return getattr(target, name)

        def mutant(self, seed: int) -> Mutant:
            turned = data[: seed // 8] + bytes([data[seed // 8] ^ 1 << seed % 8]) + data[seed // 8 + 1 :]
            return Mutant("a bit", {"adapter.safetensors": turned}, source, False, "adapter.safetensors")

    tally = campaign.run(Bits(), range(0, len(data) * 8, step), place)
    if tally.loaded:
        raise SystemExit(f"{tally.loaded} files with one bit turned were loaded.")
    return tally


def _row(tally, seconds: float) -> dict[str, Any]:
    kinds = {k: dict(sorted(c.items())) for k, c in sorted(tally.kinds.items())}
    return {
        "files": tally.files,
        "seeds": [0, tally.files - 1],
        "refused": tally.refused,
        "loaded": tally.loaded,
        "faults": [dataclasses.asdict(a) for a in tally.faults],
        "slowest": {"seconds": round(tally.slowest[0], 4), "seed": tally.slowest[1]},
        "largest": {"MiB": round(tally.largest[0] / 2**20, 2), "seed": tally.largest[1]},
        "seconds": {"processor": round(tally.seconds, 1), "clock": round(seconds, 1)},
        "kinds": kinds,
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        "| reader | files | refused | loaded, and true | faults | slowest | most memory |",
        "|:-|-:|-:|-:|-:|-:|-:|",
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['files']:,} | {row['refused']:,} | {row['loaded']:,} | {len(row['faults'])} | "
            f"{row['slowest']['seconds'] * 1e3:.0f} ms | {row['largest']['MiB']:.1f} MiB |"
        )
    return "\n".join(lines)
