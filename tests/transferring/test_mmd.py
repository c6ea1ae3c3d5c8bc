"""Maximum mean discrepancy: sums that are written out, its properties, and what a filter does to a planted mixture."""

import math

import pytest
import torch

import addenda as ad
from addenda.transferring.discriminator import kept
from addenda.transferring.mmd import features, median_distance, mmd
from tiny_models import make_llama, make_tokenizer


def drawn(n, shift=0.0, seed=0, width=3):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def by_loops(X, Y, sigma, unbiased):
    def mean(A, B, skip):
        pairs = [(i, j) for i in range(len(A)) for j in range(len(B)) if not (skip and i == j)]
        squares = [sum((a - b) ** 2 for a, b in zip(A[i].tolist(), B[j].tolist(), strict=True)) for i, j in pairs]
        return sum(math.exp(-s / (2 * sigma**2)) for s in squares) / len(pairs)

    return mean(X, X, unbiased) + mean(Y, Y, unbiased) - 2 * mean(X, Y, False)


@pytest.mark.parametrize("unbiased", [False, True])
def test_it_is_the_sum_over_all_pairs(unbiased):
    X, Y = drawn(5), drawn(7, 0.5, 1)
    assert mmd(X, Y, bandwidth=0.8, unbiased=unbiased) == pytest.approx(by_loops(X, Y, 0.8, unbiased), abs=1e-12)
    assert mmd(Y, X, bandwidth=0.8, unbiased=unbiased) == pytest.approx(mmd(X, Y, bandwidth=0.8, unbiased=unbiased))


def test_of_a_sample_with_itself_it_is_nothing():
    X = drawn(40)
    assert mmd(X, X) == pytest.approx(0, abs=1e-14) and mmd(X, X[torch.randperm(40)]) == pytest.approx(0, abs=1e-14)
    assert mmd(X, drawn(40, 0, 5)) >= 0
    many = [mmd(drawn(30, 0, s), drawn(30, 0, s + 1000), unbiased=True, bandwidth=1.5) for s in range(60)]
    assert abs(sum(many) / 60) < 3 * torch.tensor(many).std().item() / 60**0.5  # 0 on average


def test_the_median_is_that_of_all_different_pairs():
    X, Y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])
    assert median_distance(X, Y) == 2.0  # of 1, 2 and 3
    assert median_distance(torch.zeros(3, 2), torch.zeros(2, 2)) == 1.0


@pytest.mark.parametrize("unbiased", [False, True])
def test_it_falls_where_a_filter_takes_a_planted_mixture_apart(unbiased):
    real, good, bad = drawn(120, 0, 1), drawn(100, 0, 2), drawn(60, 2.0, 3)
    made = torch.cat([good, bad])
    margins = (-(made.sum(1)) + 3.0 + 0.5 * drawn(160, 0, 4, 1)[:, 0]).tolist()  # a judge that errs
    sigma = median_distance(made, real)
    before, after = (mmd(part, real, bandwidth=sigma, unbiased=unbiased) for part in (made, made[kept(margins)]))
    assert after < before / 3


def test_samples_that_cannot_be_compared_are_refused():
    for X, Y, more in ((drawn(3), drawn(3, width=2), {}), (drawn(1), drawn(3), {"unbiased": True}),
                       (drawn(3)[:0], drawn(3), {}), (drawn(3)[0], drawn(3), {})):  # fmt: skip
        with pytest.raises(ad.AddendaError, match="rows of one width"):
            mmd(X, Y, **more)
    with pytest.raises(ad.AddendaError, match="not finite"):
        mmd(drawn(3) * math.nan, drawn(3))
    with pytest.raises(ad.AddendaError, match="bandwidth="):
        mmd(drawn(3), drawn(3), bandwidth=0.0)


def test_features_are_mean_states_of_each_text_alone_and_of_length_one():
    model, tokenizer = make_llama(), make_tokenizer()
    texts = ["3+4=?", "a much longer text", "x"]
    found = features(model, tokenizer, texts)
    for row, text in zip(found, texts, strict=True):
        state = model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0).double()
        torch.testing.assert_close(row, state / state.norm(), atol=1e-5, rtol=1e-4)
    adapter = ad.attach(model, "lora:rank=2")
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    assert not torch.allclose(features(model, tokenizer, texts), found, atol=1e-3)
    with ad.disabled(model):
        torch.testing.assert_close(features(model, tokenizer, texts), found)
    with pytest.raises(ad.AddendaError, match="empty"):
        features(model, tokenizer, ["a", " "])
