"""LoRA-Pro against dense float64 algebra: projections by QR, the Sylvester equation by a Kronecker product."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from addenda import AddendaError, attach, optim
from addenda.optim import lora_pro
from addenda.optim.lora_pro import LoRAPro, Tangent

EXACT = "damping=1e-14,trust=1e9"


def one(m=10, n=7, rank=3, alpha=None, spec="lora", dtype=torch.float64, seed=0, cold=False):
    """An adapter on one layer with random factors, and its tensors."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    adapter = attach(model, f"{spec}:rank={rank}" + (f",alpha={alpha}" if alpha else ""), targets="0")
    model.to(dtype)
    ((_, t),) = adapter.sites()
    with torch.no_grad():
        t.A.normal_()
        t.B.normal_().mul_(0 if cold else 1)
    return adapter, t


def give(t, G: Tensor) -> tuple[Tensor, Tensor]:
    """The factors' gradients where the weight's is G."""
    pair = t.method.pair(t.tensors())
    t.B.grad, t.A.grad = (pair.scale * G @ pair.A.T).detach(), (pair.scale * pair.B.T @ G).detach()
    return t.B.grad.clone(), t.A.grad.clone()


def projection(B: Tensor, A: Tensor, G: Tensor, c: float = 1.0) -> Tensor:
    """c P_B G + (I − P_B) G P_A."""
    Q, R = torch.linalg.qr(B.detach()).Q, torch.linalg.qr(A.detach().T).Q
    inside = Q @ Q.T @ G if B.any() else torch.zeros_like(G)
    return c * inside + (G - inside) @ R @ R.T


def adjusted(B, A, gB, gA, s):
    """gB', gA' by inverses and one large linear system."""
    P, Q, r = B.T @ B, A @ A.T, len(A)
    rhs = -torch.linalg.inv(P) @ gA @ A.T / s**2
    eye = torch.eye(r, dtype=B.dtype)
    X = torch.linalg.solve(torch.kron(P, eye) + torch.kron(eye, Q.T.contiguous()), rhs.flatten()).view(r, r)
    a = torch.linalg.inv(P) @ gA / s**2 + X @ A
    b = (torch.eye(len(B), dtype=B.dtype) - B @ torch.linalg.inv(P) @ B.T) @ gB @ torch.linalg.inv(Q) / s**2 - B @ X
    return b, a


def sgd_step(adapter, t, rate=1e-3, options=EXACT):
    """What one step of mode "sgd" did, over the rate: (gB', gA')."""
    before = t.B.detach().clone(), t.A.detach().clone()
    optim.build(adapter, f"lora-pro:mode=sgd,{options}", rate).step()
    return (before[0] - t.B.detach()) / rate, (before[1] - t.A.detach()) / rate


def close(a, b, tolerance=1e-8):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize("shape", [(10, 7), (6, 12), (8, 8)])
def test_a_step_moves_w_along_the_projection_by_the_nearest_factors(shape, alpha):
    adapter, t = one(*shape, alpha=alpha)
    s, G = (alpha or 3) / 3, torch.randn(shape, dtype=torch.float64)
    B, A = t.B.detach().clone(), t.A.detach().clone()
    gB, gA = give(t, G)
    b, a = sgd_step(adapter, t)
    near = projection(B, A, G)
    close(s * (B @ a + b @ A), near)
    close((gA * a).sum() + (gB * b).sum(), near.square().sum())
    want_b, want_a = adjusted(B, A, gB, gA, s)
    close(b, want_b)
    close(a, want_a)
    distance = (a - gA).square().sum() + (b - gB).square().sum()
    for _ in range(5):
        Y = torch.randn(3, 3, dtype=torch.float64)
        assert distance < (a + Y @ A - gA).square().sum() + (b - B @ Y - gB).square().sum()


