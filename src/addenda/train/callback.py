"""For a Hugging Face Trainer of your own: the adapter in every checkpoint, its schedules, a strict resume."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import transformers
from torch import nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.packed.tensor import Packed
from addenda.core.state.outside import refuse_outside
from addenda.core.state.state import record_of
from addenda.train import checkpoint


class TrainerCallback(transformers.TrainerCallback):
    """A callback for a plain Trainer: `Trainer(model, …, callbacks=[addenda.TrainerCallback(adapter)])`.

    Calls `adapter.step()` after every optimizer step (schedules, dead tensors); writes `adapter.safetensors` into every
    checkpoint, before the Trainer deletes older ones (save_total_limit); on resume loads it back strictly, over what
    the Trainer loaded non-strictly. Weights in few bits, which safetensors cannot write, are left out of what the
    Trainer itself writes of the model while it trains: they are frozen, and in the model that is resumed already.
    resume_from: the folder that `resume_from_checkpoint` names, if it does not lie in the Trainer's output_dir. dead:
    as in `Adapter.step`. without_base: as in `save`: go on although tensors of the base train beside the adapter, which
    are in the Trainer's own files only.
    """

    def __init__(
        self,
        adapter: Adapter,
        resume_from: str | Path | None = None,
        dead: Literal["raise", "warn"] = "raise",
        without_base: bool = False,
    ):
        if not isinstance(adapter, Adapter):
            kind = type(adapter).__name__
            raise AddendaError(f"TrainerCallback is of an adapter, got a {kind}. attach and load give them.")
        self.adapter, self.resume_from, self.without_base = adapter, resume_from, without_base
        self._hooks: list = []
        self._written: Path | None = None
        self.dead: Literal["raise", "warn"] = dead

    def on_train_begin(self, args, state, control, **kwargs):
        """Load the checkpoint that the Trainer resumes from.

        Raises AddendaError where it holds no adapter, or not the optimizer and the schedule, which the
        Trainer would begin anew; and before the first step where the base trains beside the adapter.
        """
        root, host, _ = record_of(self.adapter.model, self.adapter.name)
        if not self.without_base:
            refuse_outside(root, host, self.adapter.name, "would not be in the checkpoints whole")
        if state.global_step > 0:
            own = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            folder = Path(self.resume_from or own)
            if not (
                getattr(args, "deepspeed", None) or getattr(args, "fsdp", None)
            ):  # theirs lie in files of other names, by process
                checkpoint.check_resumable(folder)
            checkpoint.restore(self.adapter, folder)
        self._release()  # of a run that ended early
        self._written = None
        if not self.adapter.sharded:  # then all processes write, and only one of them writes the state
            before_deleting(state, self._write)
        self._hooks = [m.register_state_dict_post_hook(_without_packed) for m in _holders(self.adapter.model)]

    def on_train_end(self, args, state, control, **kwargs):
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.adapter.step(self.dead)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and self.adapter.sharded:
            self._write(_folder(args, state), args.should_save)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        folder = _folder(args, state)
        if self._written is None or self._written.name != folder.name:
            self._write(folder, args.should_save)

    def _write(self, folder: Path, here: bool = True) -> None:
        checkpoint.write(self.adapter, folder, here=here, without_base=self.without_base)
        self._written = folder


def before_deleting(state: transformers.TrainerState, write: Callable[[Path], None]) -> None:
    """Have a function called with the folder of every checkpoint of a plain Trainer, before it deletes older ones.

    on_save comes after that: killed between the two, a run with save_total_limit=1 would have no whole checkpoint left.
    What comes before is the Trainer's own state, the last file that it writes; only the process that writes it calls.
    """
    own = state.save_to_json

    def save(json_path: str) -> None:
        folder = Path(json_path).parent
        if re.fullmatch(r"checkpoint-\d+", folder.name):
            write(folder)
        own(json_path)

    state.save_to_json = save


def _folder(args, state) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _holders(model: nn.Module) -> list[nn.Module]:
    """Return the modules that keep a packed weight of their own."""
    return [m for m in model.modules() if any(isinstance(p, Packed) for p in m._parameters.values())]


def _without_packed(module: nn.Module, state_dict: dict, prefix: str, metadata: dict) -> None:
    for name, p in module._parameters.items():
        if isinstance(p, Packed):
            state_dict.pop(f"{prefix}{name}", None)
