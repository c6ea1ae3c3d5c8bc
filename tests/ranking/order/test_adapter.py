"""The adapter against its equations written out, and what a score must not depend on."""

import math

import pytest
import torch
import torch.nn.functional as F

from addenda import AddendaError
from addenda.ranking.order.adapter import OrderAdapter
from addenda.ranking.order.settings import OrderSettings

SMALL = {"width": 16, "heads": 2, "layers": 1, "after": 1, "prompts": 3, "tokens": 4, "dropout": 0.0, "ratio": 2}


def made(**options):
    return OrderAdapter(OrderSettings(**SMALL | options), image_width=12, text_width=10, seed=1).double().eval()


def example(n=5, patches=6, tokens=7):
    generator = torch.Generator().manual_seed(2)
    patches_ = torch.randn(n, patches, 12, generator=generator).double()
    return patches_, torch.randn(tokens, 10, generator=generator).double()


def attention(query, key, value, heads):
    """Softmax attention head by head, in loops."""
    d = query.shape[-1] // heads
    parts = []
    for h in range(heads):
        q, k, v = (t[:, h * d : (h + 1) * d] for t in (query, key, value))
        parts.append((q @ k.t() / math.sqrt(d)).softmax(-1) @ v)
    return torch.cat(parts, 1)


def written_out(adapter, patches, tokens):
    """X of each image by itself."""
    s = adapter.settings
    context = torch.cat([adapter.prompts.expand(-1, s.width), adapter.from_text(tokens)])
    rows = []
    for image in patches:
        z = adapter.from_image(image)
        for block in adapter.blocks:
            normed = block.norm(z)
            read = normed if block.context_norm is None else block.context_norm(context)
            key, value = block.key_value(read).split(s.width, -1)
            z = z + block.out(attention(block.query(normed), key, value, s.heads))
            z = z + block.mlp(block.mlp_norm(z))
        z = adapter.norm(z) @ adapter.projection.weight.t()
        for layer in adapter.after:
            own = layer.self_attn
            q, k, v = F.linear(z, own.in_proj_weight, own.in_proj_bias).split(s.width, -1)
            z = layer.norm1(z + own.out_proj(attention(q, k, v, s.heads)))
            z = layer.norm2(z + layer.linear2(layer.linear1(z).relu()))
        rows.append(z)
    return torch.stack(rows)


@pytest.mark.parametrize("pool", ["sum", "mean"])
def test_it_computes_its_equations(pool):
    adapter, (patches, tokens) = made(pool=pool), example()
    states = written_out(adapter, patches, tokens)
    normed = F.layer_norm(states, (16,), adapter.pooled_norm.weight, adapter.pooled_norm.bias)
    pooled = normed.sum(1) if pool == "sum" else normed.sum(1) / patches.shape[1]
    found = adapter(patches, tokens, pairs=True)
    torch.testing.assert_close(found.values, adapter.score(pooled)[:, 0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.pairs, adapter.pair_head(states), rtol=1e-8, atol=1e-10)


def test_a_score_is_of_its_image_alone_and_needs_no_pairs():
    adapter, (patches, tokens) = made(), example()
    alone = adapter(patches[2:3], tokens).values
    all_of_them = adapter(patches, tokens)
    assert all_of_them.pairs is None
    torch.testing.assert_close(alone[0], all_of_them.values[2])


def test_padding_counts_only_where_asked():
    patches, tokens = example()
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    masked, as_released = made(), made(mask_padding=False)
    torch.testing.assert_close(masked(patches, tokens, mask).values, masked(patches, tokens[:5]).values)
    assert not torch.allclose(as_released(patches, tokens, mask).values, as_released(patches, tokens[:5]).values)


def test_scalar_prompts_are_one_number_for_all_channels():
    assert made(prompt="scalar").prompts.shape == (3, 1)
    assert made(prompt="vector").prompts.shape == (3, 16)
    patches, tokens = example()
    assert made(prompt="scalar")(patches, tokens).values.isfinite().all()


def test_every_tensor_learns():
    adapter, (patches, tokens) = made(), example()
    scores = adapter.train()(patches, tokens, pairs=True)
    (scores.values.square().sum() + scores.pairs.triu(1).tanh().sum()).backward()
    dead = [n for n, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 1e-9]
    # it cancels in s_ij − s_ji
    assert dead == ["pair_head.score.10.bias"]


def test_it_begins_alike_for_a_seed_and_otherwise_for_another():
    first, again = made(), made()
    other = OrderAdapter(OrderSettings(**SMALL), 12, 10, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.from_text.weight.float(), other.from_text.weight)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"width": 15}, "heads"),
        ({"heads": 0}, "heads"),
        ({"prompts": -1}, "prompts"),
        ({"dropout": 1.0}, "dropout"),
        ({"pool": "max"}, "pool"),
        ({"prompt": "none"}, "prompt"),
        ({"tokens": True}, "tokens"),
    ],
)
def test_impossible_settings_are_refused(options, word):
    with pytest.raises(AddendaError, match=word):
        OrderSettings(**SMALL | options)


def test_states_of_other_shapes_are_refused():
    patches, tokens = example()
    with pytest.raises(AddendaError, match="images × patches × width"):
        made()(patches[0], tokens)
