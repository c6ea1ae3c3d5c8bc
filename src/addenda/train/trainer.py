"""transformers' Trainer for adapters: checkpoints without the base, loaded strictly; a resume that continues exactly.

A plain Trainer writes the whole model and loads it non-strictly. `AdapterTrainer` writes the adapter, the optimizer,
the scheduler, the random generators and its own state; on one machine a run that was killed and resumed ends with the
very bits of the uninterrupted one. A plain Trainer's states are pickles; these are not, and none is opened. (DeepSpeed
writes and reads its own.) For a Trainer of your own, see `TrainerCallback`.
"""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import whole
from addenda.core.disk.access import DiskError, writing
from addenda.core.file.states import read_state, write_state
from addenda.data.encoded import IGNORE, Encoded
from addenda.optim.plain import adamw
from addenda.optim.registry import Optimizers
from addenda.train import checkpoint, states, together
from addenda.train.callback import TrainerCallback
from addenda.train.checkpoint import OPTIMIZER, SCALER, SCHEDULER, random_file
from addenda.train.compiled import eager
from addenda.train.consistency import Consistency
from addenda.train.evaluate import evaluate
from addenda.train.loss import score
from addenda.train.quantised import own_check
from addenda.train.settings import Settings
from addenda.train.sharding import take_up
from addenda.train.trackers import Told
from addenda.train.tracking import Tracking

IDLE = "idle"  # marks a process's batch that stands in for none, where there are fewer rows than processes


class DivergedError(AddendaError):
    """Raised when the loss is no longer finite."""

    @classmethod
    def at(cls, step: int, loss: float, rate: float) -> "DivergedError":
        """Return the error of a run whose loss at a step is not finite."""
        return cls(
            f"The loss is {loss} at step {step} with rate {rate:g}: the run has diverged. Use a smaller rate, a longer "
            "warm-up, or dtype='float32'."
        )


class Rows(Sampler):
    """The rows of every micro-batch of the run, in order: one list each. following: those after the last ones given."""

    def __init__(self, rows: list[list[int]], batch: int):
        self.rows, self.batch_size, self.drop_last = rows, batch, False
        self.following: list[int] = []
        self.at = 0  # which ones were given last

    def __iter__(self):
        for i, (rows, following) in enumerate(zip_longest(self.rows, self.rows[1:], fillvalue=[])):
            self.at, self.following = i, following
            yield rows

    def __len__(self) -> int:
        return len(self.rows)


