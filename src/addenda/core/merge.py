"""Merging a change into the base, with proof: what rounding lost at each site, and whether the outputs still agree."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.adapted import Adapted, effective_weight, slots_of
from addenda.core.attach import restore
from addenda.core.borrow import training_mode
from addenda.core.errors import AddendaError
from addenda.core.hidden import HiddenMethod
from addenda.core.packed import Packed
from addenda.core.random import Stream
from addenda.core.sharded import refuse_sharded
from addenda.core.sites import PARAMETER, Site, owners_of, site_at
from addenda.core.state import Kept, State, apply_active, state_of

_UNSEEN_LIMIT = 0.25  # share of the change that rounding may take when no batch is there to judge by


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Errors are ‖merged − (W + Δ)‖ / ‖Δ‖; divergences are over the verify batch."""

    sites: dict[str, float]
    total: float  # the same error over all sites together
    dtype: str
    kl: float | None = None  # mean KL(adapter ‖ merged) of the logits, in nats
    noise_kl: float | None = None  # mean KL(adapter in a wider dtype ‖ adapter): what the base's dtype costs anyway
    top1: float | None = None  # share of positions where the most likely output is the same
    output: float | None = None  # relative L2 distance of the outputs
    noise_output: float | None = None
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        worst = sorted(self.sites.items(), key=lambda item: -item[1])[:3]
        lines = [
            f"merged {len(self.sites)} sites in {self.dtype}: rounding took {self.total:.2%} of the change "
            f"(worst: {', '.join(f'{p} {e:.2%}' for p, e in worst)})"
        ]
        if self.output is not None:
            lines.append(f"outputs differ by {self.output:.2e} (noise of {self.dtype}: {self.noise_output:.2e})")
        if self.kl is not None:
            lines.append(f"KL {self.kl:.2e} nats (noise {self.noise_kl:.2e}), top-1 agreement {self.top1:.2%}")
        return "\n".join([*lines, *self.notes])


@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    verify: object | None = None,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    allow_loss: float | None = None,
    seed: int = 0,
) -> MergeReport:
    """Write W + ΔW of the active adapter(s) into the base, so that it runs at the base's cost; `unmerge` undoes it.

    verify: a batch (a dict for model(**batch), else model(batch)): outputs before and after are compared.
    dtype: convert the whole model first, e.g. torch.float32, where nothing is lost. rounding: "nearest" or
    "stochastic" (unbiased: changes below half a rounding step survive on average). allow_loss: accept rounding that
    takes up to this share of the change.

    Raises AddendaError, with the base's bits restored, when the outputs move by more than twice what the base's dtype
    costs anyway (the adapter's outputs against the same in the next wider dtype), or, without a batch, when rounding
    takes more than a quarter of the change; and when nothing is active, a change is merged already, or an adapter that
    is active changes activations.
    """
    root, state = state_of(model)
    refuse_sharded(root, "nothing can be merged into it")
    if state.merged is not None:
        raise AddendaError(f"{', '.join(state.active)} is merged already. Call unmerge(model) first.")
    if not state.active:
        raise AddendaError("No adapter is active, so there is nothing to merge. Call switch(model, name) first.")
    _only_weights(state)
    if rounding not in ("nearest", "stochastic"):
        raise AddendaError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}.")
    if dtype is not None:
        root.to(dtype)
    with training_mode(root, False):
        return _merged(root, state, verify, rounding, allow_loss, seed)


def _only_weights(state: State) -> None:
    """Raises AddendaError where an active adapter changes activations: no weight can hold that."""
    for name in state.active:
        hidden = [path for path, m in state.records[name].methods.items() if isinstance(m, HiddenMethod)]
        if hidden:
            methods = ", ".join(dict.fromkeys(state.records[name].methods[path].name for path in hidden))
            raise AddendaError(
                f"{name!r} cannot be merged: {methods} changes what modules return ({len(hidden)} places, e.g. "
                f"{hidden[0]}), which no weight can hold. Keep it attached, or switch to adapters of weights only."
            )


def _merged(
    root: nn.Module, state: State, verify: object | None, rounding: str, allow_loss: float | None, seed: int
) -> MergeReport:
    before = noise = None
    if verify is not None:
        before = _outputs(root, verify)
        wide, wider = _wider(root)
        noise = _outputs(wide, _in(verify, wider))
    owners = owners_of(root)
    state.merged, errors, lost, size = {}, {}, 0.0, 0.0
    names = state.active
    try:
        for path in dict.fromkeys(p for n in names for p in state.records[n].methods):
            site = site_at(root, path, owners)
            index, before_it, exact = _change(site)
            change = torch.linalg.vector_norm(exact - before_it)
            rounded = _rounded(exact, site.weight.dtype, rounding, Stream(seed, "rounding", path))
            error = torch.linalg.vector_norm(rounded.to(exact.dtype) - exact)
            errors[path] = float(error / change) if change > 0 else 0.0
            lost, size = lost + float(error) ** 2, size + float(change) ** 2
            state.merged[path] = Kept(before_it, index)
            Kept(rounded, index).into(site)
        apply_active(root, state, names)
        total = (lost / size) ** 0.5 if size else 0.0
        dtype = next(iter(state.merged.values())).values.dtype
        report = MergeReport(errors, total, str(dtype).removeprefix("torch."))
        report = _judged(report, root, verify, before, noise, allow_loss)
    except BaseException:
        restore(root, state)
        apply_active(root, state, names)
        raise
    return report


