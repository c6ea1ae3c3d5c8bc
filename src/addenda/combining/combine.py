"""Several adapters of one base as one: `addenda.combine`.

| how            | what                                                     | default weights, options          |
| -------------- | -------------------------------------------------------- | --------------------------------- |
| `cat`          | Σ w ΔW, exactly: factors side by side, ranks add         | 1                                 |
| `linear`       | Σ w ΔW                                                   | 1/T                               |
| `task-arithmetic` | Σ w ΔW                                                | 1; scale                          |
| `svd`          | Σ w ΔW, then the nearest of a rank                       | 1; rank or energy                 |
| `magnitude`    | the largest entries of each, summed                      | 1; density 0.2                    |
| `ties`         | trimmed, signs elected, mean of those that agree         | 1; density 0.2                    |
| `dare`         | entries dropped at random, rescaled, summed              | 1; density 0.5, seed              |
| `della`        | small entries dropped more often, signs elected, mean    | 1; density 0.5, window, seed      |
| `tsv`          | singular vectors of all decorrelated, summed             | 1                                 |
| `iso-c`        | the sum with all singular values at their mean           | 1                                 |
| `sparse-union` | Σ w ΔW of sparse methods, at the positions of all        | 1                                 |
| `knots`        | a rule in the coordinates of KnOTS                       | rule="ties", its options          |
| `core-space`   | a rule in Core Space                                     | rule="tsv", its options           |

The equations, and where they differ from the papers' code, stand in `combining.rules` and `combining.spaces`.

Scales are folded in, and everything is computed in float64 of what an adapter *adds to the weight* outside training, a
site at a time. Factors are never averaged: (B_1 + B_2)(A_1 + A_2) has products of one adapter's B with the other's A,
and two halves of one adapter so come to be that adapter with a wrong scale.

Where every change at a site is low-rank, ΔW is never formed for sums (factors side by side), `svd` (a decomposition of
Σ r_t × Σ r_t), `tsv` and `iso-c` (in Core Space): these turn with their matrices, so that it is the same.
`magnitude`, `ties`, `dare` and `della` look at single entries of ΔW, and are something else in Core Space or KnOTS:
say which with `rule=`. Vectors (norms, biases) have no singular values: the matrix rules sum them.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from addenda.combining import forms
from addenda.combining.options import SPACES, SPECIAL, SUMS, How, check, check_settings, rule_of, weights_of
from addenda.combining.report import Combined, CombineReport
from addenda.combining.rules import RULES, Rule, Settings, within
from addenda.combining.sources import (
    Change,
    Given,
    Place,
    Source,
    attached,
    check_files,
    check_heads,
    loaded,
    model_of,
    named,
    places,
)
from addenda.combining.spaces import Low, core, evenly, total
from addenda.core.adapter.attach import detach, ready
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.base.sharded import refuse_sharded
from addenda.core.modules.borrow import training_mode
from addenda.core.state.undo import undone
from addenda.exporting.install import install
from addenda.reducing.delta import low_rank


class Result(NamedTuple):
    """What the changes at one site come to, of each matrix: the result, the exact weighted sum, the sources' ranks."""

    changes: list[Change]
    exact: list[Change]
    ranks: list[list[int | None]]

    def most(self, together: bool = False) -> int | None:
        """Return the highest rank of the sources, or of all of them together; None where one is not low-rank."""
        if any(r is None for of in self.ranks for r in of):
            return None
        return max((sum if together else max)(r for r in of if r is not None) for of in self.ranks)