def test_the_projection_knows_neither_scale_nor_gauge():
    G, R = torch.randn(10, 7, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    found = []
    for alpha, turned in ((None, False), (30.0, False), (30.0, True)):
        adapter, t = one(alpha=alpha, seed=1)
        if turned:
            with torch.no_grad():
                t.B.copy_(t.B @ R), t.A.copy_(torch.linalg.inv(R) @ t.A)
        B, A = t.B.detach().clone(), t.A.detach().clone()
        give(t, G)
        b, a = sgd_step(adapter, t)
        found.append((alpha or 3) / 3 * (B @ a + b @ A))
    close(found[1], found[0])
    close(found[2], found[0])


def test_sites_of_one_shape_are_computed_together_and_those_at_zero_move_b_alone():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(7, 7, bias=False) for _ in range(3))).double()
    adapter = attach(model, "lora:rank=3")
    model.double()
    sites = [t for _, t in adapter.sites()]
    with torch.no_grad():
        sites[0].B.normal_(), sites[2].B.normal_()
    before = [(t.B.detach().clone(), t.A.detach().clone()) for t in sites]
    grads = [torch.randn(7, 7, dtype=torch.float64) for _ in sites]
    for t, G in zip(sites, grads, strict=True):
        give(t, G)
    optim.build(adapter, f"lora-pro:mode=sgd,{EXACT}", 1e-3).step()
    for t, G, (B, A) in zip(sites, grads, before, strict=True):
        b, a = (B - t.B.detach()) / 1e-3, (A - t.A.detach()) / 1e-3
        close(B @ a + b @ A, projection(B, A, G))
    assert torch.equal(sites[1].A, before[1][1])
    assert not torch.equal(sites[2].A, before[2][1])


def test_the_loss_falls_by_the_squared_length_of_the_projection(tiny, ids):
    adapter = attach(tiny, "lora:rank=2,alpha=5", freeze=False)
    tiny.double()
    sites = dict(adapter.sites())
    with torch.no_grad():
        for t in sites.values():
            t.B.normal_(std=0.3)

    def loss() -> Tensor:
        return tiny(ids).square().mean()

    loss().backward()
    want = 0.0
    for path, t in sites.items():
        G = tiny.get_submodule(path).weight.grad
        want += float(projection(t.B, t.A, G).square().sum())
    with torch.no_grad():
        first = loss()
        optim.build(adapter, f"lora-pro:mode=sgd,{EXACT}", 1e-6).step()
        fallen = float(first - loss())
    assert fallen / 1e-6 == pytest.approx(want, rel=1e-4)


def reference(B, A, grads, s, rates, decay=0.0, trust=1e9, betas=(0.9, 0.999), eps=1e-8):
    """Mode "full", every matrix dense."""
    B, A = B.clone(), A.clone()
    M = torch.zeros(len(B), A.shape[1], dtype=B.dtype)
    V = torch.zeros_like(M)
    for t, (G, rate) in enumerate(zip(grads, rates, strict=True), 1):
        g = projection(B, A, G)
        M, V = betas[0] * M + (1 - betas[0]) * g, betas[1] * V + (1 - betas[1]) * g**2
        u = M / (1 - betas[0] ** t) / ((V / (1 - betas[1] ** t)).sqrt() + eps)
        if B.any():
            b, a = adjusted(B, A, s * u @ A.T, s * B.T @ u, s)
            c = min(1.0, float(trust * A.norm() / (rate * a.norm())))
            u = projection(B, A, u, c)
            want = c * a
            b = (u / s - B @ want) @ torch.linalg.pinv(A)  # what is left to B: u = s (B a + b A)
            a = want
        else:
            a, b = torch.zeros_like(A), u @ torch.linalg.pinv(A) / s
        shrink = (1 - rate * decay) ** 0.5
        A, B = shrink * A - rate * a, shrink * B - rate * b
    return B, A


