"""Many trials over one frozen base: what one forward for all of them can win, and what it does.

The base: a forward and the gradient of the embedding's output for nine batches, one after another and as one batch.
Parts, which `--arms` chooses between |: the models of SHAPES; what the record has of the others stays.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.measure import in_process

TRIALS = 9
DTYPES = ("float32", "bfloat16")
SHAPES = {"splade-tiny": ((4, 32), (4, 64), (16, 32)), "smollm2": ((4, 32), (4, 64))}  # rows × tokens of a trial
TURNS = {"splade-tiny": 15, "smollm2": 2}


def run(given) -> tuple[dict, str]:
    """Measure on this machine, beside what the record has of processors of other classes."""
    parts = given.arms.split("|") if given.arms else [*SHAPES]
    kept = given.out / "grouped.json" if given.out else None
    found: dict[str, Any] = json.loads(kept.read_text())["found"] if kept and kept.exists() else {}
    here = found.setdefault(_processor(), {})
    for model in [m for m in SHAPES if m in parts]:
        for dtype in DTYPES:
            here["base"] = here.get("base", {}) | in_process(base, model, dtype, given.threads)
    return found, "\n\n".join(_table(found, part) for part in ("base",))


def _processor() -> str:
    """The class of this processor, by what its float32 and bfloat16 products run on."""
    import torch

    probes = (("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported"),
              ("AVX512", "_is_avx512_supported"), ("AVX2", "_is_avx2_supported"))  # fmt: skip
    return next((n for n, probe in probes if getattr(torch.cpu, probe, lambda: False)()), "other")


def build(name: str, dtype: Any) -> tuple[Any, str]:
    """A pretrained model in evaluation mode, frozen, and the kind of its labels."""
    from recipes.common import folder_of

    from addenda.models.embedded import model_folder
    from addenda.models.load import load_model

    if name == "smollm2":
        loaded, kind = load_model(model_folder(), task="causal", dtype=dtype), "causal"
    else:
        loaded, kind = load_model(folder_of(name), task="label", labels=8, dtype=dtype), "class"
    model: Any = loaded.model.requires_grad_(False).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model, kind


def batch_of(model: Any, kind: str, rows: int, tokens: int, seed: int = 1) -> dict:
    """Random tokens; the last quarter of them are to be predicted, or a class of each row."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (rows, tokens), generator=generator)
    labels = torch.randint(0, 8, (rows,), generator=generator)
    if kind == "causal":
        labels = ids.clone()
        labels[:, : tokens * 3 // 4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def base(name: str, dtype: str, threads: int) -> dict[str, dict[str, float]]:
    """Seconds of nine batches one after another and of all at once, by shape; and the spread of their ratio."""
    import torch

    from addenda.core.modules.borrow import gradient_from
    from addenda.train.loss import score

    torch.set_num_threads(1 if name == "splade-tiny" else threads)
    model, kind = build(name, dtype)
    found = {}
    for rows, tokens in SHAPES[name]:
        single = batch_of(model, kind, rows, tokens)
        whole = batch_of(model, kind, TRIALS * rows, tokens)

        def step(batch: dict) -> None:
            with gradient_from(model.get_input_embeddings()):
                score(model, batch, kind).mean.backward()

        step(single)
        apart, together = _alternated(
            TURNS[name], lambda s=single: [step(s) for _ in range(TRIALS)], lambda w=whole: step(w)
        )
        what = f"{name}, {dtype}, {rows} × {tokens}"
        found[what] = _compared(apart, together)
        print(f"{what}: {found[what]['ratio']:.2f}", file=sys.stderr, flush=True)
    return found


def _alternated(turns: int, *arms: Callable[[], Any]) -> list[list[float]]:
    """Seconds of every arm in every turn; the order turns by one."""
    times: list[list[float]] = [[] for _ in arms]
    for turn in range(turns):
        for i in [(turn + k) % len(arms) for k in range(len(arms))]:
            started = time.perf_counter()
            arms[i]()
            times[i].append(time.perf_counter() - started)
    return times


def _compared(apart: list[float], together: list[float]) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(apart, together, strict=True))
    return {"apart": statistics.median(apart), "together": statistics.median(together),
            "ratio": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}  # fmt: skip


def _table(found: dict, part: str) -> str:
    lines = [f"{TRIALS} batches of rows × tokens: forward and gradient of the embedding's output.", "",
             "| processor | base | one after another | at once | ratio |",
             "| --- | --- | ---: | ---: | ---: |"]  # fmt: skip
    for processor, made in found.items():
        for what, m in made.get(part, {}).items():
            lines.append(f"| {processor} | {what} | {m['apart'] * 1e3:.0f} ms | {m['together'] * 1e3:.0f} ms | "
                         f"{m['ratio']:.2f} ({m['low']:.2f} to {m['high']:.2f}) |")  # fmt: skip
    return "\n".join(lines)
