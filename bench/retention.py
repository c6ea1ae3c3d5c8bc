"""What two tasks keep when their adapters are combined: which library is a docstring from, and what does it describe?

An encoder that a package carries (`--model`: splade-tiny by default, or minilm), a LoRA for each task (rank 8, every
linear layer of the encoder; the task's head was fitted to the frozen encoder before and belongs to the base), saved as
files, and combined into one by each rule. Three seeds; intervals from seeds outside of items.
"""

import tempfile
from pathlib import Path

WAYS = {
    "linear": {},
    "task-arithmetic": {},
    "svd": {"rank": 8},
    "ties": {"density": 0.2},
    "dare": {"density": 0.5},
    "della": {"density": 0.5},
    "magnitude": {"density": 0.2},
    "knots": {"rule": "ties", "density": 0.2},
    "tsv": {},
    "iso-c": {},
    "core-space": {"rule": "ties", "density": 0.2},
}
TASKS, RATES = ("library", "kind"), (3e-3, 1e-2)
RANK, BATCH, STEPS, ITEMS, VALIDATION = 8, 16, 1000, 800, 400


def run(given) -> tuple[dict, str]:
    import torch

    torch.set_num_threads(given.threads)
    name = "splade-tiny" if given.model == "llama94m" else given.model
    with tempfile.TemporaryDirectory() as folder:
        found = measured(name, Path(folder), given.rounds)
    return found, table(found)


def measured(name: str, folder: Path, seeds: int) -> dict:
    """The scores of each way on each task, of so many seeds."""
    import numpy as np

    import addenda as ad
    from addenda.combining.retention import kept
    from addenda.comparing.encoder import on_docstrings
    from addenda.models.encoders import encoder_named

    subjects = {task: on_docstrings(encoder_named(name).setup(), task) for task in TASKS}
    rates = {task: _rate(on) for task, on in subjects.items()}
    right: dict = {task: {way: [] for way in ("base", "alone", *WAYS)} for task in TASKS}
    errors: dict = {way: [] for way in WAYS}
    for seed in range(seeds):
        for task, on in subjects.items():
            adapter = _trained(on, rates[task], STEPS, seed)
            right[task]["alone"].append(_right(on))
            adapter.save(folder / f"{task}.safetensors")
            ad.detach(on.model)
            right[task]["base"].append(_right(on))
        files = [folder / f"{task}.safetensors" for task in TASKS]
        for way, options in WAYS.items():
            seeded = {"seed": seed} if way in ("dare", "della") else {}
            model = subjects[TASKS[0]].model
            report = ad.combine(files, model=model, how=way, name="both", **options, **seeded)
            errors[way].append(report.error)
            report.adapter.save(folder / "both.safetensors")
            ad.detach(model)
            for task, on in subjects.items():  # the same encoder, under the head of each task
                ad.load(on.model, folder / "both.safetensors")
                right[task][way].append(_right(on))
                ad.detach(on.model)
            print(seed, way, {t: round(float(np.mean(right[t][way][-1])), 3) for t in TASKS}, flush=True)
    rows = {}
    for way in WAYS:
        rows[way] = {"error": float(np.mean(errors[way]))}
        for task in TASKS:
            scores = right[task]
            made = kept(task, *(np.array(scores[k], dtype=float) for k in ("base", "alone", way)))
            rows[way][task] = {
                "combined": made.combined,
                "retained": made.retained and [made.retained.value, made.retained.low, made.retained.high],
                "gain": made.gain and [made.gain.value, made.gain.low, made.gain.high],
            }
    means = {t: {k: float(np.mean(right[t][k])) for k in ("base", "alone")} for t in TASKS}
    settings = {"model": name, "rank": RANK, "steps": STEPS, "batch": BATCH, "seeds": seeds, "items": ITEMS,
                "rates": rates, "ways": WAYS}  # fmt: skip
    return {"settings": settings, "alone": means, "combined": rows}


def _trained(on, rate: float, steps: int, seed: int):
    import torch

    import addenda as ad
    from addenda.train.fit import fit

    torch.manual_seed(seed)
    method = ad.LoRA(rank=RANK)
    adapter = ad.attach(on.model, method, targets="linear", exclude=("classifier", "*pooler*"), seed=seed)
    fit(on.model, adapter, on.splits["train"], steps=steps, batch=BATCH, rate=rate, schedule="linear", warmup=0.05,
        seed=seed, attention=None)  # fmt: skip
    return adapter


def _rate(on) -> float:
    """The rate with which half as many steps come out best on the validation split."""
    import addenda as ad
    from addenda.train.evaluate import evaluate

    losses = {}
    for rate in RATES:
        _trained(on, rate, STEPS // 2, 0)
        losses[rate] = float(evaluate(on.model, None, on.splits["validation"].first(VALIDATION)).loss)
        ad.detach(on.model)
    return min(losses, key=losses.__getitem__)


def _right(on) -> list[int]:
    from addenda.train.evaluate import evaluate

    return [int(r) for r in evaluate(on.model, None, on.splits["test"].first(ITEMS)).items]


def table(found: dict) -> str:
    told = [f"{t} {a['base']:.3f} and {a['alone']:.3f}" for t, a in found["alone"].items()]
    lines = [
        f"Base, and the task's adapter alone: {'; '.join(told)}.",
        "",
        f"| way | from Σ w ΔW | {' | '.join(f'{t} | retained | gain kept' for t in TASKS)} |",
        f"| --- | ---: | {' | '.join('---: | --- | ---' for _ in TASKS)} |",
    ]  # fmt: skip
    for way, row in found["combined"].items():
        cells = [way, f"{row['error']:.1e}"]
        for task in TASKS:
            of = row[task]
            cells += [f"{of['combined']:.3f}", _share(of["retained"]), _share(of["gain"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(of) -> str:
    return "-" if of is None else f"{of[0]:.2f} ({of[1]:.2f} to {of[2]:.2f})"
