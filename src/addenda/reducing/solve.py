"""The low-rank stand-in of a linear layer: one eigenproblem, and the routes of the literature as its metrics.

A layer y = W x + b (W: m × n) becomes y' = B (A x) + b' with B: m × r and A: r × n. For a metric C (n × n) of its
inputs and weights d (m) of its outputs, D = diag(d),

    minimise   tr(D (W − B A) C (W − B A)ᵀ D)
    solution   B = D⁻¹ Q,  A = Qᵀ D W,   Q: the r leading eigenvectors of D W C Wᵀ D  (m × m)

and what is lost is the sum of the other eigenvalues. With C = E[x xᵀ] that loss is the mean square error of the
layer's output. The m × m matrix is never formed where n < m; no inverse is taken, so C may be singular. Directions that
no input ever had cost nothing; ranks left over after the others go to the part of W that remains, so that r = min(m, n)
gives W back whatever the data.

| route     | C                | D                          | paper                                                  |
| --------- | ---------------- | -------------------------- | ------------------------------------------------------ |
| `svd`     | I                | I                          |                                                        |
| `fwsvd`   | I                | √ row sums of the Fisher   | Hsu et al. 2022, arXiv:2207.00112                      |
| `asvd`    | diag(E|x|^2α)    | I                          | Yuan et al. 2023, arXiv:2312.05821                     |
| `lord`    | E[x xᵀ]          | I                          | Kaushal et al. 2023, arXiv:2309.14021                  |
| `svd-llm` | E[x xᵀ]          | I                          | Wang et al. 2024, arXiv:2403.07378                     |
| `drone`   | E[x xᵀ]          | I                          | Chen et al. 2021 (NeurIPS)                             |

The last three have one optimum and reach it by different arithmetic: `lord` by the eigenvectors of the outputs' second
moment, `svd-llm` by a Cholesky factor of C and its inverse, `drone` by singular vectors of the inputs. Only the first
needs no inverse. `fwsvd` weighs the rows of W as torch stores it, one for each output.

center (lord): C = E[x xᵀ] − μμᵀ, and b' = b + (W − B A) μ: the principal components of the outputs, as published. Its
layer error is lower, but language models came out worse with it, so it is not the default.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError, nearest
from addenda.reducing.moments import Moments, square_root

Split = Literal["left", "sqrt"]
ROUTES = {
    "svd": "singular values of W alone",
    "fwsvd": "rows of W weighted by their Fisher information",
    "asvd": "columns of W weighted by the mean size of their inputs",
    "lord": "principal components of the outputs",
    "svd-llm": "W whitened by a Cholesky factor of the inputs' second moment",
    "drone": "W and the inputs, each by its singular vectors",
}
_EPS = 1e-13  # of the largest eigenvalue: below it a direction is taken for unseen


@dataclass(frozen=True)
class LowRank:
    """B (m × k) and A (k × n), nested: the first r columns and rows are the solution of rank r. All float64.

    errors (k + 1): the relative mean square error of the output at ranks 0 … k on the calibration inputs, measured with
    these factors, whatever metric they were chosen by. mean: E[x] where the bias is to make up for it, else None.
    """

    B: Tensor
    A: Tensor
    errors: Tensor
    mean: Tensor | None = None
    note: str = ""

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def first(self, rank: int) -> "LowRank":
        """Return the solution of a lower rank."""
        return replace(self, B=self.B[:, :rank], A=self.A[:rank], errors=self.errors[: rank + 1])

    def bias(self, W: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return b' (m): what the layer's bias becomes beside these factors."""
        if self.mean is None:
            return bias
        shift = W.double() @ self.mean - self.B @ (self.A @ self.mean)
        return shift if bias is None else bias.double() + shift

    def split(self, how: Split) -> "LowRank":
        """Return the same product. "left": as solved (columns of B orthonormal); "sqrt": b_i and a_i equally long."""
        if how == "left":
            return self
        scale = (self.A.norm(dim=1) / self.B.norm(dim=0).clamp_min(1e-300)).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return replace(self, B=self.B * scale, A=self.A / scale[:, None])


def check(how: str, center: bool, split: str = "left") -> None:
    """Raise AddendaError for an unknown route, and for options that it does not have."""
    if not isinstance(how, str) or how not in ROUTES:
        raise AddendaError(f"There is no route {how!r}.{nearest(how, ROUTES)} Known: {', '.join(ROUTES)}.")
    if center and how != "lord":
        raise AddendaError(f"Only 'lord' has a centred form, {how!r} has none. Leave center out, or use 'lord'.")
    if split not in ("left", "sqrt"):
        raise AddendaError(f"split must be 'left' or 'sqrt', got {split!r}.")


