"""LoRA-Pro: factors that move as full fine-tuning would move W, as nearly as their rank allows (arXiv 2407.18242).

    g~ = s (B gA' + gB' A)      what a step of the factors does to W, to first order
    the g~ nearest to G = ∂L/∂W:   P_B G + (I − P_B) G P_A     P_B, P_A: projections on the columns of B, the rows of A
    gA' = (BᵀB)⁻¹ gA / s² + X A         gB' = (I − P_B) gB (A Aᵀ)⁻¹ / s² − B X      from LoRA's own gradients gA, gB
    X: the factors' steps are nearest to gA, gB where  BᵀB X + X A Aᵀ = −(BᵀB)⁻¹ gA Aᵀ / s²

Modes. "full": Adam's two moments of g~ (m × n each), and its step u takes the place of G in gA' and gB'; this is what
the paper's main results use. "efficient": gA' and gB' go through AdamW, entry by entry, which undoes part of the
projection. "sgd": A −= rate gA', B −= rate gB', where the loss falls by rate ‖g~‖² to first order.

Where B is 0, as at LoRA's start, A stays and B alone moves: g~ = G P_A. A step later B is as small as the rate and its
inverse as large as 1/rate, so A turns towards the gradient by about half its length, whatever the rate; W moves little
by it, as B is small. `trust` bounds the step of A to so much of ‖A‖, at each matrix: gA' and X are made smaller by one
factor c, and W moves by c P_B u + (I − P_B) u P_A, still downhill; c = 0 is the step at B = 0. The default of 1 lets A
turn, and stops only a step longer than A itself, where the term rate² s B' A' that the projection leaves out can
outgrow the rest. 0.1 makes the first steps nearly exact, but holds A back for a dozen of them, and training with it,
unless the rate is too high.

`damping` is added to both Gram matrices, relative to their mean eigenvalue: the projection does not depend on how small
B is. The Sylvester equation is solved by two symmetric eigendecompositions, sites of one shape together. Nothing of
size m × m is made.

Weight decay pulls ΔW to 0 by rate · weight_decay a step, in every mode: both factors shrink by its square root, the
base is never touched. Where offsets of the factors are trained (PiSSA) each offset shrinks by the whole, which does the
same to first order. The equations hold for gradients of one product: clip both factors by one norm, as trainers do.
With dropout or DoRA, G is the gradient that the product sees. Trainable tensors that belong to no pair, such as heads,
and pairs of which one factor is frozen, get AdamW.

Traps in the released code: it is part of a changed DeepSpeed, with s fixed at 2, absolute damping, a first-step branch
that is never reached, moments in bfloat16, and m × m identities.

rate: in mode "full" that of full fine-tuning, well below LoRA's: every entry of W moves by about the rate.
Cost: "full" keeps 2 m n numbers a site, as full fine-tuning does, and makes a few passes over them; the others keep
AdamW's 2 r (m + n), or nothing. Not where memory is why LoRA was chosen, except for "efficient".
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.optim.pairs import Paired, adam, groups_of, loss_of, paired, plain_step, trained
from addenda.optim.registry import optimizer

CHUNK = 1 << 21  # numbers of one m × n temporary: small enough for a cache, large enough to fill a GPU


@optimizer("lora-pro", paper="Wang et al. 2024, arXiv:2407.18242")
class LoRAPro(torch.optim.Optimizer):
    """Moves two thin factors as full fine-tuning would move the weight, as nearly as their rank allows.

    mode, damping, trust: see the module. beta1, beta2, eps: Adam's.
    """

    def __init__(
        self,
        adapter: Adapter,
        rate: float,
        weight_decay: float = 0.0,
        *,
        mode: Literal["full", "efficient", "sgd"] = "full",
        damping: float = 1e-6,
        trust: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ):
        problems = [] if mode in ("full", "efficient", "sgd") else [f"mode 'full', 'efficient' or 'sgd', got {mode!r}"]
        problems += [f"{k} above 0, got {v}" for k, v in (("damping", damping), ("trust", trust)) if not v > 0]
        if problems:
            raise AddendaError(f"lora-pro wants {' and '.join(problems)}.")
        sites = [s for s in paired(adapter, "lora-pro") if all(p.requires_grad for p in s.parameters)]
        if any(s.tensors.method.bits for s in sites):
            raise AddendaError("lora-pro moves the factors that act, and these act in few bits (bits=). Take 'adamw'.")
        own = [p for s in sites for p in s.parameters]
        rest = trained(adapter, own)
        if not sites:
            raise AddendaError(f"No site of adapter {adapter.name!r} trains both of its factors. Take 'adamw'.")
        if any(p.element_size() < 4 for p in own):
            raise AddendaError("lora-pro wants factors in float32 or wider, which attach makes; these were cast.")
        self.mode, self.damping, self.trust = mode, damping, trust
        alike: dict[tuple, list[Paired]] = {}
        for s in sites:
            alike.setdefault((s.left.shape[-2:], s.right.shape[-2:], s.left.dtype, s.left.device), []).append(s)
        self.alike = list(alike.values())
        super().__init__(*groups_of(adapter, own, rest, rate, weight_decay, betas=(beta1, beta2), eps=eps))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step from the gradients that are there; a site without them is left alone."""
        loss = loss_of(closure)
        pairs, *others = self.param_groups
        for sites in self.alike:
            room: list[Tensor] = []  # the m × n temporaries of all portions
            for some in self._portions([s for s in sites if all(p.grad is not None for p in s.parameters)]):
                self._move(some, pairs, room)
        for group in others:
            plain_step(self, group)
        return loss

    def _portions(self, sites: list[Paired]) -> Iterator[list[Paired]]:
        """Yield sites to compute together: all that are alike, in mode "full" as many as a temporary holds."""
        most = len(sites)
        if sites and self.mode == "full":
            most = max(1, CHUNK // (sites[0].left.numel() * sites[0].right.shape[-1] // sites[0].left.shape[-1]))
        for i in range(0, len(sites), most or 1):
            yield sites[i : i + most]

    def _move(self, sites: list[Paired], group: dict, room: list[Tensor]) -> None:
        rate, decay = group["lr"], group["lr"] * group["weight_decay"]
        lefts, rights = [s.left for s in sites], [s.right for s in sites]
        pairs, leads = [s.now for s in sites], [p.shape[:-2] for p in lefts]
        B, A = _stack([p.B for p in pairs], lefts), _stack([p.A for p in pairs], rights)
        gB, gA = _stack([p.grad for p in lefts], lefts), _stack([p.grad for p in rights], rights)
        each = [p.scale for p, lead in zip(pairs, leads, strict=True) for _ in range(math.prod(lead))]
        tangent = Tangent(B, A, torch.tensor(each, dtype=torch.float64).to(B)[:, None, None], self.damping)
        if self.mode == "full":
            size = (len(B), B.shape[1], A.shape[2])
            if not room or room[0].numel() < math.prod(size):
                room[:] = B.new_empty(math.prod(size)), B.new_empty(math.prod(size))
            g, u = (t[: math.prod(size)].view(size) for t in room)
            tangent.gradient(gB, gA, out=g)
            u.zero_()
            adam(_apart(u, leads), _apart(g, leads), [self.state[p] for p in lefts], group, rate=-1.0)
            gB, gA = tangent.seen(u)
        b, a = tangent.factors(gB, gA, None if self.mode == "efficient" else (self.trust, rate))
        if decay:
            for s in sites:
                for p in s.parameters:
                    p.mul_(1 - decay if s.offset else math.sqrt(1 - decay))
        for values, made in ((lefts, _apart(b, leads)), (rights, _apart(a, leads))):
            if self.mode == "efficient":
                adam(values, made, [self.state[p] for p in values], group, rate)
            else:
                for p, move in zip(values, made, strict=True):
                    p.sub_(move, alpha=rate)


class Tangent:
    """The directions s (B Y + Z A) in which a change s B A moves at first, for stacked B (k, m, r) and A (k, r, n)."""

    def __init__(self, B: Tensor, A: Tensor, s: Tensor, damping: float):
        self.B, self.A, self.s = B, A, s
        self.p, self.U, self.inverse_b = _inverse(B.mT @ B, damping)
        self.q, self.V, self.inverse_a = _inverse(A @ A.mT, damping)

    def gradient(self, gB: Tensor, gA: Tensor, out: Tensor | None = None) -> Tensor:
        """Return g~ (k, m, n), the nearest to G, from gB = s G Aᵀ and gA = s Bᵀ G."""
        left = torch.cat([self.B, self._off(gB)], 2)
        right = torch.cat([self.inverse_b @ gA, self.inverse_a @ self.A], 1) / self.s
        return torch.bmm(left, right, out=out)

    def seen(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the factors' gradients are where the weight's is u."""
        return u @ (self.s * self.A).mT, (self.s * self.B).mT @ u

    def factors(self, gB: Tensor, gA: Tensor, limit: tuple[float, float] | None = None) -> tuple[Tensor, Tensor]:
        """Return the factors' directions gB' and gA'. limit: (trust, rate)."""
        a = self.inverse_b @ gA / self.s**2
        gaps = (self.p[:, :, None] + self.q[:, None, :]).clamp_min(torch.finfo(a.dtype).tiny)
        X = -self.U @ ((self.U.mT @ (a @ self.A.mT) @ self.V) / gaps) @ self.V.mT
        a = a + X @ self.A
        if limit is not None:
            trust, rate = limit
            jump = (rate * _length(a)).clamp_min(torch.finfo(a.dtype).tiny)
            c = (trust * _length(self.A) / jump).clamp_max(1)
            a, X = c * a, c * X
        return self._off(gB) @ (self.inverse_a / self.s**2) - self.B @ X, a

    def _off(self, gB: Tensor) -> Tensor:
        """Return the part of gB outside of B's columns: (I − P_B) gB."""
        return gB - self.B @ (self.inverse_b @ (self.B.mT @ gB))


def _inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return damped eigenvalues, eigenvectors and inverse of Gram matrices; the inverse of zeros is zero."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    values = values + damping * values.mean(1, keepdim=True)
    inverse = torch.where(values > torch.finfo(values.dtype).tiny, 1 / values, 0)
    return values, vectors, (vectors * inverse[:, None, :]) @ vectors.mT


def _length(t: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(t, keepdim=True)


def _stack(tensors: list, like: list) -> Tensor:
    """Return the matrices of all sites, of stacks too, as one (k, rows, columns) in the parameters' dtype."""
    return torch.cat([t.reshape(-1, *p.shape[-2:]).to(p.dtype) for t, p in zip(tensors, like, strict=True)])


def _apart(stacked: Tensor, leads: list[torch.Size]) -> list[Tensor]:
    """Return the sites' own tensors again: views of the stacked one."""
    parts = stacked.split([math.prod(lead) for lead in leads])
    return [t.view(*lead, *t.shape[1:]) for t, lead in zip(parts, leads, strict=True)]
