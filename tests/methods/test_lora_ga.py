"""LoRA-GA against LAPACK's singular vectors of a gradient, and its claim about the first step."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda import AddendaError, attach
from addenda.core.base.random import Stream
from addenda.methods.lora_ga import LoRAGA


def gradient(m: int, n: int, rank: int | None = None) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    rank = rank or min(m, n)
    left = torch.randn(m, rank, generator=g, dtype=torch.float64)
    return left @ torch.randn(rank, n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"alpha": 6.0, "gamma": 4.0}])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (40, 45)])
def test_it_is_the_papers_residual_form(check, shape, options):
    """W − s B₀A₀ + s (B₀+dB)(A₀+dA); A₀ from the first r right singular vectors of G, B₀ from the next r left ones."""
    G = gradient(*shape)
    at = check.make(LoRAGA(rank=3, **options), *shape, calibration=G)
    s, c = options.get("alpha", 3) / 3, shape[0] ** 0.25 / options.get("gamma", 16) ** 0.5
    U, _, Vh = torch.linalg.svd(G)
    A0, B0 = at.p["A0"], at.p["B0"]
    torch.testing.assert_close((A0 @ Vh[:3].T).abs(), c * torch.eye(3, dtype=G.dtype), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close((U[:, 3:6].T @ B0).abs(), c * torch.eye(3, dtype=G.dtype), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(A0.norm(dim=1), torch.full((3,), c, dtype=G.dtype))
    new = at.W - s * B0 @ A0 + s * (B0 + at.p["B"].detach()) @ (A0 + at.p["A"].detach())
    torch.testing.assert_close(at.W + at.delta.detach(), new, rtol=1e-9, atol=1e-9)
    check.forms_agree(at)
    Y, got = check.upstream(at)[1], check.gradients(at)
    torch.testing.assert_close(got["A"], (s * (B0 + at.p["B"]).T @ Y).detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got["B"], (s * Y @ (A0 + at.p["A"]).T).detach(), rtol=1e-9, atol=1e-9)
    pair = at.method.pair(at.p)
    torch.testing.assert_close(pair.scale * pair.B @ pair.A - s * B0 @ A0, at.delta, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [6, 4, 1])
def test_the_first_step_is_the_best_step_of_rank_2r(check, rank):
    """Also where the gradient has fewer directions than 2r = 4: then the step is the gradient itself."""
    G = gradient(9, 8, rank)
    at = check.make(LoRAGA(rank=2, alpha=6.0), 9, 8, calibration=G)
    p = at.p | {k: torch.zeros_like(at.p[k]).requires_grad_() for k in ("A", "B")}
    gA, gB = torch.autograd.grad((G * at.method.delta(at.W, p)).sum(), (p["A"], p["B"]))
    step = 3 * (at.p["B0"] @ gA + gB @ at.p["A0"])  # of W, for a learning rate of −1
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    torch.testing.assert_close(step, 3**2 * (9**0.25 / 4) ** 2 * best, rtol=1e-9, atol=1e-9)


def test_neither_the_size_of_the_loss_nor_the_number_of_batches_changes_the_start(check):
    G, method = gradient(12, 9), LoRAGA(rank=2)
    one = check.make(method, 12, 9, calibration=G).p
    seen = None
    for _ in range(4):
        seen = method.calibrate(G, 1e-3 * G, seen)
    other = check.make(method, 12, 9, calibration=seen).p
    torch.testing.assert_close(other["A0"], one["A0"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(other["B0"], one["B0"], rtol=1e-9, atol=1e-9)


def batches():
    return [Stream(i, "x").normal(6, 10) for i in range(2)]


def loss(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_with_data(dtype, tmp_path):
    model = nn.Sequential(nn.Linear(10, 8)).to(dtype)
    data = [x.to(dtype) for x in batches()]
    G = torch.autograd.grad(sum(loss(model, x) for x in data), model[0].weight)[0].double()
    before = [model(x) for x in data]
    adapter = attach(model, LoRAGA(rank=2), calibration=data, loss=loss)
    assert all(torch.equal(model(x), y) for x, y in zip(data, before, strict=True))
    assert adapter.trainable == LoRAGA(rank=2).trainable(8, 10) == 2 * 18
    (tensors,) = (t for _, t in adapter.sites())
    assert tensors.A.dtype == tensors.A0.dtype == torch.float32
    assert set(adapter.state_dict()) == {"0/A", "0/B", "0/A0", "0/B0"}
    Vh = torch.linalg.svd(G).Vh[:2].float()
    c = 8**0.25 / 4
    torch.testing.assert_close(tensors.A0 @ Vh.T @ Vh, tensors.A0, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    torch.testing.assert_close(tensors.A0.norm(dim=1), torch.full((2,), c), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        tensors.A.normal_(), tensors.B.normal_()
    y, file = model(data[0]), adapter.save(tmp_path / "a.safetensors")
    ad.detach(model)
    ad.load(model, file)  # without data: A0 and B0 are in the file
    assert torch.equal(model(data[0]), y)


def test_options_and_shapes_are_checked():
    for options, message in (
        ({"rank": 0}, "rank must"),
        ({"gamma": 0}, "gamma must be above 0"),
        ({"alpha": -1.0}, "alpha must"),
        ({"dropout": 1.0}, "dropout must"),
    ):
        with pytest.raises(AddendaError, match=message):
            LoRAGA(**options)
    assert LoRAGA(rank=4).check(8, 20) is None
    assert LoRAGA(rank=5).check(8, 20) == "rank 5 takes 10 singular directions, 8 × 20 has 8"
    with pytest.raises(AddendaError, match="lora-ga with these options looks at data before training"):
        attach(nn.Sequential(nn.Linear(20, 20)), "lora-ga:rank=2")
