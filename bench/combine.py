"""Combining four LoRAs of rank 16 at a weight of 2048 × 2048: in Core Space, and on ΔW as the papers write it.

Rules that turn with their matrices are the same in both, up to rounding; `ties` is not, and stands beside. Weighted
sums have no decomposition, so that there is little to win. Times are medians of one process, float64, one weight.
"""

import statistics
import time

from bench.measure import in_process

TASKS, RANK, SIDE = 4, 16, 2048
RULES = ("task-arithmetic", "svd", "tsv", "iso-c", "ties")


def run(given) -> tuple[dict, str]:
    found = {rule: in_process(measured, rule, given.threads, given.rounds) for rule in RULES}
    return {"tasks": TASKS, "rank": RANK, "side": SIDE, "rules": found}, table(found)


def measured(name: str, threads: int, rounds: int) -> dict[str, float]:
    """Median seconds of one combination in Core Space and on ΔW, and how far apart the results are."""
    import torch

    from addenda.combining.rules import RULES, Settings, within
    from addenda.combining.spaces import Low, core, evenly
    from addenda.core.base.random import Stream

    torch.set_num_threads(threads)
    shape, weights = (SIDE, SIDE), [1.0] * TASKS
    changes = [
        Low(Stream(t, "B").normal(SIDE, RANK).double(), Stream(t, "A").normal(RANK, SIDE).double())
        for t in range(TASKS)
    ]
    rule = RULES["task-arithmetic" if name == "svd" else name]
    settings = Settings(0.2) if rule.density else Settings()

    def small() -> Low:
        space = core(changes)
        made = space.back(rule(space.parts, weights, within(settings, shape), Stream(0)))
        return evenly(made, RANK) if name == "svd" else made

    def dense() -> torch.Tensor:
        made = rule([c.dense() for c in changes], weights, settings, Stream(0))
        if name != "svd":
            return made
        U, S, Vt = torch.linalg.svd(made, full_matrices=False)
        return U[:, :RANK] * S[:RANK] @ Vt[:RANK]

    low, full = small(), dense()
    apart = float((low.dense() - full).norm() / full.norm())
    return {"core": _median(small, rounds * 3), "dense": _median(dense, max(1, rounds // 3)), "apart": apart}


def _median(function, rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def table(found: dict[str, dict[str, float]]) -> str:
    lines = ["| rule | in Core Space | on ΔW | on ΔW / in Core Space | apart |", "| --- | ---: | ---: | ---: | ---: |"]
    for rule, row in found.items():
        ratio = f"{row['dense'] / row['core']:.0f}"
        lines.append(f"| {rule} | {row['core'] * 1e3:.0f} ms | {row['dense']:.2f} s | {ratio} | {row['apart']:.0e} |")
    return "\n".join(lines)
