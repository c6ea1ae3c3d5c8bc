"""Step time and memory of every method against the floor, and against the peer where it has the method."""

import statistics

from bench.measure import alternate, ratios, spread

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

OTHERS = {  # the command `others`: methods with arithmetic of their own, and the share of it that `ad.plan` foresees
    "shira:density=0.01,mask=block": "dense/shira:density=0.01,mask=block",
    "adalora:rank=16": "peft/adalora",
    "olora:rank=16": "peft/olora",
    "loha:rank=16": "peft/loha",
    "lokr:rank=16": "peft/lokr",
    "c3a:block=64": "peft/c3a",
    "fourierft:frequencies=1000": "peft/fourierft",
    "randlora:rank=32": "peft/randlora",
    "hra:rank=8": "peft/hra",
    "boft:block=8,levels=2": "peft/boft",
    "road": "peft/road",
    "vera:rank=256": "peft/vera",
    "oft:block=32": "peft/oft",
    "svft:pattern=banded,band=8": "dense/svft:pattern=banded,band=8",
    "loldu:rank=64": "dense/loldu:rank=64",
}

LEAN = ("lean/lora:rank=16", "lean/miss:rank=64", "lean/pissa:rank=16")


def run(given) -> tuple[dict, str]:
    """Every arm beside a floor and its peer of its own: three processes that take turns."""
    arms = given.arms.split("|") if given.arms else ["full", *(f"ours/{o}" for o in PAIRS), *LEAN]
    found = given.earlier | rows({arm: PAIRS.get(arm.removeprefix("ours/")) for arm in arms}, given)
    return found, table(found, given)


def rows(arms: dict[str, str | None], given) -> dict[str, dict[str, list[dict]]]:
    """{arm: {"floor" | "own" | "peer": what `measure.step` says of each turn}}."""
    batch, length = map(int, given.tokens.split("x"))
    found = {}
    for arm, peer in arms.items():
        group = ["floor", arm, *([peer] if peer else [])]
        jobs = [(given.model, one, (batch, length), given.attention, given.threads) for one in group]
        found[arm] = dict(zip(("floor", "own", "peer"), alternate(jobs, given.rounds), strict=False))
    return found


def table(found: dict[str, dict[str, list[dict]]], given, flops: dict[str, float] | None = None) -> str:
    """Markdown: ratios to the floor and to the peer of the same turn, median (lowest to highest)."""
    floors = [m for group in found.values() for m in group["floor"]]
    lines = [
        f"{given.model}, bfloat16, {given.tokens} tokens, {given.attention} attention, {given.threads} threads, "
        f"{given.rounds} turns. Floor: {statistics.median(m['wall'] for m in floors) * 1e3:.0f} ms, "
        f"{statistics.median(m['memory'] for m in floors) / 1e6:.0f} MB above the loaded model.",
        "",
        "| arm | trained | time / floor | memory / floor | time / peer | memory / peer | peer: time, memory / floor |"
        + (" FLOPs / floor |" if flops else ""),
        "| --- | ---: | --- | --- | --- | --- | --- |" + (" --- |" if flops else ""),
    ]
    for arm, group in found.items():
        own, floor, peer = group["own"], group["floor"], group.get("peer")
        cells = [arm, f"{own[0]['trainable']:,}", *(spread(ratios(own, floor, key)) for key in ("wall", "memory"))]
        cells += [spread(ratios(own, peer, key)) for key in ("wall", "memory")] if peer else ["", ""]
        theirs = [f"{statistics.median(ratios(peer, floor, key)):.2f}" for key in ("wall", "memory")] if peer else []
        cells.append(", ".join(theirs))
        cells += [f"{flops[arm]:.2f}"] if flops else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
