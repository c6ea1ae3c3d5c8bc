"""A batch to try a model on, and the proof that an exported adapter acts as the live one does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.forward.adapted import effective_weight
from addenda.core.merge.judge import Proof, distance, working_dtype
from addenda.core.merge.outputs import Outputs, run
from addenda.core.modules.borrow import training_mode
from addenda.core.site.site import owners_of, site_at
from addenda.core.state.state import acting_again, apply_active, record_of, state_of
from addenda.exporting.diffusion_probe import diffusion_batch

EXACT = 1e-5  # of the largest output in float32: the difference that an exact export may make
_HALF = 2.0**-6  # the same where the base computes in half precision, whose products are rounded in another order


def probe_of(model: nn.Module, rows: int = 2, length: int = 16) -> dict[str, Any]:
    """Return a small batch for a model of transformers or diffusers, always the same, by its config.

    Token ids, or pixels; for a UNet or DiT a noisy sample, a time step and what it is conditioned on.

    Raises AddendaError where the model has no config that says what it reads.
    """
    config: Any = getattr(model, "config", None)
    main = str(getattr(model, "main_input_name", "input_ids"))
    rng, batch = Stream(0, "probe"), diffusion_batch(model, rows) or {}
    text = getattr(config, "text_config", None) or config
    vocabulary = getattr(text, "vocab_size", None)
    if main == "pixel_values" and config is not None:
        side = getattr(config, "image_size", None) or 32
        height, width = (side, side) if isinstance(side, int) else tuple(side)
        batch["pixel_values"] = rng.normal(rows, int(getattr(config, "num_channels", 3)), height, width)
    elif main == "input_ids" and isinstance(vocabulary, int):
        longest = getattr(text, "max_position_embeddings", None) or length
        ids = (rng.uniform(rows, min(length, longest)) * vocabulary).long().clamp_max(vocabulary - 1)
        pad = getattr(text, "pad_token_id", None)
        ids[ids == pad] = 0 if pad else min(1, vocabulary - 1)  # padding would be read as the end of a text
        batch["input_ids"] = ids
        batch["attention_mask"] = torch.ones_like(ids)
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = ids[:, :4]
    if not batch:
        raise AddendaError(
            f"There is no telling what a {type(model).__name__} reads. Give probe=, a batch for it: a tensor, a tuple, "
            "a dict of arguments, or a function that is given the model and returns its outputs."
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {k: _placed(t, device, dtype) for k, t in batch.items()}


@torch.no_grad()
def probe_for(adapter: Adapter) -> dict[str, Any]:
    """Return the batch of `probe_of` an adapter's model; where the adapter moves nothing on it, one that it may move.

    An adapter of a few tokens acts on texts with these tokens only, and the batch has few of a vocabulary: those whose
    rows of the embedding are changed take the place of others. Raises AddendaError as `probe_of` does.
    """
    root, _, record = record_of(adapter.model, adapter.name)
    batch, owners = probe_of(root), owners_of(root)
    ids = batch.get("input_ids")
    sites = [(site_at(root, path, owners), t) for path, t in adapter.sites() if path not in record.also_train]
    sites = [(site, t) for site, t in sites if site.kind.name == "embedding"]
    if ids is None or not sites:
        return batch
    base, live = (outputs_of(root, names, batch).main for names in ((), (adapter.name,)))
    if torch.equal(base, live):
        changed = [effective_weight(site, (t,), torch.float32) != site.weight.float() for site, t in sites]
        rows = torch.cat([c.any(-1).nonzero()[:, 0] for c in changed if c.shape[0] > int(ids.max())]).unique()
        rows = rows[: ids.shape[1] // 2]
        ids[0, : len(rows)] = rows.to(ids)
    return batch


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: _placed(v, device, dtype) for k, v in value.items()}
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


@dataclass(frozen=True)
class Effect:
    """What an adapter does to a model's main output on a batch, and how far an exported one is from that."""

    size: float  # the largest output of the model with the live adapter
    moved: float  # the largest difference that the live adapter makes
    difference: float  # the largest difference between the exported one and the live one
    relative: float  # ‖exported − live‖ / ‖live − base‖

    def __str__(self) -> str:
        share = self.difference / self.size if self.size else 0.0
        return (
            f"the adapter moves outputs of up to {self.size:.3g} by {self.moved:.3g};\n"
            f"  what was written is {self.difference:.1e} off: {share:.1e} of the largest, "
            f"{self.relative:.1e} of the change"
        )


@torch.no_grad()
def outputs_of(model: nn.Module, names: tuple[str, ...], batch: object) -> Outputs:
    """Return a model's outputs on a batch with exactly these adapters acting, outside training; all is put back."""
    root, state = state_of(model)
    with acting_again(root, state), training_mode(root, False):
        apply_active(root, state, names)
        return run(root, batch, called="probe")


def effect(
    adapter: Adapter, exported: Adapter | Callable[[], Outputs], batch: object, *, exact: bool = True, where: str = ""
) -> Effect:
    """Compare the outputs of an exported adapter, attached beside or run by a function, with those of the live one.

    Raises AddendaError where the live one moves nothing, so that nothing could be seen; where the exported one leaves
    the model as the base is; and, for one that is to be exact, where outputs differ by more than rounding.
    """
    base, live = (outputs_of(adapter.model, names, batch).main for names in ((), (adapter.name,)))
    if isinstance(exported, Adapter):
        other = outputs_of(adapter.model, (exported.name,), batch).main
    else:
        other = exported().main
    if other.shape != live.shape:
        raise AddendaError(f"{where}: its outputs are {tuple(other.shape)}, and {tuple(live.shape)} were expected.")
    found = Effect(_largest(live), _largest(live - base), _largest(other - live), distance(other - base, live - base))
    if not found.moved > 0:
        raise AddendaError(
            f"{adapter.name!r} moves no output of the probe batch, so nothing can be proved by it: it was not trained, "
            "or the batch does not reach it. Train it, or give another probe=."
        )
    if not _largest(other - base) > 0:
        raise AddendaError(
            f"{where}: the adapter that was read back has no effect: the model answers as the base does."
        )
    half = any(torch.finfo(d).bits < 32 for d in (live.dtype, working_dtype(state_of(adapter.model).root)))
    limit = (_HALF if half else EXACT) * found.size
    if exact and not found.difference <= limit:  # deep models may amplify rounding: so it is measured
        limit = max(limit, 2 * _noise(adapter, batch))
    if exact and not found.difference <= limit:
        raise AddendaError(
            f"{where}: what was read back acts otherwise than the adapter: {found}. At most {limit:.2e} is rounding."
        )
    return found


def _noise(adapter: Adapter, batch: object) -> float:
    """Return how far the main output of the live adapter is from that in the next wider dtype; 0 if not measured."""
    root, state = state_of(adapter.model)
    with acting_again(root, state), training_mode(root, False):
        apply_active(root, state, (adapter.name,))
        live = run(root, batch)
        noise = Proof.of(root, batch, live).noise
    return noise.get("logits" if "logits" in live.values else next(iter(live.values)), 0.0)


def _largest(t: Tensor) -> float:
    return float(t.double().abs().max()) if t.numel() else 0.0
