"""One run of one arm: attach, fit, judge, detach. The model is afterwards what it was before, bit for bit."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from addenda.comparing.arm import Arm
from addenda.comparing.entries import SplitResult, TextResult, TrialRecord, TrialSpec, Validation
from addenda.comparing.record import BASE
from addenda.comparing.shots import evaluate_with_cache
from addenda.comparing.subject import Subject
from addenda.core.adapter.attach import attach, detach
from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.file.save import save
from addenda.data.encoded import Encoded
from addenda.models.machine import device_of, resident
from addenda.train.checkpoint import NoneWholeError, newest
from addenda.train.evaluate import Evaluation, evaluate
from addenda.train.fit import FitResult, Progress, fit
from addenda.train.loss import score
from addenda.train.tracking import Tracking
from addenda.train.trainer import DivergedError
from addenda.train.tune import calibration

TOGETHER = 8  # windows of the general text that are judged together


@dataclass(frozen=True)
class TrialSettings:
    """The settings that all arms share."""

    batch: int = 8
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    validation: int = 64  # examples of the validation split looked at while training


def trial(
    subject: Subject,
    arm: Arm,
    settings: TrialSettings,
    spec: TrialSpec,
    *,
    progress: Progress | None = None,
    checkpoints: Path | None = None,
    save_every: int | None = None,
    tracking: Tracking | None = None,
    after: Callable[[Adapter], None] | None = None,
) -> TrialRecord:
    """Train and judge once; return what the record keeps. spec: stage "search" judges on validation only.

    A loss that diverges is a result, not an error: status "diverged". checkpoints: a folder for going on after a kill.
    tracking: where its losses are logged besides. after: is called with the trained adapter once it is judged, while it
    is still attached; it may change it; of a run that diverged it is not called.
    """
    model, train = subject.model, subject.splits["train"]
    seed = spec.seed
    floor, started = resident(device_of(model)), time.perf_counter()
    torch.manual_seed(seed)  # of dropout
    with attached(subject, arm, settings, seed) as adapter:
        try:
            result = fit(
                model, adapter, train, **how(arm, settings, spec), eval=looked_at(subject, settings), progress=progress,
                memory_floor=floor, out=checkpoints, save_every=save_every, tracking=tracking,
                resume=checkpoints is not None and goes_on(checkpoints),
            )  # fmt: skip
        except DivergedError as error:
            return concluded(subject, adapter, spec, error, time.perf_counter() - started)
        except AddendaError:
            if _finite(adapter):
                raise
            result = FitResult(adapter, spec.steps, [])  # no checkpoint could be written of it
        made = concluded(subject, adapter, spec, result, 0.0)
        if after is not None and made.status == "ok":
            after(adapter)
        return replace(made, seconds=time.perf_counter() - started)


def how(arm: Arm, settings: TrialSettings, spec: TrialSpec) -> dict[str, Any]:
    """Return the options of `fit` that a run has."""
    return {
        "steps": spec.steps, "batch": settings.batch, "rate": spec.rate, "schedule": settings.schedule,
        "warmup": settings.warmup, "weight_decay": settings.weight_decay, "seed": spec.seed,
        "eval_every": looks(spec.steps, spec.stage), "optimizer": arm.optimizer,
        "attention": None,  # chosen once, for all arms
    } | arm.training  # fmt: skip


def looked_at(subject: Subject, settings: TrialSettings) -> Encoded:
    """Return the part of the validation split that is judged while a run trains."""
    return subject.splits["validation"].first(settings.validation)


def concluded(
    subject: Subject, adapter: Adapter, spec: TrialSpec, result: FitResult | DivergedError, seconds: float
) -> TrialRecord:
    """Judge a trained adapter, which acts now, and return what the record keeps of its run. seconds: it took so far."""
    run = TrialRecord(
        method=spec.method, seed=spec.seed, stage=spec.stage, rate=spec.rate, steps=spec.steps,
        trainable=adapter.trainable, attach_seconds=adapter.seconds, status="ok", note="",
    )  # fmt: skip
    if isinstance(result, DivergedError):
        return _diverged(run, str(result), seconds)
    if not _finite(adapter):  # its last step made it so, and no loss came after it
        return _diverged(run, "the adapter holds values that are not finite", seconds)
    started, pace = time.perf_counter(), result.tokens_per_second
    run = replace(
        run,
        losses=tuple((step, float(f"{loss:.6g}")) for step, loss in result.losses),
        validation=tuple((look["step"], _look(look, spec.stage)) for look in result.evaluations),
        step_seconds=result.step_seconds,
        tokens_per_second=pace if result.unit == "tokens" else None,
        images_per_second=pace if result.unit == "images" else None,
        peak_bytes=result.peak_memory,
    )
    if spec.stage != "search":
        results = _results(subject.model, subject.tested)
        run = replace(
            run, test=results.get("test"), ood=results.get("ood"), general=_on_text(subject),
            adapter_bytes=_file_size(adapter),
        )  # fmt: skip
    if not result.losses or not math.isfinite(result.losses[-1][1]):
        run = _diverged(run, "the loss is not finite", 0.0)
    elif not _judged_finite(run):  # finite values of an adapter whose outputs are none
        run = _diverged(run, "what it is judged by is not finite", 0.0)
    return replace(run, seconds=seconds + time.perf_counter() - started)


def goes_on(checkpoints: Path) -> bool:
    """Return False where all checkpoints of a trial are damaged: it begins again, and ends as it would have."""
    try:
        newest(checkpoints)
    except NoneWholeError:
        return False
    return True


@contextmanager
def attached(
    subject: Subject, arm: Arm, settings: TrialSettings, seed: int, batches: int = 8, name: str = "trial"
) -> Iterator[Adapter]:
    """Attach the arm's adapter for the length of a `with` block. batches: what a calibrated method may see."""
    model, train = subject.model, subject.splits["train"]
    adapter = attach(
        model, arm.method, targets=arm.targets, also_train=arm.also_train, name=name, seed=seed,
        calibration=calibration(model, train, settings.batch, seed, batches),
        loss=lambda m, b: score(m, cast(dict, b), train.kind).mean,
    )  # fmt: skip
    try:
        yield adapter
    finally:
        detach(model, name)


