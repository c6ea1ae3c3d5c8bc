"""One change of a weight in fewer numbers: two thin matrices, its largest entries, few bits, or what differs exactly.

D (m × n), or a stack of them (k × m × n), is what was added to a weight. Pure functions in float64, without a model.

    low_rank     D ≈ B A          least ‖(D − B A) C^½‖, by the eigenproblem of `reducing.solve`; C = I, or E[x xᵀ]
    top_k        D ≈ K entries    those with the largest D²_ij C_jj
    few_bits     D ≈ codes        2^b values, their scale and mean by least squares (at one bit as BitDelta's scale,
                                  Liu et al. 2024, arXiv 2402.10193)
    difference   tuned and base   positions where bits differ, and the tuned values there: nothing is lost

With C = E[x xᵀ] of a layer's inputs, ‖(D − B A) C^½‖² is the mean square error of what it puts out. C may be singular.
Directions no input had cost nothing; ranks left over by the others go to what they leave of D.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.core.base.largest import largest
from addenda.core.base.ranges import Range
from addenda.core.packed.bits import unpack
from addenda.core.packed.few_bits import MOST, FewBits, encoded
from addenda.reducing.solve import completed, spectrum

Known = tuple[Tensor, Tensor]  # B (m × s) and A (s × n), whose product is D
_SHARE = Range(0, 1, above=True)
_EXACT = 1e-12  # of the energy: what a lossless low rank may leave, an error of 1e-6


@dataclass(frozen=True)
class Thin:
    """D ≈ B A. B: m × r, A: r × n, or k × m × r and k × r × n; each b_i as long as its a_i, those of most energy first.

    error: ‖D − B A‖ / ‖D‖. energy: the share kept of tr(D C Dᵀ), C as given or I; both are measured, not predicted.
    """

    B: Tensor
    A: Tensor
    error: float
    energy: float

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def dense(self) -> Tensor:
        """Return B A."""
        return self.B @ self.A


@dataclass(frozen=True)
class Sparse:
    """D ≈ values at flat positions of an m × n matrix. index (K): sorted, int64; values (K); of a stack k × K.

    error, energy: as in `Thin`, C being diagonal.
    """

    index: Tensor
    values: Tensor
    shape: torch.Size
    error: float
    energy: float

    @property
    def count(self) -> int:
        return self.index.shape[-1]

    def dense(self) -> Tensor:
        """Return the values in their places, zero elsewhere."""
        flat = self.values.new_zeros(*self.shape[:-2], self.shape[-2] * self.shape[-1])
        return flat.scatter(-1, self.index, self.values).view(self.shape)


@dataclass(frozen=True)
class Coded:
    """D ≈ codes: a `FewBits` of D's shape. error: as in `Thin`."""

    codes: FewBits
    error: float

    def dense(self) -> Tensor:
        """Return the values of the codes, float32."""
        return self.codes.unpack()


@dataclass(frozen=True)
class Difference:
    """What two tensors differ in. index (K): sorted flat positions, int64; values (K): those of the tuned one."""

    index: Tensor
    values: Tensor

    def onto(self, base: Tensor) -> Tensor:
        """Return a copy of the base with these values in their places: the tuned tensor, bit for bit."""
        return base.flatten().index_put((self.index,), self.values).view(base.shape)


@torch.no_grad()
def low_rank(
    D: Tensor | Known, *, rank: int | None = None, energy: float | None = None, second: Tensor | None = None
) -> Thin:
    """Return the best B A for D (m × n or k × m × n), or for a D that is known as two factors (any inner size s).

    rank: the columns of B; fewer where fewer give D back. energy: instead, the lowest rank that keeps this share; a
    stack has one rank. Neither: the lowest rank with an error of at most 1e-6 (in the metric). second: C, n × n (or one
    for each matrix, k × n × n), symmetric, maybe singular; or its diagonal, n numbers. Known factors are solved
    in an s × s core. B and A come in D's dtype, float32 at least.

    Raises AddendaError for a rank and an energy, one out of range, a C of another size, values that are not finite.
    """
    if rank is not None and energy is not None:
        raise AddendaError(f"Give the rank or the energy to keep, not both; got rank={rank} and energy={energy}.")
    m, n = _shape(*D) if isinstance(D, tuple) else _shape(D)
    if rank is not None and not 1 <= rank <= min(m, n):
        raise AddendaError(f"A rank of a {m} × {n} matrix is between 1 and {min(m, n)}, got {rank}.")
    if energy is not None and (refusal := _SHARE.refusal("energy", energy)):
        raise AddendaError(f"{refusal}.")
    like = D[0] if isinstance(D, tuple) else D
    metrics = _metrics(second, n, like)
    single = _Matrix(D, metrics[0]) if like.dim() == 2 else None

    def each() -> Iterator[_Matrix]:  # of a stack, one matrix in float64 at a time
        return iter([single]) if single else map(_Matrix, _matrices(D), metrics)

    if rank is None:
        full = torch.stack([x.spectrum()[0] for x in each()])
        rank = _enough(full.sum(0), 1 - _EXACT if energy is None else energy)
    pairs, losses = [], torch.zeros(4, dtype=torch.float64)
    for matrix in each():
        B, A = matrix.solve(rank)
        losses += matrix.losses(B, A).cpu()
        pairs.append((matrix.lifted(B), A))
    columns = max(B.shape[1] for B, _ in pairs)
    kind = torch.promote_types(like.dtype, torch.float32)
    Bs = [F.pad(B, (0, columns - B.shape[1])).to(kind) for B, _ in pairs]
    As = [F.pad(A, (0, 0, 0, columns - A.shape[0])).to(kind) for _, A in pairs]
    B, A = (torch.stack(Bs), torch.stack(As)) if like.dim() == 3 else (Bs[0], As[0])
    return Thin(B.contiguous(), A.contiguous(), *_shares(losses))


