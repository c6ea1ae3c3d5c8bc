"""Merging a change into the base, with proof: what rounding lost at each site, and whether the outputs still agree.

Where the base's weights are packed there are four ways: onto the values that the adapter was trained on, or onto those
that were lost when they were packed; and either of them plain, or packed again.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core import cast
from addenda.core.adapted import Adapted, effective_weight, slots_of
from addenda.core.arguments import checked
from addenda.core.attach import restore, take_out
from addenda.core.borrow import training_mode
from addenda.core.errors import AddendaError
from addenda.core.hidden import HiddenMethod
from addenda.core.packed import Packed
from addenda.core.random import Stream
from addenda.core.sharded import refuse_sharded
from addenda.core.sites import PARAMETER, Site, owners_of, site_at
from addenda.core.state import Kept, State, apply_active, state_of, unwrap
from addenda.core.twin import aside

Base = Literal["as-trained", "full-precision"]
_UNSEEN_LIMIT = 0.25  # share of the change that rounding may take when no batch is there to judge by


@dataclass(frozen=True)
class Way:
    """One way to merge into packed weights, against what was trained: the packed values, and the adapter on them.

    weights: ‖merged − (Ŵ + Δ)‖ / ‖Ŵ + Δ‖ over the packed sites; output, kl: over the verify batch, as in the report.
    """

    weights: float
    output: float | None = None
    kl: float | None = None

    def __str__(self) -> str:
        told = [f"weights {self.weights:.2e}"]
        told += [] if self.output is None else [f"outputs {self.output:.2e}"]
        return ", ".join(told + ([] if self.kl is None else [f"KL {self.kl:.2e} nats"]))


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
    ways: dict[str, Way] = field(default_factory=dict)  # where base=, full= or requantize= asked for more than one

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
        lines += [f"{way}: {told} away from what was trained" for way, told in self.ways.items()]
        return "\n".join([*lines, *self.notes])


@checked()
@torch.no_grad()
def merge(
    model: nn.Module,
    *,
    verify: object | None = None,
    dtype: torch.dtype | None = None,
    rounding: str = "nearest",
    allow_loss: float | None = None,
    seed: int = 0,
    base: Base = "as-trained",
    full: nn.Module | None = None,
    requantize: bool = False,
) -> MergeReport:
    """Write W + ΔW of the active adapter(s) into the base, so that it runs at the base's cost; `unmerge` undoes it.

    verify: a batch (a dict for model(**batch), else model(batch)): outputs before and after are compared.
    dtype: convert the whole model first, e.g. torch.float32, where nothing is lost; what that changes is kept beside,
    for `unmerge`. rounding: "nearest" or "stochastic" (unbiased: changes below half a rounding step survive on
    average). allow_loss: accept rounding that takes up to this share of the change.

    For packed (quantised) weights Ŵ, which become plain ones: base="as-trained" writes Ŵ + ΔW, what was trained;
    "full-precision" writes W + ΔW with the weights of `full`, the model before it was packed, and W where no adapter
    acts. requantize packs the result again, in the form that each weight had. The report then has all ways with their
    distances from what was trained. Only as-trained and plain must reproduce the adapter's outputs; for the others
    allow_loss, if given, is the most that rounding may take.

    Raises AddendaError, with the base's bits and dtypes restored, when the outputs move by more than twice what the
    base's dtype costs anyway (the adapter's outputs against the same in the next wider dtype), or, without a batch,
    when rounding takes more than a quarter of the change; when outputs, before or after, or weights are not finite; and
    when nothing is active, a change is merged already, or an adapter that is active changes activations.
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
    if base not in ("as-trained", "full-precision"):
        raise AddendaError(f"base must be 'as-trained' or 'full-precision', got {base!r}.")
    if base == "full-precision" and full is None:
        raise AddendaError("base='full-precision' wants the weights before they were packed: full=the plain model.")
    if (full is not None or requantize) and not _packed(root):
        raise AddendaError(
            f"No weight of this {type(root).__name__} is packed, so there is one way to merge; leave base=, full= and "
            "requantize= out."
        )
    state.cast = {} if dtype is None else cast.changed_by(root, dtype)
    try:
        if dtype is not None:
            nn.Module.to(root, dtype)  # transformers' own refuses quantised models, whose packed weights follow too
        with training_mode(root, False):
            return _merged(root, state, verify, allow_loss, Writing(base, requantize, full, rounding, seed))
    except BaseException:
        restore(root, state)
        raise