def control(subject: Subject, label: str, splits: dict[str, Encoded]) -> TrialRecord:
    """Judge the bare base on the given encodings, and once, under its own label, on the general text."""
    started = time.perf_counter()
    results = _results(subject.model, splits)
    general = _on_text(subject) if label == BASE else None
    seconds = time.perf_counter() - started
    return TrialRecord(
        method=label, stage="control", status="ok", seconds=seconds, test=results.get("test"), ood=results.get("ood"),
        general=general,
    )  # fmt: skip


def _on_text(subject: Subject) -> TextResult | None:
    """Judge the general text, where the subject has one."""
    if subject.general is None:
        return None
    made = evaluate(subject.model, examples=subject.general, batch=TOGETHER)
    return TextResult(loss=made.loss, losses=tuple(float(f"{loss:.7g}") for loss in made.losses))


def _results(model: nn.Module, splits: dict[str, Encoded]) -> dict[str, SplitResult]:
    """Judge the splits "test" and "ood", where they are among these."""
    return {split: judged(evaluate_with_cache(model, encoded)) for split, encoded in splits.items()}


def judged(evaluation: Evaluation) -> SplitResult:
    """Return what the record keeps of a whole split."""
    accuracy = math.nan if evaluation.accuracy is None else evaluation.accuracy
    losses = tuple(float(f"{loss:.4g}") for loss in evaluation.losses)
    items = "".join(map(str, evaluation.items))
    return SplitResult(accuracy=accuracy, loss=evaluation.loss, items=items, losses=losses)


def _look(look: dict, stage: str) -> Validation:
    """Return what the record keeps of a look at validation: the answers too, where rates are chosen by them."""
    items = look["items"] or None if stage == "search" else None
    return Validation(loss=look["loss"], accuracy=look["accuracy"], items=items)


def looks(steps: int, stage: str) -> list[int]:
    """Return the steps at which validation is judged: once in a search, twice in a short run, else four times."""
    times = 1 if stage == "search" else 2 if steps <= 50 else 4
    return sorted({max(1, round(steps * k / times)) for k in range(1, times + 1)})


def _diverged(run: TrialRecord, why: str, seconds: float) -> TrialRecord:
    return replace(run, status="diverged", note=why, seconds=seconds, losses=(), validation=())


def _judged_finite(run: TrialRecord) -> bool:
    """Return whether the last look at validation and every answer to the test split have a finite loss."""
    looks = [look.loss for _, look in (run.validation or ())[-1:]]
    losses = [*looks, *((run.test.loss, *(run.test.losses or ())) if run.test else ())]
    return all(loss is not None and math.isfinite(loss) for loss in losses)


def _finite(adapter: Adapter) -> bool:
    """Return whether all values of an adapter are finite."""
    return all(bool(t.isfinite().all()) for t in adapter.state_dict().values())


def _file_size(adapter: Adapter) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return save(adapter, Path(folder) / "adapter.safetensors").stat().st_size
