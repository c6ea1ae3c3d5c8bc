"""A LoRA made of adapters of other methods (`addenda.reduce`): plain or weighed by inputs, what do the logits lose?

Each method is trained for some steps on the embedded task, on SmolLM2 in float32. Its ΔW is reduced once at the highest
rank, plainly and weighed by the inputs of training examples; lower ranks are the first columns and rows of these, which
are the solutions of those ranks. Error of a batch: ‖reduced − live‖ / ‖live − base‖ of the logits at its tokens. Judged
are batches of the task that nothing has seen, and of other text (Python), which the weights know nothing of either.
"""

import statistics

import torch
from torch import Tensor

STEPS, BATCH, RANKS, CALIBRATION, HELD, ROWS = 16, 4, (4, 8, 16, 32), 32, 8, 1
RATES = {"loha": 1e-2, "oft": 1e-3, "shira": 3e-3}  # the catalogue's, but for OFT: at 1e-2 so few steps diverge
TEXTS = ("task", "python")
T_HALF = 2.365  # of Student's t with 7 degrees of freedom, 95 %


def run(given) -> tuple[dict, str]:
    import addenda as ad
    from addenda.data.encode import encode
    from addenda.data.read import of_task
    from addenda.data.task import embedded_task
    from addenda.models.embedded import model_folder
    from addenda.models.load import load_model

    torch.set_num_threads(given.threads)
    loaded, task = load_model(model_folder(), task="causal", dtype="float32"), embedded_task()
    model, tokenizer = loaded.model, loaded.tokenizer
    encoded = {s: encode(of_task(task, s), tokenizer) for s in ("train", "test")}
    seen = [_inputs(encoded["train"].batch(range(i, i + 8))) for i in range(0, CALIBRATION, 8)]
    held = {
        "task": [_inputs(encoded["test"].batch(range(i, i + ROWS))) for i in range(0, HELD * ROWS, ROWS)],
        "python": _python(tokenizer),
    }
    found: dict[str, dict] = dict(given.earlier)
    for method in given.arms.split("|") if given.arms else RATES:
        loss = judged(model, encoded["test"])
        options = {"rate": RATES[method], "steps": STEPS, "batch": BATCH, "attention": "sdpa", "progress": False}
        ad.tune(model, of_task(task, "train"), method, tokenizer=tokenizer, name=method, **options)
        ad.switch(model, method)
        trained = {"loss": [loss, judged(model, encoded["test"])]}
        found[method] = trained | measured(model, ad.adapters(model)[method], seen, held)
        print(method, found[method], flush=True)
        ad.detach(model)
    return found, table(found)


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: batch[k] for k in ("input_ids", "attention_mask")}


def _python(tokenizer) -> list[dict[str, Tensor]]:
    from addenda.compressing.texts import windows

    return windows(tokenizer, None, 1, 48, judge=HELD * ROWS)[1].batches(ROWS)


def judged(model, held) -> float:
    from addenda.train.evaluate import evaluate

    return evaluate(model, examples=held.first(16)).loss


def measured(model, adapter, seen: list, held: dict[str, list]) -> dict:
    """Return the errors of the weights, and of the logits of every batch, by form and rank."""
    import addenda as ad
    from addenda.exporting.install import install

    highest = max(RANKS)
    with torch.no_grad():
        live = {t: [logits(model, b) for b in batches] for t, batches in held.items()}
        ad.switch(model, None)
        base = {t: [logits(model, b) for b in batches] for t, batches in held.items()}
        ad.switch(model, adapter.name)
    changed = {t: [float((a - b).norm() / b.norm()) for a, b in zip(live[t], base[t], strict=True)] for t in held}
    out: dict = {"change": {t: statistics.fmean(c) for t, c in changed.items()}, "plain": {}, "weighed": {}}
    for form, weigh in (("plain", None), ("weighed", seen)):
        report = ad.reduce(adapter, "lora", rank=highest, weigh=weigh, name=form, probe=held["task"][0])
        factors = {path: (t.B.detach(), t.A.detach()) for path, t in report.adapter.sites()}
        size = sum(s.size**2 for s in report.sites)
        ad.detach(model, form)
        lost = dict.fromkeys(RANKS, 0.0)
        for path, tensors in adapter.sites():
            D, (B, A) = _dense(model, path, tensors), factors[path]
            for rank in RANKS:
                lost[rank] += float((D - B[:, :rank] @ A[:rank]).double().square().sum())
        for rank in RANKS:
            cut = {p: (ad.LoRA(rank=rank), {"B": B[:, :rank], "A": A[:rank]}) for p, (B, A) in factors.items()}
            made = install(model, cut, name="cut")
            ad.switch(model, "cut")
            with torch.no_grad():
                errors = {
                    t: [
                        float((logits(model, b) - y).norm() / (y - z).norm())
                        for b, y, z in zip(batches, live[t], base[t], strict=True)
                    ]
                    for t, batches in held.items()
                }
            out[form][str(rank)] = {"weights": (lost[rank] / size) ** 0.5} | errors
            ad.detach(model, made.name)
        ad.switch(model, adapter.name)
    return out


def _dense(model, path: str, tensors) -> Tensor:
    from addenda.core.site.site import site_at
    from addenda.exporting.deltas import delta

    return delta(site_at(model, path), tensors, torch.float32)


def logits(model, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits at the tokens of a batch (tokens × words)."""
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


def table(found: dict[str, dict]) -> str:
    lines = [
        "| method | rank | ΔW lost, plain | weighed | logits lost on the task, plain | weighed | difference (95 %) | "
        "on Python, plain | weighed | difference (95 %) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, made in found.items():
        for rank in made["plain"]:
            plain, weighed = made["plain"][rank], made["weighed"][rank]
            cells = [method, rank, f"{plain['weights']:.1%}", f"{weighed['weights']:.1%}"]
            for text in TEXTS:
                mean, half = spread([w - p for w, p in zip(weighed[text], plain[text], strict=True)])
                cells += [f"{statistics.fmean(x[text]):.1%}" for x in (plain, weighed)]
                cells.append(f"{100 * mean:+.2f} ({100 * (mean - half):+.2f} to {100 * (mean + half):+.2f})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> tuple[float, float]:
    """Return the mean of eight batches' values and half of its 95 % interval."""
    return statistics.fmean(values), T_HALF * statistics.stdev(values) / len(values) ** 0.5
