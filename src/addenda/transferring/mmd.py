"""How far two samples of texts are apart: maximum mean discrepancy over the features of a model.

    X, Y = features(model, tokenizer, made), features(model, tokenizer, real)
    mmd(X, Y), mmd(X, Y, unbiased=True, bandwidth=median_distance(X, Y))

    MMD² = mean k(x, x') + mean k(y, y') − 2 mean k(x, y),    k(a, b) = exp(−‖a − b‖² / 2σ²)

(Gretton et al. 2012, JMLR 13.) The biased one is never below 0, and 0 for X and X; the unbiased one leaves each x out
of its own mean, and is 0 on average, not each time, where both come of one distribution. Compare two samples with a
third under one σ: `median_distance` of the widest of them. Trans-LoRA (arXiv:2405.17258) shows that its filter brings
synthetic inputs nearer to real ones so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.ranking.bi_encoder import BiEncoder
from addenda.train.masked_logits import body_of

MOST = 2000  # rows of each for the median of distances: more move it little


def features(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the mean last hidden state of each text, of length 1 (texts × width, float64), in order.

    model: an encoder, or a causal LM below its head, as it acts now; of an embedded encoder, `BiEncoder.load("minilm")`
    has both. Raises AddendaError for an empty text, and for a model that gives no hidden states.
    """
    encoder = BiEncoder(body_of(model) or model, tokenizer, query="", passage="", cache=False)
    return torch.from_numpy(encoder.embed(texts)).double()


def mmd(X: Tensor, Y: Tensor, *, bandwidth: float | None = None, unbiased: bool = False) -> float:
    """Return MMD² of samples X (m × d) and Y (n × d), with an RBF kernel. bandwidth: σ; None: `median_distance`.

    unbiased: see the module; wants two rows of each. Raises AddendaError for samples that cannot be compared.
    """
    X, Y = _rows(X, Y, 2 if unbiased else 1)
    sigma = median_distance(X, Y) if bandwidth is None else bandwidth
    if not sigma > 0:
        raise AddendaError(f"bandwidth= is above 0, got {sigma!r}: all rows may be the same.")
    within = [_kernel(Z, Z, sigma) for Z in (X, Y)]
    own = [
        float((K.sum() - K.diagonal().sum()) / (len(K) * (len(K) - 1)) if unbiased else K.mean()) for K in within
    ]  # fmt: skip
    return sum(own) - 2 * float(_kernel(X, Y, sigma).mean())


def median_distance(X: Tensor, Y: Tensor) -> float:
    """Return the median distance between the rows of X and Y together, of 2,000 of each at most; 1 if that is 0."""
    X, Y = _rows(X, Y, 1)
    Z = torch.cat([X[:MOST], Y[:MOST]])
    above = torch.triu_indices(len(Z), len(Z), 1)
    return float(_squares(Z, Z)[above[0], above[1]].median().sqrt()) or 1.0


def _kernel(X: Tensor, Y: Tensor, sigma: float) -> Tensor:
    return torch.exp(_squares(X, Y) / (-2 * sigma**2))


def _squares(X: Tensor, Y: Tensor) -> Tensor:
    return torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _rows(X: Tensor, Y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    if X.dim() != 2 or Y.dim() != 2 or X.shape[1] != Y.shape[1] or min(len(X), len(Y)) < least:
        raise AddendaError(
            f"Two samples of features are compared, rows of one width, {least} of each at least; got {tuple(X.shape)} "
            f"and {tuple(Y.shape)}."
        )
    if not (bool(X.isfinite().all()) and bool(Y.isfinite().all())):
        raise AddendaError("Features hold values that are not finite.")
    return X.double(), Y.double()
