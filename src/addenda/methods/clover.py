"""CLOVER: a head's own orthogonal vectors, combined anew (Meng et al. 2025, arXiv 2411.17426).

One layer, d rows W_h at a time    W_h = L_h Qᵀ, Q orthonormal, L_h lower triangular;   the paper trains L_h
Value and output of a head         O_h W_h = U S_h Vᵀ, a singular value decomposition;   the paper trains S_h (d × d)

The paper puts Q, or U and V, in the place of the weights, and a matrix between them that starts at L_h or S_h and is
trained. Here the weights stay, and only the change D_h of that matrix is trained, from zero, at the first of the two
layers:

    ΔW_h = out_h D_h into_h W_h      into_h = L_h⁻¹, out_h = 1                    one layer:  ΔW_h = D_h Qᵀ
                                     into_h = (W_h V)⁻¹, out_h = (Uᵀ O_h)⁻¹       a pair:     O_h ΔW_h = U D_h Vᵀ

That is the paper's model for every D_h, with the paper's gradients; weight decay pulls to the base, not to zero. All
rows of a head are multiplied by small matrices, so nothing of the size of W is computed, kept or added to the model.

pairs. "vo": layers called v_proj (or v, v_lin) are taken together with the o_proj (out_proj, o, out_lin) beside them,
all others one by one. "vo+qk": queries (q_proj, q, q_lin, query) with keys, too: K_hᵀ W_h = U S_h Vᵀ, trained at the
query. This is wrong wherever something stands between the two: with rotary position embeddings, which turn queries and
keys by their places, or with norms on them, U and V are no longer the directions in which scores are made. The paper
does the same: no pairs under RoPE, the key layer alone instead. "none": no pairs at all.

The paper's models have one value for each head; where several heads read one, its released code takes the value layer
alone. Here their outputs are stacked, O_h = [O_1; O_2; …], which is the pair again where there is one. Biases stay as
they are; the released code turns them with the weight. Directions that W_h lacks (singular values below 1e-6 of the
largest) are left out.

The paper's run on LLaMA-2-7B is {"k_proj": CLOVER(block=128), "v_proj": CLOVER(block=128), "up_proj": CLOVER()}: heads
of 128 and, in the MLP, 64 neurons at a time.

Cost: d m numbers a site, for blocks of d rows, and as many or twice as many in memory for into and out; d m
multiply-adds a token, x Wᵀ kept for backward, and computed once more in layers with a bias. Not for changes that need
directions which a head does not have.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod

OUTPUTS = {"v_proj": ("o_proj", "out_proj"), "v": ("o",), "v_lin": ("out_lin",)}
KEYS = {"q_proj": ("k_proj",), "q": ("k",), "q_lin": ("k_lin",), "query": ("key",)}
LEAST = 1e-6  # singular values below this share of the largest are none


@register(
    "clover",
    title="CLOVER",
    paper="Meng et al. 2025, arXiv:2411.17426",
    equation="ΔW_h = out_h D_h into_h W_h for each head h; O_h ΔW_h = U D_h Vᵀ where O_h W_h = U S Vᵀ",
    hypothesis="A head has the directions that a task needs; it only has to combine them differently.",
    family="spectral",
    rate=1e-3,
    published="LLaMA-2-7B, mean of 8 commonsense tasks: LoRA 77.6, DoRA 79.7, PiSSA 84.5, CLOVER 85.2, each with "
    "0.83 % of the numbers (paper, table 2; its rows of LoRA and DoRA are copied from DoRA's paper, where checkpoints "
    "are chosen by validation, as they are not here).",
    paper_setting="LLaMA: a head's size on keys and values with outputs, 64 rows of up as one head (here 64 "
    "everywhere), rate 1e-4, batch 16 (paper, §4.2; a head of LLaMA-2-7B has 128).",
)
@dataclass(frozen=True)
class CLOVER(WeightMethod):
    """block: how many rows are combined: a head's size, in pairs with shared values or keys exactly that. pairs: see
    the module."""

    sized_by: ClassVar[str] = "block"
    block: int = 64
    pairs: Literal["none", "vo", "vo+qk"] = "vo"

    def validate(self):
        if self.block < 1:
            yield f"block must be at least 1, got {self.block}"

    def check(self, m: int, n: int) -> str | None:
        if m % self.block:
            return f"block={self.block} does not divide the output width {m}"
        if self.block > n:
            return f"{self.block} rows of {n} numbers have no orthogonal vectors each; block must be at most {n}"
        return None

    def beside(self, path: str) -> tuple[str, ...]:
        name = path.rpartition(".")[2]
        wanted = (OUTPUTS if self.pairs != "none" else {}) | (KEYS if self.pairs == "vo+qk" else {})
        return wanted.get(name, ())

    def derive(self, W: Tensor, rng: Stream) -> Params:
        _, R = torch.linalg.qr(self._heads(W).mT)
        signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        return {"into": torch.linalg.pinv(R.mT * signs[:, None], rtol=LEAST).to(W.dtype)}

    def derive_beside(self, W: Tensor, rng: Stream, others: Params) -> Params:
        heads, other = self._heads(W), self._other(W, others)
        Q, R = torch.linalg.qr(heads.mT)
        _, T = torch.linalg.qr(other, mode="r")
        u, _, vt = torch.linalg.svd(T @ R.mT)  # O_h W_h = (its own Q) T Rᵀ Qᵀ
        V = Q @ vt.mT
        largest = V.gather(1, V.abs().argmax(1, keepdim=True))
        signs = torch.where(largest < 0, -1.0, 1.0)
        into, out = R.mT @ (vt.mT * signs), (u * signs).mT @ T
        return {
            "into": torch.linalg.pinv(into, rtol=LEAST).to(W.dtype),
            "out": torch.linalg.pinv(out, rtol=LEAST).to(W.dtype),
        }

    def _heads(self, W: Tensor) -> Tensor:
        """(heads, d, n) in float64."""
        return W.cpu().double().unflatten(0, (-1, self.block))

    def _other(self, W: Tensor, others: Params) -> Tensor:
        """O_h of every head (heads, …, d), whose product with W_h is decomposed: columns of an output, or K_hᵀ."""
        (name, weight), d, heads = next(iter(others.items())), self.block, len(W) // self.block
        columns = weight.T if any(name in names for names in KEYS.values()) else weight
        theirs, left = divmod(columns.shape[1], d)
        if left or not theirs or theirs % heads * (heads % theirs) or columns.numel() < heads * d * d:
            raise AddendaError(
                f"clover: {len(W)} rows, {d} to a head, cannot be paired with {name} of shape {tuple(weight.shape)}: "
                "its heads must be as many, or a multiple or a part of them. Set block to a head's size, or pairs=none."
            )
        each = columns.cpu().double().unflatten(1, (theirs, d)).transpose(0, 1)
        if theirs < heads:  # several queries have one key
            return each.repeat_interleave(heads // theirs, 0)
        return each.unflatten(0, (heads, -1)).flatten(1, 2)  # one value has several outputs

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        return {"D": nn.Parameter(torch.zeros(len(W) // self.block, self.block, self.block))}

    def _turn(self, p: Params) -> Tensor:
        """out_h D_h into_h (heads, d, d), in the dtype of D."""
        change = p["D"] @ p["into"].to(p["D"].dtype)
        return p["out"].to(change.dtype) @ change if "out" in p else change

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return (self._turn(p) @ W.unflatten(0, (-1, self.block))).flatten(0, 1)

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        y = base(x)
        h = y if base.bias is None else F.linear(x, base.weight)  # y − bias would lose what a large bias drowns
        heads, turn = h.unflatten(-1, (-1, self.block)), self._turn(p).to(h.dtype)
        return y + torch.einsum("...hn,hmn->...hm", heads, turn).flatten(-2)

    def trainable(self, m: int, n: int) -> int:
        return m * self.block
