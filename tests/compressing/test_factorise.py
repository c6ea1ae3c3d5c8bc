"""`factorise`: what is cut, what is left, what it costs; the source is safe."""

import copy

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.compressing.criteria import Rule, Spectrum, tails
from addenda.compressing.layers import LowRankLinear
from addenda.compressing.schemes import LowRankConv2d


class Net(nn.Module):
    """Two strided convolutions behind a stem, one of them at two paths, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.Conv2d(12, 12, 3, padding=1)
        self.again, self.fc = self.b, nn.Linear(12, 5)

    def forward(self, x):
        x = torch.tanh(self.again(torch.tanh(self.b(torch.tanh(self.a(self.norm(self.stem(x))))))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def x():
    return torch.randn(4, 3, 9, 9)


def test_the_report_says_what_the_model_costs(x):
    for scheme in ("channel", "spatial", "decoupled"):
        net = Net()
        before = copy.deepcopy(net.state_dict())
        made = ad.factorise(net, scheme, ranks={"a": 3, "b": 2}, example=x)
        assert made.macs == (sum(ad.macs(net, x).values()), sum(ad.macs(made.model, x).values()))
        assert made.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (net, made.model))
        assert isinstance(made.model.b, LowRankConv2d) and made.model.again is made.model.b
        assert made.speedup > 1 and f"{made.speedup:.2f} × fewer" in str(made) and "first convolution" in str(made)
        assert type(net.a) is nn.Conv2d and all(torch.equal(before[k], t) for k, t in net.state_dict().items())
        fresh = ad.factorise(Net(), scheme, ranks=made.ranks, example=x, copy=False).model
        fresh.load_state_dict(made.model.state_dict())
        torch.testing.assert_close(fresh.eval()(x), made.model.eval()(x), rtol=0, atol=0)


def test_a_layer_that_would_cost_more_stays_and_says_so(x):
    net = Net().eval()
    made = ad.factorise(net, energy=1, copy=False)
    assert made.model is net and type(net.a) is nn.Conv2d and made.macs is None and made.speedup is None
    row = made.layers[0]
    most = (8 * 9 * 12 - 1) // (8 * 9 + 12)
    assert row.full == row.wanted == 12 and row.rank is None
    assert row.why == f"rank 12 costs more parameters than dense, {most} would be the highest to save any"
    ranks = {x.path: x.rank for x in ad.factorise(net, ranks={"a": most, "b": most + 1}).layers}
    assert ranks == {"a": most, "b": most + 1}  # given ones are taken, whatever they cost
    # a strided layer's vertical half still runs at the old width: fewer ranks save multiplications than parameters
    spatial = ad.factorise(net, "spatial", energy=1, example=x).layers[0]
    assert f"more multiplications than dense, {(864 * 16 - 1) // (24 * 4 * 9 + 36 * 16)} would" in spatial.why
    assert spatial.macs == (864 * 16, 864 * 16)
    spatial = ad.factorise(net, "spatial", energy=1, example=x, of="parameters").layers[0]
    assert f"more parameters than dense, {(864 - 1) // (24 + 36)} would" in spatial.why


class Padded(nn.Module):
    """A convolution whose output is larger than its input: a rank may save multiplications, and no parameters."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=4, bias=False)

    def forward(self, x):
        return self.a(self.stem(x))


@pytest.mark.parametrize("scheme", ["spatial", "decoupled"])
def test_given_ranks_rebuild_what_multiplications_have_allowed(scheme):
    net, x = Padded(), torch.randn(1, 3, 4, 4)
    full = ad.factorise(net, scheme, energy=1, of="parameters").layers[0]
    most = int(full.why.partition(", ")[2].split()[0])
    made = ad.factorise(net, scheme, ranks={"a": most + 1}, example=x)
    row = made.layers[0]
    assert row.rank == most + 1 and row.parameters[1] >= row.parameters[0] and row.macs[1] < row.macs[0]
    back = ad.factorise(Padded(), scheme, ranks=made.ranks)
    assert back.ranks == made.ranks
    back.model.load_state_dict(made.model.state_dict())
    assert torch.equal(back.model(x), made.model(x))


def test_a_copy_shares_nothing_with_the_source():
    for net, targets in ((nn.Sequential(nn.Linear(64, 64)), "0"), (Net(), ["a", "b", "fc"])):
        before = copy.deepcopy(net.state_dict())
        made = ad.factorise(net, targets=targets, keep=0.5)
        with torch.no_grad():
            for t in [*made.model.parameters(), *made.model.buffers()]:
                t.add_(1)
        assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


def test_energy_value_relative():
    S = torch.tensor([3.0, 2.0, 1.0, 0.5]).double()
    total = float(S.square().sum())
    assert torch.allclose(tails(S), torch.tensor([14.25, 5.25, 1.25, 0.25, 0.0]).double())
    for e in (0.1, 9 / 14.25, 0.64, 0.9, 0.95, 0.99, 1.0):
        r = Rule(energy=e).rank(S)
        assert float(S[:r].square().sum()) / total >= e - 1e-12
        assert r == 1 or float(S[: r - 1].square().sum()) / total < e
    assert [Rule(value=t).rank(S) for t in (0.4, 1.0, 2.5, 9.0)] == [4, 3, 1, 1]
    assert [Rule(relative=t).rank(S) for t in (0.1, 1 / 3, 0.5, 1.0)] == [4, 3, 2, 1]
    assert Rule(energy=0.5).rank(torch.zeros(3)) == 1 and Rule(energy=1).rank(torch.zeros(3)) == 3
    for bad in ({}, {"energy": 0.5, "value": 1.0}, {"energy": 0}, {"energy": 1.1}, {"value": 0}, {"keep": 1}):
        with pytest.raises(ad.AddendaError):
            Rule(**bad)