@torch.no_grad()
def top_k(D: Tensor, *, count: int | None = None, density: float | None = None, second: Tensor | None = None) -> Sparse:
    """Return the K entries of D (m × n or k × m × n) that hold most: the largest D²_ij, or D²_ij C_jj.

    count: K, of each matrix of a stack. density: instead, K / (m n), K at least 1. second: C as in `low_rank`, of which
    the diagonal is used. Of equal entries those that come first are taken.

    Raises AddendaError for none or both of count and density, one out of range, a C of another size, values that are
    not finite.
    """
    m, n = _shape(D)
    if (count is None) == (density is None):
        raise AddendaError(f"Give the count or the density of entries, one of them; got {count} and {density}.")
    if density is not None:
        if refusal := _SHARE.refusal("density", density):
            raise AddendaError(f"{refusal}.")
        count = max(1, round(density * m * n))
    if count is None or not 1 <= count <= m * n:
        raise AddendaError(f"A {m} × {n} matrix has from 1 to {m * n} entries to keep, got {count}.")
    chosen, losses = [], torch.zeros(4, dtype=torch.float64)
    for d, C in zip(_matrices(D), _metrics(second, n, D), strict=True):
        assert isinstance(d, Tensor)
        square = d.double().square()
        weighted = square * (C if C.dim() == 1 else C.diagonal())
        index = largest(weighted, count)
        kept = torch.stack([t.flatten()[index].sum() for t in (square, weighted)])
        total = torch.stack([square.sum(), weighted.sum()])
        losses += torch.stack([total - kept, total]).clamp_min(0).T.flatten().cpu()
        chosen.append((index, d.flatten()[index]))
    index, values = (torch.stack(t) if D.dim() == 3 else t[0] for t in zip(*chosen, strict=True))
    return Sparse(index, values, D.shape, *_shares(losses))


@torch.no_grad()
def few_bits(D: Tensor, bits: int) -> Coded:
    """Return D (m × n or k × m × n, each matrix for itself) in 1 to 8 bits an entry.

    The codes are those of `core.packed.few_bits`; their scale and mean are then the least-squares ones of D.
    Raises AddendaError for bits out of range and values that are not finite.
    """
    _shape(D)
    if refusal := Range(1, MOST, whole=True).refusal("bits", bits):
        raise AddendaError(f"{refusal}.")
    stacked = D.dim() == 3
    packed = encoded(D, bits, stacked)
    flat = D.detach().reshape(len(D) if stacked else 1, -1).double()
    codes = unpack(packed.codes.view(len(flat), -1), bits, flat.shape[1])
    v = packed.book.double()[codes.long()]
    mean, v_mean = flat.mean(1, keepdim=True), v.mean(1, keepdim=True)
    scale = ((flat - mean) * (v - v_mean)).sum(1, keepdim=True) / (v - v_mean).square().sum(1, keepdim=True).clamp_min(
        1e-300
    )
    moments = torch.cat([mean - scale * v_mean, scale], 1).float().view(packed.moments.shape)
    packed = FewBits.of(packed.codes, moments, bits, D.shape, packed.dtype)
    lost = (packed.unpack().double() - D.double()).square().sum()
    return Coded(packed, _root(lost, flat.square().sum()))


@torch.no_grad()
def difference(base: Tensor, tuned: Tensor) -> Difference:
    """Return where two tensors of one shape and dtype differ in any bit, and the tuned values there. It may be nowhere.

    Compared are bits, so −0 is not 0 and a NaN is itself. Raises AddendaError for other shapes or dtypes.
    """
    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise AddendaError(f"Expected two tensors of one shape and dtype, got {_said(base)} and {_said(tuned)}.")
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    one, other = (t.detach().contiguous().flatten() for t in (base, tuned))
    index = torch.nonzero(one.view(bits) != other.view(bits)).flatten()
    return Difference(index, other[index])


# -- one matrix --------------------------------------------------------------------------------------------------------


