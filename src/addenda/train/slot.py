"""One run of a group: its steps, optimizer, schedule, stream of dropout and checkpoints (see `train.grouped`)."""

import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import writing
from addenda.core.file.identity import plain
from addenda.core.file.states import read_state, write_state
from addenda.data.encoded import IGNORE, Encoded
from addenda.models.machine import device_of
from addenda.train import attention, checkpoint, states
from addenda.train.checkpoint import OPTIMIZER, SCHEDULER, STATE, random_file
from addenda.train.evaluate import evaluate
from addenda.train.fit import (
    FitResult,
    Progress,
    check_trainable,
    evaluations_in,
    event_at,
    identity_of,
    losses_in,
    planned,
    when,
)
from addenda.train.trainer import DivergedError, parts

ALONE = ("consistency", "consistency_add", "early_stop", "compile")  # options of `fit` that no group has
_KEPT = 2  # checkpoints of a run


@dataclass(frozen=True)
class Run:
    """A run of a group. options: keywords of `fit`, but for those in `ALONE`; attention is the model's own.

    out: a folder for checkpoints, gone on from where there are some.
    """

    adapter: Adapter
    options: dict[str, Any]
    progress: Progress | None = None
    out: Path | None = None


class Slot:
    """A run of a group, at its next step."""

    def __init__(self, model: nn.Module, index: int, run: Run, train: Encoded, eval: Encoded | None):
        check_trainable(model, run.adapter)
        if train.kind == "group":
            raise AddendaError("Runs on groups of rows are trained one by one. Use fit.")
        options = {"optimizer": "auto", "dead": "raise", "eval_every": None, "save_every": None} | run.options
        own = {k: v for k, v in options.items() if k not in ("steps", "optimizer", "dead", "eval_every", "save_every")}
        if alone := [k for k in ALONE if own.get(k)] + ["attention"] * (own.get("attention") is not None):
            raise AddendaError(f"{', '.join(alone)}: a run with that is trained alone, not in a group. Use fit.")
        plan = planned(
            model, run.adapter, train, eval, options["steps"], options["optimizer"], own | {"attention": None}
        )
        self.index, self.adapter, self.progress, self.out = index, run.adapter, run.progress, run.out
        self.train, self.eval, self.dead, self.model = plan.train, plan.eval, options["dead"], model
        self.settings = replace(plan.settings, attention=attention.current(model))
        self.rows = [parts(rows, plan.settings.accumulate) for rows in plan.rows]
        self.evaluations = when(options["eval_every"], self.settings.steps, 20) if eval is not None else frozenset()
        self.saves = when(options["save_every"], self.settings.steps, 5) | {self.settings.steps}
        self.optimizer = plan.optimizer(run.adapter, self.settings.rate, self.settings.weight_decay)
        self.parameters = run.adapter.parameters()
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.settings.multiplier())
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)  # as torch's DataLoader begins
        self.step, self.tokens, self.begun_at = 0, 0, 0
        self.log: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.error: DivergedError | None = None
        self.micro: list[list[int]] = []
        self.labels: list[int] = []
        self.identity: dict[str, Any] = {}
        self.choices: dict[str, Any] = {}

    # -- a step ----------------------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        return self.error is None and self.step < len(self.rows)

    def next(self) -> None:
        """Take the rows of the next step."""
        self.micro = self.rows[self.step]
        self.loss, self.finite = 0.0, True
        if self.train.kind == "causal":  # what each part of this step predicts
            tokens = self.train.labels
            self.labels = [sum(t != IGNORE for i in part for t in tokens[i][1:]) for part in self.micro]
        else:
            self.labels = [len(part) for part in self.micro]
        self.items = sum(self.labels)

    def long(self, k: int) -> int:
        """Return the length of the longest row of the k-th part of this step."""
        lengths = self.train.lengths
        return max(lengths[i] for i in self.micro[k])

    def told(self, total: Tensor) -> Tensor | None:
        """Return the loss of a part of this step, from its sum over labels; None where it is not finite."""
        loss = total / self.items
        self.loss += float(loss.detach())
        self.finite = self.finite and bool(torch.isfinite(loss))
        return loss if self.finite else None

    def take(self) -> None:
        """Take the optimizer's step; or leave, where the loss is not finite."""
        if not self.finite:
            self.error = DivergedError.at(self.step + 1, self.loss, self.settings.rate)
        else:
            if self.settings.clip > 0:
                torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
            self.optimizer.step()
            self.adapter.step(self.dead)
            self.schedule.step()
        self.optimizer.zero_grad()

    def after(self, seconds: float) -> None:
        """Note a step that was taken; look at the validation data and save, where it is time for that."""
        if self.error is not None:
            return
        self.step += 1
        self.seconds.append(seconds)
        lengths = self.train.lengths
        self.tokens += sum(lengths[i] for part in self.micro for i in part)
        self.log.append({"loss": self.loss, "step": self.step})
        self._tell(None)
        if self.step in self.evaluations:
            made = evaluate(self.model, examples=self.eval, batch=max(self.settings.batch, 32))
            found = {"step": self.step, "loss": made.loss, "accuracy": made.accuracy,
                     "items": "".join(map(str, made.items))}  # fmt: skip
            self.log.append({"step": self.step} | {f"eval_{k}": v for k, v in found.items() if k != "step"})
            self._tell(found)
        if self.out is not None and self.step in self.saves:
            self._save(self.out)

    def _tell(self, evaluation: dict | None) -> None:
        if self.progress is not None:
            total, unit = len(self.rows), self.train.unit
            self.progress(event_at(self.step, total, self.loss, self.tokens, self.seconds, evaluation, unit))

    # -- the whole -------------------------------------------------------------------------------------------------

    def begin(self, how: dict[str, str]) -> None:
        """Begin the run, or go on with its checkpoint. how: the choice of the loss."""
        self.settings = replace(self.settings, loss=how["name"])  # type: ignore[arg-type]
        self.choices = {"attention": asdict(attention.Attention(self.settings.attention)), "loss": how}
        if self.out is None:
            return
        about = identity_of(
            self.model, self.adapter, eval=None if self.eval is None else self.eval.digest, evaluations=None,
            arguments={},
        )  # fmt: skip
        self.identity = plain(about | asdict(self.settings))
        start, _ = checkpoint.newest(self.out, [random_file(0, 1)])
        if start is not None and checkpoint.note_of(start).get("identity") == self.identity:
            checkpoint.clear_unfinished(self.out)
            self._restore(start)
        else:
            checkpoint.check_free(self.out, self.saves)
            checkpoint.clear(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
            checkpoint.begin(self.out, self.identity, self.choices, [])

    def _save(self, out: Path) -> None:
        from transformers import TrainerState

        final = out / f"checkpoint-{self.step}"
        staging = final.with_name(f".{final.name}")
        with writing(final):
            staging.mkdir(parents=True, exist_ok=True)
            checkpoint.write(self.adapter, staging, asdict(self.settings), self.choices, identity=self.identity)
            write_state(staging / OPTIMIZER, states.state_of(self.optimizer), "state of the optimizer")
            write_state(staging / SCHEDULER, self.schedule.state_dict(), "state of the schedule")
            drawn = states.random_state({device_of(self.model)}) | {"torch": self.generator.get_state()}
            write_state(staging / random_file(0, 1), drawn, "state of a generator")
            size = math.ceil(self.settings.batch / self.settings.accumulate)
            state = TrainerState(
                global_step=self.step, max_steps=len(self.rows), log_history=self.log, logging_steps=1,
                train_batch_size=size,
            )  # fmt: skip
            state.save_to_json(str(staging / STATE))
            checkpoint.finish(staging, final, _KEPT)

    def _restore(self, start: Path) -> None:
        from transformers import TrainerState

        checkpoint.restore(self.adapter, start)
        states.load_state(self.optimizer, read_state(start / OPTIMIZER), start / OPTIMIZER)
        states.load_schedule(self.schedule, read_state(start / SCHEDULER), start / SCHEDULER)
        self.generator.set_state(read_state(start / random_file(0, 1))["torch"])
        self.log = TrainerState.load_from_json(str(start / STATE)).log_history
        self.step = self.begun_at = checkpoint.step_of(start)

    def result(self, memory: int | None, floor: int | None) -> FitResult | DivergedError:
        """Return what `fit` would; times are this run's share of the group's. memory: the group's peak."""
        if self.error is not None:
            return self.error
        spent = sum(self.seconds)
        return FitResult(
            self.adapter,
            self.step,
            losses_in(self.log),
            evaluations=evaluations_in(self.log),
            tokens=self.tokens,
            tokens_per_second=self.tokens / spent if spent else 0.0,
            step_seconds=statistics.median(self.seconds) if self.seconds else 0.0,
            seconds=spent,
            peak_memory=memory,
            memory_floor=floor,
            resumed_from=self.begun_at,
            choices=self.choices,
            unit=self.train.unit,
        )
