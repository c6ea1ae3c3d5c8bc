"""What LoRA-Pro costs beside AdamW: LoRA of rank 8 on the embedded SmolLM2-135M, a whole training step."""

import statistics

from bench.measure import alternate, ratios, spread

MODEL, ARM = "smollm2", "ours/lora:rank=8"
OPTIMIZERS = ("lora-pro:mode=full", "lora-pro:mode=efficient")


def run(given) -> tuple[dict, str]:
    """Each optimizer beside an AdamW of its own: two processes that take turns."""
    tokens = tuple(map(int, given.tokens.split("x")))
    found = {}
    for name in OPTIMIZERS:
        jobs = [(MODEL, arm, tokens, given.attention, given.threads) for arm in (ARM, f"{ARM}@{name}")]
        found[name] = dict(zip(("adamw", "own"), alternate(jobs, given.rounds), strict=True))
    return found, table(found, given)


def table(found: dict[str, dict[str, list[dict]]], given) -> str:
    """Markdown: ratios to AdamW of the same turn, median (lowest to highest)."""
    usual = [m for group in found.values() for m in group["adamw"]]
    lines = [
        f"{MODEL}, {ARM}, bfloat16, {given.tokens} tokens, {given.threads} threads, {given.rounds} turns. "
        f"AdamW: {statistics.median(m['wall'] for m in usual) * 1e3:.0f} ms, "
        f"{statistics.median(m['memory'] for m in usual) / 1e6:.0f} MB above the loaded model.",
        "",
        "| optimizer | step / AdamW's | memory / AdamW's | memory beyond AdamW's, MB |",
        "| --- | --- | --- | ---: |",
    ]
    for name, group in found.items():
        own, usually = group["own"], group["adamw"]
        cells = [spread(ratios(own, usually, key)) for key in ("wall", "memory")]
        more = statistics.median(a["memory"] - b["memory"] for a, b in zip(own, usually, strict=True)) / 1e6
        lines.append(f"| {name} | {' | '.join(cells)} | {more:.0f} |")
    return "\n".join(lines)