@pytest.mark.parametrize("trust", [1e9, 0.1])
@pytest.mark.parametrize("cold", [True, False])
def test_full_mode_against_a_dense_reference(cold, trust):
    adapter, t = one(12, 9, alpha=4.0, cold=cold)
    grads = [torch.randn(12, 9, dtype=torch.float64) for _ in range(6)]
    B, A = t.B.detach().clone(), t.A.detach().clone()
    made = optim.build(adapter, f"lora-pro:damping=1e-14,trust={trust}", 1e-2, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
    for i, G in enumerate(grads, 1):
        give(t, G)
        made.step()
        schedule.step()
        rates = [1e-2 / (1 + k) for k in range(i)]
        want_b, want_a = reference(B, A, grads[:i], 4 / 3, rates, 0.3, trust)
        close(t.B.detach(), want_b, 1e-6)
        close(t.A.detach(), want_a, 1e-6)
    assert made.state[t.B]["exp_avg"].shape == (12, 9)
    assert not made.state[t.A]


def test_at_full_rank_it_is_full_fine_tuning():
    """A square invertible B: the projection is the identity, and what differs from AdamW on W is of second order."""
    differences = []
    for rate in (1e-3, 1e-4):
        adapter, t = one(4, 6, rank=4, alpha=6.0, seed=3)
        dense = nn.Parameter(1.5 * (t.B @ t.A).detach())
        theirs = torch.optim.AdamW([dense], lr=rate, weight_decay=0.0)
        made = optim.build(adapter, "lora-pro:damping=1e-14", rate)
        for _ in range(5):
            dense.grad = torch.randn(4, 6, dtype=torch.float64)
            give(t, dense.grad)
            made.step()
            theirs.step()
        differences.append(float((1.5 * t.B @ t.A - dense).detach().norm()))
    assert differences[0] < 1e-3
    assert 60 < differences[0] / differences[1] < 150


def test_efficient_mode_is_adamw_on_adjusted_gradients():
    adapter, t = one(12, 9)
    B, A = nn.Parameter(t.B.detach().clone()), nn.Parameter(t.A.detach().clone())
    theirs = torch.optim.AdamW([B, A], lr=1e-2, weight_decay=0.0)
    made = optim.build(adapter, f"lora-pro:mode=efficient,{EXACT}", 1e-2)
    for _ in range(4):
        gB, gA = give(t, torch.randn(12, 9, dtype=torch.float64))
        B.grad, A.grad = adjusted(B.detach(), A.detach(), gB, gA, 1.0)
        made.step()
        theirs.step()
    close(t.B.detach(), B.detach())
    close(t.A.detach(), A.detach())


def test_damping_is_relative_so_that_a_small_b_has_the_same_projection():
    torch.manual_seed(0)
    B, A, G = torch.randn(1, 16, 8), torch.randn(1, 8, 24), torch.randn(1, 16, 24)
    want = projection(B[0].double(), A[0].double(), G[0].double())
    for size in (1.0, 1e-4, 1e-8, 1e-12):
        small = size * B
        got = Tangent(small, A, torch.ones(1, 1, 1), 1e-6).gradient(G @ A.mT, small.mT @ G)
        assert float((got[0].double() - want).norm() / want.norm()) < 1e-3, size


def test_trust_bounds_the_jump_of_a_in_the_second_step():
    jumps = {}
    for trust in (1e9, 0.1):
        for rate in (2e-5, 1e-3):
            adapter, t = one(64, 64, rank=8, cold=True, dtype=torch.float32)
            made = optim.build(adapter, f"lora-pro:trust={trust}", rate)
            for _ in range(2):
                before = t.A.detach().clone()
                give(t, torch.randn(64, 64))
                made.step()
            jumps[trust, rate] = float((t.A.detach() - before).norm() / before.norm())
    assert jumps[1e9, 2e-5] > 0.3 and jumps[1e9, 1e-3] > 0.3
    assert jumps[0.1, 2e-5] == pytest.approx(0.1, rel=1e-3)
    assert jumps[0.1, 1e-3] == pytest.approx(0.1, rel=1e-3)


def test_a_bounded_step_is_still_downhill_and_leaves_b_its_part():
    adapter, t = one()
    with torch.no_grad():
        t.B.mul_(1e-6)
    B, A, G = t.B.detach().clone(), t.A.detach().clone(), torch.randn(10, 7, dtype=torch.float64)
    give(t, G)
    b, a = sgd_step(adapter, t, options="damping=1e-14,trust=0.1")
    close(1e-3 * a.norm() / A.norm(), torch.tensor(0.1, dtype=torch.float64))
    moved, c = B @ a + b @ A, 0.1 * A.norm() / (1e-3 * adjusted(B, A, G @ A.T, B.T @ G, 1.0)[1].norm())
    close(moved, projection(B, A, G, float(c)))
    assert float((moved * G).sum()) > 0


def test_offsets_move_as_the_factors_they_belong_to():
    adapter, t = one(spec="pissa")
    other, plain = one()
    pair, G = t.method.pair(t.tensors()), torch.randn(10, 7, dtype=torch.float64)
    with torch.no_grad():
        plain.B.copy_(pair.B), plain.A.copy_(pair.A)
    before = t.B.detach().clone(), t.A.detach().clone()
    was = plain.B.detach().clone(), plain.A.detach().clone()
    for one_adapter, tensors in ((adapter, t), (other, plain)):
        made = optim.build(one_adapter, "lora-pro", 1e-3)
        for _ in range(3):
            give(tensors, G)
            made.step()
    close(t.B.detach() - before[0], plain.B.detach() - was[0])
    close(t.A.detach() - before[1], plain.A.detach() - was[1])


def test_decay_shrinks_the_change():
    adapter, t = one()
    B, A = t.B.detach().clone(), t.A.detach().clone()
    give(t, torch.zeros(10, 7, dtype=torch.float64))
    optim.build(adapter, "lora-pro", 0.1, weight_decay=0.5).step()
    close((t.B @ t.A).detach(), 0.95 * B @ A)
    adapter, t = one(spec="pissa")
    B, A = t.B.detach().clone(), t.A.detach().clone()
    give(t, torch.zeros(10, 7, dtype=torch.float64))
    optim.build(adapter, "lora-pro", 0.1, weight_decay=0.5).step()
    close(t.B.detach(), 0.95 * B)
    close(t.A.detach(), 0.95 * A)


MODES = {"full": 1e-2, "efficient": 3e-2, "sgd": 0.3}  # and a rate


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return (model(ids) - 1).square().mean()


def train(model, adapter, made, ids, steps, schedule=None):
    losses = []
    for _ in range(steps):
        loss = loss_of(model, ids)
        loss.backward()
        made.step()
        adapter.step()
        if schedule is not None:
            schedule.step()
        made.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("spec", ["lora:rank=2", "pissa:rank=2", "rslora:rank=3,alpha=6"])
@pytest.mark.parametrize("mode", MODES)
def test_it_trains(tiny, ids, mode, spec):
    adapter = attach(tiny, spec, targets=["q_proj", "v_proj", "up_proj", "down_proj"])
    made = optim.build(adapter, f"lora-pro:mode={mode}", MODES[mode])
    losses = train(tiny, adapter, made, ids, 40)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_has_the_bits_of_the_uninterrupted_one(tiny, ids, mode):
    def start(model):
        adapter = attach(model, "lora:rank=2", also_train=["score"])
        made = optim.build(adapter, f"lora-pro:mode={mode}", 1e-2, weight_decay=0.1)
        return adapter, made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))

    other = copy.deepcopy(tiny)
    adapter, made, schedule = start(tiny)
    train(tiny, adapter, made, ids, 3, schedule)
    file = io.BytesIO()
    torch.save([made.state_dict(), schedule.state_dict(), adapter.state_dict()], file)
    train(tiny, adapter, made, ids, 3, schedule)

    again, resumed, later = start(other)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    for what, state in zip((resumed, later, again), states, strict=True):
        what.load_state_dict(state)
    train(other, again, resumed, ids, 3, later)
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@pytest.mark.parametrize("mode", MODES)
def test_gradients_may_come_in_parts(tiny, ids, mode):
    other = copy.deepcopy(tiny)
    found = []
    for model, parts in ((tiny, [ids]), (other, [ids[:1], ids[1:]])):
        adapter = attach(model, "lora:rank=2")
        model.double()
        made = optim.build(adapter, f"lora-pro:mode={mode}", 1e-2)
        for _ in range(3):
            for part in parts:
                (loss_of(model, part) / len(parts)).backward()
            made.step()
            made.zero_grad()
        found.append(adapter.state_dict())
    for key, tensor in found[0].items():
        close(found[1][key], tensor, 1e-6)


