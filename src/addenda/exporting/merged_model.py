"""A model's own folder as a door: the change written into its weights, for programs that know no adapters.

The model is in memory here, with its adapter live on it, as transformers or diffusers has loaded it; `merge_on_disk`
does the same for a folder and an adapter file, a weight at a time.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import writing
from addenda.core.forward.acting import blocks, enter
from addenda.core.merge.merge import merge, unmerge
from addenda.core.merge.outputs import Outputs, run
from addenda.core.method.contract import Method
from addenda.core.modules.classes import original_class
from addenda.core.site.site import Site
from addenda.core.state.state import acting_again, apply_active, record_of
from addenda.exporting.other_files import TOKENIZER, copy_others
from addenda.exporting.pairs import Pair
from addenda.exporting.routes import Route
from addenda.models.pretrained import pretrained_as, quiet


def route(method: Method, site: Site, config: Any = None) -> Route:
    """Return how a method goes into the weights: exactly, whatever it is."""
    return Route("exact", "W + ΔW")


def write(
    adapter: Adapter, folder: Path, pairs: dict[str, Pair] | None = None, *, allow_loss: float | None = None
) -> dict[str, float]:
    """Write the adapter's model with W + ΔW in its weights into an empty folder, and what lies in its own beside it.

    Returns by path the share of ΔW that rounding took. allow_loss: the share that it may take of all of it, by default
    a quarter. The model is as it was afterwards, bit for bit. Raises AddendaError for a model that does
    not write itself, and where rounding to the base's dtype takes too much of the change.
    """
    if pairs is not None:
        raise AddendaError("'merged' takes every change as it is: leave rank= and energy= out.")
    root, state, _ = record_of(adapter.model, adapter.name)
    model: Any = root
    if not callable(getattr(model, "save_pretrained", None)) or not callable(
        getattr(original_class(model), "from_pretrained", None)
    ):
        raise AddendaError(
            f"A {original_class(root).__name__} has no save_pretrained and from_pretrained, so there is no folder that "
            "could come back. Call merge(model) and save its state_dict yourself."
        )
    around = blocks()  # which a merge leaves, and an unmerge would take for those of somebody else
    with acting_again(root, state):
        apply_active(root, state, (adapter.name,), stay=True)
        report = merge(root, allow_loss=allow_loss)
        try:
            with writing(folder), quiet():
                model.save_pretrained(folder)
        finally:
            enter(around)
            unmerge(root)
    source = Path(str(getattr(getattr(root, "config", None), "_name_or_path", "") or ""))
    if source.is_absolute() and (source / "config.json").is_file():  # a pipeline's folder has none
        others = TOKENIZER if adapter.vocabulary is not None else ()  # it lacks the new tokens
        copy_others(source, folder, [*others, *(str(p.relative_to(folder)) for p in folder.rglob("*"))])
    return report.sites


@torch.no_grad()
def outputs(folder: Path, like: nn.Module, batch: object) -> Outputs:
    """Return the outputs of a fresh model of a folder on a batch. like: the model that it was written from."""
    weight = next((p for p in like.parameters() if p.is_floating_point()), torch.empty(0))
    config = getattr(like, "config", None)
    kind = "dtype" if hasattr(config, "to_dict") else "torch_dtype"  # transformers; diffusers
    options: dict[str, Any] = {kind: weight.dtype, "use_safetensors": True}
    return run(pretrained_as(original_class(like), folder, **options).to(weight.device).eval(), batch)
