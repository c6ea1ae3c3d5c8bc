"""SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): quick to switch, and less quarrelsome when fused?

Claims. (1) Putting 1 % of the entries on and off is 5 to 16 times faster than fusing a LoRA. (2) Two adapters of
different tasks, added up, lose less accuracy than two LoRAs do. (3) Alone, it is as good as a LoRA.

Two tasks share the encoder: which library is a docstring from, and does it describe a class, a function or a method?
Each has a head of its own, fitted to the frozen features beforehand. Arms, on every linear layer: LoRA r = 8 and
SHiRA at 1 % with the largest weights, random positions, and the largest gradients. Each is trained on each
task, judged alone, then judged with the other task's adapter acting too. Intervals are over seeds, of both tasks' mean.
"""

import statistics
import time
from argparse import Namespace

import torch

import addenda as ad
from addenda.comparing.arm import center, parse_arm
from addenda.comparing.entries import TrialRecord
from addenda.comparing.search import grid, search
from addenda.comparing.subject import Subject
from addenda.comparing.trial import looks
from addenda.core.site.site import site_at
from addenda.models.encoders import ENCODERS
from addenda.models.load import load_model
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit
from addenda.train.loss import score
from addenda.train.tune import calibration
from recipes.common import (
    VALIDATION,
    Finding,
    Interval,
    conclude,
    folder_of,
    identity,
    options,
    over_seeds,
    search_steps,
    subject,
)
from recipes.kept import Runs

LORA = "lora:rank=8"
SHIRA = {how: f"shira:density=0.01,mask={how}" for how in ("magnitude", "random", "gradient")}
TASKS, REPEAT, RANK = ("library", "kind"), 20, 32  # the rank of the LoRA that switching is measured against


class TwoHeads(torch.nn.Module):
    """One encoder under the classifiers of both tasks; `task` says which one answers."""

    def __init__(self, subjects: dict[str, Subject]):
        super().__init__()
        first = subjects[TASKS[0]].model
        heads = {task: torch.nn.Sequential(on.model.bert.pooler, on.model.classifier) for task, on in subjects.items()}
        self.bert, self.config, self.heads = first.bert, first.config, torch.nn.ModuleDict(heads)
        self.bert.pooler = None
        self.task = TASKS[0]

    def forward(self, **batch):
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.heads[self.task](self.bert(**batch).last_hidden_state))


def main() -> None:
    given = options(__doc__, "shira")
    subjects = {} if given.old else {task: subject(given.model, task) for task in TASKS}
    with Runs(given, identity(given, **subjects)) as runs:
        told(given, subjects, runs)


def told(given: Namespace, subjects: dict[str, Subject], runs: Runs) -> None:
    """Run what is missing, and conclude. subjects: none where nothing is run."""
    model, arms = TwoHeads(subjects) if subjects else None, [LORA, *SHIRA.values()]
    print(f"{len(arms)} arms, 2 tasks, {given.seeds} seeds, {given.steps} steps; about 15 minutes on 2 quiet cores.")
    rates = {
        (spec, task): best_rate(runs, model, subjects.get(task), task, spec, given) for spec in arms for task in TASKS
    }
    made = {}
    for seed in range(given.seeds):
        for spec in arms:
            name = f"fused-{_file(spec)}-seed{seed}"
            made[spec, seed] = runs.once(name, lambda s=spec, n=seed: fused(model, subjects, s, n, rates, given.steps))
    speed = runs.once("switching", lambda: switching(given.model))
    drop = {s: [made[s, n]["alone"] - made[s, n]["fused"] for n in range(given.seeds)] for s in arms}
    alone = {s: [made[s, n]["alone"] for n in range(given.seeds)] for s in arms}
    spared = {h: over_seeds(x - y for x, y in zip(drop[LORA], drop[s], strict=True)) for h, s in SHIRA.items()}
    as_good = {h: over_seeds(x - y for x, y in zip(alone[s], alone[LORA], strict=True)) for h, s in SHIRA.items()}
    times = {k: f"{speed[k] * 1e3:.2f} ms" for k in ("entries", "in place", "dense")}
    ratio, wasteful = speed["in place"] / speed["entries"], speed["dense"] / speed["entries"]
    findings = [
        Finding(
            "switching 5 to 16 times faster than fusing a LoRA",
            f"{speed['sites']} layers on and off, median of {REPEAT}: entries {times['entries']}, addmm_ in place "
            f"{times['in place']} ({ratio:.1f} ×), ΔW made and added {times['dense']} ({wasteful:.1f} ×)",
            "holds" if ratio >= 5 else "holds against a wasteful fuse only" if wasteful >= 5 else "does not hold",
        ),
        Finding(
            "fused with another task's adapter, less accuracy is lost (paper: 3.6 and 4.4 points against 11.1)",
            f"LoRA loses {over_seeds(drop[LORA]).mean * 100:.1f} points; SHiRA spares "
            + ", ".join(f"{h} {x.points()}" for h, x in spared.items()),
            spared["magnitude"].above(),
        ),
        Finding(
            "alone as good as LoRA, within 2 points",
            "SHiRA − LoRA: " + ", ".join(f"{h} {x.points()}" for h, x in as_good.items()),
            as_good["magnitude"].above(-0.02),
        ),
    ]  # fmt: skip
    table = [
        {"arm": s, "trainable": made[s, 0]["trainable"], "rates": [rates[s, t] for t in TASKS],
         "alone": _rounded(over_seeds(alone[s])), "loss by fusing": _rounded(over_seeds(drop[s]))}
        for s in arms
    ]  # fmt: skip
    conclude(given, "SHiRA, arXiv:2406.13175", findings, [*table, {"switching, seconds": speed}])


