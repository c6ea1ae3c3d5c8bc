"""`factorise`: the layers of a network as two thin ones each, at the rank that their singular values give.

After Trained Rank Pruning the cut at the training's own rule is the last projection. On a network that was trained
plainly the same call is the decomposition of Zhang et al. (scheme "channel") or of Jaderberg et al. ("spatial").
"""

import copy as copying
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from addenda.compressing.candidates import candidates
from addenda.compressing.criteria import Rule, Spectrum, highest_saving, tails
from addenda.compressing.macs import Call, calls, of_call
from addenda.compressing.recalibrate import recalibrate
from addenda.compressing.schemes import Place, spectrum
from addenda.core.base.arguments import check_batches, checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.ranges import Range
from addenda.core.modules.put import put
from addenda.core.site.targets import Target


@dataclass(frozen=True)
class Row:
    """What became of one layer. shape: (matrices, rows, columns). wanted: the rule's rank; rank: None where dense.

    macs: multiplications of one example as (before, after), None without an example. energy: the share that is kept.
    """

    path: str
    scheme: str
    shape: tuple[int, int, int]
    full: int
    wanted: int | None
    rank: int | None
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    energy: float
    why: str = ""


@dataclass(frozen=True)
class Factorised:
    """What `factorise` made. dense: other convolutions and linear layers, and why they stay as they are.

    parameters, macs: of the whole model, before and after. norms: batch norms that were recalibrated.
    """

    model: nn.Module = field(repr=False)
    rule: str
    layers: tuple[Row, ...]
    dense: dict[str, str]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    norms: int

    @property
    def ranks(self) -> dict[str, int | None]:
        """The ranks that rebuild this form in a fresh model: `factorise(fresh, ranks=…)`, then `load_state_dict`."""
        return {x.path: x.rank for x in self.layers}

    @property
    def speedup(self) -> float | None:
        """How many times fewer multiplications the whole model takes; no measured time."""
        return None if self.macs is None else self.macs[0] / self.macs[1]

    def to_dict(self) -> dict[str, Any]:
        """Return all but the model, for JSON."""
        rows = [{k: getattr(x, k) for k in x.__dataclass_fields__} for x in self.layers]
        return {
            "rule": self.rule, "layers": rows, "dense": self.dense, "parameters": self.parameters, "macs": self.macs,
            "norms": self.norms,
        }  # fmt: skip

    def __str__(self) -> str:
        head = ("layer", "scheme", "full rank", "rank", "energy kept", "parameters", "multiplications")
        rows: list[tuple[str, ...]] = [head]
        for x in self.layers:
            rank = str(x.rank) if x.rank is not None else f"dense ({x.why})"
            spent = "" if x.macs is None else f"{x.macs[0]:,} → {x.macs[1]:,}"
            numbers = f"{x.parameters[0]:,} → {x.parameters[1]:,}"
            rows.append((x.path, x.scheme, str(x.full), rank, f"{x.energy:.4f}", numbers, spent))
        widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        p, m = self.parameters, self.macs
        total = f"{self.rule}: parameters {p[0]:,} → {p[1]:,} ({p[0] / p[1]:.2f} × fewer)"
        if m is not None:
            total += f", multiplications for one example {m[0]:,} → {m[1]:,} ({m[0] / m[1]:.2f} × fewer)"
        lines += ["", total, *(f"dense: {path}: {why}" for path, why in self.dense.items())]
        if self.norms:
            lines.append(f"{self.norms} batch norms recalibrated")
        return "\n".join(lines)


