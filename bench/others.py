"""Methods with arithmetic of their own: step time and memory beside the FLOPs that `ad.plan` foresees."""

from bench.measure import in_process
from bench.memory import predict
from bench.steps import OTHERS, rows, table


def run(given) -> tuple[dict, str]:
    arms = {f"ours/{ours}": peer for ours, peer in OTHERS.items()}
    if given.arms:
        arms = {arm: arms.get(arm) for arm in given.arms.split("|")}
    sizes = tuple(map(int, given.tokens.split("x")))
    flops = {
        arm: in_process(predict, given.model, arm.removeprefix("ours/"), *sizes, False)["flop_ratio"] for arm in arms
    }
    found = given.earlier.get("steps", {}) | rows(arms, given)
    flops = given.earlier.get("flops", {}) | flops
    return {"steps": found, "flops": flops}, table(found, given, flops)