@checked(special=SPECIAL)
@torch.no_grad()
def combine(
    adapters: Sequence[Given],
    *,
    model: nn.Module | None = None,
    how: How = "cat",
    rule: str | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    scale: float = 1.0,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    window: float | None = None,
    form: Literal["auto", "low-rank", "sparse", "dense"] = "auto",
    absent: Literal["error", "zero"] = "error",
    heads_of: str | None = None,
    base: Literal["exact", "compatible"] = "exact",
    seed: int = 0,
    name: str = "combined",
) -> CombineReport:
    """Attach one new adapter, idle, that several adapters of one base come to; see the module for each `how`.

    adapters: handles, names of attached ones, or files (of which `model` says where they belong; a file is put on the
    model for the time of the call only). weights: one each, or by name (a file's is its name without suffix). scale:
    of the result. rank, energy: no more than this rank, or share of ‖ΔW‖², at a site. density, window, seed: of rules
    that trim or drop. form: how the result is held; "auto" is entries for sparse-union, copies for vectors, else two
    thin matrices. A rule on entries gives a matrix of full rank: by default it is cut to the sources' ranks together,
    and the report says what that lost; form="dense" holds a copy of each weight instead, form="sparse" what is not 0.
    absent: what a site means that one adapter lacks. heads_of: the adapter whose heads, trained as whole copies, the
    result takes; there is no combination of heads.

    Raises AddendaError, and leaves the model as it was, for adapters of other bases, of other sites, of activations,
    with heads and no heads_of, named twice; for weights of another count, not finite or all 0; for options that `how`
    does not read; and as `attach` does.
    """
    root = model_of(adapters, model)
    sources, chosen, weighted, settings = prepared(
        adapters, model=root, how=how, rule=rule, weights=weights, scale=scale, rank=rank, energy=energy,
        density=density, window=window, form=form, absent=absent, heads_of=heads_of, base=base, seed=seed,
    )  # fmt: skip
    refuse_sharded(root, "its adapters cannot be combined")
    ready(root, name)
    with _on(root, sources, base) as held:
        found, heads = places(held, absent)
        kept, labels = _heads(held, heads, heads_of)
        made: dict[str, forms.Form] = {}
        told: list[Combined] = []
        with training_mode(root, False):
            for place in found:
                result = _site(place, how, chosen, list(weighted.values()), settings, seed)
                made[place.site.path] = held_as = _form(place, how, result, rank, energy, form)
                told.append(_told(place.site.path, held_as, result))
        before = sum(a.trainable for s in held if (a := s.adapter) is not None)
        given = {path: (f.method, f.tensors) for path, f in made.items()}
        adapter = install(
            root, given, name=name, heads=kept, labels=labels, what=f"A combination of {', '.join(weighted)}"
        )
    notes = [f"heads: those of {heads_of!r}"] if kept else []
    called = how if how not in SPACES else f"{chosen.name} in {'Core Space' if how == 'core-space' else 'KnOTS'}"
    return CombineReport(adapter, called, weighted, tuple(told), before, tuple(notes))


@checked(special=SPECIAL)
def prepared(
    adapters: Sequence[Given],
    *,
    model: nn.Module | None = None,
    how: How = "cat",
    rule: str | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    scale: float = 1.0,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    window: float | None = None,
    form: str = "auto",
    absent: Literal["error", "zero"] = "error",
    heads_of: str | None = None,
    base: str = "exact",
    seed: int = 0,
) -> tuple[list[Source], Rule, dict[str, float], Settings]:
    """Return the sources, the rule, the weights by name and the settings of a call of `combine`.

    All is checked that can be before a model is read or touched: words, numbers, files against each other. Raises
    AddendaError as `combine` does.
    """
    check(how, rule, form, absent, rank, energy, density, window, seed, base)
    sources = named(adapters, model)
    chosen = rule_of(how, rule)
    weighted = weights_of(weights, [s.name for s in sources], chosen)
    settings = Settings(1.0 if chosen.density is None else density or chosen.density, window, scale)
    check_settings(settings, window)
    check_files(sources, absent, heads_of, base)
    return sources, chosen, weighted, settings


@contextmanager
def _on(root: nn.Module, sources: list[Source], base: Literal["exact", "compatible"]):
    """Put the files among the sources on the model for the length of a block; an error leaves it as it was."""
    with undone(root):
        held = loaded(sources, root, base)
        yield held
        for temporary in list(attached(held)):
            detach(root, temporary)


def _heads(held: list[Source], heads: dict[str, list[str]], heads_of: str | None) -> tuple[dict, tuple[str, ...]]:
    """Return the heads that the result takes, by path, and the labels of its outputs."""
    check_heads(heads, heads_of)
    source = next((s for s in held if s.name == heads_of), None)
    if source is None or source.adapter is None:
        labels = {s.adapter.labels for s in held if s.adapter is not None}
        return {}, labels.pop() if len(labels) == 1 else ()
    copies = {p: {"value": t.tensors()["value"].detach()} for p, t in source.adapter.sites() if p in heads[source.name]}
    return copies, source.adapter.labels


def _site(place: Place, how: str, rule: Rule, weights: list[float], settings: Settings, seed: int) -> Result:
    """Return what the sources' changes at one site come to."""
    if how == "sparse-union" and (others := [t.method for t in place.tensors if t is not None and not _sparse(t)]):
        raise AddendaError(
            f"sparse-union is of methods that change single entries, and {place.site.path} has {others[0].name}. Use "
            "how='linear' or 'task-arithmetic' with form='dense'."
        )
    results, exact, ranks = [], [], []
    for e, changes in enumerate(place.changes()):
        here = [(c, w) for c, w in zip(changes, weights, strict=True) if c is not None]
        parts, share = [c for c, _ in here], [w for _, w in here]
        if how == "cat" and not all(isinstance(c, Low) for c in parts):
            kinds = ", ".join(dict.fromkeys(t.method.name for t in place.tensors if t is not None))
            raise AddendaError(
                f"cat puts factors side by side, and {place.site.path} ({kinds}) has a change without. Use "
                "how='linear' or 'svd' with a rank, or form='dense'."
            )
        exact.append(_sum(parts, share))
        ranks.append([c.rank if isinstance(c, Low) else None for c in parts])
        rng = Stream(seed, how, place.site.path, *([str(e)] if place.copies > 1 else []))
        results.append(_combined(parts, share, how, rule, settings, rng))
    return Result(results, exact, ranks)


