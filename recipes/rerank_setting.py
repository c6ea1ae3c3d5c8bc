"""What decides the numbers of `recipes.rerank`: its arms, their settings, where texts come from, how time is taken."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from addenda import AddendaError
from addenda.models.encoders import ENCODERS
from addenda.ranking import debian
from addenda.ranking.collection import Collection
from addenda.train.fit import Event

ENGLISH, PART = "en", " + part"
TASKS = ("full", "pfeiffer", "lottery", "random")
ARMS = tuple(f"{task}{part}" for task in TASKS for part in ("", PART))
FIRST, CONTROLS = "e5", ("BM25", "e5")
MEASURES = ("AP", "nDCG@10", "RR@10")
FACTORS = (1, 2, 4, 8, 16, 32)  # of --all: the hidden size by a bottleneck's width
PLACES = ("query", "both", "split")  # of --all: where a language's part stands instead of the document's


@dataclass(frozen=True)
class Setting:
    """What decides a record's numbers. pairs of a step: batch · (1 + negatives); pool: documents of a language."""

    model: str = "e5"
    steps: int = 1000
    part_steps: int = 1000
    batch: int = 2
    negatives: int = 7
    queries: int = 100
    depth: int = 50
    pool: int = 600
    learned: int = 4000  # English documents that are learned from
    seeds: tuple[int, ...] = (0, 1, 2)
    languages: tuple[str, ...] = debian.LANGUAGES
    arms: tuple[str, ...] = ARMS
    task_rank: int = 24
    part_rank: int = 192
    max_length: int = 128  # tokens of a pair, and of a text that a part learns from

    def __post_init__(self):
        for name in ("steps", "part_steps", "queries", "depth"):
            if getattr(self, name) < 1:
                raise AddendaError(f"{name} is {getattr(self, name)}, and at least 1 is wanted.")


class Corpora:
    """Debian's descriptions and the encoder. A test gives others, with the same three methods."""

    def folder(self, model: str) -> Path:
        return ENCODERS[model].model_folder() if model in ENCODERS else Path(model)

    def collection(self, query: str, documents: str, split: str, limit: int) -> Collection:
        return debian.collection(documents, query_language=query, splits=(split,), limit=limit)

    def texts(self, language: str) -> list[str]:
        return debian.texts(language)


class Times:
    """Seconds of steps as `fit` tells of them. phases: how often all steps are made, of a lottery twice."""

    def __init__(self, tick: Callable[[], None] = lambda: None, phases: int = 1):
        self.phases, self._tick, self._last, self._step = phases, tick, 0.0, 0
        self.seconds: list[list[float]] = [[]]

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if event.step <= self._step:
            self.seconds.append([])
        elif self._step:
            self.seconds[-1].append(now - self._last)
        self._last, self._step = now, event.step
        self._tick()

    @property
    def second(self) -> float:
        """The median of a step, of all phases together; a phase that an earlier sitting made takes as long as these."""
        found = [median(of) for of in self.seconds if of]
        return sum(found) * self.phases / len(found) if found else 0.0

    def kept(self, steps: int) -> dict:
        """Return seconds of so many steps, as a record has them."""
        return {"seconds": round(self.second * steps, 2), "steps": steps, "second": round(self.second, 5)}


def part_of(kind: str) -> str:
    """Return the kind of the parts that a task of a kind is trained over."""
    return "bottlenecks" if kind.removesuffix(PART) in ("full", "pfeiffer") else "numbers"


def hashed(query: str) -> str:
    """Return what stands for a query in a record."""
    return hashlib.sha256(f"rerank\x1f{query}".encode()).hexdigest()[:12]


def sides(where: str) -> tuple[str, ...]:
    """Return which texts of a pair a language's part acts on."""
    return ("query", "document") if where in ("both", "split") else (where,)


def slug(arm: str) -> str:
    """Return an arm as a part of a file's name."""
    return arm.replace(PART, "-part")
