"""How several changes of one weight become one: the rules, each a function of matrices of one shape.

D_t (m × n) is the change of the t-th adapter, w_t its weight, λ the scale of the result:

| rule            | λ ·                                                          | from                             |
| --------------- | ------------------------------------------------------------ | -------------------------------- |
| linear          | Σ w_t D_t, weights 1/T unless given                          |                                  |
| task-arithmetic | Σ w_t D_t, weights 1 unless given                            | Ilharco et al. 2022, 2212.04089  |
| magnitude       | Σ w_t trim(D_t)                                              |                                  |
| ties            | Σ_A w_t trim(D_t) / Σ_A |w_t|                                | Yadav et al. 2023, 2306.01708    |
| dare            | Σ w_t drop(D_t) / ρ                                          | Yu et al. 2023, 2311.03099       |
| della           | Σ_A w_t drop'(D_t) / Σ_A |w_t|                               | Deep et al. 2024, 2406.11617     |
| tsv             | Σ w_t U'_t Σ_t V'_tᵀ                                         | Gargiulo et al. 2024, 2412.00081 |
| iso-c           | mean(σ) U Vᵀ, U Σ Vᵀ = Σ w_t D_t                             | Marczak et al. 2025, 2502.04959  |

trim keeps the share ρ (`density`) of a matrix's entries that are largest in size. A: at each entry, those of the
changes that have the elected sign, the sign of Σ w_t trim(D_t). drop keeps an entry with probability ρ; drop' with
probability p_i, rising with the rank of |entry| in its row from ρ − window/2 to ρ + window/2, and divides it by p_i.

TSV: of each D_t its first min(rank, ⌊min(m, n)/T⌋) singular triplets; the U_t side by side are made orthonormal as a
whole, U' = polar(U) = U (UᵀU)^−½, and so are the V_t. Iso-C: every singular value of the sum becomes their mean.

Where this differs from the papers' code, on purpose: trimming is within each matrix, where TIES trims over the whole
model; TIES and DELLA divide by Σ|w_t| and not by a count, so that two halves of one change are that change (with
weights of 1 it is the count). Directions with singular values below 1e-6 of the largest are none: a low-rank change has
them only by rounding, and what Iso-C and TSV do with them would depend on how a machine completes a basis. So both are
functions of the changes alone, and *turn with them*: rule(Q D R) = Q rule(D) R for orthogonal Q and R. The sums do so
too. Such a rule may act on small matrices in the common subspace of low-rank changes (`combining.spaces`) and gives the
same there. Trimming, dropping and electing look at single entries, which are others in another basis: in a subspace
those are other rules than on ΔW. TSV counts min(m, n)/T in whatever it is given, so that it is told the weight's own.

Two halves of one change, or one alone, are that change under the sums and, at a density of 1, magnitude, TIES and DARE.
TSV makes one change of two equal ones with weights of 1, as it takes them for one direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from addenda.core.base.random import Stream

DIRECTION = 1e-6  # of the largest singular value: below it a direction is taken for rounding


@dataclass(frozen=True)
class Settings:
    """The numbers that rules of combining read.

    density: the share of entries that is kept. window: of DELLA's probabilities, by default as wide as it may be.
    side: of TSV, min(m, n) of the weight, where the matrices are coordinates in a smaller space.
    """

    density: float = 1.0
    window: float | None = None
    scale: float = 1.0
    side: int | None = None

    @property
    def spread(self) -> float:
        """How far DELLA's probabilities are apart: `window`, or half of what keeps them between 0 and 1."""
        return min(self.density, 1 - self.density) if self.window is None else self.window


Function = Callable[[Sequence[Tensor], Sequence[float], Settings, Stream], Tensor]


@dataclass(frozen=True)
class Rule:
    """One way to make a change out of several. turns: whether it is the same in every basis, see the module."""

    name: str
    combine: Function
    says: str
    turns: bool = False
    density: float | None = None  # by default; None: it has none
    mean: bool = False  # whether weights are 1/T unless given, and not 1

    def __call__(self, parts: Sequence[Tensor], weights: Sequence[float], settings: Settings, rng: Stream) -> Tensor:
        """Return the combined change of matrices of one shape. rng: of rules that draw."""
        return settings.scale * self.combine(parts, weights, settings, rng)


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float], settings: Settings, rng: Stream) -> Tensor:
    """Return Σ w_t D_t."""
    total = weights[0] * parts[0]
    for w, D in zip(weights[1:], parts[1:], strict=True):
        total = total + w * D
    return total


def trimmed(D: Tensor, density: float) -> Tensor:
    """Return D with its largest entries, a share of `density` and at least one, and zeros."""
    flat = D.flatten()
    keep = max(1, round(density * flat.numel()))
    if keep >= flat.numel():
        return D
    index = flat.abs().topk(keep, sorted=False).indices
    return torch.zeros_like(flat).scatter(0, index, flat[index]).view_as(D)


def magnitude(parts: Sequence[Tensor], weights: Sequence[float], settings: Settings, rng: Stream) -> Tensor:
    """Return Σ w_t trim(D_t)."""
    return weighted_sum([trimmed(D, settings.density) for D in parts], weights, settings, rng)


