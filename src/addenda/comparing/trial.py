"""One run of one arm: attach, fit, judge, detach. The model is afterwards what it was before, bit for bit."""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from addenda.comparing.arm import Arm
from addenda.comparing.shots import evaluate_with_cache
from addenda.comparing.subject import Subject
from addenda.core.adapter.attach import attach, detach
from addenda.core.adapter.handle import Adapter
from addenda.core.file.save import save
from addenda.data.encoded import Encoded
from addenda.models.machine import device_of, resident
from addenda.train.evaluate import Evaluation
from addenda.train.fit import Progress, fit
from addenda.train.loss import score
from addenda.train.trainer import DivergedError
from addenda.train.tune import calibration


@dataclass(frozen=True)
class TrialSettings:
    """What all arms share."""

    batch: int = 8
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    validation: int = 64  # examples of the validation split looked at while training


def trial(
    subject: Subject,
    arm: Arm,
    settings: TrialSettings,
    *,
    stage: str,
    seed: int,
    rate: float,
    steps: int,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    save_every: int | None = None,
) -> dict:
    """Run once and return what the record keeps (see `comparing.record`). stage: "search" judges on validation only.

    A loss that diverges is a result, not an error: status "diverged". checkpoints: a folder for going on after a kill.
    """
    model, train = subject.model, subject.splits["train"]
    floor, started = resident(device_of(model)), time.perf_counter()
    torch.manual_seed(seed)  # of dropout
    with attached(subject, arm, settings, seed) as adapter:
        told = {"method": arm.label, "seed": seed, "stage": stage, "rate": rate, "steps": steps}
        told |= {"trainable": adapter.trainable, "attach_seconds": adapter.seconds, "status": "ok", "note": ""}
        try:
            made = fit(
                model, adapter, train, steps=steps, batch=settings.batch, rate=rate, schedule=settings.schedule,
                warmup=settings.warmup, weight_decay=settings.weight_decay, seed=seed,
                eval=subject.splits["validation"].first(settings.validation), eval_every=looks(steps, stage),
                progress=progress, memory_floor=floor, out=checkpoints, save_every=save_every,
                resume=checkpoints is not None, optimizer=arm.optimizer,
                attention=None,  # chosen once, for all arms
                **arm.training,
            )  # fmt: skip
        except DivergedError as error:
            return told | _diverged(str(error), time.perf_counter() - started)
        told |= {
            "losses": [[s, float(f"{loss:.6g}")] for s, loss in made.losses],
            "validation": [[e["step"], {"loss": e["loss"], "accuracy": e["accuracy"]}] for e in made.evaluations],
            "step_seconds": made.step_seconds,
            f"{made.unit}_per_second": made.tokens_per_second,
            "peak_bytes": made.peak_memory,
        }
        if stage != "search":
            told |= {s: judged(evaluate_with_cache(model, e)) for s, e in subject.tested.items()}
            told["adapter_bytes"] = _file_size(adapter)
        if not made.losses or not math.isfinite(made.losses[-1][1]):
            told |= _diverged("the loss is not finite", 0.0)
        return told | {"seconds": time.perf_counter() - started}


@contextmanager
def attached(subject: Subject, arm: Arm, settings: TrialSettings, seed: int, batches: int = 8) -> Iterator[Adapter]:
    """The arm's adapter on the model, for the length of a `with` block. batches: what a calibrated method may see."""
    model, train = subject.model, subject.splits["train"]
    adapter = attach(
        model, arm.method, targets=arm.targets, also_train=arm.also_train, name="trial", seed=seed,
        calibration=calibration(model, train, settings.batch, seed, batches),
        loss=lambda m, b: score(m, cast(dict, b), train.kind).mean,
    )  # fmt: skip
    try:
        yield adapter
    finally:
        detach(model, "trial")


def control(subject: Subject, label: str, splits: dict[str, Encoded]) -> dict:
    """The bare base on the given encodings."""
    started = time.perf_counter()
    found = {s: judged(evaluate_with_cache(subject.model, e)) for s, e in splits.items()}
    seconds = time.perf_counter() - started
    return {"method": label, "seed": None, "stage": "control", "status": "ok", "seconds": seconds, **found}


def judged(made: Evaluation) -> dict:
    return {"accuracy": made.accuracy, "loss": made.loss, "items": "".join(map(str, made.items))}


def looks(steps: int, stage: str) -> list[int]:
    """When validation is looked at: once in a search, twice in a short run, else four times."""
    times = 1 if stage == "search" else 2 if steps <= 50 else 4
    return sorted({max(1, round(steps * k / times)) for k in range(1, times + 1)})


def _diverged(why: str, seconds: float) -> dict:
    return {"status": "diverged", "note": why, "seconds": seconds, "losses": [], "validation": []}


def _file_size(adapter: Adapter) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save(adapter, Path(folder) / "adapter.safetensors").stat().st_size
