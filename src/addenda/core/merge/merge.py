"""Merging a change into the base, with proof: the rounding lost at each site, and whether the outputs still agree."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import refuse_sharded
from addenda.core.forward.acting import between_forwards, blocks
from addenda.core.merge.judge import Proof, distance, divergence
from addenda.core.merge.outputs import Outputs, run
from addenda.core.merge.write import Base, Writing, packed_weights, write
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.borrow import in_its_mode, training_mode
from addenda.core.site.site import owners_of, site_at
from addenda.core.state import copies as cast
from addenda.core.state.bypass import known_reads, watching
from addenda.core.state.merged import apart, restore, still_merged, take_out
from addenda.core.state.state import State, apply_active, apply_again, intact, state_of

UNSEEN_LIMIT = 0.25  # share of the change that rounding may take when no batch is there to judge by


@dataclass(frozen=True)
class Way:
    """One way to merge into packed weights, and its distance from the packed values with the adapter on them.

    weights: ‖merged − (Ŵ + Δ)‖ / ‖Ŵ + Δ‖ over the packed sites; output, kl: over the verify batch, as in the report.
    """

    weights: float
    output: float | None = None
    kl: float | None = None

    def __str__(self) -> str:
        parts = [f"weights {self.weights:.2e}"]
        parts += [] if self.output is None else [f"outputs {self.output:.2e}"]
        return ", ".join(parts + ([] if self.kl is None else [f"KL {self.kl:.2e} nats"]))


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge. Errors are ‖merged − (W + Δ)‖ / ‖Δ‖; divergences are over the verify batch."""

    sites: dict[str, float]
    total: float  # the same error over all sites together
    dtype: str
    kl: float | None = None  # mean KL(adapter ‖ merged) of the logits, in nats
    noise_kl: float | None = None  # mean KL(adapter in a wider dtype ‖ adapter): what the base's dtype costs anyway
    top1: float | None = None  # share of positions where the most likely output is the same
    output: float | None = None  # relative L2 distance of the main output: the logits, or the first
    noise_output: float | None = None
    compared: int = 0  # how many floating outputs, each number of them
    worst: str = ""  # the one nearest to its limit: where it stands in what the model returns
    moved: float | None = None  # its largest difference
    limit: float | None = None  # and what that may be
    notes: tuple[str, ...] = field(default=())
    ways: dict[str, Way] = field(default_factory=dict)  # where base=, full= or requantize= asked for more than one

    def __str__(self) -> str:
        worst = sorted(self.sites.items(), key=lambda item: -item[1])[:3]
        lines = [
            f"merged {len(self.sites)} sites in {self.dtype}: rounding took {self.total:.2%} of the change "
            f"(worst: {', '.join(f'{p} {e:.2%}' for p, e in worst)})"
        ]
        if self.output is not None:
            lines.append(
                f"compared {self.compared} outputs: the largest difference is {self.moved:.2e}, at {self.worst!r} "
                f"(limit {self.limit:.2e})"
            )
            noise = "not measured" if self.noise_output is None else f"{self.noise_output:.2e}"
            lines.append(f"outputs differ by {self.output:.2e} (noise of {self.dtype}: {noise})")
        if self.kl is not None:
            noise_kl = "not measured" if self.noise_kl is None else f"{self.noise_kl:.2e}"
            lines.append(f"KL {self.kl:.2e} nats (noise {noise_kl}), top-1 agreement {self.top1:.2%}")
        lines += [f"{name}: {way} away from what was trained" for name, way in self.ways.items()]
        return "\n".join([*lines, *self.notes])


