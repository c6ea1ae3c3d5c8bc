"""The hostile collection of tests/attacks: what each idea is refused with, in how much time and memory.

Every idea is made and read in a process forked from this one, which has read a sound file of every kind before. Of
three runs the fastest counts, as the machine may be another's too, and the one that took the most memory: the peak
above what was there before.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1] / "tests"


def run(given) -> tuple[dict, str]:
    sys.path.insert(0, str(TESTS))
    from attacks.run import MEMORY, SECONDS, attack, ideas, warm

    torch.set_num_threads(1)
    warm()
    found = {}
    for name, file in ideas().items():
        tries = [attack(name, file) for _ in range(3)]
        best = min(tries, key=lambda o: o.seconds)
        best.memory = max(o.memory for o in tries)
        best.wrong = [w for o in tries for w in o.wrong]
        best.wrong += ["too slow"] if best.seconds > SECONDS else []
        best.wrong += ["too much memory"] if best.memory > MEMORY else []
        found[name] = asdict(best) | {"seconds": round(best.seconds, 4), "words": best.words[:160]}
    return found, _table(found)


def _table(found: dict) -> str:
    rows = ["| read by | ideas | refused as promised | slowest | most memory |", "| --- | ---: | ---: | ---: | ---: |"]
    for reader in dict.fromkeys(o["reader"] for o in found.values()):
        of = [o for o in found.values() if o["reader"] == reader]
        slowest, most = max(o["seconds"] for o in of), max(o["memory"] for o in of)
        right = sum(not o["wrong"] for o in of)
        rows.append(f"| {reader} | {len(of)} | {right} | {slowest * 1000:,.0f} ms | {most / 2**20:.0f} MiB |")
    wrong = [f"{name}: {o['wrong'][0]}" for name, o in found.items() if o["wrong"]]
    return "\n".join([*rows, *wrong])
