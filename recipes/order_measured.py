"""What is kept of a run's scores, and what two arms differ by: Spearman by query, and a bootstrap over test images.

A record holds, for each group of queries, the mean Spearman of `draws` resamplings of the test images. The resamplings
are the same for all arms and seeds, so the difference of two records' lists is the paired bootstrap of their
difference, and no score of any image has to be kept.

Of a contrast at S seeds, with d_s the difference and B_s its resamplings: the variance over images is that of the mean
of B over seeds, the interaction of images and seeds is what single seeds have above that, and the variance over seeds
is pooled over all arms (`addenda.statistics.intervals`, whose `spread` puts them together, with degrees of freedom).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from addenda.ranking.order.measures import measured, resamplings
from addenda.statistics.intervals import Pool, Pooled, spread
from recipes.claims import Measured
from recipes.order_setting import ARMS, LEARNED, OTHER, Setting, run_name

KEPT = ("spearman", "kendall", "pairs")
Known = Callable[[str], dict | None]  # a run's record by name
Scores = Mapping[str, np.ndarray]  # of each sentence, one for each image


def resampled(scores: np.ndarray, values: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each resampling; nan where all values are alike, 0 where all scores are.

    drawn: how often each image is in each, draws × images.
    """
    x, y = _ranks(scores, drawn), _ranks(values, drawn)
    n = drawn.sum(1)
    middle = (n + 1) / 2  # the mean of ranks from 1 to n
    x, y = x - middle[:, None], y - middle[:, None]
    of = (drawn * x * y).sum(1)
    xx, yy = (drawn * x * x).sum(1), (drawn * y * y).sum(1)
    both = np.sqrt(np.where(xx * yy > 0, xx * yy, 1.0))
    return np.where(yy > 0, np.where(xx > 0, of / both, 0.0), np.nan)


def _ranks(x: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the rank of each image in each resampling, ties shared, draws × images."""
    order = np.argsort(x, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(x[order]) != 0]))
    counts = np.add.reduceat(drawn[:, order], starts, axis=1)  # of each distinct value
    middle = np.cumsum(counts, 1) - counts + (counts + 1) / 2
    which = np.empty(len(x), int)
    which[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(x))))
    return middle[:, which]


def kept(
    scores: Scores, values: Mapping[str, np.ndarray], groups: Mapping[str, Sequence[str]], draws: int, other: str = ""
) -> dict:
    """Return {"by_query", "mean", "draws"} of the groups that have scores.

    other: a group whose sentences' scores are compared, besides, with the values of all the other ones.
    """
    found: dict = {"by_query": {}, "mean": {}, "draws": {}}
    for group, texts in groups.items():
        if not all(text in scores for text in texts):
            continue
        drawn = np.stack(list(resamplings(len(scores[texts[0]]), draws)))
        by = {text: measured(scores[text].tolist(), values[text].tolist()) for text in texts}
        found["by_query"][group] = {t: [_plain(m[k]) for k in KEPT] for t, m in by.items()}
        pairs = [(text, text) for text in texts]
        found["mean"][group] = _plain(float(np.nanmean([m["spearman"] for m in by.values()])))
        found["draws"][group] = _resampled(scores, values, pairs, drawn)
        if group == other and len(texts) > 1:
            pairs = [(a, b) for a in texts for b in texts if a != b]
            once = np.ones((1, drawn.shape[1]), int)
            each = [resampled(scores[a], values[b], once) for a, b in pairs]
            found["mean"][OTHER] = _plain(float(np.nanmean(each)))
            found["draws"][OTHER] = _resampled(scores, values, pairs, drawn)
    return found


def _resampled(
    scores: Scores, values: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], drawn
) -> list[float]:
    each = np.stack([resampled(scores[a], values[b], drawn) for a, b in pairs])
    return [round(float(v), 4) for v in np.nanmean(each, 0)]


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 5)


# ---- two arms --------------------------------------------------------------------------------------------------------


def seeds_of(
    known: Known, subject: str, arm: str, images: int, group: str, seeds: Sequence[int]
) -> dict[int, tuple[float, np.ndarray]]:
    """Return {seed: (mean Spearman, resamplings)} of what is on record of an arm and a group."""
    real, entry = ("dual", OTHER) if arm == OTHER else (arm, group)
    found = {}
    for seed in seeds:
        record = known(run_name(subject, real, images, seed))
        if record is not None and record["mean"].get(entry) is not None:
            found[seed] = (float(record["mean"][entry]), np.array(record["draws"][entry]))
    return found


def arms_of(known: Known, subject: str, images: int, group: str, seeds: Sequence[int]) -> dict[str, dict]:
    """Return what `seeds_of` does of every arm that may answer a group; "other text" is of the trained one."""
    arms = (*ARMS, OTHER) if group == LEARNED[subject] else ARMS
    return {arm: seeds_of(known, subject, arm, images, group, seeds) for arm in arms}


def tested(known: Known, subject: str, setting: Setting) -> int:
    """Return how many test images a subject has on record."""
    record = known(f"{subject}-features-test") or {}
    return int(record.get("images", setting.test))


def contrast(a: Mapping, b: Mapping | None, pool: Pool, names: tuple[str, str], images: int) -> Measured | None:
    """Return a − b, or a alone, at the seeds that both have; None where they share fewer than two.

    a, b: as `seeds_of` returns them; pool: of all arms there; images: that the test has.
    """
    seeds = [s for s in a if b is None or s in b]
    if len(seeds) < 2:
        return None
    means = np.array([a[s][0] - (b[s][0] if b is not None else 0.0) for s in seeds])
    drawn = np.stack([a[s][1] - (b[s][1] if b is not None else 0.0) for s in seeds])
    items = float(drawn.mean(0).var(ddof=1))
    shared = max(float(drawn.var(1, ddof=1).mean()) - items, 0.0) / (len(seeds) - 1)
    over: Pooled = pool.of_arm(names[0], means) if b is None else pool.of_pair(*names, means)
    error, df = spread(items, over.variance / len(seeds), shared, images, over.freedom)
    return Measured(float(means.mean()), float(error), float(df), len(seeds), images, looks=False)


def pool_of(arms: Mapping[str, Mapping]) -> Pool:
    """Return the variances over seeds of all arms that have two or more. arms: as `seeds_of` returns them."""
    return Pool.of({arm: {s: v[0] for s, v in of.items()} for arm, of in arms.items() if len(of) > 1})
