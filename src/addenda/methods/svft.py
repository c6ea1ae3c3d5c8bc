"""SVFT: ΔW is a sparse combination of W's own singular directions (Lingam et al. 2024, arXiv 2405.19597).

    W = U Σ Vᵀ,   ΔW = U M Vᵀ = Σ m_ij u_i v_jᵀ  over the (i, j) of a fixed pattern;  only the m_ij are trained

    x (…, n) ── Vᵀ (k × n) ── M (k × k, sparse) ── U (m × k) ──┐        k = min(m, n)
         └──────────────────────── W (m × n) ──────────────────┴── y

Patterns: "plain" is the diagonal (k numbers), "banded" |i − j| ≤ band, "random" as many distinct positions as
the band has, "topk" as many again where |u_i · v_j| is largest (square W only). `full_matrices` adds the m −
k (or n − k) directions that W itself does not use; the paper has them, the authors' code does not.

The release draws "random" with replacement, and sums what falls on one place: `repeats=True` does the same. Its "topk"
compares U with Vᵀ by signed entries, where the paper and this compare u_i with v_j by size.

The values start at zero and W stays as it is, so the start is exact. The released code starts elsewhere:
values of N(0, 2/N), times a trained gate that starts at sigmoid(0) = ½ and stands in no equation;
`released=True` does the same.

U and V are found again from W at load and never saved. They are computed in float64 on the CPU, so that machines agree
to float32's precision wherever singular values are distinct; `addenda tune` prints how long attaching took. A pair
(u_i, v_i) is unique up to a sign, fixed so that the largest entry of u_i is positive. The core keeps the factors in the
base's dtype.

Cost: k (m + n) numbers of memory a site, at least that of W again, and k (m + n) + k² multiply-adds a token.
Not for wide layers under a tight memory limit, and not for changes that W's own directions cannot express.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from addenda.core.base.linalg import singular_triplets
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Factors, Params, Shape, Start, WeightMethod


@register(
    "svft",
    title="SVFT",
    paper="Lingam et al. 2024, arXiv:2405.19597",
    equation="ΔW = U M Vᵀ, M sparse, W = U Σ Vᵀ",
    hypothesis="The change is sparse in W's own singular basis: it rescales and mixes directions W already uses.",
    family="spectral",
    rate=3e-2,
    published="Gemma-2B, GSM8K: LoRA r = 32 43.06, DoRA r = 16 44.27, SVFT plain 40.34 with 0.19 M numbers, random "
    "50.03 with 6.35 M, full fine-tuning 52.69 (paper). The released layer does not start at the base, "
    "and its rank option truncates W itself.",
    paper_setting="plain at rate 5e-2, or banded and random with d = 2 to 16; full U and V (full_matrices=True; the "
    "release: thin, as here). 'random' is drawn with replacement in the release (repeats=True), and its d is a "
    "budget, not a band; 'topk' there compares U with Vᵀ by its signed entries, here |u_i · v_j| as "
    "the paper's text.",
)
@dataclass(frozen=True)
class SVFT(WeightMethod):
    """pattern, band: which entries of M are trained, and how many (banded, random, topk). Others: see the module."""

    sized_by: ClassVar[str] = "band"
    pattern: Literal["plain", "banded", "random", "topk"] = "plain"
    band: int = 8
    full_matrices: bool = False
    released: bool = False
    repeats: bool = False

    def validate(self):
        if self.repeats and self.pattern != "random":
            yield f"repeats=True is about the draws of pattern='random', not of {self.pattern!r}"
        if self.band < 0:
            yield f"band must be at least 0, got {self.band}"
        if self.full_matrices and self.pattern == "plain":
            yield "full_matrices adds directions that a diagonal M (pattern='plain') never touches"

    def check(self, m: int, n: int) -> str | None:
        if self.pattern == "topk" and m != n:
            return f"pattern='topk' compares u_i with v_j and needs a square weight, not {m} × {n}"
        return None

    @property
    def starts(self) -> Start:
        return Start(1.0, "released=True starts with ‖ΔW‖ near 0.71 at every site") if self.released else Start()

    # -- which entries of M: flat positions in a rows × columns matrix

    def _size(self, m: int, n: int) -> Shape:
        """The shape of M."""
        return (m, n) if self.full_matrices else (min(m, n), min(m, n))

    def _reach(self, rows: int, columns: int) -> int:
        """How many diagonals on either side have entries; a file may ask for any band."""
        return 0 if self.pattern == "plain" else min(self.band, max(rows, columns))

    def _diagonals(self, rows: int, columns: int) -> list[Tensor]:
        band = self._reach(rows, columns)
        i = torch.arange(rows)
        return [(i * columns + i + o)[(i + o >= 0) & (i + o < columns)] for o in range(-band, band + 1)]

    def _positions(self, U: Tensor, Vt: Tensor, rng: Stream) -> Tensor:
        rows, columns = U.shape[1], Vt.shape[0]
        band = torch.cat(self._diagonals(rows, columns))
        if self.pattern == "random":
            return rng.choice(rows * columns, len(band))
        if self.pattern == "topk":
            return (U.T @ Vt.T).abs().flatten().topk(len(band)).indices.sort().values
        return band.sort().values

    def _repeated(self, entries: int, draws: int, rng: Stream) -> Params:
        """Positions drawn with replacement: "index", each once, and "of": value c is a part of entry index[of[c]]."""
        drawn = torch.from_numpy((rng.raw(draws) % np.uint64(entries)).astype(np.int64))
        index, of = drawn.unique(return_inverse=True)
        spare = torch.ones(entries, dtype=torch.bool).index_fill(0, index, False).nonzero().flatten()  # stay zero, and
        index = torch.cat([index, spare[: draws - len(index)]])  # give every matrix of a stack as many
        return {"index": index.int(), "of": of.int()}

    # -- the contract

    def derive(self, W: Tensor, rng: Stream) -> Params:
        U, _, Vt = singular_triplets(W, full_matrices=self.full_matrices)
        found = {"U": U.to(W.dtype), "Vt": Vt.to(W.dtype)}
        if self.pattern == "plain":
            return found
        if self.repeats:
            return found | self._repeated(U.shape[1] * Vt.shape[0], self.trainable(*W.shape) - self.released, rng)
        return {**found, "index": self._positions(U, Vt, rng).int()}

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        count = self.trainable(*W.shape) - self.released
        if not self.released:
            return {"values": nn.Parameter(torch.zeros(count))}
        values = rng.normal(count, std=(2 / count) ** 0.5)
        return {"values": nn.Parameter(values), "gate": nn.Parameter(torch.zeros(()))}

    def _values(self, p: Params) -> Tensor:
        values = p["values"] * p["gate"].sigmoid() if self.released else p["values"]
        return values.new_zeros(len(p["index"])).index_add(0, p["of"], values) if self.repeats else values

    def factors(self, p: Params, shape: Shape) -> Factors:
        return Factors(p["U"], p["Vt"], self._values(p), p.get("index"))

    def trainable(self, m: int, n: int) -> int:
        rows, columns = self._size(m, n)
        band = self._reach(rows, columns)
        lengths = (max(0, min(rows, columns - o) - max(0, -o)) for o in range(-band, band + 1))
        return sum(lengths) + self.released