class AdapterTrainer(transformers.Trainer):
    """A Trainer of one run over given rows: one "epoch" of transformers', so that a resume skips by counting.

    rows: for every step the positions of its examples in `train`; as many as a run that has stopped early has made,
    where it is gone on with. evaluations, saves: steps after which to do so.
    out: where checkpoints go. choices, identity, looks: noted in them. watch: called after every step.
    dead: as in `Adapter.step`. tracking: where losses are logged besides.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        adapter: Adapter,
        train: Encoded,
        rows: list[list[int]],
        settings: Settings,
        *,
        out: Path,
        eval_data: Encoded | None = None,
        evaluations: frozenset[int] = frozenset(),
        saves: frozenset[int] = frozenset(),
        keep: int = 2,
        optimizer: Optimizers = adamw,
        choices: dict | None = None,
        identity: dict | None = None,
        looks: list | None = None,
        watch: Callable[["AdapterTrainer"], None] | None = None,
        dead: Literal["raise", "warn"] = "raise",
        tracking: Tracking | None = None,
        **arguments: Any,
    ):
        self.adapter, self.settings, self.make_optimizer = adapter, settings, optimizer
        self.data, self.out, self.choices = train, Path(out), choices
        self.noted = {"identity": identity, "looks": looks}
        self.rows = [part for step in rows for part in parts(step, settings.accumulate)]
        self.evaluations, self.saves, self.keep = evaluations, saves, keep
        self.seconds, self.tokens, self.best = [], 0, None
        args = transformers.TrainingArguments(
            output_dir=str(out),
            max_steps=len(rows),
            per_device_train_batch_size=math.ceil(settings.batch / settings.accumulate),
            gradient_accumulation_steps=settings.accumulate,
            max_grad_norm=settings.clip,
            seed=settings.seed,
            use_cpu=next(adapter.model.parameters()).device.type == "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            eval_strategy="no",
            disable_tqdm=True,
            report_to="none",  # trackers are told by callbacks of ours
            run_name=tracking and tracking.run,
            project=tracking.group if tracking else "addenda",
            dataloader_pin_memory=False,
            accelerator_config={"split_batches": True},
            **arguments,
        )
        told = [Told(name, tracking) for name in tracking.trackers] if tracking else []
        with own_check(adapter):
            super().__init__(
                adapter.model, args, train_dataset=train, eval_dataset=eval_data,
                callbacks=[_Conductor(self, watch), *told],
            )  # fmt: skip
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 2) == 1:
            raise AddendaError(
                "The first version of FSDP puts many tensors into one, and no adapter can be told from it. Take the "
                "second: fsdp_config={'version': 2}, or accelerate's --fsdp_version 2."
            )
        self.remove_callback(transformers.PrinterCallback)
        self.add_callback(_Steps(adapter, dead=dead))
        self.model_accepts_loss_kwargs = True

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        take_up(self.accelerator)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def train(self, *args, **kwargs):
        """Train; the logs of trackers are closed however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Told):
                    callback.end()

    # -- a step ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's share of every batch. Accelerate's own split leaves out batches that are not full."""
        index, count = self.args.process_index, self.args.world_size
        rows = Rows([share(part, index, count) for part in self.rows], self.args.per_device_train_batch_size)
        idle = [len(part) <= index for part in self.rows]
        positions: Any = range(len(self.data))  # the data makes its own batches, from positions

        def collate(these: list[int]) -> dict[str, Tensor]:
            made = self.data.drawn(rows.at).batch(these)
            self.data.ahead(rows.following)  # decoded while the model works on this batch
            return made | ({IDLE: torch.ones(1)} if idle[rows.at] else {})

        loader = DataLoader(positions, batch_sampler=rows, collate_fn=collate)
        return prepare_data_loader(loader, self.accelerator.device, 1, 0, put_on_device=True)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(self.adapter, self.settings.rate, self.settings.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            chosen = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, self.settings.multiplier())
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """Return the number of labels, or groups, of one optimizer step, over its parts and all processes."""
        causal, what = self.data.kind == "causal", "group" if self.data.kind == "group" else "labels"
        labels: list[Tensor] = [b["labels"][:, 1:] if causal else b[what] for b in batch_samples]
        tokens = self.data.kind in ("causal", "masked")
        counts = [(t != IGNORE).sum() if tokens else torch.tensor(len(t)) for t in labels]
        idle = [IDLE in b for b in batch_samples]
        count: Any = torch.stack([n * (not i) for n, i in zip(counts, idle, strict=True)]).sum()
        return together.sum_of(count.to(device))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the summed loss over the labels of the whole step (all parts, all processes)."""
        idle = inputs.pop(IDLE, None) is not None
        if self.settings.consistency:
            twice = Consistency(self.settings.consistency, self.settings.consistency_add)
            total, count = twice.total(model, self.adapter, inputs, self.data.kind)
        else:
            how: dict[str, Any] = {"whole": self.settings.loss != "chunked", "objective": self.data.objective}
            made = score(model, inputs, self.data.kind, **how)
            total, count = made.total, made.count
        if idle:  # others have the examples of this batch; what is computed here only keeps them company
            total, count = total * 0, 0
        else:
            self.tokens += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else len(inputs["labels"])
        whole = num_items_in_batch is None
        loss = total / max(count, 1) if whole else total / num_items_in_batch * self.args.world_size
        return (loss, None) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if together.any_of(not bool(torch.isfinite(loss))):
            raise DivergedError.at(self.state.global_step + 1, loss.item(), self.settings.rate)
        return loss

    def _clip_grad_norm(self, model):
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return whole(torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.args.max_grad_norm))

    def _get_grad_norm(self, model, grad_norm=None):
        return grad_norm

    def floating_point_ops(self, inputs) -> int:
        return 0  # transformers walks over all parameters for it, every step

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict:
        """Judge as `evaluate` does, without a random number; early stopping looks at the loss."""
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        with eager() if self.settings.compile else nullcontext():  # no gradient, other shapes: it would compile anew
            made = evaluate(self.adapter.model, examples=data, batch=max(self.settings.batch, 32))
        loss, accuracy, items = together.agreed(lambda: (made.loss, made.accuracy, "".join(map(str, made.items))))
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_accuracy": accuracy}
        before = [e["eval_loss"] for e in self.state.log_history if "eval_loss" in e]
        logs: dict[str, Any] = metrics | {f"{metric_key_prefix}_items": items}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.settings.early_stop is not None:
            losses = [*before, loss]
            if losses.index(min(losses)) == len(losses) - 1:
                self.best = {k: whole(t).clone() for k, t in self.adapter.state_dict().items()}
            if self.settings.stops_at(losses):
                self.control.should_training_stop = True
                self.control.should_save = bool(self.saves)  # so that a call that finds it has no step to make again
        return metrics

    def take_best(self) -> None:
        """Put the values of the best evaluation back into the adapter."""
        if self.best is not None:
            self.adapter.load_state_dict(self.best)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter only."""
        here = self.args.should_save
        folder = output_dir or self.out
        checkpoint.write(self.adapter, folder, asdict(self.settings), self.choices, **self.noted, here=here)

    def _save_checkpoint(self, model, trial) -> None:
        final = self.out / f"checkpoint-{self.state.global_step}"
        staging = final.with_name(f".{final.name}")
        try:
            with writing(final):
                self._write_all(staging, final)
        except DiskError:
            if checkpoint.is_own(staging):  # a part of a checkpoint is worth nothing, and the disk may be full
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _write_all(self, staging: Path, final: Path) -> None:
        if self.args.should_save:
            staging.mkdir(parents=True, exist_ok=True)
        self.save_model(str(staging))
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        self._save_generators(staging)
        if self.args.should_save:
            if self.best is not None:
                write_state(staging / checkpoint.BEST, self.best, "best values")
            self.state.save_to_json(os.path.join(staging, checkpoint.STATE))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.finish(staging, final, self.keep)

    # what transformers does with pickles, without them: its names, its moments

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        made = states.state_of(self.optimizer)  # of a sharded model all processes take part
        if self.args.should_save:
            write_state(Path(output_dir, OPTIMIZER), made, "state of the optimizer")
            assert self.lr_scheduler is not None
            write_state(Path(output_dir, SCHEDULER), self.lr_scheduler.state_dict(), "state of the schedule")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        file = Path(checkpoint, OPTIMIZER)
        states.load_state(self.optimizer, read_state(file), file)
        file = Path(checkpoint, SCHEDULER)
        states.load_schedule(self.lr_scheduler, read_state(file), file)

    def _save_rng_state(self, output_dir: str) -> None:
        write_state(self._random_file(output_dir), states.random_state(self._devices()), "state of a generator")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            file = self._random_file(checkpoint)
            states.set_random_state(read_state(file), self._devices(), file)

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            write_state(Path(output_dir, SCALER), scaler.state_dict(), "state of the scaler")

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and checkpoint is not None and Path(checkpoint, SCALER).is_file():
            scaler.load_state_dict(read_state(Path(checkpoint, SCALER)))

    def _random_file(self, folder: str) -> Path:
        return Path(folder, random_file(self.args.process_index, self.args.world_size))

    def _devices(self) -> set[torch.device]:
        """Return the devices whose generators this process draws from."""
        if self.args.world_size > 1:
            return {self.args.device}
        return {self.args.device, *(p.device for p in self.adapter.model.parameters())}

    def _save_generators(self, staging: Path) -> None:
        """Write the random generators of every process into the folder of the first, which others may not see."""
        if not together.apart():
            return self._save_rng_state(str(staging))
        with tempfile.TemporaryDirectory(prefix="addenda-") as own:
            self._save_rng_state(own)
            [file] = Path(own).iterdir()
            names, contents = together.gathered(file.name.encode()), together.gathered(file.read_bytes())
        if self.args.should_save:
            for name, content in zip(names, contents, strict=True):
                (staging / name.decode()).write_bytes(content)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        checkpoint.restore(self.adapter, resume_from_checkpoint)
        best = Path(resume_from_checkpoint, checkpoint.BEST)
        self.best = read_state(best) if best.is_file() else None

    def _load_callback_state(self) -> None:
        pass  # ours keep none


