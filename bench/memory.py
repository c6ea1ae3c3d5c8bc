"""Predicted against measured memory of a training step, each method in a fresh process.

Memory is the highest resident memory of the second and third training step (forward with logits at every position,
backward, AdamW), minus that of the loaded model before attach; a step of one short example has run by then, so that the
kernels' code is counted with the model. "floor" is the frozen base's forward and the gradient of its embeddings.
"""

import sys

from bench.arms import build, prepare, warm
from bench.measure import in_process

METHODS = ("floor", "lora:rank=16", "shira", "svft:pattern=banded,band=8", "dora:rank=16", "full")
MODELS = ("smollm2", "llama94m")
PARTS = ("adapter", "optimizer", "gradients", "activations", "temporaries")


def run(given) -> tuple[list, str]:
    rows, sizes = [], tuple(map(int, given.tokens.split("x")))
    for name in MODELS:
        for method in METHODS:
            for lean in (False, True) if method in METHODS[:2] else (False,):
                rows.append(in_process(measure, name, method, *sizes, lean, given.threads))
                print(rows[-1], file=sys.stderr, flush=True)
    return rows, table(rows, given)


def table(rows: list[dict], given) -> str:
    lines = [f"{given.tokens} tokens, bfloat16; MiB above the loaded model.", "",
             "| model | method | predicted | measured | ratio | FLOPs / floor | of it activations |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for r in rows:
        ratio, parts = r["predicted"] / r["measured"], r["parts"]
        kept = f"{parts['activations'] / 2**20:,.0f}" if parts else ""
        what = r["method"] + (", lean" if r["lean"] else "")
        sizes = " | ".join(f"{r[k] / 2**20:,.0f}" for k in ("predicted", "measured"))
        lines.append(f"| {r['model']} | {what} | {sizes} | {ratio:.2f} | {r['flop_ratio']:.2f} | {kept} |")
    return "\n".join(lines)


def measure(model_name: str, method: str, batch: int, length: int, lean: bool, threads: int) -> dict:
    """One row, in a process of its own."""
    import torch

    import addenda as ad
    from addenda.train.loss import score
    from addenda.train.machine import Peak, resident
    from addenda.train.trainer import adamw

    torch.set_num_threads(threads)
    model = build(model_name)
    if lean:
        ad.lean(model)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    batch_of = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    warm(model)
    loaded, optimizer = resident(), None
    if method == "floor":
        prepare("floor", model)
    else:
        optimizer = adamw(ad.attach(model, method), 1e-4)

    def step() -> None:
        score(model, batch_of, "causal").mean.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    step()
    resident()
    with Peak() as peak:
        step()
        step()
    fresh = build(model_name)
    if lean:
        ad.lean(fresh)
    planned = ad.plan(fresh, "lora" if method == "floor" else method, batch=batch, length=length).step
    parts = {} if method == "floor" else {part: getattr(planned, part) for part in PARTS}
    return {
        "model": model_name, "method": method, "lean": lean, "parts": parts,
        "predicted": planned.floor if method == "floor" else planned.above,
        "measured": (peak.bytes or 0) - (loaded or 0),
        "flop_ratio": 1.0 if method == "floor" else planned.flop_ratio,
    }  # fmt: skip
