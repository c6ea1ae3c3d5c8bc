"""Common subspaces of low-rank changes: coordinates in which several become small matrices, and the way back.

D_t = B_t A_t (B_t: m × r_t, A_t: r_t × n), t = 1 … T, K = Σ r_t.

Core Space (Panariello et al. 2025, arXiv:2509.17786). U and V are the left singular vectors of [B_1 … B_T] and of
[A_1ᵀ … A_Tᵀ], at most K each. As every column of every B_t lies in the span of U, and every row of every A_t in that of
V, nothing is lost:

    D_t = U M_t Vᵀ   with   M_t = (Uᵀ B_t)(A_t V)      K × K

A rule that turns with its matrices (`combining.rules`) gives U rule(M) Vᵀ = rule(U M Vᵀ) = rule(D): the same as on ΔW,
for T QR decompositions and products with K columns instead of singular value decompositions of m × n.

Rules that look at single entries give something else here, and it depends on U and V, hence on how D_t is split
between B_t and A_t: D = (B c)(A / c). As trained, that is an accident of α and of rates of learning. Here each D_t is
split evenly first, B_t = P √Σ, A_t = √Σ Qᵀ with D_t = P Σ Qᵀ, so that the result is a function of the D_t alone. The
paper's code takes the factors as they are.

KnOTS (Stoica et al. 2024, arXiv:2410.19735). One decomposition of the changes side by side,

    [D_1 … D_T] = U Σ [V_1ᵀ … V_Tᵀ]   so that   D_t = U (Σ V_tᵀ)

and the rule acts on the Σ V_tᵀ (K × n); U brings the result back. Without the m × (T n) matrix: [B_1 … B_T] = Q R,
A_t = L_t P_t with orthonormal rows P_t, and the singular values of the K × K matrix [R_1 L_1 … R_T L_T] are those
wanted, as the P_t side by side have orthonormal rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RANK = 1e-12  # of the largest singular value: what float64 leaves where there is nothing


class Low(NamedTuple):
    """D = B A. B: m × r, A: r × n; float64."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def dense(self) -> Tensor:
        """Return B A (m × n)."""
        return self.B @ self.A


class Space(NamedTuple):
    """Changes in a common subspace: D_t = left · parts[t] · right. right: None for the identity."""

    left: Tensor  # m × k
    parts: list[Tensor]  # k × l each
    right: Tensor | None  # l × n

    def back(self, part: Tensor) -> Low:
        """Return the change whose coordinates these are."""
        if self.right is None:
            return Low(self.left, part)
        if part.shape[0] <= part.shape[1]:
            return Low(self.left, part @ self.right)
        return Low(self.left @ part, self.right)


def core(changes: Sequence[Low]) -> Space:
    """Return the coordinates in Core Space: left m × k, parts k × k', right k' × n, with k, k' ≤ Σ ranks."""
    even = [evenly(c) for c in changes]
    left = _span(torch.cat([c.B for c in even], 1))
    right = _span(torch.cat([c.A for c in even]).T)
    return Space(left, [(left.T @ c.B) @ (c.A @ right) for c in even], right.T)


def knots(changes: Sequence[Low]) -> Space:
    """Return the coordinates of KnOTS: left m × k, parts k × n, k ≤ Σ ranks."""
    Q, R = torch.linalg.qr(torch.cat([c.B for c in changes], 1))
    thin = [torch.linalg.qr(c.A.T) for c in changes]  # A = L P, as Aᵀ = P'ᵀ Lᵀ
    blocks = R.split([c.rank for c in changes], 1)
    U, S, Vt = torch.linalg.svd(
        torch.cat([b @ right.T for b, (_, right) in zip(blocks, thin, strict=True)], 1), full_matrices=False
    )
    rank = max(1, int(S.gt(RANK * S[0]).sum()))
    U, Vt = U[:, :rank], S[:rank, None] * Vt[:rank]
    parts = Vt.split([P.shape[1] for P, _ in thin], 1)
    return Space(Q @ U, [V @ P.T for V, (P, _) in zip(parts, thin, strict=True)], None)


def total(changes: Sequence[Low], weights: Sequence[float]) -> Low:
    """Return Σ w_t B_t A_t as stacked factors: exactly, of rank Σ r_t, without products of one's B and another's A."""
    return Low(
        torch.cat([w * c.B for c, w in zip(changes, weights, strict=True)], 1), torch.cat([c.A for c in changes])
    )


def triplets(change: Low) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m × r), σ (r) and Vᵀ (r × n) of B A from a decomposition of r × r, rounding left out; r at least 1."""
    left, R = torch.linalg.qr(change.B)
    right, L = torch.linalg.qr(change.A.T)
    U, S, Vt = torch.linalg.svd(R @ L.T, full_matrices=False)
    rank = max(1, int(S.gt(RANK * S[0]).sum()))
    return left @ U[:, :rank], S[:rank], Vt[:rank] @ right.T


def evenly(change: Low, rank: int | None = None, energy: float | None = None) -> Low:
    """Return the same change with b_i and a_i equally long, largest first. rank, energy: no more than that of it.

    energy: the share of ‖D‖² that is kept, by the lowest rank that does.
    """
    U, S, Vt = triplets(change)
    if energy is not None:
        kept = S.square().cumsum(0)
        rank = int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1
    root = S[:rank].sqrt()
    return Low(U[:, :rank] * root, root[:, None] * Vt[:rank])


def norm(change: Low) -> float:
    """Return ‖B A‖ from the factors."""
    if not change.rank:
        return 0.0
    R, L = torch.linalg.qr(change.B, mode="r").R, torch.linalg.qr(change.A.T, mode="r").R
    return float((R @ L.T).norm())


def _span(M: Tensor) -> Tensor:
    """Return the left singular vectors of M that belong to singular values which are not rounding."""
    U, S, _ = torch.linalg.svd(M, full_matrices=False)
    return U[:, : max(1, int(S.gt(RANK * S[0]).sum()))]
