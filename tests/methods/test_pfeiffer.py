"""Pfeiffer's adapter against the published order: the residual and the norm before it and again behind it."""

import pytest
import torch.nn.functional as F

import addenda as ad
import toys
from published import changed, delta, same


def test_published_order_of_bert():
    """a = LN(o + res); out = LN((o + Δ(a)) + res)."""
    model, (p, *_) = changed(toys.make_bert(), ad.Pfeiffer(rank=3))
    block = model.bert.encoder.layer[0]

    def reference(h):
        res = block.attention(h)[0]
        o = block.output.dense(block.intermediate(res))
        a = block.output.LayerNorm(o + res)
        return block.output.LayerNorm((o + delta(p, a)) + res)

    same(model, block, reference, (p,))


def test_a_norm_before_the_parts_leaves_the_sums():
    """a = o + res; out = (o + Δ(a)) + res."""
    model, (p, *_) = changed(toys.make_gpt2(), ad.Pfeiffer(rank=3))
    block = model.transformer.h[0]

    def reference(h):
        res = h + block.attn(block.ln_1(h))[0]
        o = block.mlp(block.ln_2(res))
        return (o + delta(p, o + res)) + res

    same(model, block, reference, (p,))


@pytest.mark.parametrize("targets", ["attention", ("attention", "mlp")])
def test_after_the_attention_of_bert(targets):
    model, tensors = changed(toys.make_bert(), ad.Pfeiffer(rank=3), targets=targets)
    block, both = model.bert.encoder.layer[0], isinstance(targets, tuple)
    tensors = tensors[: 2 if both else 1]

    def reference(h):
        out = block.attention.output
        o = out.dense(block.attention.self(h)[0])
        res = out.LayerNorm(o + delta(tensors[0], out.LayerNorm(o + h)) + h)
        o = block.output.dense(block.intermediate(res))
        change = delta(tensors[1], block.output.LayerNorm(o + res)) if both else 0
        return block.output.LayerNorm(o + change + res)

    same(model, block, reference, tensors)


def test_the_output_is_what_mosas_release_reads():
    """The MLP's output before the sum, through a LayerNorm of the adapter's own."""
    for method in (ad.Pfeiffer(rank=3, reads="output", norm=True),
                   ad.MoSAPfeiffer(rank=3, reads="output", norm=True, parts=1)):  # fmt: skip
        model, (one, *_) = changed(toys.make_gpt2(), method)
        block = model.transformer.h[0]

        def reference(h, block=block, one=one):
            h = h + block.attn(block.ln_1(h))[0]
            o = block.mlp(block.ln_2(h))
            return h + o + delta(one, F.layer_norm(o, (8,), one["norm_weight"], one["norm_bias"]))

        same(model, block, reference, (one,))
