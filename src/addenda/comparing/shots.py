"""Judging with a shared beginning: what all examples begin with (template, shots) is read once and kept as a cache."""

from torch import nn

from addenda.data.encode import Tokens
from addenda.data.encoded import Encoded
from addenda.train.evaluate import Evaluation, evaluate

WORTHWHILE = 8  # shared tokens below which a cache saves nothing


def common_prefix(examples: Tokens) -> int:
    """Return how many first tokens all examples share, one short of where the first of them is judged."""
    if examples.kind != "causal":
        return 0
    first, last = min(examples.ids), max(examples.ids)
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    judged = min(next(i for i, t in enumerate(row) if t != -100) for row in examples.labels)
    return max(0, min(shared, judged - 1))


def evaluate_with_cache(model: nn.Module, examples: Encoded, batch: int = 32) -> Evaluation:
    """Judge a causal LM as `evaluate` does, up to rounding, with the shared tokens computed once."""
    n = common_prefix(examples) if isinstance(examples, Tokens) else 0
    caches = hasattr(getattr(model, "config", None), "use_cache")
    return evaluate(model, examples=examples, batch=batch, prefix=n if n >= WORTHWHILE and caches else 0)
