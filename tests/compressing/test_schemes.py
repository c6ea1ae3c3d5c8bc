"""Two convolutions for one: exact at full rank, the best of their rank below it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from addenda.compressing.candidates import candidates
from addenda.compressing.macs import calls, macs
from addenda.compressing.schemes import SCHEMES, Place
from addenda.core.base.errors import AddendaError
from addenda.core.site.site import site_at


def place_of(conv: nn.Module, scheme: str) -> Place:
    return Place(site_at(nn.Sequential(conv), "0"), SCHEMES[scheme])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_rank_is_the_convolution(scheme):
    """Every stride, padding, dilation, group, padding mode and bias; and what it multiplies is what it says."""
    options = itertools.product(
        [(3, 3), (3, 2)], [1, (2, 1), 2], [0, (1, 2), "same"], [1, (2, 1)], [1, 2], ["zeros", "reflect", "circular"]
    )
    x = torch.randn(2, 4, 9, 8).double()
    for number, (kernel, stride, padding, dilation, groups, mode) in enumerate(options):
        if padding == "same" and stride != 1:
            continue
        conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, bool(number % 2), mode).double()
        place = place_of(conv, scheme)
        U, S, Vt = place.decomposed()
        low = place.factored(U, S, Vt, S.shape[1])
        torch.testing.assert_close(low(x), conv(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(low.weight, conv.weight, rtol=0, atol=1e-10)
        assert all(p.requires_grad for p in low.parameters())
        spent = sum(macs(nn.Sequential(low), x).values())
        assert spent == S.shape[1] * place.per_rank(calls(nn.Sequential(conv), x)["0"])
        assert sum(p.numel() for p in (low.first.weight, low.second.weight)) == S.shape[1] * place.per_rank()


@pytest.mark.parametrize("groups", [1, 2])
def test_below_full_rank_it_is_the_best_of_its_rank(groups):
    """Against the weight multiplied out by hand, and the error that Eckart and Young give."""
    conv, r = nn.Conv2d(4, 6, (3, 2), 2, 1, groups=groups).double(), 2
    x, w = torch.randn(2, 4, 7, 7).double(), conv.weight.detach()
    for scheme in SCHEMES:
        place = place_of(conv, scheme)
        low = place.factored(*place.decomposed(), r)
        a, b = low.first.weight.detach(), low.second.weight.detach()
        n = 6 // groups
        if scheme == "channel":
            seen = [(b[g * n : g * n + n, :, 0, 0], a[g * r : g * r + r]) for g in range(groups)]
            product = torch.cat([torch.einsum("nr,rcij->ncij", second, first) for second, first in seen])
            stack = [w[g * n : g * n + n].reshape(n, -1) for g in range(groups)]
        elif scheme == "spatial":
            seen = [(b[g * n : g * n + n, :, 0], a[g * r : g * r + r, :, :, 0]) for g in range(groups)]
            product = torch.cat([torch.einsum("nrj,rci->ncij", second, first) for second, first in seen])
            own = [w[g * n : g * n + n] for g in range(groups)]
            stack = [torch.stack([v[:, c, i] for c in range(v.shape[1]) for i in range(3)]).flatten(1) for v in own]
        else:
            product = torch.einsum("nrij,nrc->ncij", b, a.reshape(6, r, -1))
            stack = [v.flatten(1) for v in w]
        torch.testing.assert_close(low(x), F.conv2d(x, product, conv.bias, 2, 1, groups=groups), rtol=0, atol=1e-12)
        lost = sum(torch.linalg.svdvals(m)[r:].square().sum() for m in stack)
        torch.testing.assert_close((w - product).square().sum(), lost)


def test_large_layers_take_the_faster_way_to_the_same():
    for n, c in ((80, 30), (300, 9)):  # wide and tall; and one with directions that squaring would lose
        conv = nn.Conv2d(c, n, 3).double()
        place = place_of(conv, "channel")
        U, S, Vt = place.decomposed()
        M = conv.weight.detach().flatten(1)
        exact = torch.linalg.svd(M, full_matrices=False)
        torch.testing.assert_close(S[0], exact.S)
        torch.testing.assert_close((U * S[:, None] @ Vt)[0], M, rtol=0, atol=1e-12)
        torch.testing.assert_close((U[..., :9] @ Vt[:, :9])[0], exact.U[:, :9] @ exact.Vh[:9])
        for Q in (U[0], Vt[0].mT):
            torch.testing.assert_close(Q.mT @ Q, torch.eye(Q.shape[1]).double(), rtol=0, atol=1e-9)
        with torch.no_grad():
            conv.weight[3:5] = conv.weight[:2] * (1 + 1e-9)
        U, S, Vt = place.decomposed()
        torch.testing.assert_close(Vt[0] @ Vt[0].mT, torch.eye(Vt.shape[1]).double(), rtol=0, atol=1e-12)


def test_memory_format_and_frozen_layers_stay(tiny_conv):
    conv = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    place = place_of(conv, "channel")
    low = place.factored(*place.decomposed(), 2)
    assert low.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in low.parameters())
    assert "channel, rank 2" in repr(low)


def test_roles_leave_out_what_the_paper_does():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.wide = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
            self.point, self.each = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, groups=16)
            self.line, self.fc = nn.Linear(16, 16), nn.Linear(16, 10)
            self.one, self.other = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
            self.other.weight = self.one.weight
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3))
            self.long = nn.Conv1d(16, 16, 3)

    net = Net()
    found, dense = candidates(net)
    assert set(found) == {"wide"}
    for path, why in {
        "stem": "first convolution", "point": "1 × 1", "each": "no rank", "line": "not among", "fc": "heads",
        "one": "tied", "other": "tied", "normed": "computed", "long": "Conv1d",
    }.items():  # fmt: skip
        assert why in dense[path], dense[path]
    assert set(candidates(net, ["stem", "point", "linear"], "wide")[0]) == {"stem", "point", "line"}
    with pytest.raises(AddendaError, match=r"no scheme 'chanel'. Did you mean 'channel'"):
        candidates(net, scheme="chanel")
    with pytest.raises(AddendaError, match=r"'convs' matches nothing in this Net.*stem"):
        candidates(net, "convs")
    with pytest.raises(AddendaError, match=r"No convolution or linear layer.*can be factorised: .*first convolution"):
        candidates(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(AddendaError, match="it has none"):
        candidates(nn.ReLU())