@dataclass(frozen=True)
class Writing:
    """How the changed weights are written. full: the model with the weights before they were packed."""

    base: Base
    again: bool
    full: nn.Module | None
    rounding: str
    seed: int

    def __str__(self) -> str:
        return f"{self.base}, packed again" if self.again else self.base

    @property
    def plain(self) -> bool:
        """Whether it is the one way that there is for plain weights."""
        return self.base == "as-trained" and not self.again

    def others(self) -> "list[Writing]":
        """All ways to compare, where one was asked for that is not the plain one."""
        if self.plain and self.full is None:
            return []
        bases: list[Base] = ["as-trained", *(["full-precision"] if self.full is not None else [])]
        return [replace(self, base=b, again=again) for b in bases for again in (False, True) if self.again or not again]


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
    root: nn.Module, state: State, verify: object | None, allow_loss: float | None, how: Writing
) -> MergeReport:
    before = noise = None
    if verify is not None:
        before = _outputs(root, verify)
        if wrong := int((~torch.isfinite(before)).sum()):
            raise AddendaError(
                f"The verify batch has outputs that are not finite before anything is merged: {wrong:,} of "
                f"{before.numel():,}, in {before.dtype}, so they prove nothing. Give another batch, a wider dtype=, "
                "or an adapter that has not diverged."
            )
        wide, wider = _wider(root)
        noise = _outputs(wide, _in(verify, wider))
    names, ways = state.active, {}
    try:
        for way in how.others():
            _, _, away = _write(root, state, way)
            after = None if verify is None else _outputs(root, verify)
            ways[str(way)] = _way(root, away, before, after)
            take_out(root, state)
            apply_active(root, state, names)
        errors, total, _ = _write(root, state, how)
        dtypes = dict.fromkeys(str(kept.values.dtype).removeprefix("torch.") for kept in state.merged.values())
        report = MergeReport(errors, total, next(iter(dtypes)), ways=ways)
        report = _judged(report, root, verify, before, noise, allow_loss, how)
    except BaseException:
        take_out(root, state)
        apply_active(root, state, names)
        raise
    return report


def _write(root: nn.Module, state: State, how: Writing) -> tuple[dict[str, float], float, float]:
    """(the error at each site, over all of them, how far packed sites end from what was trained)."""
    owners, names = owners_of(root), state.active
    state.merged, errors = {}, {}
    lost = size = away = trained = 0.0
    for path in dict.fromkeys(p for n in names for p in state.records[n].methods):
        site = site_at(root, path, owners)
        index, kept, before, exact = _change(site)
        packed = kept if isinstance(kept, Packed) else None
        aim = exact
        if packed is not None and how.base == "full-precision":
            assert how.full is not None
            plain = plain_weight(how.full, path, packed).detach().to(exact.device, exact.dtype)
            before, aim = plain, plain + (exact - before)
        change = torch.linalg.vector_norm(aim - before)
        if packed is not None and how.again:
            rounded = packed.again(aim.to(packed.dtype))
            written = rounded.dense(exact.dtype)
        else:
            rounded = _rounded(aim, site.weight.dtype, how.rounding, Stream(how.seed, "rounding", path))
            written = rounded.to(exact.dtype)
        error = torch.linalg.vector_norm(written - aim)
        errors[path] = float(error / change) if change > 0 else 0.0
        lost, size = lost + float(error) ** 2, size + float(change) ** 2
        if packed is not None:
            away += float(torch.linalg.vector_norm(written - exact)) ** 2
            trained += float(torch.linalg.vector_norm(exact)) ** 2
        state.merged[path] = Kept(kept, index)
        Kept(rounded, index).into(site)
    if how.base == "full-precision" and not how.again:  # where no adapter acts the packed weights become plain too
        assert how.full is not None
        for path, packed in _packed(root).items():
            plain = plain_weight(how.full, path, packed).detach().to(packed.device, packed.dtype, copy=True)
            site = site_at(root, path, owners)
            state.merged[path] = Kept(site.weight)
            Kept(plain).into(site)
    apply_active(root, state, names)
    return errors, (lost / size) ** 0.5 if size else 0.0, (away / trained) ** 0.5 if trained else 0.0


def _packed(root: nn.Module) -> dict[str, Packed]:
    """The packed weights of a model by the path of their module."""
    return {p: w for p, m in root.named_modules() if isinstance(w := m._parameters.get("weight"), Packed)}


