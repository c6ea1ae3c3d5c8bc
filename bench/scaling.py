"""How step time and memory grow with rank, sequence length, adapters and model size; the fitted growth is printed."""

import statistics

import numpy as np

from bench.measure import alternate, ratios

SWEEPS = {  # what grows: (value, model, arm, tokens); None: the model and tokens asked for
    "rank": [(r, None, f"ours/lora:rank={r}", None) for r in (4, 16, 64, 256)],
    "length": [(n, None, "ours/lora:rank=16", (4, n)) for n in (64, 128, 256, 512)],
    "active adapters": [(k, None, f"ours/lora:rank=16*{k}", None) for k in (1, 2, 4)],
    "idle adapters": [(k, None, f"ours/lora:rank=16+{k}", None) for k in (0, 2, 8)],
    "model size (M)": [(m, f"llama{m}m", "ours/lora:rank=16", None) for m in (24, 94, 210)],
}


def run(given) -> tuple[dict, str]:
    batch, length = map(int, given.tokens.split("x"))
    found: dict = {name: [] for name in SWEEPS}
    for name, points in SWEEPS.items():
        for value, model, arm, tokens in points:
            job = (model or given.model, arm, tokens or (batch, length), given.attention, given.threads)
            base, own = alternate([(job[0], "floor", *job[2:]), job], given.rounds)
            found[name].append({
                "value": value,
                **{key: statistics.median(m[key] for m in own) for key in ("wall", "memory")},
                "time ratio": statistics.median(ratios(own, base, "wall")),
                "memory ratio": statistics.median(ratios(own, base, "memory")),
            })  # fmt: skip
    return found, table(found)


def table(found: dict[str, list[dict]]) -> str:
    """Markdown. Growth: b of a least-squares fit of time (memory) = a + b · value, and the exponent of value^e."""
    lines = [
        "| what grows | from … to | time / floor | memory / floor | time per unit | memory per unit | exponents |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, points in found.items():
        x = np.array([p["value"] for p in points], float)
        slope = {k: np.polyfit(x, [p[k] for p in points], 1)[0] for k in ("wall", "memory")}
        power = {k: np.polyfit(np.log(x), np.log([p[k] for p in points]), 1)[0] if x[0] else np.nan for k in slope}
        shares = [" ".join(f"{p[k]:.2f}" for p in points) for k in ("time ratio", "memory ratio")]
        cells = [name, " ".join(f"{v:g}" for v in x), *shares]
        cells += [f"{slope['wall'] * 1e3:.3g} ms", f"{slope['memory'] / 1e6:.3g} MB"]
        lines.append(f"| {' | '.join(cells)} | {power['wall']:.2f}, {power['memory']:.2f} |")
    return "\n".join(lines)