def test_a_clipped_gradient_makes_a_shorter_step_in_the_same_direction():
    steps = []
    for factor in (1.0, 0.25):
        adapter, t = one()
        give(t, torch.ones(10, 7, dtype=torch.float64))
        t.B.grad.mul_(factor), t.A.grad.mul_(factor)
        steps.append(sgd_step(adapter, t))
    for whole, clipped in zip(*steps, strict=True):
        close(clipped, 0.25 * whole)


def test_what_has_no_pair_gets_adamw(tiny, ids):
    adapter = attach(tiny, "lora:rank=2", targets="up_proj", also_train=["score"])
    heads = [p for n, p in adapter.named_parameters() if n.startswith("score")]
    made = optim.build(adapter, "lora-pro", 1e-2, weight_decay=0.1)
    assert [len(g["params"]) for g in made.param_groups] == [4, 1, 1]  # the head's bias apart: it is not decayed
    copies = [nn.Parameter(p.detach().clone()) for p in heads]
    groups = [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in copies]
    theirs = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    for _ in range(3):
        loss_of(tiny, ids).backward()
        for own, other in zip(heads, copies, strict=True):
            other.grad = own.grad.clone()
        made.step()
        theirs.step()
        made.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(heads, copies, strict=True))


def test_stacked_experts_are_single_matrices(monkeypatch):
    """A raw parameter of three matrices, beside three layers with the same values and gradients."""
    torch.manual_seed(0)
    stack = nn.Module()
    stack.experts = nn.Parameter(torch.randn(3, 8, 6))
    apart = nn.ModuleList(nn.Linear(6, 8, bias=False) for _ in range(3))
    first, second = attach(stack, "lora:rank=2", targets="experts"), attach(apart, "lora:rank=2")
    ((_, held),), singles = first.sites(), [t for _, t in second.sites()]
    grads = torch.randn(4, 3, 8, 6)
    with torch.no_grad():
        held.B.normal_()
        for e, t in enumerate(singles):
            t.B.copy_(held.B[e]), t.A.copy_(held.A[e])
    monkeypatch.setattr(lora_pro, "CHUNK", 100)
    mine, theirs = optim.build(first, "lora-pro", 1e-2), optim.build(second, "lora-pro", 1e-2)
    for G in grads:
        held.B.grad, held.A.grad = (G @ held.A.mT).detach(), (held.B.mT @ G).detach()
        for e, t in enumerate(singles):
            give(t, G[e])
        mine.step()
        theirs.step()
    assert mine.state[held.B]["exp_avg"].shape == (3, 8, 6)
    for e, t in enumerate(singles):
        close(held.B[e].detach(), t.B.detach(), 1e-5)
        close(held.A[e].detach(), t.A.detach(), 1e-5)


