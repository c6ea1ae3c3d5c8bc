"""An arm that papers leave out, and the table that recipes print."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from addenda.comparing.record import Record
from addenda.comparing.stats import Comparison
from addenda.core.base.linalg import singular_triplets
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, WeightMethod, too_high


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


def means(record: Record, found: Comparison) -> list[dict]:
    """For each arm: numbers trained, the rate that was chosen, accuracy with its 95 % interval, seconds a step."""
    table = []
    for arm, about in record.config.methods.items():
        runs = record.trials_of(arm, "final")
        told = found.test[arm]
        table.append({
            "arm": arm, "trainable": about.trainable, "rate": runs[0].rate, "accuracy": round(told.mean, 4),
            "low": round(told.low, 4), "high": round(told.high, 4), "seeds": [round(r, 4) for r in told.runs],
            "step_seconds": round(sum(r.step_seconds or 0 for r in runs) / len(runs), 4),
        })  # fmt: skip
    return table
