"""Rated images in two parts, by a hash of their bytes; images that look the same stay on one side.

What was judged must not have been learned from, nor its copy in another format, or the next shot of a burst. Two images
are near where their difference hashes differ in at most `NEAR` of 64 bits: each bit says whether one of 8 × 8 fields is
darker than its neighbour. Near ones form groups; where a group falls depends on its first key alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from addenda.core.base.errors import AddendaError
from addenda.data.examples import Picture, share
from addenda.data.images import pool
from addenda.data.prepare import plain
from addenda.ranking.order.ratings import Ratings

NEAR = 4  # bits of 64


def held_out(ratings: Ratings, fraction: float, seed: int = 0) -> tuple[Ratings, Ratings]:
    """Return (rest, held out). fraction: the expected share of the images that is held out, in (0, 1).

    Raises AddendaError where either part would be empty. An image that cannot be decoded is near to none.
    """
    if not 0 < fraction < 1:
        raise AddendaError(f"The share to hold out must be between 0 and 1, got {fraction}.")
    keys = group_keys(ratings.pictures)
    held = [i for i, key in enumerate(keys) if share(key, seed) < fraction]
    rest = [i for i, key in enumerate(keys) if share(key, seed) >= fraction]
    if not held or not rest:
        raise AddendaError(
            f"Holding out {fraction:g} of {len(keys)} images ({len(set(keys))} that look different) leaves one part "
            "empty. Rate more images, or give another share."
        )
    kept = replace(ratings.of(rest), source=f"{ratings.source} without the {len(held)} images held out")
    return kept, ratings.of(held)


def group_keys(pictures: Sequence[Picture]) -> list[str]:
    """Return for each image the first key of the images that look like it."""
    hashes = list(pool().map(difference_hash, pictures))
    known = [i for i, h in enumerate(hashes) if h is not None]
    bits = np.array([hashes[i] for i in known], dtype=np.uint64)
    first = list(range(len(pictures)))

    def root(i: int) -> int:
        while first[i] != i:
            first[i] = first[first[i]]
            i = first[i]
        return i

    for at, i in enumerate(known):
        near = np.flatnonzero(np.bitwise_count(bits[at + 1 :] ^ bits[at]) <= NEAR)
        for j in near.tolist():
            first[root(known[at + 1 + j])] = root(i)
    keys: dict[int, str] = {}
    for i, picture in enumerate(pictures):
        keys[root(i)] = min(keys.get(root(i), picture.key), picture.key)
    return [keys[root(i)] for i in range(len(pictures))]


def difference_hash(picture: Picture) -> int | None:
    """Return 64 bits: whether each field of an image is darker than the one to its right; None where it is no image."""
    try:
        grey = np.asarray(plain(picture.open()).convert("L").resize((9, 8)), dtype=np.int16)
    except Exception:  # decoders raise whatever their formats lead them to
        return None
    return int(sum(1 << n for n in np.flatnonzero(grey[:, :-1] < grey[:, 1:]).tolist()))
