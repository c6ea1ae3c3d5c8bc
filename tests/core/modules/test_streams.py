"""Dropout by group: each draws what it would draw alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from addenda.core.modules.streams import Stream, Streams, drops


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_dropout_draws_what_each_group_would_draw_alone():
    x = torch.randn(5, 7, 6)
    with Streams([Stream(2, generator(1), 4), Stream(3, generator(2), 7)], long=7):
        y, again = F.dropout(x, 0.4), F.dropout(x, 0.4)
    for seed, rows, length in ((1, slice(0, 2), 4), (2, slice(2, 5), 7)):
        torch.manual_seed(seed)
        own = x[rows, :length]
        assert torch.equal(y[rows, :length], F.dropout(own, 0.4))
        assert torch.equal(again[rows, :length], F.dropout(own, 0.4))
    torch.testing.assert_close(y[:2, 4:], x[:2, 4:] / 0.6)  # padding is scaled, and draws nothing


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_dropout(causal):
    q, k, v = torch.randn(3, 4, 2, 5, 8)
    mask = None if causal else (torch.rand(4, 1, 5, 5) > 0.3) | torch.eye(5, dtype=torch.bool)
    if mask is not None:
        mask[0, ..., 3:] = False  # the shorter row's padding
    with Streams([Stream(1, generator(1), 3), Stream(3, generator(2), 5)], long=5):
        got = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.5, is_causal=causal)
    for seed, rows, n in ((1, slice(0, 1), 3), (2, slice(1, 4), 5)):
        torch.manual_seed(seed)
        own = None if mask is None else mask[rows, :, :n, :n]
        cut = [t[rows, :, :n] for t in (q, k, v)]
        want = F.scaled_dot_product_attention(*cut, attn_mask=own, dropout_p=0.5, is_causal=causal)
        torch.testing.assert_close(got[rows, :, :n], want)


def test_one_group_alone_draws_within():
    second = Stream(2, generator(2))
    drawn = Streams([Stream(2, generator(1)), second])
    with drawn, drawn.only(second):
        got = torch.empty(3, 4).bernoulli_(0.5)
    torch.manual_seed(2)
    assert torch.equal(got, torch.empty(3, 4).bernoulli_(0.5))


def test_what_drops():
    assert drops(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    assert not drops(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))
