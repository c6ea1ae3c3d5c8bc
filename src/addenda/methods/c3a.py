"""C3A: every b × b block of ΔW is circulant (Chen et al. 2024, arXiv 2407.19342).

    block (p, q) of ΔW = 1/n · [ w_0   w_1   …  w_{b−1} ]        w = w_pq, b trained numbers
                               [ w_{b−1} w_0 …  w_{b−2} ]        every row is the one above, shifted by one
                               [          …             ]

    x in blocks of b ── FFT ── Σ_q, products of frequencies ── inverse FFT ── / n ──┐
         └───────────────────────────── W (m × n) ──────────────────────────────────┴── y

A block may have full rank for b numbers, so a larger block trains less and costs no rank. The kernels start at zero:
the start is exact. PEFT, where the authors published their code, starts them Xavier-uniform unless told otherwise. The
1/n stands in no equation of the paper but in that code; learning rates near 0.1 belong to it. The transforms run in
float32 at least.

Cost: m n / b numbers a site; (m + n) log b + 2 m n / b operations a token. Needs b to divide m and n. Neighbours on a
shifted diagonal share a number: not for changes that must tell single entries apart.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Base, Params, WeightMethod


@register(
    "c3a",
    title="C3A",
    paper="Chen et al. 2024, arXiv:2407.19342",
    equation="ΔW = blocks of circulant matrices / n",
    hypothesis="The change has high rank but few free numbers: in every block it only depends on column minus row.",
    family="block",
    rate=1e-1,
    published="RoBERTa-base, mean of 6 tasks of GLUE: full fine-tuning 83.92, LoRA r = 8 83.35 with 0.295 M numbers, "
    "C3A 83.84 with 0.111 M (paper; others print 85.2 for the same LoRA).",
    paper_setting="blocks of the whole width and of a sixth of it on RoBERTa-base (768 and 128), an eighth on large "
    "(128), a 32nd on LLaMA (4096/32 = 128; here 64) (paper, tables 2 to 4); PEFT's default is 256.",
)
@dataclass(frozen=True)
class C3A(WeightMethod):
    """block: the side b of a block; larger trains less."""

    sized_by: ClassVar[str] = "block"
    block: int = 64

    def validate(self):
        if self.block < 1:
            yield f"block must be at least 1, got {self.block}"

    def check(self, m: int, n: int) -> str | None:
        return f"block={self.block} does not divide both of {m} × {n}" if m % self.block or n % self.block else None

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        m, n = W.shape
        return {"kernel": nn.Parameter(torch.zeros(m // self.block, n // self.block, self.block))}

    def delta(self, W: Tensor, p: Params) -> Tensor:
        i = torch.arange(self.block, device=W.device)
        blocks = p["kernel"][..., (i - i[:, None]) % self.block]  # …, row, column
        return blocks.transpose(1, 2).reshape(W.shape) / W.shape[1]

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        if not x.numel():  # no FFT takes an empty batch
            return base(x) + F.linear(x, self.delta(base.weight, p).to(x.dtype))
        return base(x) + _Correlate.apply(x, p["kernel"])

    def trainable(self, m: int, n: int) -> int:
        return m * n // self.block


class _Correlate(torch.autograd.Function):
    """y_pi = Σ_qj w_pq,(j−i) x_qj / n for x (…, n) and the kernel w (m/b, n/b, b), by FFT along the last dimension.

    Kept for backward: x and the kernel. Their waves, twice as wide as x in bfloat16, are made again.
    """

    @staticmethod
    def forward(ctx, x, kernel):
        ctx.save_for_backward(x, kernel)
        waves, w = _waves(x, kernel, x), _waves(kernel.flatten(-2), kernel, x)
        return _back(torch.einsum("...qk,pqk->...pk", waves, w.conj()), kernel, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, kernel = ctx.saved_tensors
        need_x, need_kernel = ctx.needs_input_grad
        g, gx, gkernel = _waves(gy, kernel, x), None, None
        if need_x:
            w = _waves(kernel.flatten(-2), kernel, x)
            gx = _back(torch.einsum("...pk,pqk->...qk", g, w), kernel, x)
        if need_kernel:
            waves, g = (t.reshape(-1, *t.shape[-2:]) for t in (_waves(x, kernel, x), g))
            both = torch.einsum("tqk,tpk->pqk", waves, g.conj())
            gkernel = (torch.fft.irfft(both, kernel.shape[-1]) / x.shape[-1]).to(kernel.dtype)
        return gx, gkernel


def _waves(t: Tensor, kernel: Tensor, like: Tensor) -> Tensor:
    """The spectra of every block of b entries of t (…, blocks · b), as wide as `like`, float32 at least."""
    t = t.to(torch.promote_types(like.dtype, torch.float32))
    return torch.fft.rfft(t.unflatten(-1, (-1, kernel.shape[-1])))


def _back(waves: Tensor, kernel: Tensor, like: Tensor) -> Tensor:
    n = kernel.shape[1] * kernel.shape[2]
    return (torch.fft.irfft(waves, kernel.shape[-1]).flatten(-2) / n).to(like.dtype)