def test_a_budget_is_met_with_the_least_energy_lost(x):
    """Against all pairs of ranks of the two layers, tried one by one."""
    net = Net().double()
    made = ad.factorise(net, keep=0.6, example=x.double())
    rows = {r.path: r for r in made.layers}
    points = []  # of each layer: (multiplications, energy lost), rank by rank, and dense; b runs twice on 4 × 4 places
    for path, each, whole in (("a", 84 * 16, 864 * 16), ("b", 120 * 32, 1296 * 32)):
        s = torch.linalg.svdvals(getattr(net, path).weight.flatten(1)).square().detach()
        curve = [(r * each, float(s[r:].sum() / s.sum())) for r in range(1, 13) if r * each < whole]
        points.append([*curve, (whole, 0.0)])
        assert rows[path].macs in [(whole, spent) for spent, _ in points[-1]]
    budget = 0.6 * (864 * 16 + 1296 * 32)
    assert sum(r.macs[1] for r in made.layers) <= budget
    pairs = [(p[0] + q[0], p[1] + q[1]) for p in points[0] for q in points[1]]
    best = min(lost for spent, lost in pairs if spent <= budget)
    got = sum(1 - r.energy for r in made.layers)
    assert best - 1e-9 <= got <= best + max(p[0][1] - p[1][1] for p in points)  # within the largest step of one rank
    assert Spectrum.of("p", torch.ones(4), 100, 30).break_even == 3
    with pytest.raises(ad.AddendaError, match="leaves no room"):
        ad.factorise(net, keep=0.01)


def test_batch_norms_are_recalibrated_on_what_now_reaches_them(x):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)).train()
    made = ad.factorise(net, ranks={"1": 2}, batches=[(x, 0), x.flip(0)[:3] + 1])
    one, two = (made.model[:2](b) for b in (x, x.flip(0)[:3] + 1))
    torch.testing.assert_close(made.model[2].running_mean, (one.mean((0, 2, 3)) + two.mean((0, 2, 3))) / 2)
    torch.testing.assert_close(made.model[2].running_var, (one.var((0, 2, 3)) + two.var((0, 2, 3))) / 2)
    assert made.norms == 1 and made.model[2].momentum == 0.1 and made.model[2].training
    assert torch.equal(net[2].running_mean, torch.zeros(8))
    for batches, why in (([], "none came"), ([x / 0], "not finite"), ([3], "got a int")):
        with pytest.raises(ad.AddendaError, match=why):
            ad.factorise(net, ranks={"1": 2}, batches=batches, copy=False)
        assert type(net[1]) is nn.Conv2d and torch.equal(net[2].running_mean, torch.zeros(8)) and net[3].training


def test_linear_layers_are_their_own_matrix(gpt2, ids):
    """Conv1D of GPT-2, stored the other way round; against a singular value decomposition by hand."""
    made = ad.factorise(gpt2.double(), targets="mlp", ranks={f"transformer.h.{i}.mlp.c_fc": 3 for i in range(2)})
    layer, old = made.model.transformer.h[0].mlp.c_fc, gpt2.transformer.h[0].mlp.c_fc
    assert isinstance(layer, LowRankLinear) and layer.first.weight.requires_grad
    U, S, Vt = torch.linalg.svd(old.weight.detach().T, full_matrices=False)
    torch.testing.assert_close(layer.weight, U[:, :3] * S[:3] @ Vt[:3])
    torch.testing.assert_close(layer.bias, old.bias)
    rest = [r for r in made.layers if r.rank is None]
    assert len(rest) == len(made.layers) - 2 and rest[0].why == "as given"
    assert made.model(ids).logits.isfinite().all()


def test_bad_input(x):
    net = Net()
    with torch.no_grad():
        net.b.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ad.AddendaError, match=r"b has 1 weights of 1,296 that are not finite"):
        ad.factorise(net, energy=0.9, copy=False)
    assert type(net.a) is nn.Conv2d
    net = Net()
    for options, why in (
        ({"ranks": {"a": 13, "fc": 2}}, "fc: not a layer.*the rank of a must be from 1 to 12, got 13"),
        ({"ranks": {"a": 2.5}}, "the rank of a must be a whole number, got 2.5"),
        ({"ranks": {"a": "3"}}, "the rank of a must be a whole number, got '3'"),
        ({"ranks": {"a": True}}, "the rank of a must be a whole number, got True"),
        ({"ranks": ["a"]}, "ranks must be a dict or None, got a list"),
        ({"energy": 0.9, "batches": 3}, "batches must be a list or None, got 3"),
        ({"energy": 0.9, "batches": x}, "batches is a list of batches.*got a Tensor"),
        ({"energy": 0.9, "batches": {"x": x}}, "batches is a list of batches.*got a dict"),
        ({"energy": 0.9, "scheme": "vertical"}, "no scheme 'vertical'"),
        ({"energy": 0.9, "scheme": 3}, "no scheme 3"),
        ({"energy": 0.9, "of": "flops"}, "of must be"),
        ({"energy": 0.9, "of": "macs"}, "wants an example"),
        ({"energy": 0.9, "targets": "convolution"}, "matches nothing"),
        ({"energy": 0.9, "exclude": "nothing.*"}, "exclude: "),
    ):
        with pytest.raises(ad.AddendaError, match=why):
            ad.factorise(net, **options)
    attached = Net()
    ad.attach(attached, ad.LoRA(rank=2), targets="a", name="one")
    assert "may do more" in ad.factorise(attached, energy=0.5).dense["a"]