@torch.no_grad()
def solve(
    W: Tensor,
    moments: Moments,
    how: str = "lord",
    *,
    rank: int | None = None,
    center: bool = False,
    fisher: Tensor | None = None,
    alpha: float = 0.5,
) -> LowRank:
    """Return the nested low-rank solutions of W (m × n) for inputs with these moments. rank: by default min(m, n).

    fisher (m): for `fwsvd`, Σ over inputs and batches of (∂loss/∂W)². alpha: the power of `asvd`.
    Raises AddendaError for an unknown route, a rank out of range and moments of another width.
    """
    check(how, center)
    m, n = W.shape
    k = min(m, n) if rank is None else rank
    if not 1 <= k <= min(m, n):
        raise AddendaError(f"A rank of a {m} × {n} matrix is between 1 and {min(m, n)}, got {k}.")
    if moments.sum.shape != (n,) or not moments.count:
        raise AddendaError(f"Expected moments of inputs of width {n}, got {moments.count} rows of {len(moments.sum)}.")
    W = W.double()
    moment = moments.second
    if center:
        moment = moment - torch.outer(moments.mean, moments.mean)
    note = ""
    if how == "svd-llm":
        L, note = _cholesky(moment)
        B, A = _whitened(W, L, k, triangular=True)
    elif how == "drone":
        B, A = _whitened(W, moments.root, k, triangular=False)
    elif how == "fwsvd":
        if fisher is None:
            raise AddendaError("fwsvd wants fisher=, the squared gradients of a loss summed over each row of W.")
        d = fisher.double().clamp_min(1e-8 * float(fisher.max()) or 1.0).sqrt()  # its inverse is taken
        Q = leading(d[:, None] * W, W.new_ones(n), k)
        B, A = Q / d[:, None], Q.T @ (d[:, None] * W)
    else:
        metric = {"svd": W.new_ones(n), "asvd": (moments.size + 1e-12).pow(2 * alpha)}.get(how, moment)
        Q = leading(W, metric, k, root=moments.root if how == "lord" and not center and m > n else None)
        B, A = Q, Q.T @ W
    return LowRank(B, A, output_errors(W, B, A, moment, moments.second), moments.mean if center else None, note)


def output_errors(W: Tensor, B: Tensor, A: Tensor, C: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the relative output error at every rank r at once: (k + 1) tr(E_r C E_rᵀ) / tr(W C' Wᵀ).

    E_r = W − Σ_{i ≤ r} b_i a_iᵀ. C' = scale or C."""
    WC = W @ C
    total = (WC * W).sum()
    cross = ((WC @ A.T) * B).sum(0)
    square = ((B.T @ B) * ((A @ C) @ A.T)).cumsum(0).cumsum(1).diagonal()
    errors = torch.cat([total[None], total - 2 * cross.cumsum(0) + square])
    scale_total = total if scale is None else ((W @ scale) * W).sum()
    return (errors / scale_total.clamp_min(1e-300)).clamp_min(0)


def leading(G: Tensor, C: Tensor, k: int, root: Tensor | None = None) -> Tensor:
    """Return (m × k) the leading eigenvectors of G C Gᵀ in falling order; C: n × n, or a vector for a diagonal.

    Directions without energy are replaced by leading singular vectors of what is left of G.
    """
    return completed(G, spectrum(G, C, k, root)[1], k)


def spectrum(G: Tensor, C: Tensor, most: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (the min(m, n) eigenvalues of G C Gᵀ, falling, and m × r its first eigenvectors, those with energy).

    r ≤ most. C: n × n, or a vector for a diagonal. Where n < m they come out of the n × n matrix Rᵀ Gᵀ G R with
    R Rᵀ = C (root: R).
    """
    m, n = G.shape
    if m <= n:
        values, Q = torch.linalg.eigh((G * C) @ G.T if C.dim() == 1 else (G @ C) @ G.T)
        values, Q = values.flip(0), Q.flip(1)
        return values, Q[:, : int((values[:most] > _EPS * values[0]).sum())]
    R = square_root(C) if root is None else root
    M = G * R if R.dim() == 1 else G @ R
    values, V = torch.linalg.eigh(M.T @ M)
    values, V = values.flip(0), V.flip(1)
    rank = int((values[:most] > _EPS * values[0]).sum())
    return values, torch.linalg.qr(M @ V[:, :rank]).Q  # small ones lose their right angles when they are squared


def completed(G: Tensor, Q: Tensor, k: int) -> Tensor:
    """Return m × k orthonormal columns: those of Q, then leading left singular vectors of what Q leaves of G."""
    if Q.shape[1] >= k:
        return Q[:, :k]
    residual = G - Q @ (Q.T @ G)
    complement = torch.linalg.svd(residual, full_matrices=False).U[:, : k - Q.shape[1]]
    return torch.linalg.qr(torch.cat([Q, complement], 1)).Q


def _cholesky(C: Tensor) -> tuple[Tensor, str]:
    """Return (L with L Lᵀ = C, a note): of C itself, or with as much on the diagonal as it takes."""
    L, failed = torch.linalg.cholesky_ex(C)
    if not failed:
        return L, ""
    lowest, size = float(torch.linalg.eigvalsh(C)[0]), float(C.diagonal().mean())
    shift = max(-lowest, 0.0) + 1e-6 * max(size, 1e-30)
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.linalg.cholesky(C + shift * eye), f"second moment singular: {shift:.1e} added to its diagonal"


def _whitened(W: Tensor, L: Tensor, k: int, triangular: bool) -> tuple[Tensor, Tensor]:
    """Return [W L]_k L⁻¹ as (U, Σ Vᵀ L⁻¹). L: lower triangular, or with orthogonal columns, some of them zero."""
    U, S, Vt = torch.linalg.svd(W @ L, full_matrices=False)
    scaled = S[:k, None] * Vt[:k]
    if triangular:
        return U[:, :k], torch.linalg.solve_triangular(L, scaled, upper=False, left=False)
    squares = L.square().sum(0)
    inverse = torch.where(squares > _EPS * squares.max(), squares.reciprocal(), torch.zeros_like(squares))
    return U[:, :k], (scaled * inverse) @ L.T