def plain_weight(full: nn.Module, path: str, like: Tensor) -> Tensor:
    """The plain weight that a model has at a path. Raises AddendaError where it has none of the shape of `like`."""
    try:
        found = site_at(unwrap(full), path).weight
    except AddendaError:
        found = None
    if found is None or found.shape != like.shape or isinstance(found, Packed):
        raise AddendaError(
            f"The {type(unwrap(full)).__name__} that was given has no plain weight of shape {tuple(like.shape)} at "
            f"{path}. Give the model as it was before its weights were packed."
        )
    return found


def _change(site: Site) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(flat positions or None for all, a copy of the base's own there, its values, the exact new ones), the last two in
    float32 at least.

    Only what changes is touched: a sparse change of a contiguous weight is its few entries.
    """
    slots = slots_of(site.module)
    assert slots is not None
    live, W = slots.live[site.parameter], site.weight.detach()
    wide = torch.promote_types(W.dtype, torch.float32)
    if isinstance(W, Packed):
        return None, site.weight, W.dense(wide), effective_weight(site, live, wide)
    plain = W.is_contiguous() and not site.kind.transposed and (W.dim() == 2 or site.kind != PARAMETER)
    if not (plain and live and all(t.method.has("sparse") for t in live)):
        return None, W.clone(), W.to(wide), effective_weight(site, live, wide)
    parts = [t.method.sparse(t.tensors(), site.shape) for t in live]
    index, values = parts[0][0].long(), parts[0][1].detach().to(wide)
    if len(parts) > 1:  # where masks overlap the changes add up
        every, place = torch.cat([i for i, _ in parts]).long().unique(return_inverse=True)
        added = torch.cat([v.detach().to(wide) for _, v in parts])
        index, values = every, values.new_zeros(len(every)).index_add_(0, place, added)
    before = W.view(-1)[index]
    return index, before, before.to(wide), before.to(wide) + values


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the base's own bits back, exactly; the same adapters are active as before the merge.

    Where the merge has converted the model (dtype=), all of it gets its own dtypes and values back.
    """
    root, state = state_of(model)
    if state.merged is None:
        raise AddendaError("Nothing is merged into the base.")
    restore(root, state)
    apply_active(root, state, state.active)


def _way(root: nn.Module, away: float, before: Tensor | None, after: Tensor | None) -> Way:
    if before is None or after is None:
        return Way(away)
    kl = _divergence(before, after)[0] if _is_logits(root, before) else None
    return Way(away, _distance(after, before), kl)


def _judged(
    report: MergeReport, root: nn.Module, verify: object | None, before, noise, allow_loss: float | None, how: Writing
) -> MergeReport:
    ways = (
        "Ways out: merge(…, dtype=torch.float32); rounding='stochastic'; allow_loss=1.0 to accept it; "
        "or keep the adapter unmerged."
    )
    broken = "" if math.isfinite(report.total) else "the changed weights"
    if verify is not None:
        after = _outputs(root, verify)
        broken = broken if bool(torch.isfinite(after).all()) else "the outputs"
        moved, usual = _distance(after, before), _distance(before, noise)
        report = replace(report, output=moved, noise_output=usual)
        floor = 2 * usual + 1e-6
        bad = not moved <= floor  # NaN is no proof
        said = f"the outputs move by {moved:.2e}, more than twice the noise of {report.dtype} ({floor / 2:.2e})"
        if _is_logits(root, before):
            kl, top1 = _divergence(before, after)
            noise_kl, _ = _divergence(noise, before)
            report = replace(report, kl=kl, noise_kl=noise_kl, top1=top1)
            bad = not kl <= 2 * noise_kl + 1e-9
            said = f"KL is {kl:.2e} nats, more than twice the noise of {report.dtype} ({noise_kl:.2e})"
    else:
        bad = not report.total <= _UNSEEN_LIMIT
        said = (
            f"rounding to {report.dtype} takes {report.total:.1%} of the change, and no verify=batch shows it harmless"
        )
    if not how.plain:  # another base, or other codes: the outputs are meant to differ
        bad = allow_loss is not None
        said = f"{how} loses more than allow_loss={allow_loss}"
    if broken:
        raise AddendaError(
            f"The merge was undone: {broken} are not finite in {report.dtype}, whose largest number is "
            f"{torch.finfo(getattr(torch, report.dtype)).max:.3g}. Ways out: merge(…, dtype=torch.float32), or keep "
            "the adapter unmerged."
        )
    if bad and not report.total <= (allow_loss or 0.0):
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
    return nn.Module.to(copy.deepcopy(root, aside(root)), dtype), dtype


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
