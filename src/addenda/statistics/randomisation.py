"""The paired randomisation test: how often a mean as far from 0 comes of signs that a coin has thrown (Fisher 1935).

If two systems are alike, each item's difference might as well have had the other sign. All 2ⁿ ways of giving n
differences signs are counted where they are few, else drawn; p is their share with a mean as far from 0, what was
observed counted with them, so it is never 0. No shape of the differences is assumed. Items are what varies; seeds are
averaged first, and that they vary is for the intervals (`statistics/intervals.py`) to say.
"""

import numpy as np

from addenda.core.base.random import Stream

DRAWS = 50_000
FEW = 16  # differences, up to which all signs are tried: 65,536 ways
_ROWS = 4096  # drawn at once
_NEAR = 1e-10  # sums this near by the size of their parts are equal: rounding must decide nothing


def randomised(differences: np.ndarray, seed: int = 0, draws: int = DRAWS) -> float:
    """Return the two-sided p of the mean of paired differences (items,) being 0, the same for one seed everywhere."""
    x = np.asarray(differences, dtype=np.float64)
    x = x[x != 0]  # either sign of 0 is the same
    if not len(x):
        return 1.0
    far = abs(x.sum()) - _NEAR * np.abs(x).sum()
    if len(x) <= FEW:
        sums = np.zeros(1)
        for value in x:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= far))
    stream, found, words = Stream(seed, "randomisation"), 0, -(-len(x) // 64)
    for start in range(0, draws, _ROWS):
        rows = min(_ROWS, draws - start)
        bits = np.unpackbits(stream.raw(rows * words).view(np.uint8).reshape(rows, -1), axis=1)[:, : len(x)]
        found += int(np.sum(np.abs((2.0 * bits - 1.0) @ x) >= far))
    return (found + 1) / (draws + 1)