class _Matrix:
    """One D in float64 with its metric C (n × n, or a diagonal): as G (m × n), or as Q G with Q orthonormal (m × s)."""

    def __init__(self, D: Tensor | Known, C: Tensor):
        self.Q, self.C = None, C
        self.solved: tuple[Tensor, Tensor] | None = None
        if not isinstance(D, tuple):
            self.G = D.double()
            return
        B, A = D[0].double(), D[1].double()
        if B.shape[1] < min(B.shape[0], A.shape[1]):
            self.Q, B = torch.linalg.qr(B)
        self.G = B @ A

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Return (the energy of each direction, falling; the orthonormal directions that have any)."""
        if self.solved is None:
            self.solved = spectrum(self.G, self.C, min(self.G.shape))
        return self.solved

    def solve(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return B and A of G at this rank, or at the lowest that gives G back."""
        Q = (self.solved or spectrum(self.G, self.C, min(rank, *self.G.shape)))[1][:, :rank]
        left = self.G - Q @ (Q.T @ self.G)
        if Q.shape[1] < rank and left.square().sum() > _EXACT * self.G.square().sum():
            Q = completed(self.G, Q, min(rank, *self.G.shape))
        Q = Q if Q.shape[1] else torch.eye(self.G.shape[0], 1, dtype=Q.dtype, device=Q.device)  # of a G that is zero
        A = Q.T @ self.G
        root = A.norm(dim=1).sqrt()
        return Q * root, A / torch.where(root > 0, root, torch.ones_like(root))[:, None]

    def losses(self, B: Tensor, A: Tensor) -> Tensor:
        """Return ‖E‖², ‖G‖², tr(E C Eᵀ), tr(G C Gᵀ) of E = G − B A."""
        E = self.G - B @ A
        return torch.stack([E.square().sum(), self.G.square().sum(), *(_energy(M, self.C) for M in (E, self.G))])

    def lifted(self, B: Tensor) -> Tensor:
        return B if self.Q is None else self.Q @ B


def _energy(M: Tensor, C: Tensor) -> Tensor:
    return ((M * C if C.dim() == 1 else M @ C) * M).sum()


def _enough(energies: Tensor, share: float) -> int:
    """Return the lowest rank, at least 1, whose energies (falling) are this share of all, to rounding."""
    tails = energies.clamp_min(0).flip(0).cumsum(0).flip(0)  # what rank 0, 1, … leaves
    return max(1, int((tails > (1 - share) * tails[0] + 1e-15 * tails[0]).sum()))


def _shares(losses: Tensor) -> tuple[float, float]:
    lost, total, weighted_lost, weighted_total = losses
    return _root(lost, total), float(1 - weighted_lost / weighted_total) if weighted_total > 0 else 1.0


def _root(lost: Tensor, total: Tensor) -> float:
    return float((lost / total).sqrt()) if total > 0 else 0.0


# -- what is given -----------------------------------------------------------------------------------------------------


def _shape(*given: Tensor) -> tuple[int, int]:
    """Return (m, n) of a D, or of the product of two factors, after all checks of them."""
    first, last = given[0], given[-1]
    if first.dim() not in (2, 3) or not all(t.is_floating_point() and t.numel() for t in given):
        raise AddendaError(f"Expected a matrix or a stack of them, got {' and '.join(map(_said, given))}.")
    if len(given) == 2 and (first.shape[:-2] != last.shape[:-2] or first.shape[-1] != last.shape[-2]):
        raise AddendaError(f"Expected factors m × s and s × n, got {_said(first)} and {_said(last)}.")
    if not all(bool(torch.isfinite(t).all()) for t in given):
        raise AddendaError("The change holds values that are not finite, and has no smaller form.")
    return first.shape[-2], last.shape[-1]


def _matrices(D: Tensor | Known) -> Sequence[Tensor | Known]:
    """Return each matrix of a D."""
    if isinstance(D, tuple):
        return [D] if D[0].dim() == 2 else list(zip(*D, strict=True))
    return [D] if D.dim() == 2 else list(D)


def _metrics(second: Tensor | None, n: int, D: Tensor) -> list[Tensor]:
    """Return the metric of each matrix of a D."""
    count = len(D) if D.dim() == 3 else 1
    if second is None:
        return [torch.ones(n, dtype=torch.float64, device=D.device)] * count
    each = D.dim() == 3 and second.shape == (count, n, n)
    if second.shape not in ((n, n), (n,)) and not each:
        raise AddendaError(f"Expected second moments of inputs of width {n}, got {_said(second)}.")
    if not bool(torch.isfinite(second).all()):
        raise AddendaError("The second moments hold values that are not finite.")
    second = second.to(D.device, torch.float64)
    return list(second) if each else [second] * count


def _said(t: Tensor) -> str:
    return f"{' × '.join(map(str, t.shape)) or 'a number'} in {str(t.dtype).removeprefix('torch.')}"
