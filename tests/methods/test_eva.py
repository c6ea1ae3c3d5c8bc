"""EVA against LAPACK's singular vectors of all inputs stacked, and its claim about the first gradient."""

import pytest
import torch
from torch import nn

from addenda import AddendaError, attach, detach, load, plan
from addenda.core.base.random import Stream
from addenda.methods.eva import EVA


def inputs(tokens: int, n: int) -> torch.Tensor:
    """With a mean and with directions of very different size, as activations have."""
    spread = torch.logspace(1, -2, n)
    turn = torch.linalg.qr(Stream(1, "turn").normal(n, n)).Q
    return (Stream(2, "x").normal(tokens, n) * spread + 0.5) @ turn


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_reference(check, shape, alpha):
    X, method, s = inputs(40, shape[1]).double(), EVA(rank=3, alpha=alpha), (alpha or 3) / 3
    seen = None
    for part in X.split(11):
        seen = method.calibrate(torch.zeros(shape), part, seen)
    own = method.init(torch.zeros(shape), Stream(0), {"calibration": seen})
    Vh = torch.linalg.svd(X).Vh[:3].float()
    torch.testing.assert_close((own["A"] @ Vh.T).abs(), torch.eye(3), rtol=1e-5, atol=1e-5)
    assert bool((own["A"].detach().gather(1, own["A"].detach().abs().argmax(1, keepdim=True)) > 0).all())
    assert not own["B"].any()
    assert sum(t.numel() for t in own.values()) == method.trainable(*shape)

    at = check.make(method, *shape, calibration=seen)
    A, B = at.p["A"].detach(), at.p["B"].detach()
    torch.testing.assert_close(at.delta.detach(), s * sum(torch.outer(B[:, k], A[k]) for k in range(3)))
    check.forms_agree(at)
    G, got = check.upstream(at)[1], check.gradients(at)
    torch.testing.assert_close(got["A"], s * B.T @ G, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got["B"], s * G @ A.T, rtol=1e-10, atol=1e-10)
    pair = method.pair(at.p)
    torch.testing.assert_close(pair.scale * pair.B @ pair.A, at.delta)


