"""The core of every run: fit an attached adapter to encoded data. `tune` and `compare` both call it."""

import hashlib
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.core.disk.lock import one_at_a_time
from addenda.core.disk.place import is_first
from addenda.core.file.identity import base_of, digest, goes_on, larger, look, plain, versions
from addenda.core.forward.lean import leaner
from addenda.core.modules.borrow import training_mode
from addenda.core.state.outside import refuse_outside
from addenda.core.state.state import record_of
from addenda.data.batches import batches
from addenda.data.encoded import Encoded
from addenda.data.limits import padded
from addenda.models.machine import Peak, device_of, processes, resident
from addenda.optim.registry import Optimizers, named
from addenda.train import attention as attentions
from addenda.train import checkpoint, chunked, compiled, together
from addenda.train.choices import attention_of, compilation, recomputing
from addenda.train.consistency import check
from addenda.train.settings import Settings
from addenda.train.sharding import check_launch
from addenda.train.theirs import PASSED, translated
from addenda.train.tracking import Tracking


@dataclass(frozen=True)
class Event:
    """What a progress function is told after every step and every evaluation."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    evaluation: dict | None = None  # {"step", "loss", "accuracy", "items"} right after an evaluation
    unit: str = "tokens"  # or "images", of what is counted as tokens


Progress = Callable[[Event], None]


@dataclass(frozen=True)
class FitResult:
    """What a run gives. losses: (step, mean over label tokens), those before a resume too; times: of this call."""

    adapter: Adapter
    steps: int
    losses: list[tuple[int, float]]
    evaluations: list[dict] = field(default_factory=list)  # {"step", "loss", "accuracy", "items"}
    tokens: int = 0  # read in this call, padding not counted; images, where `unit` says so
    tokens_per_second: float = 0.0
    step_seconds: float = 0.0  # median of a step: forward, backward, optimizer
    seconds: float = 0.0  # sum of all steps
    peak_memory: int | None = None  # bytes above the floor, at the worst moment
    memory_floor: int | None = None  # bytes in use before, see `fit`
    resumed_from: int = 0
    best_step: int | None = None  # with early_stop: the evaluation whose values the adapter has now
    choices: dict = field(default_factory=dict)  # attention, loss, compile: what was chosen, and the numbers behind it
    unit: str = "tokens"
    looks: list[dict] = field(
        default_factory=list
    )  # how a run was lengthened after it was seen, see `core.file.identity`
    damaged: tuple[str, ...] = ()  # checkpoints that were passed over, and what is wrong with each


@checked(settings=Settings, also=PASSED, translate=translated)
@one_at_a_time
def fit(
    model: nn.Module,
    adapter: Adapter,
    train: Encoded,
    *,
    steps: int | Sequence[Sequence[int]],
    optimizer: str | Optimizers = "auto",
    dead: Literal["raise", "warn"] = "raise",
    eval: Encoded | None = None,
    eval_every: int | Sequence[int] | None = None,
    out: str | Path | None = None,
    save_every: int | None = None,
    keep: int = 2,
    resume: bool = False,
    progress: Progress | None = None,
    memory_floor: int | None = None,
    begun_with: str | None = None,
    tracking: Tracking | None = None,
    **options,
) -> FitResult:
    """Train the adapter and nothing else; the model keeps its flags, its configuration and its base's bits.

    steps: how many optimizer steps, or the rows of each of them (positions in `train`). eval_every: after every so many
    steps, or at a list of them; with `eval`, the default is ten times in the run, at most every 20th step. out: a
    folder for checkpoints (None: none), written every save_every steps (default: ten times, at most every 5th) and at
    the end. resume: go on with the newest one there, if there is one. memory_floor: bytes in use by the loaded model
    (`models.machine.resident()` before attach); taken at the call if not given. begun_with: the SHA-256 of the file
    whose values the adapter begins with, if it does: a part of what the run is. tracking: where losses are logged
    besides (`train.trackers`), no part of it. dead: "warn" where layers are dropped at random or a first batch reaches
    not all tensors, see `Adapter.step`.

    options: the fields of `Settings`, and what a launcher of several processes reads of transformers.TrainingArguments
    (`train.theirs.PASSED`); the names there that have an equal here are translated (learning_rate is rate), and all
    others are refused. weight_decay: not of trained copies of norms' gains and of biases (`optim.pairs`). batch,
    group: see `data.batches.batches`; images, all of one length, are never grouped. early_stop: after so many
    evaluations without a better loss; the adapter then gets its best values. consistency: the weight of the consistency
    term, for which every batch runs twice; consistency_add: of the second run's own loss (see `train.consistency`).

    How it is computed, off switches included. attention: "auto" measures "sdpa" and "eager" on these examples (runs of
    fewer than 40 steps keep the model's own), a name takes that one unmeasured, None the model's own. loss: "chunked"
    never holds the logits of all labels at once, "logits" does; "auto": see `chunked.choose`. compile: torch.compile of
    the repeated blocks, with its pay-back measured. optimizer: a name with options as `addenda.optim.known()`
    lists them, "auto" for what the method is trained by, or a function (adapter, rate, weight_decay) -> torch
    optimizer. checkpointing: keep the activations between blocks only, and compute the others again in backward. lean:
    the same for gated MLPs and norms only, at little cost (`core.forward.lean`). What "auto" chose is in `choices` and
    in every checkpoint: a resumed run goes on with it. A resumed run must be the same in everything that decides its
    numbers (base, data, options, versions: see `core.file.identity`); only `steps` may grow, which the result's
    `looks` tell.

    Raises AddendaError for impossible settings, an adapter that cannot train, a diverged loss, a tensor that gets no
    gradient, a checkpoint of another run, another run in the same folder, and a name in it that is taken by something
    else. A damaged checkpoint is passed over for the one before it, with a warning and in the result's `damaged`; where
    none is whole, NoneWholeError.
    """
    check_launch()
    check_trainable(model, adapter)
    if not len(train):
        raise AddendaError("There is no example to train on.")
    if resume and out is None:
        raise AddendaError("resume=True wants the folder of the checkpoints: give out=.")
    arguments = {k: v for k, v in options.items() if k in PASSED}
    together.meet(arguments.get("ddp_backend"), arguments.get("ddp_timeout"))
    own = {k: v for k, v in options.items() if k not in PASSED}
    plan = planned(model, adapter, train, eval, steps, optimizer, own)
    settings, train, eval = plan.settings, plan.train, plan.eval
    if eval is None and (settings.early_stop is not None or eval_every is not None):
        raise AddendaError("eval_every and early_stop look at the loss on eval data; give eval=.")
    evaluations = when(eval_every, settings.steps, 20) if eval is not None else frozenset()
    saves = when(save_every, settings.steps, 5) | {settings.steps} if out is not None else frozenset()
    kept = None if out is None else path_of(out, "out")
    identity: dict[str, Any] = {}
    rows, begun = plan.rows, _Begun()
    if kept is not None or together.apart():
        every = eval_every if isinstance(eval_every, int | None) else list(eval_every)
        origin = {"start": begun_with} if begun_with is not None else {}
        identity = identity_of(
            model, adapter, **origin, eval=None if eval is None else eval.digest,
            evaluations={"every": every} if settings.early_stop else None, arguments=arguments,
        )  # fmt: skip
        together.check_alike(identity | asdict(settings))
    if kept is not None:
        written = saves if settings.early_stop is None else saves | evaluations
        begun = _begin(kept, adapter, settings, identity, written, keep, resume)
        if begun.start is not None and begun.stopped:  # early, there: no further step is made
            rows = rows[: checkpoint.step_of(begun.start)]
    start, looks = begun.start, begun.looks

    from addenda.train.trainer import AdapterTrainer, parts  # transformers takes seconds to import

    device = device_of(model)
    floor = resident(device) if memory_floor is None else memory_floor
    folder = kept if kept is not None else Path(tempfile.mkdtemp(prefix="addenda-"))
    cache = getattr(getattr(model, "config", None), "use_cache", None)
    resumed_from = checkpoint.step_of(start) if start else 0
    micro = [part for step in plan.rows for part in parts(step, settings.accumulate)]
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    first = kept is not None and not (kept / checkpoint.NOTE).exists()
    try:
        if cache is not None:
            model.config.use_cache = False  # type: ignore[attr-defined]
        chosen = attention_of(
            settings.attention, begun.choices.get("attention"), model, train, len(micro[0]), settings.steps
        )
        computed = attentions.using(model, chosen.name)
        again = recomputing(model, settings.checkpointing)
        lean = leaner(model, settings.lean)
        with together.ending(), computed, again, lean, training_mode(model, True):
            loss = settings.loss
            how = (loss == "auto" and begun.choices.get("loss")) or chunked.choose(loss, model, train, micro)
            choices: dict[str, Any] = {"attention": asdict(chosen), "loss": how}
            settings = replace(settings, attention=chosen.name, loss=how["name"])
            if kept is not None:
                whole = plain(identity | asdict(settings))
                together.agreed(lambda: checkpoint.begin(kept, whole, choices, looks))
            with compiled.compiled(model) if settings.compile else nullcontext():
                if settings.compile:
                    choices["compile"] = compilation(model, adapter, train, micro[0], whole=how["name"] == "logits")
                resident(device)  # gives free pages back, those of a long attach too
                with Peak(device) as peak:
                    with _said(arguments):
                        trainer = AdapterTrainer(
                            adapter, train, rows, settings, out=folder, eval_data=eval, evaluations=evaluations,
                            saves=saves, keep=keep, optimizer=plan.optimizer, choices=choices,
                            identity=plain(identity | asdict(settings)), looks=looks,
                            watch=_watch(progress, settings.steps, train.unit), dead=dead,
                            tracking=tracking, **arguments,
                        )  # fmt: skip
                    with together.fetched(start) as here:
                        trainer.train(resume_from_checkpoint=str(here) if here else None)
                    if settings.early_stop is not None:
                        trainer.take_best()
    except BaseException:
        if first and is_first() and not checkpoint.all_of(folder):  # nothing to go on with: nothing stays
            (folder / checkpoint.NOTE).unlink(missing_ok=True)
        for path in new:  # the Trainer makes folders before it has anything to put there
            with suppress(OSError):
                path.rmdir()
        raise
    finally:
        if cache is not None:
            model.config.use_cache = cache  # type: ignore[attr-defined]
        model.__dict__.pop("_is_accelerate_prepared", None)
        for p in adapter.parameters():
            p.grad = None
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
    log = trainer.state.log_history
    evaluated = evaluations_in(log)
    seconds = sum(trainer.seconds)
    best = min(evaluated, key=lambda e: e["loss"])["step"] if settings.early_stop is not None and evaluated else None
    return FitResult(
        adapter,
        trainer.state.global_step,
        losses_in(log),
        evaluations=evaluated,
        tokens=trainer.tokens,
        tokens_per_second=trainer.tokens / seconds if seconds else 0.0,
        step_seconds=statistics.median(trainer.seconds) if trainer.seconds else 0.0,
        seconds=seconds,
        peak_memory=None if peak.bytes is None or floor is None else max(peak.bytes - floor, 0),
        memory_floor=floor,
        resumed_from=resumed_from,
        best_step=best,
        choices=choices,
        unit=train.unit,
        looks=looks,
        damaged=tuple(begun.damaged),
    )


@dataclass(frozen=True)
class _Plan:
    """What a run does: its settings, the rows of every step, the data padded as its batches are, what makes steps."""

    settings: Settings
    rows: list[list[int]]
    train: Encoded
    eval: Encoded | None
    optimizer: Optimizers


def planned(
    model: nn.Module,
    adapter: Adapter,
    train: Encoded,
    eval: Encoded | None,
    steps: int | Sequence[Sequence[int]],
    optimizer: str | Optimizers,
    own: dict[str, Any],
) -> _Plan:
    """Return the plan of a call. own: fields of `Settings` as given. Raises AddendaError for impossible ones."""
    batch, rows = own.get("batch", Settings.batch), None
    if isinstance(steps, int):
        train = padded(train, model, batch)
        own |= {"steps": steps, "group": own.get("group", Settings.group) and train.ragged, "data": train.digest}
    else:
        rows = [list(r) for r in steps]
        train = padded(train, model, max(map(len, rows), default=1))
        _check_rows(rows, len(train), own.get("accumulate", Settings.accumulate))
        order = hashlib.sha256(repr(rows).encode()).hexdigest()
        own |= {"steps": len(rows), "batch": max(map(len, rows)), "group": False}
        own |= {"data": f"{train.digest} in given order {order}"}
    eval = None if eval is None else padded(eval, model, batch)
    label, made = named(optimizer, adapter, own["steps"])
    settings = s = Settings(**own, optimizer=label)
    if s.consistency:
        check(adapter, train.kind, s.loss, s.checkpointing)
        settings = replace(s, loss="logits")
    rows = rows or batches(train.lengths, s.batch, s.steps, s.seed, s.group, s.accumulate)
    return _Plan(settings, rows, train, eval, made)


@contextmanager
def _said(arguments: dict[str, Any]) -> Iterator[None]:
    """Turn what the Trainer raises for arguments passed on to it, in a `with` block, into an AddendaError."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        if not arguments:
            raise
        given = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
        raise AddendaError(f"transformers' Trainer does not take {given} here: {str(error).strip()}") from error


def identity_of(model: nn.Module, adapter: Adapter, **more) -> dict[str, Any]:
    """Return what decides a run's numbers besides its settings: base, adapter, judging, machine kind, versions."""
    record = record_of(adapter.model, adapter.name).record
    paths = [path for path, _ in adapter.sites()]
    methods = dict.fromkeys(m for p, m in record.methods.items() if p not in record.also_train)
    about = {
        "methods": [{"name": m.name} | m.options(defaults=True) for m in methods],
        "sites": {"count": len(paths), "paths": digest(paths)},
        "also_train": sorted(record.also_train),
        "seed": record.seed,
    }
    computed = {"device": device_of(model).type, "processes": processes(), "versions": versions()}
    return {"base": base_of(model), "adapter": about, **computed, **more}


@dataclass(frozen=True)
class _Begun:
    """What a run goes on with. start: the newest whole checkpoint; stopped: whether the run ended there, early."""

    start: Path | None = None
    damaged: list[str] = field(default_factory=list)
    choices: dict = field(default_factory=dict)
    looks: list[dict] = field(default_factory=list)
    stopped: bool = False


def _begin(
    out: Path, adapter: Adapter, settings: Settings, identity: dict, written: frozenset[int], keep: int, resume: bool
) -> _Begun:
    """Make a folder ready for a run, and return what the run goes on with. The first process looks, for all.

    written: the steps after which checkpoints are written. Raises AddendaError for a checkpoint of another run, and for
    a name that is taken by something else; NoneWholeError where there are checkpoints and all are damaged.
    """

    def decided() -> tuple[str | None, list[str], dict, list[dict], bool]:
        wanted = [checkpoint.random_file(i, processes()) for i in range(processes())]
        start, damaged = checkpoint.newest(out, wanted) if resume else (None, [])
        choices, looks = _known(out, start, adapter, settings, identity, resume)
        checkpoint.check_free(out, written)
        if start is None:
            checkpoint.clear(out)
        else:  # what a kill has left
            checkpoint.clear_unfinished(out)
            checkpoint.prune(start, keep)
        judged = evaluations_in(checkpoint.log_of(start)) if start is not None and settings.early_stop else []
        stopped = settings.stops_at([e["loss"] for e in judged])
        return None if start is None else str(start), damaged, choices, looks, stopped

    found, damaged, choices, looks, stopped = together.agreed(decided)
    start = None if found is None else Path(found)
    if start is not None and damaged and is_first():
        warnings.warn(
            f"In {out} {'; '.join(damaged)}. The run goes on from {start.name}, which is whole, and ends as it would "
            "have.",
            stacklevel=3,
        )
    return _Begun(start, damaged, choices, looks, stopped)


def _known(
    out: Path, start: Path | None, adapter: Adapter, settings: Settings, identity: dict, resume: bool
) -> tuple[dict, list[dict]]:
    """Return the choices and looks of the run that a call goes on with, with this look where it lengthens the run.

    start: the newest whole checkpoint. Raises AddendaError where it is of another run.
    """
    if start is None:
        before = checkpoint.begun(out) if resume else {}
        now = plain(identity | asdict(settings))
        same = {k: v for k, v in now.items() if k not in ("attention", "loss")}
        return (before["choices"], []) if before and same.items() <= before["identity"].items() else ({}, [])
    note = checkpoint.note_of(start)
    choices, looks = note.get("choices", {}), list(note.get("looks", []))
    chosen = {"attention": settings.attention or attentions.current(adapter.model), "loss": settings.loss}
    chosen = {k: choices.get(k, {}).get("name") if v == "auto" and k in choices else v for k, v in chosen.items()}
    settings = replace(settings, **{k: note["settings"].get(k) if v == "auto" else v for k, v in chosen.items()})
    there, now = note.get("identity", {}), identity | asdict(settings)
    checkpoint.fitting(adapter, start, base=False)  # that is in the identity
    grown = goes_on(
        f"The checkpoint {start}", there, now, grows={"steps": larger},
        way="Repeat the call with its settings to go on with it, or start again with resume=False (--no-resume) or in "
        "another folder (--out).",
    )  # fmt: skip
    if grown:
        looks.append(look(grown, f"{checkpoint.step_of(start)} steps"))
    return choices, looks


def check_trainable(model: nn.Module, adapter: Adapter) -> None:
    """Raise AddendaError for an adapter that cannot be trained on this model: elsewhere, idle, merged or frozen."""
    root, state, _ = record_of(adapter.model, adapter.name)
    refuse_outside(root, state, adapter.name, "cannot be trained here")
    if root is not model and root not in set(model.modules()):
        raise AddendaError(f"Adapter {adapter.name!r} is attached to another model than the one given.")
    if state.merged is not None or adapter.name not in state.active:
        raise AddendaError(f"Adapter {adapter.name!r} does not act now. Call switch(model, {adapter.name!r}) first.")
    if not any(p.requires_grad for p in adapter.parameters()):
        raise AddendaError(
            f"No tensor of adapter {adapter.name!r} may train. Call adapter.requires_grad_(True), or load it with "
            "trainable=True."
        )


def _check_rows(rows: list[list[int]], n: int, accumulate: int) -> None:
    wrong = [i for i, r in enumerate(rows) if len(r) < accumulate or not all(0 <= k < n for k in r)]
    if wrong or not rows:
        raise AddendaError(
            f"Steps as lists of rows want positions from 0 to {n - 1}, at least {accumulate} in every step; "
            f"{f'steps {wrong[:5]} have others' if wrong else 'there is no step'}."
        )


def when(every: int | Sequence[int] | None, total: int, least: int) -> frozenset[int]:
    """Return after which of `total` steps something is done: as listed, or after every so many and the last.

    every=None: ten times in all, but at most every `least` steps. Raises AddendaError for an interval below 1.
    """
    if isinstance(every, Sequence):
        return frozenset(every)
    if every is not None and every < 1:
        raise AddendaError(f"eval_every and save_every count steps, at least 1; got {every}.")
    return frozenset(range(0, total + 1, every or max(least, total // 10))) - {0} | {total}


def losses_in(log: list[dict]) -> list[tuple[int, float]]:
    """Return (step, loss) of every step in a trainer's log."""
    return [(int(e["step"]), e["loss"]) for e in log if "loss" in e]


def evaluations_in(log: list[dict]) -> list[dict]:
    """Return every look at the validation data in a trainer's log."""
    return [
        {"step": e["step"], "loss": e["eval_loss"], "accuracy": e["eval_accuracy"], "items": e["eval_items"]}
        for e in log
        if "eval_loss" in e
    ]


def _watch(progress: Progress | None, total: int, unit: str):
    if progress is None:
        return None

    def tell(trainer) -> None:
        log = trainer.state.log_history
        step = trainer.state.global_step
        loss = next((e["loss"] for e in reversed(log) if "loss" in e), float("nan"))
        if not ("loss" in log[-1] or "eval_loss" in log[-1]) or not trainer.seconds:
            return
        found = evaluations_in(log[-1:])
        progress(event_at(step, total, loss, trainer.tokens, trainer.seconds, found[0] if found else None, unit))

    return tell


def event_at(
    step: int, total: int, loss: float, tokens: int, seconds: Sequence[float], evaluation: dict | None, unit: str
) -> Event:
    """Return what a progress function is told. tokens: read so far in this call; seconds: of each of its steps."""
    spent = max(sum(seconds), 1e-9)
    left = spent / len(seconds) * (total - step)
    return Event(step, total, loss, tokens / spent, left, evaluation, unit)
