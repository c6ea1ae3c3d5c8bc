"""A module in the place of another."""

import torch
from torch import nn

from addenda.core.modules.put import put


def test_it_stands_where_the_other_stood(tiny, ids):
    before = tiny(ids)
    order = [n for n, _ in tiny.named_modules()]
    layer = nn.Linear(8, 8, bias=False)
    put(tiny, "layers.1.self_attn.q_proj", layer)
    assert tiny.layers[1].self_attn.q_proj is layer
    assert [n for n, _ in tiny.named_modules()] == order
    assert not torch.equal(tiny(ids), before)
    head = nn.Identity()
    put(tiny, "score", head)
    assert tiny.score is head
