"""A folder of images in the order that a sentence asks for.

    order = ImageOrder.load("run/order.safetensors", load_towers())
    for row in order.rank(images_in("photos/"), "many red shoes"): ...

A score is in the units of the trained query that is nearest to the sentence; how near is told beside it, because a
sentence far from all that was trained still gives an order, and nobody has measured what that is worth. Images are
scored in the order of their hashes and in batches of one size, so that their scores do not depend on how they came.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.disk.access import path_of, sha256_of, shown
from addenda.core.disk.cache import cache_folder, trim
from addenda.core.file.container import bytes_of
from addenda.core.file.identity import digest, versions
from addenda.core.file.states import keep, kept
from addenda.data.examples import Picture
from addenda.data.images import SUFFIXES, pool
from addenda.data.pixels import check_decoded
from addenda.ranking.order.adapter import OrderAdapter
from addenda.ranking.order.features import Features
from addenda.ranking.order.file import Made, Scale, check_towers, load_order
from addenda.ranking.order.towers import Towers

BATCH = 32  # images scored at once, filled up
HELD = 32 * BATCH  # images whose patches are in memory at once: 160 MB of the default's
ROOM = 64 << 20  # bytes of scores that are kept
FAR = 0.25  # of the way from sentences on other things to a trained query: below it a word of warning is due
ELSEWHERE = ("the train to Berlin leaves at noon", "taxes of the last quarter", "she had forgiven him in the end")


@dataclass(frozen=True)
class Ranked:
    """One image of an order. rank: from 1; score: in the units of `nearest`, a trained query, `similarity` to it."""

    rank: int
    picture: Picture
    score: float
    nearest: str
    similarity: float


class ImageOrder:
    """A trained adapter with its encoders. cache: keep patches and scores on disk, by content."""

    def __init__(self, towers: Towers, adapter: OrderAdapter, made: Made, *, cache: bool = True):
        check_towers(made, towers.identity, "this adapter")
        self.towers, self.adapter, self.made, self.cache = towers, adapter.eval(), made, cache
        self.features = Features(towers, cache)
        self.skipped: dict[str, str] = {}
        self._queries: Tensor | None = None

    @classmethod
    def load(cls, path: str | Path, towers: Towers, *, cache: bool = True) -> Self:
        """Read an adapter's file for these encoders. Raises AddendaError where it is of others, or damaged."""
        adapter, made = load_order(path)
        check_towers(made, towers.identity, path)
        return cls(towers, adapter, made, cache=cache)

    def rank(self, pictures: Sequence[Picture], sentence: str, *, skip_corrupt: bool = False) -> list[Ranked]:
        """Return the images, the best first; equal scores in the order of their names.

        skip_corrupt: leave out images that cannot be decoded, told in `skipped`. Raises AddendaError for those else,
        and for an empty sentence.
        """
        query, similarity = self.nearest(sentence)
        found = self._scores(pictures, sentence, query)
        if not skip_corrupt:
            check_decoded(self.skipped, len(pictures), "the folder")
        if not found:
            raise AddendaError(f"None of the {len(pictures)} images can be decoded, so there is nothing to order.")
        order = sorted(found, key=lambda i: (-found[i], pictures[i].name))
        return [Ranked(n, pictures[i], found[i], query, similarity) for n, i in enumerate(order, 1)]

    def scores(self, pictures: Sequence[Picture], sentence: str) -> dict[int, float]:
        """Return {position: score} of the images that can be decoded; the others are told in `skipped`.

        Scores are in the units of the trained query that is nearest to the sentence.
        """
        return self._scores(pictures, sentence, self.nearest(sentence)[0])

    def _scores(self, pictures: Sequence[Picture], sentence: str, query: str) -> dict[int, float]:
        """Return what `scores` does, in the units of a trained query."""
        scale, file = self.made.scales.get(query, Scale()), self._file(sentence)
        held = kept(file, lambda state: _sound(state, sentence)) if self.cache else None
        known = {} if held is None else dict(zip(held["images"], held["scores"].tolist(), strict=True))
        by_key: dict[str, list[int]] = {}
        for i, picture in enumerate(pictures):
            by_key.setdefault(picture.key, []).append(i)
        self.skipped = {}
        wanted = [pictures[places[0]] for key, places in sorted(by_key.items()) if key not in known]
        tokens = self.towers.tokens(sentence) if wanted else ()
        before = len(known)
        for start in range(0, len(wanted), HELD):
            some, new = wanted[start : start + HELD], {}
            for at, patches in self.features.of(some):
                if isinstance(patches, str):
                    self.skipped |= dict.fromkeys((pictures[i].name for i in by_key[some[at].key]), patches)
                else:
                    new[some[at].key] = patches
            known |= self._scored(new, tokens)
        if len(known) > before and self.cache:
            about = {"sentence": sentence, "images": list(known), "scores": torch.tensor(list(known.values()))}
            keep(file, about, "scores")
            trim(file.parent.parent, ROOM)
        return {i: known[k] * scale.spread + scale.centre for k, places in by_key.items() if k in known for i in places}

    @torch.no_grad()
    def _scored(self, patches: Mapping[str, Tensor], tokens: Sequence[Tensor]) -> dict[str, float]:
        """Return {key: score}, in no query's units. patches: P × D_i by key; tokens: the sentence, with its mask."""
        keys, found = sorted(patches), {}
        for at in range(0, len(keys), BATCH):
            batch = [patches[k] for k in keys[at : at + BATCH]]
            filled = torch.stack([*batch, *[batch[0]] * (BATCH - len(batch))])
            values = self.adapter(filled, *tokens).values[: len(batch)]
            found |= dict(zip(keys[at : at + BATCH], values.tolist(), strict=True))
        return found

    def nearest(self, sentence: str) -> tuple[str, float]:
        """Return the trained query that is nearest to a sentence, and the cosine of their mean token states."""
        if sentence in self.made.scales:
            return sentence, 1.0
        queries = list(self.made.scales)
        if self._queries is None:
            self._queries = torch.stack([self._meaning(q) for q in queries])
        near = self._queries @ self._meaning(sentence)
        best = int(near.argmax())
        return queries[best], float(near[best])

    def far(self, similarity: float) -> bool:
        """Return whether a sentence of such a similarity is hardly nearer to what was trained than any other is.

        What is near is the encoder's own: unlike sentences have cosines of 0.75 in e5, and of 0.1 in others.
        """
        if similarity >= 1:
            return False
        floor = fmean(self.nearest(s)[1] for s in ELSEWHERE)
        return similarity < floor + FAR * (1 - floor)

    def _meaning(self, sentence: str) -> Tensor:
        tokens, mask = self.towers.tokens(sentence)
        return F.normalize(tokens[mask].mean(0), dim=0)

    def _file(self, sentence: str) -> Path:
        """Return where the scores by a sentence are kept."""
        own = digest([sentence, self.towers.tokenizer(sentence, verbose=False)["input_ids"]])[:24]
        return cache_folder() / "scores" / self._content / f"{own}.safetensors"

    @cached_property
    def _content(self) -> str:
        """What decides scores: the encoders, the adapter's settings and values, versions."""
        sha = hashlib.sha256(repr((self.made.towers, self.made.settings, versions())).encode())
        for name, tensor in self.adapter.state_dict().items():
            sha.update(name.encode())
            sha.update(bytes_of(tensor))
        return sha.hexdigest()[:24]


