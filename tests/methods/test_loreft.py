"""LoReFT against the paper's equation with its own W, and at chosen positions."""

import pytest
import torch

import addenda as ad
import toys
from published import changed, same


def edited(p, h):
    """h + Rᵀ (W h + b − R h), where the rows of R come from Gram-Schmidt and W = R + dW."""
    rows = []
    for v in p["basis"]:
        for r in rows:
            v = v - (r @ v) * r
        rows.append(v / v.norm())
    R = torch.stack(rows)
    W = R + p["offset"]
    return h + (h @ W.T + p["bias"] - h @ R.T) @ R


@pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 1), (4, 4), (0, 9)])
def test_published_equation_in_gpt2(first, last):
    model, (p, *_) = changed(toys.make_gpt2(), ad.LoReFT(rank=3, first=first, last=last))
    block = model.transformer.h[0]

    def reference(h):
        h = h + block.attn(block.ln_1(h))[0]
        h = h + block.mlp(block.ln_2(h))
        at = torch.arange(5)
        chosen = (at < first) | (at >= 5 - last) if first or last else at >= 0
        return torch.where(chosen[:, None], edited(p, h), h)

    same(model, block, reference, (p,))


def test_rows_are_orthonormal_and_the_rest_of_the_space_is_left_alone():
    model, (p, *_) = changed(toys.make_gpt2(), ad.LoReFT(rank=3))
    R = ad.LoReFT(rank=3)._rows(p)
    torch.testing.assert_close(R @ R.T, torch.eye(3, dtype=torch.float64))
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    moved = model.transformer.h[0](h)
    with ad.disabled(model):
        moved = moved - model.transformer.h[0](h)
    torch.testing.assert_close(moved @ R.T @ R, moved)


def test_the_edit_is_continuous_where_a_pivot_changes_its_sign():
    g = torch.Generator().manual_seed(0)
    p = {k: torch.randn(2, 6, generator=g, dtype=torch.float64) for k in ("basis", "offset")}
    p["bias"], h = torch.randn(2, generator=g, dtype=torch.float64), torch.randn(3, 6, generator=g, dtype=torch.float64)
    found = []
    for pivot in (1e-6, 0.0, -1e-6):
        p["basis"][0, 0] = pivot
        found.append(ad.LoReFT(rank=2)._edit(h, p))
        torch.testing.assert_close(h + found[-1], edited(p, h))
    assert (found[0] - found[2]).abs().max() < 1e-4
    assert found[0].abs().max() > 0.1


def test_bad_options_and_counts():
    with pytest.raises(ad.AddendaError, match="9 orthonormal rows do not fit into 8"):
        ad.attach(toys.make_gpt2(), "loreft:rank=9")
    with pytest.raises(ad.AddendaError, match="first and last must be at least 0"):
        ad.LoReFT(first=-1)
    assert ad.LoReFT(rank=4).trainable(768) == 2 * 4 * 768 + 4