@checked()
@between_forwards("merge")
@torch.no_grad()
@in_its_mode
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

    verify: a batch: a tensor, a tuple of arguments, a dict (for model(**batch) where the forward takes its names, else
    as the one argument), or a function that is given the model and returns its outputs. All floating outputs before and
    after are compared, in evaluation mode, with equal random draws. dtype: convert the whole model first, e.g.
    torch.float32, where nothing is lost; what that changes is kept beside, for `unmerge`. rounding: "nearest" or
    "stochastic" (unbiased: changes below half a rounding step survive on average).

    allow_loss: the share of the change that rounding may take. Without a batch that is judged on the weights. With one
    the outputs may then move further: by the share that rounding did take of the weights, doubled, and at most this,
    of what the change itself moves them. It excuses nothing but rounding, so hardly anything in float32.

    For packed (quantised) weights Ŵ, which become plain ones: base="as-trained" writes Ŵ + ΔW, what was trained;
    "full-precision" writes W + ΔW with the weights of `full`, the model before it was packed, and W where no adapter
    acts. requantize packs the result again, in the form that each weight had. The report then has all ways with their
    distances from what was trained. Only as-trained and plain must reproduce the adapter's outputs; for the others
    allow_loss, if given, is the most that rounding may take.

    Raises AddendaError, with the base's bits and dtypes restored, when an output moves by more than twice the larger of
    what the base's dtype costs anyway (against the same adapter in the next wider dtype) and the rounding of the output
    itself, or, without a batch, when rounding takes more than a quarter of the change; when a weight is read past its
    module's forward, where the adapter does not act (`core.state.bypass`); when outputs, before or after, or weights
    are not finite; when the batch does not fit; and when nothing is active, a change is merged already, or an adapter
    that is active changes activations.
    """
    root, state = state_of(model)
    refuse_sharded(root, "nothing can be merged into it")
    if state.merged is not None:
        raise AddendaError(f"{', '.join(state.active)} is merged already. Call unmerge(model) first.")
    if not state.active:
        raise AddendaError("No adapter is active, so there is nothing to merge. Call switch(model, name) first.")
    for n in state.active:
        intact(root, n, state.records[n])
    _only_weights(state)
    apart(state)
    if rounding not in ("nearest", "stochastic"):
        raise AddendaError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise AddendaError(f"dtype must be a floating one of torch's, such as torch.float32, got {dtype!r}.")
    if base not in ("as-trained", "full-precision"):
        raise AddendaError(f"base must be 'as-trained' or 'full-precision', got {base!r}.")
    if base == "full-precision" and full is None:
        raise AddendaError("base='full-precision' wants the weights before they were packed: full=the plain model.")
    if (full is not None or requantize) and not packed_weights(root):
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


def _only_weights(state: State) -> None:
    """Raise AddendaError where an active adapter changes activations: no weight can hold that."""
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
    names, proof, around = state.active, None, blocks()
    ways: dict[str, Way] = {}
    apply_active(root, state, names)  # in no block
    try:
        if verify is not None:
            owners = owners_of(root)
            with watching(site_at(root, p, owners) for n in names for p in state.records[n].methods):
                reference = run(root, verify)
            proof = Proof.of(root, verify, reference)
            if allow_loss:
                apply_active(root, state, ())
                proof.base = run(root, verify)
                apply_active(root, state, names)
        for way in how.others():
            _, _, gap = write(root, state, way)
            after = None if proof is None else run(root, verify).main
            ways[str(way)] = _way(gap, proof, after)
            take_out(root, state)
            apply_active(root, state, names)
        errors, total, _ = write(root, state, how)
        dtypes = dict.fromkeys(str(kept.values.dtype).removeprefix("torch.") for kept in state.merged.values())
        parts = [(n, len(left)) for n in names if (left := state.records[n].left_out)]
        notes = tuple(
            f"{n!r} is a part of its file: {count} sites were left out as it was loaded" for n, count in parts
        )
        report = MergeReport(errors, total, next(iter(dtypes)), ways=ways, notes=notes)
        if proof is None:
            return _unseen(report, root, state, allow_loss, how)
        after, excused = run(root, verify), min(allow_loss, 2 * total) if allow_loss else 0.0
        if not proof.judge(after, excused).within:
            proof.look_again(root, verify, after)
        return _judged(report, proof, after, excused, allow_loss, how)
    except BaseException:
        take_out(root, state)
        apply_again(root, state, names, around)
        raise


@checked()
@between_forwards("unmerge")
@torch.no_grad()
@in_its_mode
def unmerge(model: nn.Module) -> None:
    """Put the base's own bits back, exactly; the same adapters are active as before the merge.

    Where the merge has converted the model (dtype=), all of it gets its own dtypes and values back. Interrupted, it can
    be called again.
    """
    root, state = state_of(model)
    if state.merged is None:
        raise AddendaError("Nothing is merged into the base.")
    with still_merged(state):
        restore(root, state)
        apply_active(root, state, state.active)


def _way(away: float, proof: Proof | None, after: Tensor | None) -> Way:
    if proof is None or after is None:
        return Way(away)
    reference = proof.before.main
    return Way(away, distance(after, reference), divergence(reference, after)[0] if proof.logits else None)


def _unseen(report: MergeReport, root: nn.Module, state: State, allow_loss: float | None, how: Writing) -> MergeReport:
    """Return the report of a merge without a batch. Raises AddendaError where rounding took too much."""
    _refuse_broken(report, finite=True)
    if how.plain:
        limit = max(UNSEEN_LIMIT, allow_loss or 0.0)
        reason = f"rounding to {report.dtype} takes too much, and no verify=batch shows it harmless"
    else:  # another base, or other codes: the weights are meant to differ
        limit = math.inf if allow_loss is None else allow_loss
        reason = f"{how} loses more than allow_loss={allow_loss}"
    if not report.total <= limit:
        raise _undone(report, reason)
    notes = ("outputs: not checked, as no verify=batch was given", known_reads(root, state))
    return replace(report, notes=(*report.notes, *filter(None, notes)))


def _judged(
    report: MergeReport, proof: Proof, after: Outputs, excused: float, allow_loss: float | None, how: Writing
) -> MergeReport:
    """Return the report of a merge with outputs compared. Raises AddendaError where they have moved too far.

    excused: what allow_loss admits: the share that rounding took of the weights, doubled, as outputs follow no one.
    """
    _refuse_broken(report, finite=not any(bool(t.isnan().any()) for t in after.values.values()))
    verdict = proof.judge(after, excused)
    report = replace(
        report, kl=verdict.kl, noise_kl=verdict.noise_kl, top1=verdict.top1, output=verdict.output,
        noise_output=verdict.noise_output, compared=verdict.compared, worst=verdict.worst, moved=verdict.moved,
        limit=verdict.limit, notes=(*report.notes, *proof.notes),
    )  # fmt: skip
    if not how.plain:  # another base, or other codes: the outputs are meant to differ
        if allow_loss is not None and not report.total <= allow_loss:
            raise _undone(report, f"{how} loses more than allow_loss={allow_loss}")
    elif not verdict.within:
        raise _undone(
            report,
            f"of {verdict.compared} outputs {verdict.worst!r} moves by {verdict.moved:.2e}, more than the limit of "
            f"{verdict.limit:.2e} (twice the larger of the noise of {report.dtype}, {verdict.noise:.2e}, and its "
            "rounding" + (f", and {excused:.0%} of what the change itself moves)" if excused else ")"),
        )
    return report


def _refuse_broken(report: MergeReport, finite: bool) -> None:
    broken = "" if math.isfinite(report.total) else "the changed weights"
    broken = broken if finite else "the outputs"
    if broken:
        raise AddendaError(
            f"The merge was undone: {broken} are not finite in {report.dtype}, whose largest number is "
            f"{torch.finfo(getattr(torch, report.dtype)).max:.3g}. Ways out: merge(…, dtype=torch.float32), or keep "
            "the adapter unmerged."
        )


def _undone(report: MergeReport, reason: str) -> AddendaError:
    return AddendaError(
        f"The merge was undone: {reason} (rounding took {report.total:.1%} of the change). Ways out: "
        "merge(…, dtype=torch.float32); rounding='stochastic'; allow_loss=1.0 to accept what rounding takes; or keep "
        "the adapter unmerged."
    )