class _Steps(TrainerCallback):
    """The callback of an adapter inside AdapterTrainer, which saves and restores by itself."""

    def on_train_begin(self, args, state, control, **kwargs):
        pass

    def _write(self, folder: Path, here: bool = True) -> None:
        pass


class _Conductor(transformers.TrainerCallback):
    """A callback that says when to evaluate and save, takes the time of every step, and tells who watches."""

    def __init__(self, trainer: AdapterTrainer, watch: Callable[[AdapterTrainer], None] | None):
        self.trainer, self.watch, self.started = trainer, watch, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.seconds.append(time.perf_counter() - self.started)
        control.should_log = True
        control.should_evaluate = state.global_step in self.trainer.evaluations
        control.should_save = state.global_step in self.trainer.saves
        return control

    def on_log(self, args, state, control, **kwargs):
        if self.watch is not None:
            self.watch(self.trainer)


def share(rows: list[int], index: int, count: int) -> list[int]:
    """Return what one of several processes computes of a batch: every so many-th row, or the first if none is left."""
    return rows[index::count] or rows[:1]


def parts(rows: list[int], accumulate: int) -> list[list[int]]:
    """Return the micro-batches of one step."""
    size = len(rows) / accumulate
    return [rows[round(i * size) : round((i + 1) * size)] for i in range(accumulate)]
