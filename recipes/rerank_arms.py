"""Arms of `recipes.rerank`, how they are trained in English, and what is kept of a run: numbers, never a text.

    full         every number of the model
    pfeiffer     bottlenecks, `pfeiffer:rank=24`
    lottery      K numbers of the encoder, those that moved the most, and trained again
    random       K numbers, drawn
    … + part     the same over English's part, frozen; judged with the target language's in its place

K is how many numbers the bottlenecks have, so that three arms train as many. A language's part is made once, on plain
texts of its packages that are not judged, and every arm and seed has the same: bottlenecks (rank 192) for `pfeiffer`
and `full`, K' numbers by lottery for `lottery` and `random`. A change of every number is no part that another could
take the place of, 470 MB a language; so *full + part* is full fine-tuning of the model over frozen bottlenecks: what
it says is whether the rest of the model may be trained then, not what a whole model of each language could do.

Embeddings are left out of the lottery, of 118 million numbers 96: their first phase would be most of the cost.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from addenda.core.adapter.attach import attach, detach
from addenda.core.disk.cache import cache_folder
from addenda.models.load import load_model
from addenda.ranking.bi_encoder import BiEncoder
from addenda.ranking.collection import Collection, Run
from addenda.ranking.first_stage import first_stage
from addenda.ranking.measures import by_query
from addenda.ranking.modular import modular
from addenda.ranking.reranker import Reranker
from addenda.ranking.train import train_reranker
from addenda.ranking.trec import strict
from addenda.train import checkpoint
from recipes.rerank_setting import (
    ENGLISH,
    FIRST,
    MEASURES,
    PART,
    Corpora,
    Setting,
    Times,
    hashed,
    part_of,
    sides,
    slug,
)


@dataclass
class Bench:
    """Trains parts and tasks, and judges them. tick: called after every step, and may raise to end a sitting."""

    setting: Setting
    corpora: Any = field(default_factory=Corpora)
    tick: Callable[[], None] = lambda: None
    kept: Path = field(default_factory=lambda: cache_folder() / "rerank")
    _held: dict = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self._once("model", lambda: self.corpora.folder(self.setting.model))

    @property
    def home(self) -> Path:
        """Where adapters of this setting are kept, by all that decides their numbers."""
        about = replace(self.setting, queries=1, depth=1, pool=1, seeds=(), languages=(), arms=())
        return self.kept / hashlib.sha256(repr((about, str(self.model))).encode()).hexdigest()[:16]

    def numbers(self, rank: int) -> int:
        """Return K: how many numbers bottlenecks of a width have in this model."""

        def count() -> int:
            model = load_model(self.model, task="label", labels=1).model
            made = attach(model, f"pfeiffer:rank={rank}", also_train=(), name="counted")
            found = sum(p.numel() for p in made.parameters())
            detach(model, "counted")
            return found

        return self._once(f"numbers {rank}", count)

    def learned(self, few: bool = False) -> tuple[Collection, list[Run]]:
        """Return the English collection that is learned from, with the runs that negatives are drawn out of.

        few: a small one with BM25's alone, to take times by.
        """

        def make():
            limit = min(200, self.setting.learned) if few else self.setting.learned
            found = self.corpora.collection(ENGLISH, ENGLISH, "train", limit)
            return found, [first_stage(found, by, k=100) for by in ("bm25", *([] if few else [self.encoder()]))]

        return self._once(f"learned {few}", make)

    def judged(self, language: str, query: str = ENGLISH) -> Collection:
        return self._once(
            f"judged {query} {language}",
            lambda: self.corpora.collection(query, language, "test", self.setting.pool),
        )

    def texts(self, language: str) -> list[str]:
        return self._once(f"texts {language}", lambda: self.corpora.texts(language))

    def encoder(self) -> BiEncoder:
        return self._once("encoder", lambda: BiEncoder.load(self.model))

    # ---- what is trained ---------------------------------------------------------------------------------------------

    def task(self, arm: str, seed: int, *, rank: int | None = None, steps: int | None = None, part: Any = None) -> dict:
        """Train an arm in English, and return what is kept of it. steps: so many, for their time, kept nowhere."""
        kind, rank = arm.removesuffix(PART), rank or self.setting.task_rank
        out = None if steps else self.file(arm, seed, rank).parent
        collection, runs = self.learned(few=bool(steps))
        seen = Times(self.tick, phases=2 if kind == "lottery" else 1)
        given: dict[str, Any] = {
            "steps": steps or self.setting.steps, "batch": self.setting.batch, "negatives": self.setting.negatives,
            "runs": runs, "seed": seed, "max_length": self.setting.max_length, "out": out, "progress": seen,
            "save_every": max(1, (steps or self.setting.steps) // 8),
            "language": part or (self.part_file(kind, ENGLISH) if arm.endswith(PART) else None),
        }  # fmt: skip
        if kind in ("full", "pfeiffer"):
            method = kind if kind == "full" else f"pfeiffer:rank={rank}"
        else:
            method, positions = "sparse", "largest" if kind == "lottery" else "random"
            given["lottery"] = {"k": self.numbers(rank), "positions": positions, "embeddings": False}
        made = train_reranker(self.model, collection, method, **given)
        adapter, path = made.adapter, made.path
        if path is not None:
            _drop(path.parent)
        if not seen.second:  # killed between the last step and the record: this sitting has seen no step
            seen.seconds = [[self.task(arm, seed, rank=rank, steps=10, part=given["language"])["second"] / seen.phases]]
        numbers = sum(p.numel() for p in adapter.parameters())
        return seen.kept(given["steps"]) | {"numbers": numbers, "bytes": 0 if path is None else path.stat().st_size}

    def part(self, kind: str, language: str, *, steps: int | None = None) -> dict:
        """Make a language's part of a kind, "bottlenecks" or "numbers", and return what is kept of it."""
        from recipes.rerank_parts import bottlenecks, numbers

        seen = Times(self.tick, phases=1 if kind == "bottlenecks" else 2)
        texts = self.texts(language)[: 400 if steps else None]
        out = None if steps else self.part_at(kind, language).parent
        make = bottlenecks if kind == "bottlenecks" else numbers
        losses = make(self, language, texts, steps or self.setting.part_steps, out, seen)
        count = steps or self.setting.part_steps
        if out is not None:
            _drop(out)
        if not seen.second:
            seen.seconds = [[self.part(kind, language, steps=10)["second"] / seen.phases]]
        size = 0 if out is None else self.part_at(kind, language).stat().st_size
        return seen.kept(count) | {"texts": len(texts), "bytes": size, **losses}

    def file(self, arm: str, seed: int, rank: int | None = None) -> Path:
        rank = rank or self.setting.task_rank
        return self.home / f"{slug(arm)}-{rank}-{seed}" / "adapter.safetensors"

    def part_file(self, kind: str, language: str) -> Path:
        """Return the file of the part that a task of a kind has beside it."""
        return self.part_at(part_of(kind), language)

    def part_at(self, kind: str, language: str) -> Path:
        return self.home / f"part-{kind}-{language}" / "adapter.safetensors"

    # ---- what is judged ----------------------------------------------------------------------------------------------

    def control(self, name: str, language: str, query: str = ENGLISH) -> dict:
        """Judge a first stage, and return its values, its recall where reranking ends, and what the pool is."""
        collection, asked = self.judged(language, query), self.asked(language, query)
        run = self._run(name, language, query)
        recall = f"R@{self.setting.depth}"
        values = by_query({q: collection.split("test")[q] for q in asked}, strict(run), [*MEASURES, recall])
        return {
            "queries": [hashed(q) for q in asked], "asked": len(collection.split("test")),
            "texts": len(self.texts(language)),
            "documents": len(collection.documents), "collection": collection.digest(),
            "recall": round(sum(values[recall].values()) / len(asked), 5), **_kept(values, asked),
        }  # fmt: skip

    def judge(
        self, arm: str, seed: int, language: str, *, rank: int | None = None, where: str = "document",
        query: str = ENGLISH,
    ) -> dict:  # fmt: skip
        """Put the first stage's best documents of each query in order, and return the values by query."""
        collection, asked = self.judged(language, query), self.asked(language, query)
        loaded = load_model(self.model, task="label", labels=1, seed=seed)
        parts = {}
        if arm.endswith(PART):
            of = {"query": query, "document": language}
            parts = {side: self.part_file(arm.removesuffix(PART), of[side]) for side in sides(where)}
        made = modular(loaded.model, self.file(arm, seed, rank), where=where, tokenizer=loaded.tokenizer, **parts)  # type: ignore[arg-type]
        reranker = Reranker(loaded.model, loaded.tokenizer, made.composition, max_length=self.setting.max_length)
        run = self._run(FIRST, language, query)
        started = time.perf_counter()
        after = reranker.rerank(collection, run, depth=self.setting.depth)
        seconds = time.perf_counter() - started
        values = by_query({q: collection.split("test")[q] for q in asked}, strict(after), list(MEASURES))
        return {
            "queries": [hashed(q) for q in asked],
            "asked": len(collection.split("test")),
            "ms": round(1000 * seconds / len(asked), 2),
            **_kept(values, asked),
        }

    def asked(self, language: str, query: str = ENGLISH) -> list[str]:
        """Return the queries that are judged: of the split's the first by hash, so that fewer are a part of more."""
        return sorted(self.judged(language, query).split("test"), key=hashed)[: self.setting.queries]

    def _run(self, name: str, language: str, query: str) -> Run:
        collection = self.judged(language, query)
        by: Any = "bm25" if name == "BM25" else self.encoder()
        asked = self.asked(language, query)
        return self._once(
            f"run {name} {language} {query} {len(asked)}",
            lambda: first_stage(collection, by, queries=asked, k=max(100, self.setting.depth)),
        )

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]


def _kept(values: dict[str, dict[str, float]], asked: Iterable[str]) -> dict[str, list[float]]:
    return {m: [round(values[m][q], 5) for q in asked] for m in MEASURES}


def _drop(folder: Path) -> None:
    """Let the checkpoints of a run go that has ended: an adapter is what is kept."""
    for path in (folder / "checkpoints", *folder.rglob("sparse-*"), *folder.rglob("full-*")):
        checkpoint.drop(path)
