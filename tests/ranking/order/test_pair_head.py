"""The relational head against the pairwise form that its paper's code computes, written out here."""

import copy

import bench.order
import pytest
import torch
import torch.nn.functional as F

from addenda.ranking.order.pair_head import PairHead, gates_and_values


def naive(head: PairHead, states):
    """O_ij of every ordered pair by a softmax over the patches of both, N × N × M × D, before W_o."""
    query, keys = head.projected(states)
    n, h, p, d = keys.shape
    rows = []
    for i in range(n):
        for j in range(n):
            both = torch.cat([keys[i], keys[j]], 1)  # h, 2P, d
            weights = (query @ both.transpose(-1, -2)).softmax(-1)
            difference = weights[..., :p] @ keys[i] - weights[..., p:] @ keys[j]
            rows.append(difference.transpose(0, 1).flatten(1))
    return torch.stack(rows).view(n, n, -1, h * d)


def scores(head: PairHead, states):
    """s_ij of the naive form: W_o with its bias, the sum over the tokens, the MLP."""
    summed = F.linear(naive(head, states), head.out.weight, head.out.bias).sum(2)
    found = head.score(summed).squeeze(-1)
    return found - found.t() if head.antisymmetric else found


def example(dtype=torch.float64, n=6, patches=9, width=32, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    head = PairHead(width, heads=4, tokens=5, antisymmetric=False)
    for p in head.parameters():
        drawn = torch.randn(p.shape, generator=generator) * (0.3 if p.dim() > 1 else 0.1)
        p.data = drawn + p.data.round() if p.dim() == 1 else drawn  # gains stay about 1
    states = torch.randn(n, patches, width, generator=generator) * scale
    return head.to(dtype), states.to(dtype)


@pytest.mark.parametrize("antisymmetric", [False, True])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_it_is_the_pairwise_form_with_its_gradients(dtype, close, antisymmetric):
    head, states = example(dtype)
    head.antisymmetric = antisymmetric
    other, states = copy.deepcopy(head), states.requires_grad_()
    apart = states.detach().clone().requires_grad_()
    found, wanted = head(states), scores(other, apart)
    assert (found - wanted).abs().max() <= close * wanted.abs().max()
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    pairs = [
        (states.grad, apart.grad),
        *((p.grad, q.grad) for p, q in zip(head.parameters(), other.parameters(), strict=True)),
    ]
    largest = max(g.abs().max() for _, g in pairs)
    assert all((g - w).abs().max() <= close * largest for g, w in pairs)


def test_the_form_that_is_measured_against_is_the_naive_one():
    head, states = example()
    head.antisymmetric = True
    torch.testing.assert_close(bench.order.naive(head, states), scores(head, states), rtol=1e-10, atol=1e-12)


def test_logits_of_thousands_stay_finite_and_no_further_from_float64_than_twice_the_naive_form():
    head, states = example(torch.float64)
    head.query_norm.weight.data *= 1500
    query, keys = head.projected(states)
    assert (query @ keys.transpose(-1, -2)).abs().max() > 5000
    exact = naive(head, states).sum(2)
    single, states = copy.deepcopy(head).float(), states.float()
    identity = torch.eye(32)
    single.out.weight.data, single.out.bias.data = identity, torch.zeros(32)
    found = single.summed(*gates_and_values(*single.projected(states))).double()
    written_out = naive(single, states).sum(2).double()
    assert found.isfinite().all()
    assert (found - exact).abs().max() <= 2 * (written_out - exact).abs().max()


def test_differences_are_antisymmetric_before_the_projection_and_scores_where_asked():
    head, states = example(torch.float32)
    head.out.weight.data, head.out.bias.data = torch.eye(32), torch.zeros(32)
    differences = head.summed(*gates_and_values(*head.projected(states)))
    assert torch.equal(differences, -differences.transpose(0, 1))
    assert torch.equal(differences.diagonal().abs().max(), torch.tensor(0.0))
    as_released = head(states)
    assert (as_released + as_released.t()).abs().max() > 1e-3  # the MLP tells i from j
    head.antisymmetric = True
    found = head(states)
    assert torch.equal(found, -found.t())


def test_gates_of_a_pair_add_up_to_one():
    head, states = example()
    gates, values = gates_and_values(*head.projected(states))
    assert gates.shape == (6, 4, 6, 5) and values.shape == (6, 4, 5, 8)
    torch.testing.assert_close(gates + gates.transpose(0, 2), torch.ones_like(gates))


def test_an_order_of_images_orders_rows_and_columns():
    head, states = example()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(head(states[order]), head(states)[order][:, order])
