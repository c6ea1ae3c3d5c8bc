"""Many trials over one frozen base: what one forward for all of them can win, and what training them at once does.

The base: a forward and the gradient of the embedding's output for nine batches, one after another and as one batch. The
trials: nine of LoRA (three rates, three seeds), by `fit` one after another and by `fit_grouped` at once. Parts, which
`--arms` chooses between |: "base" and "trials" of a model, such as "trials splade-tiny"; what the record has of the
others, and of processors of other classes, stays.
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
STEPS = {"splade-tiny": (20, 3), "smollm2": (2, 1)}  # of a trial, and turns of all nine
RATES, SEEDS = (1e-3, 3e-3, 1e-2), (0, 1, 2)


def run(given) -> tuple[dict, str]:
    """Measure on this machine, beside what the record has of processors of other classes."""
    every = [f"{part} {model}" for model in SHAPES for part in PARTS]
    parts = given.arms.split("|") if given.arms else every
    kept = given.out / "grouped.json" if given.out else None
    found: dict[str, Any] = json.loads(kept.read_text())["found"] if kept and kept.exists() else {}
    here = found.setdefault(_processor(), {})
    for what in [what for what in every if what in parts]:
        part, model = what.split()
        for dtype in DTYPES:
            here[part] = here.get(part, {}) | in_process(PARTS[part], model, dtype, given.threads)
    return found, f"{_base_table(found)}\n\n{_trials_table(found)}"


def _processor() -> str:
    """The class of this processor, by what its float32 and bfloat16 products run on."""
    import torch

    probes = (("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported"),
              ("AVX512", "_is_avx512_supported"), ("AVX2", "_is_avx2_supported"))  # fmt: skip
    return next((n for n, probe in probes if getattr(torch.cpu, probe, lambda: False)()), "other")


def build(name: str, dtype: Any) -> tuple[Any, str]:
    """A pretrained model in evaluation mode, frozen, and the kind of its labels."""
    from addenda.core.state.outside import drawn_at_random
    from addenda.models.embedded import model_folder
    from addenda.models.encoders import ENCODERS
    from addenda.models.load import load_model

    if name == "smollm2":
        loaded, kind = load_model(model_folder(), task="causal", dtype=dtype), "causal"
    else:
        loaded, kind = (
            load_model(ENCODERS[name].model_folder(lambda text: None), task="label", labels=8, dtype=dtype),
            "class",
        )
    model: Any = loaded.model.requires_grad_(False).eval()
    drawn_at_random(model, ())  # the head stays as it was drawn: only time is measured
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


def trials(name: str, dtype: str, threads: int) -> dict[str, dict[str, float]]:
    """Training time of nine trials, one after another and at once, by shape; their losses and memory too."""
    import torch

    from addenda import attach, detach
    from addenda.models.machine import resident
    from addenda.train.fit import fit
    from addenda.train.grouped import fit_grouped
    from addenda.train.slot import Run

    torch.set_num_threads(1 if name == "splade-tiny" else threads)
    model, kind = build(name, dtype)
    steps, turns = STEPS[name]
    which = [(rate, seed) for rate in RATES for seed in SEEDS]
    found = {}
    for rows, tokens in SHAPES[name]:
        train = examples(model, kind, rows * steps, tokens)
        options = {"steps": steps, "batch": rows, "attention": None}

        def alone(train=train, options=options) -> list:
            made = []
            for rate, seed in which:
                floor = resident()
                adapter = attach(model, "lora:rank=8", seed=seed)
                try:
                    made.append(fit(model, adapter, train, rate=rate, seed=seed, memory_floor=floor, **options))
                finally:
                    detach(model)
            return made

        def together(train=train, options=options) -> list:
            floor = resident()
            runs = [Run(attach(model, "lora:rank=8", seed=seed, name=f"t{i}"), options | {"rate": rate, "seed": seed})
                    for i, (rate, seed) in enumerate(which)]  # fmt: skip
            try:
                return fit_grouped(model, runs, train, memory_floor=floor)
            finally:
                detach(model)

        seconds: list[list[float]] = [[], []]
        wall: list[list[float]] = [[], []]
        memory: list[list[int]] = [[], []]
        losses: list[list[float]] = [[], []]
        alone() if name == "splade-tiny" else None  # the first run imports the Trainer, and warms up
        for turn in range(turns):
            for i in (0, 1) if turn % 2 == 0 else (1, 0):
                started = time.perf_counter()
                made = (alone, together)[i]()
                wall[i].append(time.perf_counter() - started)
                seconds[i].append(sum(r.seconds for r in made))
                memory[i].append(sum(r.peak_memory or 0 for r in made) // (1, TRIALS)[i])
                losses[i] = [loss for r in made for _, loss in r.losses]
        what = f"{name}, {dtype}, {rows} × {tokens}"
        found[what] = _compared(*seconds) | {
            "wall": statistics.median(a / b for a, b in zip(*wall, strict=True)),
            "memory": statistics.median(b / a for a, b in zip(*memory, strict=True)),
            "losses": max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True)),
        }
        print(f"{what}: {found[what]['ratio']:.2f}", file=sys.stderr, flush=True)
    return found


def examples(model: Any, kind: str, count: int, tokens: int) -> Any:
    """Random rows, all of one length, as `fit` takes them."""
    from addenda.data.encode import Tokens

    made = batch_of(model, kind, count, tokens)
    return Tokens(made["input_ids"].tolist(), made["labels"].tolist(), kind, model.config.pad_token_id or 0)


PARTS: dict[str, Callable[..., Any]] = {"base": base, "trials": trials}


def _base_table(found: dict) -> str:
    lines = [f"{TRIALS} batches of rows × tokens: forward and gradient of the embedding's output.", "",
             "| processor | base | one after another | at once | ratio |",
             "| --- | --- | ---: | ---: | ---: |"]  # fmt: skip
    for processor, made in found.items():
        for what, m in made.get("base", {}).items():
            lines.append(f"| {processor} | {what} | {m['apart'] * 1e3:.0f} ms | {m['together'] * 1e3:.0f} ms | "
                         f"{m['ratio']:.2f} ({m['low']:.2f} to {m['high']:.2f}) |")  # fmt: skip
    return "\n".join(lines)


def _trials_table(found: dict) -> str:
    lines = [f"{TRIALS} trials of LoRA (three rates, three seeds): the steps of all of them.", "",
             "| processor | trials | one after another | at once | ratio | of the base's | whole runs | memory of the "
             "group / sum | losses differ by |",
             "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for processor, made in found.items():
        for what, m in made.get("trials", {}).items():
            limit = made.get("base", {}).get(what, {}).get("ratio")
            share = "" if limit is None else f"{m['ratio'] / limit:.2f}"
            lines.append(f"| {processor} | {what} | {m['apart']:.2f} s | {m['together']:.2f} s | {m['ratio']:.2f} "
                         f"({m['low']:.2f} to {m['high']:.2f}) | {share} | {m['wall']:.2f} | {m['memory']:.2f} | "
                         f"{m['losses']:.0e} |")  # fmt: skip
    return "\n".join(lines)