@torch.no_grad()
@checked(special={"keep": Range(0, 1)})
def factorise(
    model: nn.Module,
    scheme: str = "channel",
    *,
    energy: float | None = None,
    value: float | None = None,
    relative: float | None = None,
    keep: float | None = None,
    ranks: Mapping[str, int | None] | None = None,
    targets: Target | Iterable[Target] = "conv",
    exclude: Iterable[Target] = (),
    example: Any = None,
    of: Literal["macs", "parameters"] | None = None,
    batches: Iterable[Any] | None = None,
    copy: bool = True,
) -> Factorised:
    """Replace a model's convolutions by two each (`compressing.schemes`), linear layers by a `LowRankLinear`.

    energy, value, relative, keep, ranks: exactly one, see `compressing.criteria`. example: one batch as the model is
    called with, a tensor, a tuple or a mapping; it gives the multiplications. of: what `keep` counts and what a layer
    must save to be factorised, by default multiplications where there is an example, else parameters: a layer whose two
    halves cost as much as itself or more stays as it is, unless `ranks` gives it one. batches: recalibrate batch norms
    on these. copy: leave this model untouched.

    Raises AddendaError for bad options, for weights that are not finite and for a model without such layers; the model
    is then as before.
    """
    rule = Rule(energy, value, relative, keep, ranks)
    if of not in (None, "macs", "parameters"):
        raise AddendaError(f"of must be 'macs' or 'parameters', got {of!r}.")
    if of == "macs" and example is None:
        raise AddendaError("of='macs' wants an example= to count multiplications on: one batch of images will do.")
    if batches is not None:
        check_batches("batches", batches)
    places, dense = candidates(model, targets, exclude, scheme)
    run = None if example is None else calls_of(model, example)
    if run is not None:
        uncalled = [p for p in places if not run[p]]
        dense |= dict.fromkeys(uncalled, "never called with this example")
        places = {p: x for p, x in places.items() if p not in uncalled}
    counted = run if run is not None and of != "parameters" else None
    rows, replacements = _factors(places, rule, counted, run)
    numbers, all_macs = _sizes(model), None if run is None else sum(_whole(model, p, c) for p, c in run.items())
    saved_parameters = sum(x.parameters[0] - x.parameters[1] for x in rows)
    saved_macs = sum(x.macs[0] - x.macs[1] for x in rows if x.macs)
    if copy:
        model = copying.deepcopy(model)
    originals = {path: model.get_submodule(path) for path in replacements}
    aliases = _aliases(model, originals)  # a layer that stands at several paths is replaced at all of them
    try:
        for path, layer in replacements.items():
            for alias in aliases[path]:
                put(model, alias, layer)
        norms = 0 if batches is None else recalibrate(model, batches)
    except BaseException:
        for path, layer in originals.items():
            for alias in aliases[path]:
                put(model, alias, layer)
        raise
    return Factorised(
        model, f"{scheme}, {rule}", tuple(rows), dense, (numbers, numbers - saved_parameters),
        None if all_macs is None else (all_macs, all_macs - saved_macs), norms,
    )  # fmt: skip


def _factors(
    places: dict[str, Place], rule: Rule, counted: dict[str, list[Call]] | None, run: dict[str, list[Call]] | None
) -> tuple[list[Row], dict[str, nn.Module]]:
    """Return the rows of a report, and the layers that replace others. One decomposition is held at a time."""
    joint_ranks = None
    if not rule.alone:
        joint_ranks = rule.over([spectrum_of(x, None if counted is None else counted[p]) for p, x in places.items()])
    rows, replacements = [], {}
    for path, place in places.items():
        U, S, Vt = place.decomposed()
        s = spectrum(S)
        rule_rank = rule.rank(s) if joint_ranks is None else joint_ranks[path]
        highest = highest_saving(*_prices(place, None if counted is None else counted[path]), len(s))
        unit = "parameters" if counted is None else "multiplications"
        rank, why = rule_rank, ""
        if rule_rank is None:
            why = "as given" if rule.ranks is not None else "the best use of the budget"
        elif rule_rank > highest and rule.ranks is None:  # given ranks rebuild what another count has allowed
            rank = None
            why = f"rank {rule_rank} costs more {unit} than dense, {highest} would be the highest to save any"
        if rank is not None:
            replacements[path] = place.factored(U, S, Vt, rank)
        losses = tails(s)
        rows.append(Row(
            path, place.called, place.stack, len(s), rule_rank, rank,
            _change(place, None, rank), None if run is None else _change(place, run[path], rank),
            1.0 if rank is None else float(1 - losses[rank] / losses[0].clamp_min(1e-300)), why,
        ))  # fmt: skip
    return rows, replacements


def spectrum_of(place: Place, calls: Sequence[Call] | None = None) -> Spectrum:
    """Return a layer as a rule over several sees it, its cost counted in these calls or in parameters."""
    return Spectrum.of(place.path, spectrum(place.decomposed()[1]), *_prices(place, calls))


def _prices(place: Place, calls: Sequence[Call] | None) -> tuple[int, int]:
    return place.dense(calls), place.per_rank(calls)


def _change(place: Place, calls: Sequence[Call] | None, rank: int | None) -> tuple[int, int]:
    dense, per_rank = _prices(place, calls)
    return dense, dense if rank is None else rank * per_rank


def calls_of(model: nn.Module, example: Any) -> dict[str, list[Call]]:
    """Return `macs.calls` of an example that is a tensor, a tuple or a mapping."""
    if isinstance(example, Mapping):
        return calls(model, **example)
    return calls(model, *(example if isinstance(example, (tuple, list)) else (example,)))


def _whole(model: nn.Module, path: str, made: list[Call]) -> int:
    return round(sum(of_call(model.get_submodule(path), call) for call in made))


def _aliases(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    paths_by_id: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths_by_id.setdefault(id(module), []).append(path)
    return {path: paths_by_id[id(module)] for path, module in modules.items()}


def _sizes(model: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
