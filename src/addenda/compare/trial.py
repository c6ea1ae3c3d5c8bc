"""One run of one arm: attach, fit, judge, detach. The model is afterwards what it was before, bit for bit."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from addenda.compare.shots import evaluate_with_cache
from addenda.compare.subject import Subject, seeded
from addenda.core.attach import attach, detach
from addenda.core.errors import AddendaError
from addenda.core.files import save
from addenda.core.method import WeightMethod
from addenda.train.encode import Encoded
from addenda.train.evaluate import Evaluation
from addenda.train.fit import Progress, fit
from addenda.train.loss import score
from addenda.train.machine import device_of, resident
from addenda.train.tune import calibration


@dataclass(frozen=True)
class Arm:
    """What is compared: a label, a method, and where it is attached."""

    label: str
    method: WeightMethod
    targets: str
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Settings:
    """What all arms share."""

    batch: int = 8
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    validation: int = 64  # examples of the validation split looked at while training


def trial(
    subject: Subject,
    arm: Arm,
    settings: Settings,
    *,
    stage: str,
    seed: int,
    rate: float,
    steps: int,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    save_every: int | None = None,
) -> dict:
    """Run once and return what the record keeps (see `compare.record`). stage: "search" judges on validation only.

    A loss that diverges is a result, not an error: status "diverged". checkpoints: a folder for going on after a kill.
    """
    model, train = subject.model, subject.splits["train"]
    floor, started = resident(device_of(model)), time.perf_counter()
    seeded(seed)
    adapter = attach(
        model, arm.method, targets=arm.targets, also_train=subject.heads, name="trial", seed=seed,
        calibration=calibration(model, train, settings.batch, seed), loss=_loss(train),
    )  # fmt: skip
    told = {"method": arm.label, "seed": seed, "stage": stage, "rate": rate, "steps": steps}
    told |= {"trainable": adapter.trainable, "attach_seconds": adapter.seconds, "status": "ok", "note": ""}
    validation = _some(subject.splits["validation"], settings.validation)
    try:
        try:
            made = fit(
                model, adapter, train, steps=steps, batch=settings.batch, rate=rate, schedule=settings.schedule,
                warmup=settings.warmup, weight_decay=settings.weight_decay, seed=seed, eval=validation,
                eval_every=looks(steps, stage), progress=progress, memory_floor=floor,
                out=checkpoints, save_every=save_every, resume=checkpoints is not None,
            )  # fmt: skip
        except AddendaError as error:
            if "diverged" not in str(error):
                raise
            return told | _diverged(str(error), time.perf_counter() - started)
        told |= {
            "losses": [[s, loss] for s, loss in made.losses],
            "validation": [[e["step"], {"loss": e["loss"], "accuracy": e["accuracy"]}] for e in made.evaluations],
            "step_seconds": made.step_seconds,
            "tokens_per_second": made.tokens_per_second,
            "peak_bytes": made.peak_memory,
        }
        if stage != "search":
            told |= {
                s: judged(evaluate_with_cache(model, subject.splits[s])) for s in ("test", "ood") if s in subject.splits
            }
            told["adapter_bytes"] = _file_size(adapter)
        if not made.losses or not math.isfinite(made.losses[-1][1]):
            told |= _diverged("the loss is not finite", 0.0)
        return told | {"seconds": time.perf_counter() - started}
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


def step_seconds(subject: Subject, arm: Arm, settings: Settings, tell: Callable[[str], None]) -> float:
    """Seconds of one training step of an arm: the faster of two after a first one."""
    train = subject.splits["train"]
    rows = [[i % len(train) for i in range(k * settings.batch, (k + 1) * settings.batch)] for k in range(3)]
    tell(f"measuring {arm.label}")
    adapter = attach(
        subject.model, arm.method, targets=arm.targets, also_train=subject.heads, name="trial",
        calibration=calibration(subject.model, train, settings.batch, 0, 1),
        loss=_loss(train),
    )  # fmt: skip
    times: list[float] = []
    try:
        fit(subject.model, adapter, train, steps=rows, rate=1e-6, progress=lambda e: times.append(time.perf_counter()))
    finally:
        detach(subject.model, "trial")
    return min(b - a for a, b in pairwise(times))


def forward_seconds(subject: Subject, split: str) -> float:
    """Seconds that judging a whole split takes, from a part of it."""
    part = _some(subject.splits[split], 128)
    made = evaluate_with_cache(subject.model, part)
    return made.seconds / len(part) * len(subject.splits[split])


def _loss(train: Encoded) -> Callable[[Any, Any], Tensor]:
    """What methods that look at data first see."""
    return lambda model, batch: score(model, batch, train.kind).mean


def looks(steps: int, stage: str) -> list[int]:
    """When validation is looked at: once in a search, twice in a short run, else four times."""
    times = 1 if stage == "search" else 2 if steps <= 50 else 4
    return sorted({max(1, round(steps * k / times)) for k in range(1, times + 1)})


def _some(split: Encoded, n: int) -> Encoded:
    return split if len(split) <= n else split.take(range(n))


def _diverged(why: str, seconds: float) -> dict:
    return {"status": "diverged", "note": why, "seconds": seconds, "losses": [], "validation": []}


def _file_size(adapter) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save(adapter, Path(folder) / "adapter.safetensors").stat().st_size
