"""For a loop of your own on accelerate: adapters in what `accelerator.save_state` writes, and back, strictly.

    addenda.register_for_checkpointing(accelerator, adapter)
    accelerator.save_state("states/100")        writes states/100/addenda/: adapter.safetensors, addenda.json
    accelerator.load_state("states/100")        restores both: the values, and the step that schedules draw by

accelerate alone writes the whole model, and knows nothing of a schedule's step: DyLoRA would go on with the rank of
step 0. What it writes of optimizers and generators are pickles of its own, so load states of your own only; the
adapter's files are none.
"""

from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.modules.wrappers import unwrap
from addenda.train import checkpoint


def register_for_checkpointing(accelerator: Any, *adapters: Adapter, base: bool = False) -> None:
    """Have an accelerator's `save_state` write these adapters and their schedules' step, and `load_state` restore them.

    Call it once they are attached; the order of several is that of their folders (addenda, addenda_1, …). The weights
    of a model in which nothing else trains are left out of the state, since the base is frozen: a resumed program has
    loaded it already, and its bytes at the adapter's sites are compared. base: write them all the same, as accelerate
    does. (Of FSDP and DeepSpeed it writes them in any case.)

    Raises AddendaError where it is given something else; later, from `load_state`, where the state has no such adapter,
    or one of other methods, seed, sites, shapes or base weights.
    """
    if not all(hasattr(accelerator, f"register_{kind}_state_pre_hook") for kind in ("save", "load")):
        raise AddendaError(f"Expected an accelerate.Accelerator first, got {type(accelerator).__name__}.")
    wrong = [type(a).__name__ for a in adapters if not isinstance(a, Adapter)]
    if wrong or not adapters:
        raise AddendaError(f"Give the adapters that attach or load returned; got {', '.join(wrong) or 'none'}.")
    states = vars(accelerator).get("_addenda_states")
    if states is None:
        states = accelerator._addenda_states = _States(accelerator)
        accelerator.register_save_state_pre_hook(states.save)
        accelerator.register_load_state_pre_hook(states.load)
    states.base |= base
    known = {(id(a.model), a.name) for a in states.adapters}
    states.adapters += [a for a in adapters if (id(a.model), a.name) not in known]


class _States:
    """The adapters of one accelerator, and the two functions that it calls."""

    def __init__(self, accelerator: Any):
        self.accelerator, self.base = accelerator, False
        self.adapters: list[Adapter] = []

    def save(self, models: list[nn.Module], weights: list, output_dir: str) -> None:
        frozen = [] if self.base else [i for i, model in enumerate(models) if self._is_only_adapted(model)]
        left_out = [i for i in frozen if i < len(weights)]  # there are none of FSDP and DeepSpeed
        for i, adapter in enumerate(self.adapters):
            here = self.accelerator.is_main_process  # where the base trains too, accelerate writes it
            noted = {"left_out": left_out}
            checkpoint.write(adapter, _folder(output_dir, i), choices=noted, here=here, without_base=True)
        for i in reversed(left_out):
            del weights[i]

    def load(self, models: list[nn.Module], input_dir: str) -> None:
        left_out: Any = []
        found = []
        for i, adapter in enumerate(self.adapters):
            folder = _folder(input_dir, i)
            if not folder.is_dir():
                raise AddendaError(
                    f"{input_dir} has no folder {folder.name!r}: adapter {adapter.name!r} was not registered when that "
                    "state was saved. Take another state, or load the model's weights by themselves."
                )
            note = checkpoint.note_of(folder)
            left_out = note.get("choices", {}).get("left_out", [])
            found.append((adapter, checkpoint.fitting(adapter, folder), note["step"]))
        if not (isinstance(left_out, list) and all(type(i) is int and 0 <= i < len(models) for i in left_out)):
            raise AddendaError(f"{input_dir} is of other models than there are here. Prepare the same ones.")
        for adapter, tensors, step in found:  # all of them fit
            adapter.load_state_dict(tensors)
            adapter.draw(step)
        for i in sorted(set(left_out), reverse=True):
            del models[i]

    def _is_only_adapted(self, model: nn.Module) -> bool:
        """Return whether a model has registered adapters, and trains nothing besides."""
        modules = set(unwrap(model).modules())
        own = [a for a in self.adapters if a.model in modules]
        trained = {id(p) for a in own for p in a.parameters()}
        return bool(own) and all(id(p) in trained for p in model.parameters() if p.requires_grad)


def _folder(state: str, i: int) -> Path:
    return Path(state, f"addenda_{i}" if i else "addenda")
