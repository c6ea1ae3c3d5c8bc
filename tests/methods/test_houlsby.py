"""Houlsby's adapters against the published order: inside the residual, before the norm, twice a block."""

import torch.nn.functional as F

import addenda as ad
import toys
from published import changed, delta, same


def test_published_order_of_bert():
    model, (one, two, *_) = changed(toys.make_bert(), ad.Houlsby(rank=3))
    block = model.bert.encoder.layer[0]

    def reference(h):
        attention, out = block.attention, block.output
        o = attention.output.dense(attention.self(h)[0])
        a = attention.output.LayerNorm((o + delta(one, o, F.silu)) + h)
        o = out.dense(block.intermediate(a))
        return out.LayerNorm((o + delta(two, o, F.silu)) + a)

    same(model, block, reference, (one, two))


def test_published_order_of_gpt2():
    model, (one, two, *_) = changed(toys.make_gpt2(), ad.Houlsby(rank=3, activation="relu", scale=0.5))
    block = model.transformer.h[0]

    def reference(h):
        o = block.attn(block.ln_1(h))[0]
        h = h + o + delta(one, o, s=0.5)
        o = block.mlp(block.ln_2(h))
        return h + o + delta(two, o, s=0.5)

    same(model, block, reference, (one, two))


def test_the_stream_is_what_mosas_release_reads():
    """Behind each sum, where the next part and the residual both go on from what the adapter made of it."""
    for method in (ad.Houlsby(rank=3, reads="stream"), ad.MoSAHoulsby(rank=3, reads="stream", parts=1)):
        model, (one, two, *_) = changed(toys.make_gpt2(), method)
        block = model.transformer.h[0]

        def reference(h, block=block, one=one, two=two):
            h = h + block.attn(block.ln_1(h))[0]
            h = h + delta(one, h, F.silu)
            h = h + block.mlp(block.ln_2(h))
            return h + delta(two, h, F.silu)

        same(model, block, reference, (one, two))
        model, (one, two, *_) = changed(toys.make_bert(), method)
        layer = model.bert.encoder.layer[0]

        def normed(h, block=layer, one=one, two=two):
            a = h + block.attention.output.dense(block.attention.self(h)[0])
            a = block.attention.output.LayerNorm(a + delta(one, a, F.silu))
            v = a + block.output.dense(block.intermediate(a))
            return block.output.LayerNorm(v + delta(two, v, F.silu))

        same(model, layer, normed, (one, two))


def test_counts():
    assert ad.Houlsby(rank=48).trainable(768) == 2 * 48 * 768 + 48 + 768
    assert ad.Houlsby(rank=48, bias=False).trainable(768) == 2 * 48 * 768
