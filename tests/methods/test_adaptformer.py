"""AdaptFormer against the published sum: it reads the stream before the norm."""

import pytest
import torch.nn.functional as F

import addenda as ad
import toys
from published import WIDTH, changed, delta, same


@pytest.mark.parametrize("reads", ["residual", "input"])
@pytest.mark.parametrize("norm", [False, True])
def test_published_sum_of_vit(reads, norm):
    model, (p, *_) = changed(toys.make_vit(), ad.AdaptFormer(rank=3, reads=reads, norm=norm))
    block = model.vit.layers[0]

    def reference(h):
        h = h + block.attention(block.layernorm_before(h))[0]
        x = block.layernorm_after(h)
        read = h if reads == "residual" else x
        if norm:
            read = F.layer_norm(read, (WIDTH,), p["norm_weight"], p["norm_bias"])
        return h + block.mlp(x) + delta(p, read, s=0.1)

    same(model, block, reference, (p,), None)


def test_counts():
    """ViT-B/16 with r = 64: twelve blocks of width 768."""
    assert 12 * ad.AdaptFormer().trainable(768) == 12 * (2 * 64 * 768 + 64 + 768) == 1_189_632
    assert ad.AdaptFormer(norm=True).trainable(768) - ad.AdaptFormer().trainable(768) == 2 * 768
