"""Arms that papers leave out: directions and bases that do not come from W."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from addenda.core.base.linalg import singular_triplets
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, WeightMethod, too_high
from addenda.methods.svft import SVFT


@register(
    "atoms",
    title="Fixed directions",
    paper="a control of ours",
    equation="ΔW = Σ d_i u_i v_iᵀ over r fixed pairs",
    hypothesis="Any r fixed rank-one directions do as well as those of a factorisation of W.",
    family="spectral",
    rate=3e-3,
)
@dataclass(frozen=True)
class Atoms(WeightMethod):
    """basis: "svd" takes W's r largest singular pairs, each of length 1; "random" r random pairs of unit length."""

    sized_by: ClassVar[str] = "rank"
    rank: int = 64
    basis: Literal["svd", "random"] = "svd"

    def check(self, m: int, n: int) -> str | None:
        return too_high(self.rank, m, n)

    def derive(self, W: Tensor, rng: Stream) -> Params:
        if self.basis == "svd":
            U, _, Vt = singular_triplets(W)
            return {"U": U[:, : self.rank].to(W.dtype), "Vt": Vt[: self.rank].to(W.dtype)}
        U, Vt = rng.normal(len(W), self.rank), rng.normal(self.rank, W.shape[1])
        return {"U": U / U.norm(dim=0), "Vt": Vt / Vt.norm(dim=1, keepdim=True)}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        return {"d": nn.Parameter(torch.zeros(self.rank))}

    def factors(self, p: Params, shape: Shape) -> Factors:
        return Factors(p["U"], p["Vt"], p["d"])

    def trainable(self, m: int, n: int) -> int:
        return self.rank


@register(
    "random-basis",
    title="SVFT in a random basis",
    paper="a control of ours",
    equation="ΔW = U M Vᵀ, U and V random and orthonormal",
    hypothesis="Any orthonormal basis will do, W's own no better than another.",
    family="spectral",
    rate=3e-2,
)
@dataclass(frozen=True)
class RandomBasis(SVFT):
    """SVFT's pattern and start between two orthonormal bases that do not depend on W."""

    def derive(self, W: Tensor, rng: Stream) -> Params:
        found, k = super().derive(W, rng), min(W.shape)
        for name, size in (("U", len(W)), ("Vt", W.shape[1])):
            basis = torch.linalg.qr(rng.normal(size, k).double())[0].to(W.dtype)
            found[name] = basis if name == "U" else basis.T.contiguous()
        return found
