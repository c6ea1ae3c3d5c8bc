"""Step time and memory of every method against the floor, and against the peer where it has the method."""

import statistics

from bench.measure import rounds

PAIRS = {  # ours: the peer's name for it, or the dense form where the peer has none
    "lora:rank=16": "peft/lora",
    "rslora:rank=16": "peft/rslora",
    "dylora:rank=16": None,
    "miss:rank=64": "peft/miss",
    "pissa:rank=16": "peft/pissa",
    "dora:rank=16": "peft/dora",
    "shira:density=0.034": "peft/shira",
    "shira:density=0.01": None,
    "vera:rank=256": "peft/vera",
    "oft:block=32": "peft/oft",
    "svft:pattern=banded,band=8": "dense/svft:pattern=banded,band=8",
    "loldu:rank=64": "dense/loldu:rank=64",
    "bat:rank=64": "dense/bat:rank=64",
}


def run(given) -> tuple[dict, str]:
    batch, length = map(int, given.tokens.split("x"))
    arms = ["floor", "full"]
    for ours, peer in PAIRS.items():
        arms += [f"ours/{ours}", *([peer] if peer else [])]
    if given.arms:
        arms = given.arms.split("|")
    jobs = [(given.model, arm, (batch, length), given.attention, given.threads) for arm in arms]
    found = {job[1]: made for job, made in rounds(jobs, given.rounds).items()}
    return found, table(found, given)


def table(found: dict[str, list[dict]], given) -> str:
    """Markdown: ratios to the floor of the same round, median (lowest to highest); ours against the peer."""
    lines = [
        f"{given.model}, bfloat16, {given.tokens} tokens, {given.attention} attention, {given.threads} threads, "
        f"{len(found['floor'])} rounds. Floor: {_middle(found['floor'], 'wall') * 1e3:.0f} ms, "
        f"{_middle(found['floor'], 'memory') / 1e6:.0f} MB above the loaded model.",
        "",
        "| arm | trained | time / floor | CPU / floor | memory / floor | time / peer | memory / peer |",
        "| --- | ---: | --- | --- | --- | --- | --- |",
    ]
    for arm, made in found.items():
        peer = PAIRS.get(arm.removeprefix("ours/")) if arm.startswith("ours/") else None
        cells = [_ratio(made, found["floor"], key) for key in ("wall", "cpu", "memory")]
        cells += [_ratio(made, found[peer], key) if peer in found else "" for key in ("wall", "memory")]
        lines.append(f"| {arm} | {made[0]['trainable']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _middle(made: list[dict], key: str) -> float:
    return statistics.median(m[key] for m in made)


def _ratio(made: list[dict], other: list[dict], key: str) -> str:
    ratios = sorted(a[key] / b[key] for a, b in zip(made, other, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
