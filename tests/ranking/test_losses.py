"""Ranking losses against loops written out in float64, and their gradients against the difference quotient's limit."""

import math

import pytest
import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.ranking.losses import RankingLoss, distill, listwise, margins, pairwise, pointwise

SIZES = (4, 1, 3, 5)
GROUP = torch.tensor([[0, 1, 2, 3, -1], [4, -1, -1, -1, -1], [5, 6, 7, -1, -1], [8, 9, 10, 11, 12]])
LABELS = [[1.0, 0, 0, -1], [1.0], [0.0, 0, 0], [2.0, 0, 1, 0, 1]]


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = sum(SIZES)
    scores, teacher = (torch.randn(n, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    return scores, torch.tensor([y for row in LABELS for y in row], dtype=torch.float64), teacher


def in_lists(values: Tensor) -> list[list[float]]:
    return [part.tolist() for part in values.split(list(SIZES))]


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def by_hand(name: str, scores: Tensor, teacher: Tensor, temperature: float = 1.0) -> list[float]:
    found = []
    for s, y, t in zip(in_lists(scores), LABELS, in_lists(teacher), strict=True):
        y = [max(v, 0.0) for v in y]
        pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if y[i] > y[j]]
        if name == "pointwise":
            sigmoid = [1 / (1 + math.exp(-v)) for v in s]
            each = [-math.log(p if v > 0 else 1 - p) for p, v in zip(sigmoid, y, strict=True)]
            found.append(sum(each) / len(each))
        elif name == "pairwise":
            each = [math.log(1 + math.exp(s[j] - s[i])) for i, j in pairs]
            found.append(sum(each) / len(each) if each else 0.0)
        elif name == "listwise":
            p = softmax(s)
            found.append(-sum(v / sum(y) * math.log(q) for v, q in zip(y, p, strict=True)) if sum(y) else 0.0)
        elif name == "distill":
            p, q = softmax([v / temperature for v in t]), softmax([v / temperature for v in s])
            found.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        else:
            each = [((s[i] - s[j]) - (t[i] - t[j])) ** 2 for i, j in pairs]
            found.append(sum(each) / len(each) if each else 0.0)
    return found


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("pointwise", 1.0), ("pairwise", 1.0), ("listwise", 1.0), ("distill", 1.0), ("distill", 2.5), ("margins", 1.0)],
)
def test_losses_are_those_written_out(name, temperature):
    scores, labels, teacher = drawn()
    scores.requires_grad_(True)
    batch = {"labels": labels, "group": GROUP, "teacher": teacher}
    loss = RankingLoss(name, temperature)(scores, batch)
    want = torch.tensor(by_hand(name, scores.detach(), teacher, temperature), dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), want, atol=1e-12, rtol=1e-12)

    weights = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    (loss * weights).sum().backward()
    gradient = torch.zeros_like(scores)
    step = 1e-6
    for i in range(len(scores)):
        sides = []
        for sign in (1, -1):
            moved = scores.detach().clone()
            moved[i] += sign * step
            sides.append(sum(w * v for w, v in zip(weights.tolist(), by_hand(name, moved, teacher, temperature),
                                                   strict=True)))  # fmt: skip
        gradient[i] = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(scores.grad, gradient, atol=1e-6, rtol=1e-6)


def test_at_nothing_learned_a_row_or_a_pair_costs_ln_2():
    _, labels, _ = drawn()
    zeros = torch.zeros(sum(SIZES))
    torch.testing.assert_close(pointwise(zeros, labels, GROUP), torch.full((4,), math.log(2)))
    assert pairwise(zeros, labels, GROUP).tolist() == pytest.approx([math.log(2), 0, 0, math.log(2)])
    assert listwise(zeros, labels, GROUP).tolist() == pytest.approx([math.log(4), 0, 0, math.log(5)])


def test_the_relevant_share_the_mass():
    labels, group = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([[0, 1, 2]])
    free = torch.zeros(3, requires_grad=True)
    for _ in range(400):
        (slope,) = torch.autograd.grad(listwise(free, labels, group).sum(), free)
        free = (free - slope).detach().requires_grad_(True)
    p = free.softmax(0)
    assert p[0].item() == pytest.approx(p[1].item(), abs=1e-6) and p[2].item() < 0.01


def test_a_loss_at_its_teacher_is_0_and_so_is_its_gradient():
    scores, labels, _ = drawn()
    scores.requires_grad_(True)
    for loss in (distill(scores, scores.detach(), GROUP, 0.5), margins(scores, labels, scores.detach(), GROUP)):
        assert loss.abs().max().item() < 1e-12
        (slope,) = torch.autograd.grad(loss.sum(), scores)
        assert slope.abs().max().item() < 1e-12


def test_groups_without_a_pair_have_no_gradient_and_no_nan():
    scores = torch.full((3,), 1e4, requires_grad=True)
    group, labels = torch.tensor([[0, 1, 2]]), torch.zeros(3)
    for loss in (pairwise(scores, labels, group), listwise(scores, labels, group)):
        (slope,) = torch.autograd.grad(loss.sum(), scores)
        assert loss.item() == 0 and slope.tolist() == [0, 0, 0]
    labels = torch.tensor([0.0, 1.0, 0.0])
    far = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    for loss in (pointwise, pairwise, listwise):
        (slope,) = torch.autograd.grad(loss(far, labels, group).sum(), far)
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize(
    ("given", "told"),
    [(("listwize",), "Did you mean 'listwise'"), (("distill", 0.0), "positive"), (("pairwise", 2.0), "for the loss"),
     (("distill", float("nan")), "positive")],
)  # fmt: skip
def test_losses_that_there_are_not(given, told):
    with pytest.raises(AddendaError, match=told):
        RankingLoss(*given)
