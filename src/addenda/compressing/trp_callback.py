"""Trained Rank Pruning in a Hugging Face Trainer."""

import json
from pathlib import Path
from typing import Protocol

import transformers

from addenda.core.base.errors import AddendaError
from addenda.core.disk.atomic import write_atomically
from addenda.train.callback import before_deleting

FILE = "trained_rank_pruning.json"


class Pruning(Protocol):
    """Trained Rank Pruning of one model, as `compressing.trp.TrainedRankPruning` is."""

    nuclear: float

    def before_forward(self) -> bool: ...
    def before_step(self) -> None: ...
    def start_epoch(self) -> None: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class TrainedRankPruningCallback(transformers.TrainerCallback):
    """Trained Rank Pruning in a Trainer: `callbacks=[trp.callback()]`. Checkpoints hold its step; a resume goes on.

    Cuts before a step's first forward, and adds the nuclear norm's sub-gradient behind the Trainer's gradient clipping.
    resume_from: the folder that `resume_from_checkpoint` names, if it does not lie in the Trainer's output_dir.
    each_epoch: every epoch begins with a cut, as in the authors' release.
    """

    def __init__(self, trp: Pruning, resume_from: str | Path | None = None, each_epoch: bool = False):
        self.trp, self.resume_from, self.each_epoch = trp, resume_from, each_epoch

    def on_train_begin(self, args, state, control, **kwargs):
        """Resume the step. Raises AddendaError for float16 without clipping, or a checkpoint that does not fit."""
        if args.fp16 and self.trp.nuclear and not args.max_grad_norm:
            raise AddendaError(
                "With float16 the Trainer's gradients are scaled until it clips them, and the nuclear norm's part "
                "would be added to scaled ones. Set max_grad_norm, use bfloat16, or leave nuclear out."
            )
        before_deleting(state, self._write)
        if state.global_step > 0:
            folder = Path(self.resume_from or Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
            try:
                pruning_state = json.loads((folder / FILE).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise AddendaError(f"{folder} holds no step of Trained Rank Pruning ({FILE}: {error}).") from None
            self.trp.load_state_dict(pruning_state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        within = abs(state.epoch - round(state.epoch)) > 1e-6  # resumed within an epoch, which has had its first cut
        if self.each_epoch and not within:
            self.trp.start_epoch()

    def on_step_begin(self, args, state, control, **kwargs):
        self.trp.before_forward()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trp.before_step()

    def _write(self, folder: Path) -> None:
        write_atomically(folder / FILE, json.dumps(self.trp.state_dict(), indent=1).encode())