def _sparse(tensors) -> bool:
    return tensors.method.has("sparse")


def _sum(parts: Sequence[Change], weights: Sequence[float]) -> Change:
    low = [c for c in parts if isinstance(c, Low)]
    if len(low) == len(parts):
        return total(low, weights)
    whole = [w * forms.dense(c) for c, w in zip(parts, weights, strict=True)]
    return sum(whole[1:], whole[0])


def _combined(
    parts: Sequence[Change], weights: Sequence[float], how: str, rule: Rule, settings: Settings, rng: Stream
) -> Change:
    """Return what the rule makes of these changes of one matrix or vector, in the space where it acts."""
    if how in SUMS or rule in (RULES["linear"], RULES["task-arithmetic"]):
        whole = _sum(parts, weights)
        return Low(settings.scale * whole.B, whole.A) if isinstance(whole, Low) else settings.scale * whole
    low = [c if isinstance(c, Low) else _factored(c) for c in parts] if how in SPACES else parts
    thin = [c for c in low if isinstance(c, Low)]
    if len(thin) < len(parts) or not (rule.turns or how in SPACES):
        return rule([forms.dense(c) for c in parts], weights, settings, rng)
    space = SPACES[how][1](thin) if how in SPACES else core(thin)
    shape = (thin[0].B.shape[0], thin[0].A.shape[1])
    return space.back(rule(space.parts, weights, within(settings, shape), rng))


def _factored(change: Tensor) -> Change:
    """Return a dense change as two factors, to bring it into a common subspace; a vector stays what it is."""
    if change.dim() < 2:
        return change
    U, S, Vt = torch.linalg.svd(change, full_matrices=False)
    root = S.sqrt()
    return Low(U * root, root[:, None] * Vt)


def _form(place: Place, how: str, result: Result, rank: int | None, energy: float | None, form: str) -> forms.Form:
    """Return the result at one site as an adapter holds it."""
    site, stacked, results = place.site, place.site.matrix.dim() > 2, result.changes
    vector = len(site.matrix.shape) < 2
    if form == "dense" or vector:
        return forms.whole([forms.dense(r) for r in results], site)
    if form == "sparse" or how == "sparse-union":
        return forms.sparse([forms.dense(r) for r in results], stacked)
    limit = min(site.shape)
    thin = [r for r in results if isinstance(r, Low)]
    if len(thin) == len(results):
        if how == "cat" and max(r.rank for r in thin) <= limit:
            return forms.thin(thin, stacked)
        most = result.most() if how == "svd" and energy is None and rank is None else rank
        cut = [evenly(r, None if most is None else min(most, limit), energy) for r in thin]
        return forms.thin(cut, stacked)
    most = rank if rank is not None or energy is not None else result.most(together=how != "svd")
    if most is None and energy is None:
        kinds = ", ".join(dict.fromkeys(t.method.name for t in place.tensors if t is not None))
        raise AddendaError(
            f"{place.site.path} ({kinds}) is no low-rank change, and as B A it is an approximation. How near it comes "
            "is for you to say: rank= or energy=; or form='dense', a copy of the weight, or form='sparse'."
        )
    near = low_rank(
        torch.stack([forms.dense(r) for r in results]), rank=None if most is None else min(most, limit), energy=energy
    )
    return forms.thin([Low(B, A) for B, A in zip(near.B, near.A, strict=True)], stacked)


def _told(path: str, form: forms.Form, result: Result) -> Combined:
    """Return how far what is held is from the exact weighted sum, and from what the rule gave."""
    off = sum(forms.distance(h, x) ** 2 for h, x in zip(form.held, result.exact, strict=True))
    lost = sum(forms.distance(h, r) ** 2 for h, r in zip(form.held, result.changes, strict=True))
    whole, made = (sum(forms.size(c) ** 2 for c in of) for of in (result.exact, result.changes))
    return Combined(path, form.says, _ratio(off, whole), _ratio(lost, made), form.numbers, (off, whole))


def _ratio(part: float, whole: float) -> float:
    return 0.0 if part == 0 else math.sqrt(part / whole) if whole else math.inf