def test_nothing_moves_without_a_gradient_or_at_rate_zero(tiny, ids):
    adapter = attach(tiny, "lora:rank=2")
    made = optim.build(adapter, "lora-pro", 0.0)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    made.step()
    loss_of(tiny, ids).backward()
    made.step()
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())
    made.param_groups[0]["lr"] = 1e-2
    next(iter(adapter.sites()))[1].A.grad = None  # of this site alone
    made.step()
    moved = [k for k, v in adapter.state_dict().items() if not torch.equal(v, before[k])]
    assert len(moved) > 0 and not any(k.startswith(next(iter(adapter.methods))) for k in moved)


def test_what_it_cannot_train_is_refused(tiny):
    with pytest.raises(AddendaError, match=r"no site of adapter 'default' \(shira\) has them"):
        optim.build(attach(tiny, "shira:density=0.1"), "lora-pro")
    adapter, t = one()
    refused = {
        "mode=half": "lora-pro: mode must be one of 'full', 'efficient', 'sgd', got 'half'",
        "trust=nan": "lora-pro: trust must be finite",
        "damping=0": "lora-pro wants damping above 0",
        "trust=-1": "lora-pro wants trust above 0",
    }
    for wrong, says in refused.items():
        with pytest.raises(AddendaError, match=says):
            optim.build(adapter, f"lora-pro:{wrong}")
    t.A.requires_grad_(False)
    with pytest.raises(AddendaError, match="trains both of its factors"):
        optim.build(adapter, "lora-pro")
    with pytest.raises(AddendaError, match="float32 or wider"):
        optim.build(one(dtype=torch.bfloat16)[0], "lora-pro")
    assert isinstance(optim.build(one()[0], "lora-pro"), LoRAPro)


def test_a_wrong_mode_is_refused_without_text_too():
    with pytest.raises(AddendaError, match="lora-pro wants mode 'full', 'efficient' or 'sgd', got 'half'"):
        LoRAPro(one()[0], 1e-3, mode="half")
