"""Judging with a cached prefix says what plain judging says."""

import pytest

from addenda.comparing.shots import common_prefix, evaluate_with_cache
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train.evaluate import evaluate
from tiny_models import make_llama, make_tokenizer


def test_the_cache_changes_nothing():
    shots = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}] * 3
    turns = [("2+3=?", "5"), ("10+3=?", "13"), ("4+4=?", "8")]
    rows = [
        {"messages": [*shots, {"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns
    ]
    made = encode(read(rows), make_tokenizer())
    labels = [[-100 if i < 100 else t for i, t in enumerate(row)] for row in made.labels]
    made.labels[:] = labels
    assert 32 < common_prefix(made) < min(made.lengths)
    model = make_llama()
    plain, cached = evaluate(model, examples=made), evaluate_with_cache(model, made, batch=2)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    assert cached.items == plain.items and cached.loss == pytest.approx(plain.loss, rel=1e-5)