def elected(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return, at each entry, the weighted mean of the changes that have the sign of their weighted sum."""
    moves = [w * D for w, D in zip(weights, parts, strict=True)]
    sign = sum(moves[1:], moves[0]).sign()
    total, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for w, move in zip(weights, moves, strict=True):
        agrees = (move.sign() == sign) & (sign != 0)
        total += torch.where(agrees, move, 0.0)
        share += abs(w) * agrees.to(share.dtype)
    return total / share.clamp_min(torch.finfo(share.dtype).tiny)


def ties(parts: Sequence[Tensor], weights: Sequence[float], settings: Settings, rng: Stream) -> Tensor:
    """Trim each change, elect a sign at each entry, average those that agree."""
    return elected([trimmed(D, settings.density) for D in parts], weights)


def dare(parts: Sequence[Tensor], weights: Sequence[float], settings: Settings, rng: Stream) -> Tensor:
    """Return Σ w_t D_t with entries dropped at random, and what stays divided by the share that stays."""
    kept = [D * _kept(D, settings.density, rng.fork(str(t))) / settings.density for t, D in enumerate(parts)]
    return weighted_sum(kept, weights, settings, rng)


def della(parts: Sequence[Tensor], weights: Sequence[float], settings: Settings, rng: Stream) -> Tensor:
    """Drop small entries rather than large ones, elect a sign at each entry, average those that agree."""
    thinned = []
    for t, D in enumerate(parts):
        rows = D if D.dim() > 1 else D[None]
        rank = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).to(D.dtype) / max(rows.shape[1] - 1, 1)
        keep = (settings.density + settings.spread * (rank - 0.5)).view_as(D)
        thinned.append(D * _kept(D, keep, rng.fork(str(t))) / keep)
    return elected(thinned, weights)


def _kept(D: Tensor, probability: Tensor | float, rng: Stream) -> Tensor:
    """Return 1 where an entry is kept and 0 elsewhere, drawn on the CPU."""
    return (rng.uniform(*D.shape).to(D) < probability).to(D.dtype)


def thin_svd(D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m × k), σ (k) and Vᵀ (k × n) of D, without the directions that are rounding; k is 0 for a D of 0."""
    U, S, Vt = torch.linalg.svd(D, full_matrices=False)
    rank = int(S.gt(DIRECTION * S[0]).sum())
    return U[:, :rank], S[:rank], Vt[:rank]


def polar(U: Tensor) -> Tensor:
    """Return the nearest U' (m × k) with orthonormal columns, in the span of U's: U (UᵀU)^−½ with a pseudo-inverse."""
    left, _, right = thin_svd(U)
    return left @ right


def tsv(parts: Sequence[Tensor], weights: Sequence[float], settings: Settings, rng: Stream) -> Tensor:
    """Return Σ w_t U'_t Σ_t V'_tᵀ, all singular vectors decorrelated from each other."""
    if parts[0].dim() < 2:
        return weighted_sum(parts, weights, settings, rng)
    most = max(1, (settings.side or min(parts[0].shape)) // len(parts))
    triplets = [(U[:, :most], S[:most], Vt[:most]) for U, S, Vt in map(thin_svd, parts)]
    left, right = torch.cat([U for U, _, _ in triplets], 1), torch.cat([Vt for _, _, Vt in triplets])
    if not right.numel():
        return torch.zeros_like(parts[0])
    sizes = torch.cat([w * S for w, (_, S, _) in zip(weights, triplets, strict=True)])
    return polar(left) * sizes @ polar(right.T).T


def iso_c(parts: Sequence[Tensor], weights: Sequence[float], settings: Settings, rng: Stream) -> Tensor:
    """Return the weighted sum with every singular value at their mean."""
    total = weighted_sum(parts, weights, settings, rng)
    if total.dim() < 2:
        return total
    U, S, Vt = thin_svd(total)
    return S.mean() * (U @ Vt) if len(S) else total


RULES = {
    r.name: r
    for r in (
        Rule("linear", weighted_sum, "the weighted mean of ΔW", turns=True, mean=True),
        Rule("task-arithmetic", weighted_sum, "the weighted sum of ΔW", turns=True),
        Rule("magnitude", magnitude, "the sum of the largest entries of each", density=0.2),
        Rule("ties", ties, "largest entries, an elected sign, the mean of those that agree", density=0.2),
        Rule("dare", dare, "entries dropped at random and the rest rescaled, summed", density=0.5),
        Rule("della", della, "small entries dropped more often, an elected sign, the mean", density=0.5),
        Rule("tsv", tsv, "singular vectors of all decorrelated", turns=True),
        Rule("iso-c", iso_c, "the sum, with all singular values at their mean", turns=True),
    )
}


def within(settings: Settings, shape: Sequence[int]) -> Settings:
    """Return the settings of a weight of this shape (m × n), for coordinates in a smaller space."""
    return replace(settings, side=min(shape)) if len(shape) > 1 else settings
