"""Adapters of activations against the floor, MoSA against the plain adapters of its forms, and the bars for both.

A hidden adapter's step may take 1.15 × floor plus the share of its own products, which `ad.plan` foresees (FLOPs /
floor − 1). MoSA, trained by the optimizer that its method asks for and with a new draw every step, may take 1.1 times
its plain adapter's time and 1.05 times its memory. All have r = 64 but for Compacter, whose numbers are few anyway.
"""

import statistics

from bench.measure import in_process, ratios
from bench.memory import predict
from bench.steps import rows, table

HIDDEN = (
    "houlsby:rank=64", "pfeiffer:rank=64", "parallel:rank=64", "adaptformer:rank=64", "compacter:rank=32",
    "loreft:rank=64", "mosa:rank=64@auto",
)  # fmt: skip
MIXTURES = {  # ours: the plain form
    "mosa:rank=64@auto": "adaptformer:rank=64@auto",
    "mosa:rank=64,share=none@auto": "adaptformer:rank=64@auto",
    "mosa-pfeiffer:rank=64@auto": "pfeiffer:rank=64@auto",
    "mosa-houlsby:rank=64@auto": "houlsby:rank=64@auto",
    "mosl:rank=16@auto": "lora:rank=16@auto",
}
FLOOR, TIME, MEMORY = 1.15, 1.10, 1.05


def run(given) -> tuple[dict, str]:
    peers = {f"ours/{own}": f"ours/{plain}" for own, plain in MIXTURES.items()}
    arms = {**{f"ours/{h}": peers.get(f"ours/{h}") for h in HIDDEN}, **peers}
    if given.arms:
        arms = {arm: arms.get(arm) for arm in given.arms.split("|")}
    sizes = tuple(map(int, given.tokens.split("x")))
    flops = {a: in_process(predict, given.model, _method(a), *sizes, False)["flop_ratio"] for a in arms}
    found = given.earlier.get("steps", {}) | rows(arms, given)
    flops = given.earlier.get("flops", {}) | flops
    bars = judged(found, flops)
    return {"steps": found, "flops": flops, "bars": bars}, f"{table(found, given, flops)}\n\n{said(bars)}"


def _method(arm: str) -> str:
    return arm.removeprefix("ours/").partition("@")[0]


def judged(found: dict, flops: dict[str, float]) -> list[dict]:
    """Every bar: arm, what is bounded, the median that was measured, its limit, whether it holds."""
    bars = []
    for arm, group in found.items():
        own, floor, peer = group["own"], group["floor"], group.get("peer")
        asked = []
        if "mosl" not in arm:  # of weights: only its plain form bounds it
            asked += [("time / floor", ratios(own, floor, "wall"), FLOOR + flops[arm] - 1)]
        if peer:
            asked += [("time / plain", ratios(own, peer, "wall"), TIME), ("memory / plain", ratios(own, peer, "memory"),
                                                                          MEMORY)]  # fmt: skip
        for what, values, limit in asked:
            middle = statistics.median(values)
            bars.append({"arm": arm, "bar": what, "measured": middle, "limit": limit, "holds": middle <= limit})
    return bars


def said(bars: list[dict]) -> str:
    missed = [
        f"{b['arm']}: {b['bar']} {b['measured']:.2f}, and {b['limit']:.2f} is the limit" for b in bars if not b["holds"]
    ]
    kept = f"{len(bars) - len(missed)} of {len(bars)} bars hold (medians)."
    return f"{kept} Missed: {'; '.join(missed)}." if missed else kept
