"""Factorisations that come out alike on every machine: float64, on the CPU, signs fixed."""

import torch
from torch import Tensor


def singular_triplets(W: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """U (m × k), Σ (k), Vᵀ (k × n) of W = U Σ Vᵀ in float64 on the CPU, k = min(m, n), singular values falling.

    A pair (u_i, v_i) is unique up to its sign, which is fixed so that the largest entry of u_i is positive; pairs of
    equal singular values may still turn among themselves. full_matrices: U m × m and Vᵀ n × n.
    """
    W, k = W.cpu().double(), min(W.shape)
    if W.shape[0] >= W.shape[1]:
        U, S, Vt = torch.linalg.svd(W, full_matrices=full_matrices)
    else:  # LAPACK takes several times as long for a wide matrix as for a tall one
        V, S, Ut = torch.linalg.svd(W.T, full_matrices=full_matrices)
        U, Vt = Ut.T, V.T
    largest = U.gather(0, U.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(largest < 0, -1.0, 1.0)
    Vt[:k] *= sign[:k, None]
    return U * sign, S, Vt.contiguous()
