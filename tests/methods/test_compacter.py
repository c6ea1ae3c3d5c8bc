"""Compacter against matrices put together with torch.kron."""

import pytest
import torch
import torch.nn.functional as F

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from published import changed, same


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


def test_a_reduction_makes_the_width_of_the_bottleneck():
    """The release's configuration: width / 32, 24 on T5-base, with every factor of that size."""
    published = ad.Compacter(reduction=32)
    own = published.init(768, Stream(0, "place"), {})
    assert {k: tuple(t.shape) for k, t in own.items()} == {
        "down_bias": (24,), "up_bias": (768,),
        "down_rows": (4, 6), "down_columns": (4, 192), "up_rows": (4, 192), "up_columns": (4, 6),
    }  # fmt: skip
    assert published.trainable(768) == sum(t.numel() for t in own.values()) == 2 * (24 + 768) + 24 + 768
    p = {k: t.detach().double().normal_() for k, t in own.items()} | {"rule": torch.randn(4, 4, 4).double()}
    D, U = published.matrices(p)
    torch.testing.assert_close(D, matrix(p, "down"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(U, matrix(p, "up"), rtol=1e-12, atol=1e-12)
    assert D.shape == (24, 768)


def test_a_reduction_is_the_rank_that_it_makes(tmp_path):
    """In a model whose places have one width, of 8 here, and through a file."""
    ids = torch.randint(0, 20, (2, 5))
    made = []
    for options in ({"rank": 4}, {"reduction": 2}):
        torch.manual_seed(0)
        model = toys.make_bert().eval()
        adapter = ad.attach(model, ad.Compacter(parts=2, **options), seed=3)
        with torch.no_grad():
            for q in adapter.parameters():
                q.add_(0.1)
        made.append((model, adapter, model(ids).logits))
    assert torch.equal(made[0][2], made[1][2]) and {m._at(8).rank for m in made[1][1].methods.values()} == {4}
    model, adapter, logits = made[1]
    file = adapter.save(tmp_path / "a.safetensors")
    ad.detach(model)
    assert next(iter(ad.load(model, file).methods.values())).reduction == 2
    assert torch.equal(model(ids).logits, logits)


def test_a_reduction_that_no_width_can_take():
    with pytest.raises(AddendaError, match="rank and reduction both say"):
        ad.Compacter(rank=8, reduction=4)
    with pytest.raises(AddendaError, match="reduction must be at least 1"):
        ad.Compacter(reduction=0)
    assert ad.Compacter(reduction=32).check(768) is None
    assert "is 3, no multiple of parts (4)" in ad.Compacter(reduction=32).check(96)
    assert "is 0, no multiple of parts (4)" in ad.Compacter(reduction=32).check(16)


def test_counts():
    assert ad.Compacter().trainable(768) == 2 * (32 + 768) + 32 + 768 == 2_400
    adapter = ad.attach(toys.make_bert(), ad.Compacter(rank=4, parts=2))
    places = len(list(adapter.sites()))
    assert sum(p.numel() for p in adapter.parameters()) == places * (3 * 12) + 8  # one set of A_i for all places
