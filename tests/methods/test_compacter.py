"""Compacter against matrices put together with torch.kron."""

import torch
import torch.nn.functional as F
from published import changed, same

import addenda as ad
import toys


def matrix(p, name):
    return sum(
        torch.kron(A, s[:, None] * t[None])
        for A, s, t in zip(p["rule"], p[f"{name}_rows"], p[f"{name}_columns"], strict=True)
    )


def test_sums_of_kronecker_products_in_bert():
    model, sites = changed(toys.make_bert(), ad.Compacter(rank=4, parts=2))
    block, (adapter,) = model.bert.encoder.layer[0], ad.adapters(model).values()
    ((_, pool),) = adapter.pools()
    one, two = ({**tensors, **pool._parameters} for tensors in sites[:2])

    def delta(p, x):
        return F.gelu(x @ matrix(p, "down").T + p["down_bias"]) @ matrix(p, "up").T + p["up_bias"]

    def reference(h):
        attention, out = block.attention, block.output
        o = attention.output.dense(attention.self(h)[0])
        a = attention.output.LayerNorm(o + delta(one, o) + h)
        o = out.dense(block.intermediate(a))
        return out.LayerNorm(o + delta(two, o) + a)

    same(model, block, reference, (one, two))


def test_counts():
    assert ad.Compacter().trainable(768) == 2 * (32 + 768) + 32 + 768 == 2_400
    adapter = ad.attach(toys.make_bert(), ad.Compacter(rank=4, parts=2))
    places = len(list(adapter.sites()))
    assert sum(p.numel() for p in adapter.parameters()) == places * (3 * 12) + 8  # one set of A_i for all places