def _attach(model: TwoHeads, on: Subject, task: str, spec: str, seed: int, name: str) -> ad.Adapter:
    model.task, train = task, on.splits["train"]
    return ad.attach(
        model, parse_arm(spec).method, targets=["attention", "mlp"], name=name, seed=seed,
        calibration=calibration(model, train, 16, seed), loss=lambda m, b: score(m, b, train.kind).mean,
    )  # fmt: skip


def best_rate(runs: Runs, model: TwoHeads | None, on: Subject | None, task: str, spec: str, given: Namespace) -> float:
    def look(rate: float, steps: int) -> TrialRecord:
        def run() -> dict:
            assert model is not None and on is not None
            adapter = _attach(model, on, task, spec, 1000, "trial")
            try:
                made = _fit(model, adapter, on, rate, steps, 1000)
            finally:
                ad.detach(model, "trial")
            seen = [[e["step"], {"loss": e["loss"], "accuracy": e["accuracy"]}] for e in made.evaluations]
            return {"status": "ok", "rate": rate, "steps": steps, "validation": seen}

        kept = runs.once(f"search-{task}-{_file(spec)}-{rate:g}-{steps}", run)
        return TrialRecord.of({"method": spec, "stage": "search", **kept})

    return search(grid(center(spec), given.rates), search_steps(given.steps), look)


def _fit(model: TwoHeads, adapter: ad.Adapter, on: Subject, rate: float, steps: int, seed: int):
    return fit(
        model, adapter, on.splits["train"], steps=steps, batch=16, rate=rate, seed=seed, attention=None,
        eval=on.splits["validation"].first(VALIDATION), eval_every=looks(steps, "search"),
    )  # fmt: skip


def fused(model: TwoHeads | None, subjects: dict[str, Subject], spec: str, seed: int, rates: dict, steps: int) -> dict:
    """Accuracy of both tasks, alone and with both adapters acting."""
    assert model is not None
    try:
        trained = 0
        for task, on in subjects.items():
            adapter = _attach(model, on, task, spec, seed, task)
            _fit(model, adapter, on, rates[spec, task], steps, seed)
            trained = adapter.trainable
            ad.switch(model, None)  # the next one is calibrated on the base
        alone, both = {}, {}
        for task, on in subjects.items():
            model.task = task
            ad.switch(model, task)
            alone[task] = evaluate(model, examples=on.splits["test"]).accuracy
            ad.switch(model, TASKS)
            both[task] = evaluate(model, examples=on.splits["test"]).accuracy
    finally:
        ad.detach(model)
    said = {"alone": statistics.mean(alone.values()), "fused": statistics.mean(both.values()), "trainable": trained}
    return said | {"by task": {"alone": alone, "fused": both}}


@torch.no_grad()
def switching(name: str) -> dict:
    """Median seconds of on + off over all layers: entries, a LoRA by addmm_ in place, a LoRA as ΔW made and added.

    On MiniLM, whose layers are three times as wide as the subject's, unless a folder is given.
    """
    model = load_model(folder_of("minilm" if name in ENCODERS else name), task="label", labels=2).model
    sparse = ad.attach(model, SHIRA["random"], targets=["attention", "mlp"], name="sparse")
    jobs, thin = [], []
    for path, t in sparse.sites():
        W = site_at(model, path).weight.data
        index, values = t.method.sparse(t.tensors(), W.shape)
        jobs.append((W.view(-1), index.long(), torch.randn_like(values).to(W.dtype)))
        thin.append((W, torch.randn(len(W), RANK).to(W.dtype) * 1e-3, torch.randn(RANK, W.shape[1]).to(W.dtype) * 1e-3))

    def entries() -> None:
        old = [flat[index] for flat, index, _ in jobs]
        for (flat, index, values), before in zip(jobs, old, strict=True):
            flat[index] = before + values
        for (flat, index, _), before in zip(jobs, old, strict=True):
            flat[index] = before

    def in_place() -> None:
        for sign in (1, -1):
            for W, B, A in thin:
                W.addmm_(B, A, alpha=sign)

    def dense() -> None:
        for sign in (1, -1):
            for W, B, A in thin:
                W.copy_((W.float() + sign * (B.float() @ A.float())).to(W.dtype))

    arms = {"entries": entries, "in place": in_place, "dense": dense}
    seconds: dict[str, list[float]] = {k: [] for k in arms}
    for i in range(REPEAT + 2):
        for name, function in arms.items():
            started = time.perf_counter()
            function()
            if i >= 2:
                seconds[name].append(time.perf_counter() - started)
    return {k: statistics.median(s) for k, s in seconds.items()} | {"sites": len(jobs)}


def _rounded(x: Interval) -> list[float]:
    return [round(v, 4) for v in (x.mean, x.low, x.high)]


def _file(spec: str) -> str:
    return spec.replace(":", "-").replace(",", "-").replace("=", "")


if __name__ == "__main__":
    main()
