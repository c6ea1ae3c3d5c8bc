"""NOLA against mixtures summed one matrix at a time."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach
from addenda.methods.nola import NOLA


@pytest.mark.parametrize(("alpha", "s"), [(None, 1), (6.0, 2)])
@pytest.mark.parametrize("shape", [(12, 12), (15, 10), (10, 17)])
def test_reference(check, shape, alpha, s):
    at = check.make(NOLA(rank=3, basis=5, alpha=alpha), *shape)
    (m, n), a, b = shape, at.p["a"].detach(), at.p["b"].detach()
    As = [at.p["A"][:n, :, i].T for i in range(5)]
    Bs = [at.p["B"][:m, :, j] for j in range(5)]
    A, B = sum(a[i] * As[i] for i in range(5)), sum(b[j] * Bs[j] for j in range(5))
    torch.testing.assert_close(at.delta.detach(), s * B @ A, rtol=1e-10, atol=1e-10)
    check.forms_agree(at)
    G = check.upstream(at)[1]
    for through in ("delta", "apply"):
        got = check.gradients(at, through)
        for i in range(5):
            torch.testing.assert_close(got["a"][i], s * (G * (B @ As[i])).sum(), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(got["b"][i], s * (G * (Bs[i] @ A)).sum(), rtol=1e-9, atol=1e-9)


def test_start_and_counts(check):
    check.starts_exactly(NOLA())
    check.starts_exactly(NOLA(rank=4, basis=10, alpha=2.0), 50, 70)
    check.counts(NOLA(basis=20))
    assert NOLA(basis=3).trainable(4096, 4096) == 6 < 2 * 4096  # below a LoRA of rank 1


def test_bases_are_shared_and_the_mixture_starts_at_the_size_of_one():
    model = nn.ModuleDict({"a": nn.Linear(300, 40), "b": nn.Linear(20, 60)})
    adapter = attach(model, NOLA(rank=4, basis=50), targets=["a", "b"])
    a, b = (t for _, t in adapter.sites())
    assert a.A is b.A and a.B is b.B
    assert (a.A.shape, a.B.shape) == ((300, 4, 50), (60, 4, 50))
    A = a.method.factors(a.tensors(), (40, 300)).A
    assert abs(A.std().item() / (300 * 3) ** -0.5 - 1) < 0.1
    assert set(adapter.state_dict()) == {f"{s}/{k}" for s in "ab" for k in "ab"}


def test_options_and_shapes_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"basis": 0}, "basis must"), ({"alpha": 0.0}, "alpha must")):
        with pytest.raises(AddendaError, match=message):
            NOLA(**options)
    assert "above" in NOLA(rank=9).check(8, 20)
