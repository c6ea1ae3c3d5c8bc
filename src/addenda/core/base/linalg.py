"""Singular vectors and rotations that come out alike on every machine: computed in float64, on the CPU, signs fixed."""

import torch
from torch import Tensor

_LEAST = 1e-5  # singular values below this share of the largest are lost when they are squared
_MORE = 16  # directions looked at beyond those asked for, so that a small gap behind the last one does no harm


def on_cpu(W: Tensor) -> Tensor:
    """Return W on the CPU; a W on the meta device, which has no values to move, as it is."""
    return W if W.is_meta else W.cpu()


def singular_triplets(
    W: Tensor, rank: int | None = None, *, full_matrices: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m × k), Σ (k), Vᵀ (k × n) of W = U Σ Vᵀ in float64 on the CPU, singular values falling.

    k = min(m, n), or the given rank: only the largest. A pair (u_i, v_i) is unique up to its sign, which is fixed so
    that the largest entry of u_i is positive; pairs of equal singular values may still turn among themselves.
    full_matrices: U m × m and Vᵀ n × n. Of a W on the meta device, tensors without values.
    """
    W, k = on_cpu(W), rank or min(W.shape)
    if W.is_meta:
        m, n = W.shape
        shapes = ((m, m), (k,), (n, n)) if full_matrices else ((m, k), (k,), (k, n))
        U, S, Vt = (W.new_empty(shape, dtype=torch.float64) for shape in shapes)
        return U, S, Vt
    tall = W if W.shape[0] >= W.shape[1] else W.T
    left, S, right = (None if full_matrices else _from_gram(tall, rank)) or _exact(tall, full_matrices)
    U, V = (left, right) if tall is W else (right, left)
    if rank is not None:
        U, S, V = U[:, :k], S[:k], V[:, :k]
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(largest < 0, -1.0, 1.0)
    V[:, :k] *= sign[:k]
    return U * sign, S, V.T.contiguous()


def _exact(tall: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(tall.double(), full_matrices=full_matrices)
    return U, S, Vt.T


def _from_gram(tall: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return U, Σ and V by the Gram matrix; None where that is not accurate.

    A few leading ones are found in float32 and refined in float64: two power steps on more directions than asked for,
    then the decomposition inside them.
    """
    if rank is None or 2 * (rank + _MORE) >= tall.shape[1]:
        tall = tall.double()
        spectrum = by_gram(tall)
        return None if spectrum is None else (tall @ spectrum[1] / spectrum[0], *spectrum)
    part, tall = tall.float(), tall.double()
    V = torch.linalg.eigh(part.T @ part).eigenvectors[:, -rank - _MORE :].double()
    for _ in range(2):
        V = torch.linalg.qr(tall.T @ (tall @ V)).Q
    U, S, turn = torch.linalg.svd(tall @ V, full_matrices=False)
    return (U, S, V @ turn.T) if S[rank - 1] > _LEAST * S[0] else None


def by_gram(tall: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return Σ (… × n), falling, and V (… × n × n) of float64 M (… × m × n, m ≥ n), from the eigenvectors of MᵀM.

    Several times faster than a decomposition of M, whose U is M V / Σ; None where a singular value is lost when it is
    squared. M V Vᵀ is M whatever the accuracy of each vector.
    """
    squares, V = torch.linalg.eigh(tall.mT @ tall)
    S, V = squares.clamp_min(0).sqrt().flip(-1), V.flip(-1)
    return (S, V) if bool((S[..., -1] > _LEAST * S[..., 0]).all()) else None


def skew_symmetric(entries: Tensor, side: int) -> Tensor:
    """Return Q = −Qᵀ (…, b, b) from its entries above the diagonal, by row (…, b (b − 1) / 2); float32 at least."""
    entries = entries.to(torch.promote_types(entries.dtype, torch.float32))  # no solve in half precision
    row, column = torch.triu_indices(side, side, 1, device=entries.device)
    Q = entries.new_zeros(*entries.shape[:-1], side * side).index_add(-1, row * side + column, entries)
    Q = Q.unflatten(-1, (side, side))
    return Q - Q.mT


def cayley(Q: Tensor) -> Tensor:
    """Return the rotation R = (I − Q)(I + Q)⁻¹ of a skew-symmetric Q (…, b, b); exactly I where Q is 0."""
    return _Cayley.apply(Q) if torch.is_grad_enabled() else _cayley(Q)


def _cayley(Q: Tensor) -> Tensor:
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye + Q, eye - Q)  # the two commute


class _Cayley(torch.autograd.Function):
    """The Cayley transform with a backward of two products and no second solve: dR = −½ (I + R) dQ (I + R)."""

    @staticmethod
    def forward(ctx, Q):
        R = _cayley(Q)
        ctx.save_for_backward(R)
        return R

    @staticmethod
    def backward(ctx, gR):
        (R,) = ctx.saved_tensors
        right = (torch.eye(R.shape[-1], dtype=R.dtype, device=R.device) + R).mT
        return right @ (gR @ right) / -2