def _change(site: Site) -> tuple[Tensor | None, Tensor, Tensor]:
    """(flat positions or None for all, a copy of the base's values there, the exact new ones in float32 at least).

    Only what changes is touched: a sparse change of a contiguous weight is its few entries.
    """
    slots = slots_of(site.module)
    assert slots is not None
    live, W = slots.live[site.parameter], site.weight.detach()
    wide = torch.promote_types(W.dtype, torch.float32)
    if isinstance(W, Packed):
        return None, site.weight, effective_weight(site, live, wide)
    plain = W.is_contiguous() and not site.kind.transposed and (W.dim() == 2 or site.kind != PARAMETER)
    if not (plain and live and all(t.method.has("sparse") for t in live)):
        return None, W.clone(), effective_weight(site, live, wide)
    parts = [t.method.sparse(t.tensors(), site.shape) for t in live]
    index, values = parts[0][0].long(), parts[0][1].detach().to(wide)
    if len(parts) > 1:  # where masks overlap the changes add up
        every, place = torch.cat([i for i, _ in parts]).long().unique(return_inverse=True)
        added = torch.cat([v.detach().to(wide) for _, v in parts])
        index, values = every, values.new_zeros(len(every)).index_add_(0, place, added)
    before = W.view(-1)[index]
    return index, before, before.to(wide) + values


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the base's own bits back, exactly; the same adapters are active as before the merge."""
    root, state = state_of(model)
    if state.merged is None:
        raise AddendaError("Nothing is merged into the base.")
    restore(root, state)
    apply_active(root, state, state.active)


def _judged(
    report: MergeReport, root: nn.Module, verify: object | None, before, noise, allow_loss: float | None
) -> MergeReport:
    ways = (
        "Ways out: merge(…, dtype=torch.float32); rounding='stochastic'; allow_loss=1.0 to accept it; "
        "or keep the adapter unmerged."
    )
    if verify is not None:
        after = _outputs(root, verify)
        moved, usual = _distance(after, before), _distance(before, noise)
        report = replace(report, output=moved, noise_output=usual)
        floor = 2 * usual + 1e-6
        bad = moved > floor
        said = f"the outputs move by {moved:.2e}, more than twice the noise of {report.dtype} ({floor / 2:.2e})"
        if _is_logits(root, before):
            kl, top1 = _divergence(before, after)
            noise_kl, _ = _divergence(noise, before)
            report = replace(report, kl=kl, noise_kl=noise_kl, top1=top1)
            bad = kl > 2 * noise_kl + 1e-9
            said = f"KL is {kl:.2e} nats, more than twice the noise of {report.dtype} ({noise_kl:.2e})"
    else:
        bad = report.total > _UNSEEN_LIMIT
        said = (
            f"rounding to {report.dtype} takes {report.total:.1%} of the change, and no verify=batch shows it harmless"
        )
    if bad and report.total > (allow_loss or 0.0):
        raise AddendaError(f"The merge was undone: {said} (rounding took {report.total:.1%} of the change). {ways}")
    return report


def _outputs(model: nn.Module, batch: object) -> Tensor:
    result = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if isinstance(result, Tensor):
        return result.detach()
    first = getattr(result, "logits", None)
    if first is None:
        first = next(
            (v for v in (result.values() if isinstance(result, Mapping) else result) if torch.is_tensor(v)), None
        )
    if first is None:
        raise AddendaError(f"The verify batch gave a {type(result).__name__} without a tensor to compare.")
    return first.detach()


def _is_logits(root: nn.Module, output: Tensor) -> bool:
    return output.dim() >= 2 and output.shape[-1] > 1 and hasattr(root, "config") and not hasattr(root, "pooler")


def _in(batch: object, dtype: torch.dtype) -> object:
    """The batch with its floating tensors in another dtype."""
    if torch.is_tensor(batch):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {k: _in(v, dtype) for k, v in batch.items()}
    return batch


def _wider(root: nn.Module) -> tuple[nn.Module, torch.dtype]:
    """A copy of the model in the next wider dtype: float32 for half precision, float64 for float32."""
    dtypes = {p.dtype for p in root.parameters()}
    half = any(torch.finfo(d).bits < 32 for d in dtypes if d.is_floating_point and not _is_adapter_only(root, d))
    dtype = torch.float32 if half else torch.float64
    return copy.deepcopy(root).to(dtype), dtype


def _is_adapter_only(root: nn.Module, dtype: torch.dtype) -> bool:
    own = {id(p) for m in root.modules() if isinstance(m, Adapted) for p in m._modules["addenda"].parameters()}
    return all(id(p) in own for p in root.parameters() if p.dtype == dtype)


def _distance(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30))


def _divergence(p: Tensor, q: Tensor) -> tuple[float, float]:
    """Mean KL(p ‖ q) in nats over positions, and the share of positions with the same most likely output."""
    lp, lq = F.log_softmax(p.double(), -1), F.log_softmax(q.double(), -1)
    kl = (lp.exp() * (lp - lq)).sum(-1).mean()
    return max(float(kl), 0.0), float((p.argmax(-1) == q.argmax(-1)).float().mean())


def _rounded(exact: Tensor, dtype: torch.dtype, rounding: str, rng: Stream) -> Tensor:
    """Cast once. Stochastic: up with a probability equal to the distance, for bfloat16 and float16."""
    if rounding == "nearest" or dtype not in (torch.bfloat16, torch.float16):
        return exact.to(dtype)
    down = exact.to(dtype)
    down = torch.where(down.float() > exact, torch.nextafter(down, torch.full_like(down, -torch.inf)), down)
    up = torch.nextafter(down, torch.full_like(down, torch.inf))
    share = ((exact - down.float()) / (up.float() - down.float())).nan_to_num(0.0)
    return torch.where(rng.uniform(*exact.shape).to(exact.device) < share, up, down)
