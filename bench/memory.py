"""Predicted against measured memory of a training step, each method in a fresh process.

Memory is the highest resident memory of the second and third training step (forward with logits at every position,
backward, AdamW), minus that of the loaded model before attach; a step of one short example has run by then, so that the
kernels' code is counted with the model. "floor" is the frozen base's forward and the gradient of its embeddings.

It is measured twice. glibc's malloc keeps freed pieces between others, unless every large tensor has pages of its own
(a threshold of 128 KiB, which takes more time): "live" is measured so, "malloc" is measured without.
"""

import ctypes
import sys

from bench.arms import build, prepare, warm
from bench.measure import in_process

METHODS = ("floor", "lora:rank=16", "shira", "svft:pattern=banded,band=8", "dora:rank=16", "full")
MODELS = ("smollm2",)
PARTS = ("adapter", "optimizer", "gradients", "activations", "temporaries")


def run(given) -> tuple[list, str]:
    rows, sizes = [], tuple(map(int, given.tokens.split("x")))
    for name in MODELS:
        for method in METHODS:
            for lean in (False, True) if method in METHODS[:2] else (False,):
                row = {"model": name, "method": method, "lean": lean} | in_process(predict, name, method, *sizes, lean)
                for key in ("live", "malloc"):
                    row[key] = in_process(measure, name, method, *sizes, lean, given.threads, key == "live")
                rows.append(row)
                print(rows[-1], file=sys.stderr, flush=True)
    return rows, table(rows, given)


def table(rows: list[dict], given) -> str:
    lines = [f"{given.tokens} tokens, bfloat16; MiB above the loaded model.", "",
             "| model | method | predicted | live | ratio | malloc | FLOPs / floor | predicted activations |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for r in rows:
        ratio, parts = r["predicted"] / r["live"], r["parts"]
        kept = f"{parts['activations'] / 2**20:,.0f}" if parts else ""
        what = r["method"] + (", lean" if r["lean"] else "")
        predicted, live, malloc = (f"{r[k] / 2**20:,.0f}" for k in ("predicted", "live", "malloc"))
        cells = [r["model"], what, predicted, live, f"{ratio:.2f}", malloc, f"{r['flop_ratio']:.2f}", kept]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def predict(model_name: str, method: str, batch: int, length: int, lean: bool) -> dict:
    """What `ad.plan` says, without running anything."""
    import addenda as ad

    model = build(model_name)
    if lean:
        ad.lean(model)
    planned = ad.plan(model, "lora" if method == "floor" else method, batch=batch, length=length).step
    if method == "floor":
        return {"predicted": planned.floor, "flop_ratio": 1.0, "parts": {}}
    parts = {part: getattr(planned, part) for part in PARTS}
    return {"predicted": planned.above, "flop_ratio": planned.flop_ratio, "parts": parts}


def measure(model_name: str, method: str, batch: int, length: int, lean: bool, threads: int, pages: bool) -> int:
    """Bytes above the loaded model, in a process of its own. pages: every large tensor has pages of its own."""
    import torch

    import addenda as ad
    from addenda.models.machine import Peak, resident
    from addenda.optim.plain import adamw
    from addenda.train.loss import score

    if pages:
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
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
    return (peak.bytes or 0) - (loaded or 0)