def test_b_gets_the_largest_gradient_to_be_expected():
    """E‖∂loss/∂B‖² over gradients of y that are independent of x is m ‖X Aᵀ‖² for their variance 1."""
    X, m = inputs(50, 12), 6
    A = EVA(rank=3).init(torch.zeros(m, 12), Stream(0), {"calibration": X.T @ X})["A"].detach()
    S = torch.linalg.svdvals(X)
    torch.testing.assert_close((X @ A.T).square().sum(), S[:3].square().sum(), rtol=1e-4, atol=1e-4)
    found = torch.stack([(Stream(i, "Y").normal(50, m).T @ X @ A.T).square().sum() for i in range(300)]).mean()
    assert abs(found / (m * S[:3].square().sum()) - 1) < 0.1
    for seed in range(20):
        other = torch.linalg.qr(Stream(seed, "A").normal(12, 3)).Q.T
        assert (X @ other.T).square().sum() < (X @ A.T).square().sum()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 10), nn.Linear(10, 16), nn.Linear(16, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.down(torch.tanh(self.up(self.embed(input_ids))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_with_data(dtype):
    torch.manual_seed(0)
    model, ids = Model().to(dtype), torch.arange(24).view(2, 12) % 20
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    x = model.embed(ids)[mask.bool()].detach()
    before = model(ids)
    batches = [{"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(2)]
    adapter = attach(model, EVA(rank=4), calibration=batches)  # no labels: no loss is asked for
    assert torch.equal(model(ids), before)
    up, down = (t for _, t in adapter.sites())
    loose = 1e-4 if dtype == torch.float32 else 0.02
    for tensors, X in ((up, x), (down, torch.tanh(model.up(x)).detach())):
        assert tensors.A.dtype == torch.float32
        Vh = torch.linalg.svd(X.float(), full_matrices=False).Vh[:4]
        torch.testing.assert_close(tensors.A @ Vh.T @ Vh, tensors.A, rtol=0, atol=loose)
        torch.testing.assert_close((tensors.A @ tensors.A.T).detach(), torch.eye(4), rtol=0, atol=1e-5)
    model(ids).float().square().sum().backward()
    assert up.B.grad.any() and not up.A.grad.any()


def test_options_and_places_are_checked():
    for options, message in (({"rank": 0}, "rank must"), ({"alpha": 0.0}, "alpha must"), ({"dropout": 1.0}, "dropout")):
        with pytest.raises(AddendaError, match=message):
            EVA(**options)
    assert "above" in EVA(rank=9).check(8, 20)
    with pytest.raises(AddendaError, match=r"1 sites have no inputs to look at.*embed"):
        attach(Model(), EVA(rank=2), targets=["linear", "embed"], calibration=[{"input_ids": torch.zeros(1, 2).int()}])


class Wide(nn.Module):
    """Layers whose inputs need few or many directions; without biases and of odd functions, so that means stay 0."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(10, 9, bias=False) for _ in range(2))
        self.c = nn.Linear(9, 6, bias=False)
        self.d = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.d(torch.tanh(self.c(torch.tanh(self.a(x)) * 3 + self.b(x))))


def balanced() -> torch.Tensor:
    half = inputs(60, 10) - 0.5
    return torch.cat([half, -half])


def allotted(model: nn.Module, x: torch.Tensor, method: EVA):
    return attach(model, method, targets=["a", "b", "c", "d"], calibration=[x], loss=lambda model, x: model(x).sum())


@pytest.mark.parametrize(("rank", "rho"), [(2, 1.5), (2, 2.0), (3, 2.0), (1, 3.0)])
def test_ranks_go_where_the_shares_are(rank, rho):
    """Against every share of every layer in one sorted list, by singular values of the inputs themselves."""
    torch.manual_seed(0)
    model, x = Wide(), balanced()
    seen: dict[str, torch.Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda _, a, n=n: seen.update({n: a[0].detach()}))  # pyright: ignore[reportUnhashable]
             for n, m in model.named_children()]  # fmt: skip
    y = model(x)
    for hook in hooks:
        hook.remove()
    shares = []
    for place, (name, X) in enumerate(seen.items()):
        squares = torch.linalg.svdvals(X.double()).square()
        most = min(round(rank * rho), *getattr(model, name).weight.shape)
        shares += [(-round(float(s), 9), place, name) for s in (squares / squares.sum())[:most]]
    chosen = [name for *_, name in sorted(shares)[: 4 * rank]]
    adapter = allotted(model, x, EVA(rank=rank, alpha=3.0, rho=rho))
    assert torch.equal(model(x), y)
    assert {path: m.rank for path, m in adapter.methods.items()} == {n: chosen.count(n) for n in dict.fromkeys(chosen)}
    assert sum(m.rank for m in adapter.methods.values()) == 4 * rank
    for path, tensors in adapter.sites():
        assert tensors.method.scale == pytest.approx(3.0 / rank)
        Vh = torch.linalg.svd(seen[path]).Vh[: tensors.method.rank]
        torch.testing.assert_close((tensors.A @ Vh.T).abs().detach(), torch.eye(len(Vh)), rtol=0, atol=1e-3)


class Halves(nn.Module):
    """A layer whose inputs have a few directions, and one whose inputs have them all alike."""

    def __init__(self):
        super().__init__()
        self.few, self.all = nn.Linear(10, 8), nn.Linear(10, 8)

    def forward(self, x):
        return self.few(x[..., :10]) + self.all(x[..., 10:])


def test_a_layer_without_ranks_is_left_out_and_files_know(tmp_path):
    torch.manual_seed(0)
    model, x = Halves(), torch.cat([inputs(200, 10) - 0.5, Stream(3, "x").normal(200, 10)], 1)
    method = EVA(rank=1, rho=2.0)
    assert plan(model, method, targets=["few", "all"]).trainable == 36  # before any data is seen
    adapter = attach(model, method, targets=["few", "all"], calibration=[x], loss=lambda model, x: model(x).sum())
    assert adapter.methods == {"few": EVA(rank=2)} and adapter.trainable == 36
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    y, methods = model(x), adapter.methods
    file = adapter.save(tmp_path / "a.safetensors")
    detach(model)
    again = load(model, file)
    assert torch.equal(model(x), y)
    assert again.methods == methods


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rank", [1, 2])
def test_peft_hands_out_the_same_ranks(rank):
    """Inputs with a mean of 0, where PEFT's centring does nothing; one batch, more tokens than directions."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, x = Wide(), balanced()
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["a", "b", "c", "d"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.999),
    )  # fmt: skip
    theirs = peft.tuners.lora.eva.get_eva_state_dict(
        model, [x], config, forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None, show_progress_bar=False,
    )  # fmt: skip
    adapter = allotted(model, x, EVA(rank=rank, rho=2.0))
    mine = {path: m.rank for path, m in adapter.methods.items()}
    assert {n: len(t) for n, t in theirs.items() if len(t)} == mine
    for path, tensors in adapter.sites():
        torch.testing.assert_close(
            (tensors.A @ theirs[path].float().T).detach().abs(), torch.eye(mine[path]), rtol=0, atol=0.02
        )


def test_equal_ranks_without_rho():
    torch.manual_seed(0)
    adapter = allotted(Wide(), balanced(), EVA(rank=2))
    assert [m.rank for m in adapter.methods.values()] == [2, 2, 2, 2]
    with pytest.raises(AddendaError, match="rho must be at least 1"):
        EVA(rho=0.5)
