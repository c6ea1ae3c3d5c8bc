"""Arms of `recipes.order`, how they are trained, and what is kept of a run: correlations and times, never a pixel.

    dual            both heads of the adapter: regression 0.2, pairs 1, as the library trains by default
    regression      the regression head alone
    pairwise        the pair head alone; it ranks by its mean score against 32 images that it was trained on
    ranknet         the regression head, trained on differences of its scores
    blind           both heads, told one and the same sentence for every query
    shuffled        both heads; the values of each image are dealt to the queries anew, so texts say nothing
    pixels          a ridge for each query on raw pixels
    patches         a ridge for each query on mean-pooled patches
    image × text    one ridge on their products; it has an answer for queries that were never trained
    whole, lora     the image encoder trained with a regression head, a number for each trained query
    alignment       a linear map between both encoders, trained on tiles with a class name: not zero-shot, and no CLIP

Seeds have images of their own, the same for all arms; smaller sizes take the first of them. The adapter's shape, rate
and steps were chosen once, for both heads, on validation images (by the classes, at 500 images), and a lower rate for
the regression head alone, which hears no text at the other; the fine-tuned encoder's were set and not tried. Ridges
choose their penalties on 100 validation images for every seed and size.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.core.base.random import Stream
from addenda.data.pixels import looked_at
from addenda.ranking.order.adapter import OrderAdapter
from addenda.ranking.order.features import Features, all_of
from addenda.ranking.order.losses import OrderLoss
from addenda.ranking.order.ratings import Ratings
from addenda.ranking.order.settings import OrderSettings
from addenda.ranking.order.towers import Towers, load_towers
from addenda.ranking.order.train import train_order
from recipes import order_data
from recipes.order_alignment import aligned
from recipes.order_data import Part
from recipes.order_measured import kept
from recipes.order_ridge import product, ridge
from recipes.order_setting import ADAPTERS, BLIND, LEARNED, NAMES, NOTHING, QUERIES, RIDGES, TUNED, Setting
from recipes.order_tuned import tuned

LOSSES = {
    "regression": OrderLoss(regression=1.0, pairs=0.0),
    "pairwise": OrderLoss(regression=0.0, pairs=1.0),
    "ranknet": OrderLoss(regression=0.0, pairs=0.0, ranknet=1.0),
}
SCORED, AGAINST = 64, 32  # images scored at once; trained images that the pair head alone ranks against


class Sources:
    """Where tiles, cloth and encoders come from. A test gives others, with the same methods."""

    def tiles(self) -> order_data.Tiles:
        return order_data.tiles()

    def wheel(self) -> Path:
        return order_data.wheel()

    def towers(self, setting: Setting) -> Towers:
        return load_towers(image=setting.image, text=setting.text, image_size=setting.side, grid=setting.grid)


class Deaf(Towers):
    """Encoders that hear one sentence, whatever is asked."""

    def tokens(self, sentence: str) -> tuple[Tensor, Tensor]:
        return super().tokens(BLIND)


@dataclass
class Bench:
    """Makes images and features, trains arms and judges them. tick: called after every step; may raise to end."""

    setting: Setting
    sources: Any = field(default_factory=Sources)
    tick: Callable[[], None] = lambda: None
    _held: dict = field(default_factory=dict)

    @property
    def towers(self) -> Towers:
        return self._once("towers", lambda: self.sources.towers(self.setting))

    @property
    def deaf(self) -> Towers:
        return self._once("deaf", lambda: Deaf(**vars(self.towers)))

    # ---- images ------------------------------------------------------------------------------------------------------

    def part(self, subject: str, which: str, seed: int = 0) -> Part:
        """Return images. which: "test", "validation", "train" (of a seed), or "names": tiles with a class name."""
        s = self.setting
        share = 1 if subject == "mosaics" else 2
        counts = {"test": s.test // share, "validation": s.validation, "train": s.most(subject), "names": s.names}

        def make() -> Part:
            if which == "names":
                return order_data.single(self._tiles, counts[which], 0)
            if subject == "textile":
                return order_data.textile(which, counts[which], seed, self.sources.wheel())
            of = order_data.mosaics if subject == "mosaics" else order_data.grades
            return of(self._tiles, which, counts[which], seed)

        return self._once(("part", subject, which, seed), make)

    @property
    def _tiles(self) -> order_data.Tiles:
        return self._once("tiles", self.sources.tiles)

    def patches(self, subject: str, which: str, seed: int = 0) -> Tensor:
        """Return the states of all images of a part, N × P × D, from the cache where they are."""

        def make() -> Tensor:
            found, _ = all_of(Features(self.towers), self.part(subject, which, seed).pictures)
            return torch.stack([p for p in found if p is not None])

        return self._once(("patches", subject, which, seed), make)

    def features(self, subject: str, which: str, seed: int) -> dict:
        """Make what is missing of a part's features, and return how many images, by hash, and how long."""
        part, features = self.part(subject, which, seed), Features(self.towers)
        started = time.perf_counter()
        for _ in features.of(part.pictures):
            self.tick()
        return {"images": len(part), "digest": part.digest, "made": features.made,
                "seconds": round(time.perf_counter() - started, 2)}  # fmt: skip

    # ---- arms --------------------------------------------------------------------------------------------------------

    def run(self, subject: str, arm: str, images: int, seed: int) -> dict:
        """Train an arm on the first so many images of a seed, and return what is kept of it."""
        test, learned = self.part(subject, "test"), self.part(subject, "train", seed)
        groups = {group: list(of) for group, of in QUERIES[subject].items()}
        asked = groups[LEARNED[subject]]
        trained = [q for q in asked if np.ptp(learned.values[q][:images])]  # the others' values are all alike
        y = np.stack([learned.values[q][:images] for q in trained], 1)
        started = time.perf_counter()
        if arm in ADAPTERS:
            score = self._adapter(subject, arm, images, seed, trained, y)
        elif arm in RIDGES:
            score = self._ridge(subject, arm, images, seed, trained, y)
        elif arm in TUNED:
            score = self._tuned(subject, arm, images, seed, trained, y)
        else:
            score = self._alignment(subject, images, seed)
        seconds = time.perf_counter() - started
        everything = [q for of in groups.values() for q in of]
        scores: Mapping[str, np.ndarray] = score([*everything] if arm not in ("pixels", "patches", *TUNED) else asked)
        other = LEARNED[subject] if arm == "dual" else ""
        found = kept(scores, test.values, groups, self.setting.draws, other)
        return {"images": images, "trained": len(trained), "seconds": round(seconds, 2), "test": test.digest,
                "data": learned.digest, **found}  # fmt: skip

    def _adapter(self, subject: str, arm: str, images: int, seed: int, trained: list[str], y: np.ndarray):
        s, towers = self.setting, self.deaf if arm == "blind" else self.towers
        if arm == "shuffled":
            order = np.stack([order_data.shuffled(len(trained), Stream(seed, "dealt", str(i))) for i in range(images)])
            y = np.take_along_axis(y, order, 1)
        keep = [k for k in range(len(trained)) if np.ptp(y[:, k])]
        values = {trained[k]: dict(enumerate(y[:, k].tolist())) for k in keep}
        patches = self.patches(subject, "train", seed)[:images]
        rate = s.regression_rate if arm == "regression" else s.rate
        ratings = Ratings(self.part(subject, "train", seed).pictures[:images], values)
        made = train_order(
            towers, ratings, list(patches), settings=self.settings, loss=LOSSES.get(arm), rate=rate, batch=s.batch,
            steps=s.of(s.steps, images), seed=seed, progress=lambda *_: self.tick(),
        )  # fmt: skip
        against = patches[:AGAINST] if arm == "pairwise" else None
        test = self.patches(subject, "test")
        return lambda texts: {q: self.scored(made.adapter, towers, test, q, against) for q in texts}

    @property
    def settings(self) -> OrderSettings:
        s = self.setting
        return OrderSettings(width=s.width, heads=s.heads, layers=s.layers, after=s.after, prompts=s.prompts)

    @torch.no_grad()
    def scored(self, adapter: OrderAdapter, towers: Towers, patches: Tensor, text: str, against: Tensor | None):
        """Return the scores of images by a sentence. against: by the pair head alone, over these images."""
        self.tick()
        tokens = towers.tokens(text)
        if against is None:
            return torch.cat([adapter(part, *tokens).values for part in patches.split(SCORED)]).double().numpy()
        known, found = adapter.states(against, *tokens), []
        for part in patches.split(AGAINST):
            pairs = adapter.pair_head(torch.cat([adapter.states(part, *tokens), known]))
            found.append(pairs[: len(part), len(part) :].mean(1))
        return torch.cat(found).double().numpy()

    def _ridge(self, subject: str, arm: str, images: int, seed: int, trained: list[str], y: np.ndarray):
        parts = {"train": seed, "validation": 0, "test": 0}
        if arm == "pixels":
            x, held, test = (self._grey(subject, which, at) for which, at in parts.items())
        else:
            x, held, test = (self.patches(subject, w, at).double().mean(1).numpy() for w, at in parts.items())
        validation = self.part(subject, "validation")
        centre, spread = y.mean(0), y.std(0)
        held_y = (np.stack([validation.values[q] for q in trained], 1) - centre) / spread
        x, y = x[:images], (y - centre) / spread
        if arm in ("pixels", "patches"):
            made = ridge(x, y, held, held_y)(test)
            none = np.zeros(len(test))
            return lambda texts: {q: made[:, trained.index(q)] if q in trained else none for q in texts}
        fitted = product(x, np.stack([self.meaning(q) for q in trained]), y, held, held_y)
        return lambda texts: {q: fitted(test, self.meaning(q)[None])[:, 0] for q in texts}

    def _grey(self, subject: str, which: str, seed: int) -> np.ndarray:
        return self._once(("grey", subject, which, seed), lambda: order_data.grey(self.part(subject, which, seed)))

    def meaning(self, text: str) -> np.ndarray:
        """Return the mean token state of a sentence, as a unit vector."""

        def make() -> np.ndarray:
            tokens, mask = self.towers.tokens(text)
            return F.normalize(tokens[mask].mean(0), dim=0).double().numpy()

        return self._once(("meaning", text), make)

    def _tuned(self, subject: str, arm: str, images: int, seed: int, trained: list[str], y: np.ndarray):
        s = self.setting
        y = (y - y.mean(0)) / y.std(0)
        of = tuned(
            self.towers, self.pixels(subject, "train", seed)[:images], y, lora=s.lora if arm == "lora" else "",
            steps=s.of(s.tuned_steps, images), batch=s.tuned_batch, rate=s.lora_rate if arm == "lora" else s.whole_rate,
            head_rate=s.head_rate, seed=seed, tick=self.tick,
        )  # fmt: skip

        def score(texts: list[str]) -> Mapping[str, np.ndarray]:
            pixels = self.pixels(subject, "test", 0)
            made, none = of(pixels), np.zeros(len(pixels))
            return {q: made[:, trained.index(q)] if q in trained else none for q in texts}

        return score

    def pixels(self, subject: str, which: str, seed: int) -> np.ndarray:
        """Return the images as the encoder is given them, N × H × W × C uint8."""
        found = list(looked_at(self.part(subject, which, seed).pictures, self.towers.preparation))
        return np.stack([p for p in found if not isinstance(p, str)])

    def _alignment(self, subject: str, images: int, seed: int):
        part, patches = self.part("mosaics", "names"), self.patches("mosaics", "names")
        at = Stream(seed, "names").choice(len(part), images)
        names = torch.from_numpy(np.stack([self.meaning(n) for n in (*NAMES, NOTHING)])).float()
        made = aligned(list(patches[at]), part.classes[at.numpy()], names, seed, self.tick)
        test = self.patches(subject, "test")
        return lambda texts: {q: made.scores(test, torch.from_numpy(self.meaning(q)).float()) for q in texts}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._held:
            if key[:1] == ("patches",) or key[:1] == ("grey",):  # of one training set at a time
                old = [k for k in self._held if k[:3] == key[:3] and k[:1] == key[:1] and k[2] == "train"]
                for k in old:
                    del self._held[k]
            self._held[key] = make()
        return self._held[key]
