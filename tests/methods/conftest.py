"""One site of any method in float64, and the checks that every method must pass at it."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import addenda
from addenda.core.base.random import Stream
from addenda.core.forward.fused import block_linear, factored_linear
from addenda.core.method.contract import Base, WeightMethod, to_float

SHAPES = ((64, 64), (96, 64), (64, 96), (50, 70))


@dataclass
class At:
    """A method at a weight, its trainable tensors filled with noise that requires gradients."""

    method: WeightMethod
    W: Tensor
    p: dict[str, Tensor]
    trainable: list[str]
    x: Tensor
    bias: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.p[k] for k in self.trainable]

    @property
    def delta(self) -> Tensor:
        return self.method.delta(self.W, self.p)

    def apply(self, x: Tensor | None = None) -> Tensor:
        """The output without forming ΔW: through the factors as the core runs them, or the method's own `apply`."""
        x, m = self.x if x is None else x, self.method
        if m.has("blocks"):
            return block_linear(x, self.W, self.bias, *m.blocks(self.p, self.W.shape))
        if m.has("factors"):
            c = m.magnitude(self.W, self.p) if m.has("magnitude") else None
            return factored_linear(x, 0.0, self.W, self.bias, c, m.factors(self.p, self.W.shape))
        return m.apply(x, Base(lambda x: F.linear(x, self.W, self.bias), self.W, self.bias), self.p)

    def dense(self) -> Tensor:
        return self.x @ (self.W + self.delta).T + self.bias


def make(method: WeightMethod, m: int, n: int, *, W: Tensor | None = None, calibration: Tensor | None = None) -> At:
    g = torch.Generator().manual_seed(m * 1000 + n)
    W = torch.randn(m, n, generator=g, dtype=torch.float64) / n**0.5 if W is None else W
    rng = Stream(0, "site")
    shapes = [(m, n), (m + 3, n + 5)]
    pool = method.pool(shapes, Stream(0, "pool"))
    known = method.shared(shapes, Stream(0, "shared")) | method.derive(W, rng) | pool
    if calibration is not None:
        known["calibration"] = calibration
    own = method.init(W, rng, known)
    p = to_float(known | own, torch.float64)
    trainable = [k for k, t in (own | pool).items() if isinstance(t, nn.Parameter)]
    for k in trainable:
        noise = torch.randn(p[k].shape, generator=g, dtype=torch.float64) * 0.3
        p[k] = (p[k].detach() + noise).requires_grad_()
    x = torch.randn(2, 3, n, generator=g, dtype=torch.float64)
    return At(method, W, p, trainable, x, torch.randn(m, generator=g, dtype=torch.float64))


def forms_agree(at: At, tolerance: float = 1e-10) -> None:
    """delta, effective, factors, sparse and apply say the same."""
    delta, shape = at.delta, at.W.shape
    torch.testing.assert_close(at.method.effective(at.W, at.p), at.W + delta, rtol=tolerance, atol=tolerance)
    if at.method.has("factors"):
        B, A = at.method.factors(at.p, shape).pair()
        product = (
            (at.W + B @ A) * at.method.magnitude(at.W, at.p)[:, None] - at.W if at.method.has("magnitude") else B @ A
        )
        torch.testing.assert_close(product, delta, rtol=tolerance, atol=tolerance)
    if at.method.has("sparse"):
        index, values = at.method.sparse(at.p, shape)
        flat = delta.flatten()
        torch.testing.assert_close(flat[index.long()], values, rtol=tolerance, atol=tolerance)
        assert flat.count_nonzero() <= len(values)
        assert bool((index.diff() > 0).all())
    if any(map(at.method.has, ("apply", "factors", "blocks"))):
        want = at.dense()
        torch.testing.assert_close(at.apply(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(at.apply(at.x[0, 0]), want[0, 0], rtol=tolerance, atol=tolerance)


def gradients(at: At, through: str = "delta") -> dict[str, Tensor]:
    """∂L/∂(each trainable tensor) for the linear loss ⟨G, W + ΔW⟩, or of ⟨Y, y⟩ through `apply`; see `upstream`."""
    Y, G = upstream(at)
    loss = (G * at.delta).sum() if through == "delta" else (Y * at.apply()).sum()
    return dict(zip(at.trainable, torch.autograd.grad(loss, at.leaves), strict=True))


def upstream(at: At) -> tuple[Tensor, Tensor]:
    """A gradient Y at the output, and the one that it makes at the weight: G = Yᵀ x."""
    Y = torch.randn(2, 3, at.W.shape[0], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Y, torch.einsum("abm,abn->mn", Y, at.x)


def starts_exactly(method: WeightMethod, m: int = 64, n: int = 64) -> None:
    """Attached through the library, the output and the effective weight are the base's, bit for bit, and train."""
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (True, False):
            torch.manual_seed(3)
            model = nn.ModuleDict({"proj": nn.Linear(n, m, bias=bias)}).to(dtype)
            x = torch.randn(2, 5, n).to(dtype)
            W, want = copy.deepcopy(model["proj"].weight.data), model["proj"](x)
            adapter = addenda.attach(model, method, targets="proj")
            assert adapter.trainable == method.trainable(m, n)
            tensors = next(t for _, t in adapter.sites())
            assert all(t.dtype == torch.float32 for t in tensors.parameters())
            got = model["proj"](x)
            assert got.dtype == dtype
            assert torch.equal(got, want)
            p = to_float(tensors.tensors())
            assert torch.equal(method.effective(W.float(), p).to(dtype), W)
            got.float().square().sum().backward()
            assert any(bool(t.grad.any()) for t in tensors.parameters())
            addenda.detach(model)
            assert torch.equal(model["proj"].weight.data, W)


def counts(method: WeightMethod, shapes=SHAPES) -> None:
    """The count formula gives what is really trained."""
    for m, n in shapes:
        assert method.check(m, n) is None, (m, n)
        found = sum(t.numel() for t in make(method, m, n).leaves)
        assert found == method.trainable(m, n) + method.pooled([(m, n), (m + 3, n + 5)]), (m, n)


class Checks:
    make, forms_agree, gradients = staticmethod(make), staticmethod(forms_agree), staticmethod(gradients)
    upstream, starts_exactly, counts = staticmethod(upstream), staticmethod(starts_exactly), staticmethod(counts)


@pytest.fixture
def check() -> type[Checks]:
    """make, forms_agree, gradients, upstream, starts_exactly, counts: see the functions of these names."""
    return Checks