def _sound(state: Any, sentence: str) -> bool:
    return state["sentence"] == sentence and len(state["images"]) == len(state["scores"])


def images_in(folder: str | Path, *, skip_corrupt: bool = False, skipped: list[str] | None = None) -> list[Picture]:
    """Return the images of a folder and of those in it, by name; links are not followed into other folders.

    skip_corrupt: leave out files that cannot be read; skipped: a list that is told which, and why. Raises AddendaError
    for a folder that is missing, cannot be read or holds no image, and for files that cannot be read or are empty, by
    name.
    """
    top = path_of(folder, "the folder")
    if not top.is_dir():
        near = nearest(top.name, [p.name for p in top.parent.iterdir()]) if top.parent.is_dir() else ""
        raise AddendaError(f"Expected a folder of images at {shown(top)}, and there is none.{near}")
    problems: list[str] = []
    files: list[Path] = []

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename}: {error.strerror}")

    for place, inside, names in os.walk(top, onerror=unreadable):
        inside[:] = sorted(n for n in inside if not n.startswith("."))
        own = (Path(place) / n for n in sorted(names) if not n.startswith("."))
        files += [p for p in own if p.suffix.lower() in SUFFIXES and _is_file(p)]
    pictures = []
    for path, key in zip(files, pool().map(_hashed, files), strict=True):
        name = str(path.relative_to(top))
        if isinstance(key, OSError):
            problems.append(f"{name}: {os.strerror(key.errno) if key.errno else key}")
        elif not path.stat().st_size:
            problems.append(f"{name}: the file is empty")
        else:
            pictures.append(Picture(key, 0, name, path))
    if skipped is not None:
        skipped.extend(problems)
    if problems and not skip_corrupt:
        rest = f"; … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AddendaError(
            f"{len(problems)} of the files and folders in {shown(top)} cannot be read: {'; '.join(problems[:5])}{rest}."
            " Mend or remove them, or leave them out with skip_corrupt (--skip-corrupt)."
        )
    if not pictures:
        raise AddendaError(f"{shown(top)} holds no image ({', '.join(SUFFIXES)}), nor does a folder in it.")
    return pictures


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that may be listed and not entered: told where it is hashed
        return True


def _hashed(path: Path) -> str | OSError:
    try:
        return sha256_of(path)
    except OSError as error:
        return error
