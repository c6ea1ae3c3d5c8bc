"""Memory of a QLoRA step over low-rank factors, beside QLoRA's own: does the parameter count foretell what is saved?

The model is LLaMA-shaped with random weights, for memory asks nothing of values: its linear layers, dense or factors
that keep so many parameters, in NF4; LoRA on every one, of rank 8 on dense layers and of the rank that trains about as
many numbers on factors; AdamW. A step's memory is that of the weights, counted tensor by tensor, and the highest
resident memory above the loaded model during two steps, with every large tensor on pages of its own. Foretold is a
difference of numbers alone: stored bytes of the weights, and 16 bytes for each trained number (it, its gradient, Adam's
two moments).
Activations are in no count, so that more tokens blur it: LoRA on a second factor keeps its input for backward, r
numbers for every token, and LoRA on first factors alone keeps no more than on dense layers.
"""

import ctypes
import sys

import torch

from bench.arms import build, warm
from bench.measure import in_process

MODEL, KEPT, RANK = "llama210m", (0.8, 0.7), 8
TOKENS = ((1, 64), (1, 512))
NUMBER = 16  # bytes of a trained number


def run(given) -> tuple[list[dict], str]:
    found = []
    for batch, length in TOKENS:
        for kept, where in ((1.0, "all"), *((kept, where) for kept in KEPT for where in ("all", "first"))):
            row = {"model": MODEL, "tokens": f"{batch}x{length}", "kept": kept, "where": where}
            found.append(row | in_process(measure, kept, where, batch, length, given.threads))
            print(found[-1], file=sys.stderr, flush=True)
    return found, table(found)


def measure(kept: float, where: str, batch: int, length: int, threads: int) -> dict:
    """Bytes of one arm, in a process of its own. where: LoRA on "all" factors or on the "first" of each layer."""
    import addenda as ad
    from addenda.compressing.folder import put
    from addenda.compressing.layers import LowRankLinear
    from addenda.models.machine import Peak, resident
    from addenda.optim.plain import adamw
    from addenda.quantizing.quantize import quantize
    from addenda.reducing import ranks
    from addenda.reducing.choose import choose
    from addenda.train.loss import score

    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
    torch.set_num_threads(threads)
    model = build(MODEL)
    shapes = choose(model)[0]
    low = {p: ranks.rank_for(m, n, kept) // 8 * 8 for p, (m, n) in shapes.items()} if kept < 1 else {}
    for path, r in low.items():
        m, n = shapes[path]
        B, A = torch.randn(m, r) / r**0.5, torch.randn(r, n) / n**0.5
        put(model, path, LowRankLinear.of(B, A, None, torch.bfloat16))
    quantize(model, "nf4")
    warm(model)
    weights, loaded = stored(model), resident()
    widths = [m + n for m, n in shapes.values()]
    inner = [n + low[p] + (where == "all") * (m + low[p]) for p, (m, n) in shapes.items() if p in low]
    rank = round(RANK * sum(widths) / sum(inner)) if inner else RANK
    adapter = ad.attach(model, f"lora:rank={rank}", targets="*.first" if where == "first" else "linear")
    optimizer = adamw(adapter, 1e-4)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> None:
        score(model, rows, "causal").mean.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Peak() as peak:
        step()
        step()
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    return {"rank": rank, "weights": weights, "trained": trained, "above": (peak.bytes or 0) - (loaded or 0)}


def stored(model) -> int:
    """Bytes of all weights, tied ones once."""
    from addenda.core.packed.tensor import parts_of

    return sum(t.numel() * t.element_size() for p in model.parameters() for t in parts_of(p))


def saved(found: list[dict]) -> list[dict]:
    """What each low-rank arm saves of the memory of the dense one at as many tokens: measured and foretold."""
    dense = {r["tokens"]: r for r in found if r["kept"] == 1}
    rows = []
    for r in (r for r in found if r["kept"] < 1):
        base = dense[r["tokens"]]
        whole = base["weights"] + base["above"]
        foretold = base["weights"] - r["weights"] + NUMBER * (base["trained"] - r["trained"])
        measured = whole - r["weights"] - r["above"]
        gain = {"measured": measured / whole, "foretold": foretold / whole}
        rows.append({k: r[k] for k in ("tokens", "kept", "where")} | gain)
    return rows


def table(found: list[dict]) -> str:
    heads = (
        "tokens",
        "kept",
        "LoRA on",
        "weights, MiB",
        "LoRA, trained",
        "step above them, MiB",
        "saved of QLoRA's",
        "foretold",
    )
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    gain = {(s["tokens"], s["kept"], s["where"]): s for s in saved(found)}
    for r in found:
        s = gain.get((r["tokens"], r["kept"], r["where"]))
        told = [f"{s['measured']:.1%}", f"{s['foretold']:.1%}"] if s else ["", ""]
        on = "layers" if r["kept"] == 1 else f"{r['where']} factors"
        trained = f"r = {r['rank']}, {r['trained']:,}"
        weights, above = (f"{r[k] / 2**20:,.0f}" for k in ("weights", "above"))
        cells = [r["tokens"], f"{r['kept']:.0%}", on, weights, trained, above, *told]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
