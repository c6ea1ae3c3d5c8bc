"""For a Hugging Face Trainer of your own: the adapter in every checkpoint, its schedules, a strict resume."""

from pathlib import Path

import transformers

from addenda.core.adapter import Adapter
from addenda.train import checkpoint


class TrainerCallback(transformers.TrainerCallback):
    """Give it to a plain Trainer: `Trainer(model, …, callbacks=[addenda.TrainerCallback(adapter)])`.

    Calls `adapter.step()` after every optimizer step (schedules, dead tensors); writes `adapter.safetensors` into every
    checkpoint; on resume loads it back strictly, over what the Trainer loaded non-strictly. resume_from: the folder
    that `resume_from_checkpoint` names, if it does not lie in the Trainer's output_dir.
    """

    def __init__(self, adapter: Adapter, resume_from: str | Path | None = None):
        self.adapter, self.resume_from = adapter, resume_from

    def on_train_begin(self, args, state, control, **kwargs):
        """Load the checkpoint that the Trainer resumes from. Raises AddendaError where it holds no adapter."""
        if state.global_step > 0:
            own = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            checkpoint.restore(self.adapter, self.resume_from or own)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.adapter.step()

    def on_save(self, args, state, control, **kwargs):
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        checkpoint.write(self.adapter, folder, here=args.should_save)
