"""Proof that a merged folder answers as its base with the adapters on it: both are loaded, one after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda.core.adapter.load import place
from addenda.core.adapter.switch import switch
from addenda.core.base.errors import AddendaError
from addenda.core.merge.judge import Proof, Verdict, distance
from addenda.core.merge.outputs import run
from addenda.core.site.site import owners_of, site_at
from addenda.core.state.bypass import watching
from addenda.exporting.folder_model import FolderModel
from addenda.exporting.stored import StoredAdapter
from addenda.models.pretrained import pretrained


@dataclass(frozen=True)
class Comparison:
    """What a merged folder gives on a batch, against the base with the adapters.

    effect: ‖with − without‖ / ‖without‖ of the main output; logits: its largest difference, merged against with. notes:
    what could not be measured.
    """

    verdict: Verdict
    effect: float
    logits: float
    notes: tuple[str, ...]


@torch.no_grad()
def compare_folders(
    source: FolderModel,
    merged: Path,
    adapters: Sequence[StoredAdapter],
    batch: object,
    *,
    dtype: torch.dtype,
    base: str,
    excused: float = 0.0,
) -> Comparison:
    """Load the base with the adapters, then the merged folder, in one dtype, and judge their outputs as `merge` does.

    excused: the share of the change's own effect that may be lost. Raises AddendaError where the merged folder does not
    load whole, where the adapters move no output of the batch, and where outputs are not finite.
    """
    model = loaded(source.folder, source.architecture, dtype, source.config)
    names = tuple(f"merged-{i}" for i in range(len(adapters)))
    for name, adapter in zip(names, adapters, strict=True):
        trained_in = {s.dtype for s in adapter.header.sites}
        exact = base == "exact" and trained_in == {str(dtype).removeprefix("torch.")}
        how = "exact" if exact else "compatible"
        place(model, adapter.path, adapter.header, dict(adapter.tensors), name=name, base=how, activate=False)
    switch(model, None)
    without = run(model, batch, called="probe")
    switch(model, names)
    owners = owners_of(model)
    with watching(site_at(model, site.path, owners) for adapter in adapters for site, _ in adapter.plan):
        before = run(model, batch, called="probe")
    proof = Proof.of(model, batch, before)
    effect = distance(before.main, without.main)
    if not effect > 0:
        raise AddendaError(
            "The adapter moves no output of the probe batch, so nothing can be proved by it: it was not trained, or "
            "the batch does not reach it. Train it, give another probe=, or check=False."
        )
    proof.base = without if excused else None
    del model
    model = loaded(merged, source.architecture, dtype)
    after = run(model, batch, called="probe")
    verdict = proof.judge(after, excused)
    if not verdict.within:
        proof.look_again(model, batch, after)
        verdict = proof.judge(after, excused)
    if any(bool(t.isnan().any()) for t in after.values.values()):
        raise AddendaError("The merged model's outputs are not finite. Give another dtype, e.g. float32.")
    notes = [*proof.notes]
    largest = float((before.main - without.main).double().abs().max())
    if largest <= verdict.limit:
        notes.append(
            f"the batch hardly shows the change (outputs move by up to {largest:.1e}): a better probe= proves more"
        )
    logits = (
        float((after.main - before.main).double().abs().max()) if after.main.shape == before.main.shape else math.inf
    )
    return Comparison(verdict, effect, logits, tuple(notes))


def loaded(folder: Path, architecture: str, dtype: torch.dtype, config: Any = None) -> nn.Module:
    """Load a folder as a class of transformers. Raises AddendaError where weights of the merged folder are missing."""
    options: dict[str, Any] = {} if config is None else {"config": config, "ignore_mismatched_sizes": True}
    model, info = pretrained(
        architecture, folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    wrong = [*info.get("missing_keys", ()), *(k for k, *_ in info.get("mismatched_keys", ()))]
    if config is None and wrong:
        raise AddendaError(f"The merged folder does not load whole: {', '.join(map(str, wrong[:6]))}.")
    return model.eval()
