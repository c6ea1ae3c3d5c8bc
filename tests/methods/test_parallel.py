"""Parallel adapters against the published sum, beside the MLP and beside the attention."""

import addenda as ad
import toys
from published import changed, delta, same


def test_beside_the_mlp_of_gpt2():
    model, (p, *_) = changed(toys.make_gpt2(), ad.ParallelAdapter(rank=3))
    block = model.transformer.h[0]

    def reference(h):
        h = h + block.attn(block.ln_1(h))[0]
        x = block.ln_2(h)
        return h + block.mlp(x) + delta(p, x, s=4.0)

    same(model, block, reference, (p,))


def test_beside_the_mlp_of_bert():
    model, (p, *_) = changed(toys.make_bert(), ad.ParallelAdapter(rank=3))
    block = model.bert.encoder.layer[0]

    def reference(h):
        x = block.attention(h)[0]
        return block.output.LayerNorm(block.output.dense(block.intermediate(x)) + delta(p, x, s=4.0) + x)

    same(model, block, reference, (p,))


def test_beside_the_attention_of_bert():
    model, (p, *_) = changed(toys.make_bert(), ad.ParallelAdapter(rank=3, scale=1.0), targets="attention")
    block = model.bert.encoder.layer[0]

    def reference(h):
        out = block.attention.output
        x = out.LayerNorm(out.dense(block.attention.self(h)[0]) + delta(p, h) + h)
        return block.output.LayerNorm(block.output.dense(block.intermediate(x)) + x)

    same(model, block, reference, (p,))
