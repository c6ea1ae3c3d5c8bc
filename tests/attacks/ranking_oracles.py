"""Who reads collections, runs, rerankers, indexes and orders of images, and what must be true of what is read.

As in `attacks.oracles`: what was read is compared with the numbers and texts in the files, by other means than the
reader's own.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from attacks import mutate, readers
from attacks.mutate import Mutant
from attacks.oracles import Target, UntrueError, made, same, same_tensor
from ranking.toy import toy


class OrderFiles(Target):
    """Adapters that order images; of every second one the digest is made right again."""

    name = "order"

    def write(self, folder: Path) -> list[Path]:
        self.words = ["settings", "scales", "towers", "widths", "score.0.weight", "prompts"]
        return [readers._order(made(folder / "a")).parent]

    def mutant(self, seed: int) -> Mutant:
        from addenda.ranking.order.file import _BEFORE

        m = super().mutant(seed)
        data = m.files[m.changed]
        at = 8 + len(_BEFORE)
        if seed % 2 or not data[8:].startswith(_BEFORE) or len(data) < at + 64:
            return m
        blank = data[:at] + b"0" * 64 + data[at + 64 :]
        sealed = data[:at] + hashlib.sha256(blank).hexdigest().encode() + data[at + 64 :]
        return Mutant(m.kind, m.files | {m.changed: sealed}, m.source, True, m.changed)

    def read(self, place: Path, mutant: Mutant) -> Any:
        from addenda.ranking.order.file import load_order

        return load_order(place / "order.safetensors")

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        if not mutant.sealed and mutant.files != self.sources[mutant.source]:
            raise UntrueError("a file that was changed was read")
        adapter, about = made
        data = (place / "order.safetensors").read_bytes()
        said = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["order"])
        same("settings", said["settings"], vars(about.settings))
        same("scales", said["scales"], {q: [s.centre, s.spread] for q, s in about.scales.items()})
        held = load_file(place / "order.safetensors")
        same("names", held.keys(), adapter.state_dict().keys())
        for name, tensor in adapter.state_dict().items():
            same_tensor(name, held[name], tensor)


class Collections(Target):
    """BEIR folders."""

    name = "collection"

    def write(self, folder: Path) -> list[Path]:
        self.words = ["_id", "text", "title", "d1", "q1", "near", "sections"]
        return [readers._beir(made(folder / "a"))]

    def read(self, place: Path, mutant: Mutant) -> Any:
        from addenda.ranking import beir

        return beir.read(place)

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        documents, queries = ([json.loads(line) for line in _lines(place / name)] for name in _PARTS)
        same("documents", {r["_id"]: (r.get("title", ""), r.get("text", "")) for r in documents},
             {i: (d.title, d.text) for i, d in made.documents.items()})  # fmt: skip
        same("queries", {r["_id"]: r["text"] for r in queries}, dict(made.queries))
        for split, qrels in made.qrels.items():
            rows = [[c.strip() for c in line.split("\t")] for line in _lines(place / "qrels" / f"{split}.tsv")][1:]
            same(split, {(q, d): float(g) for q, d, g in rows},
                 {(q, d): g for q, graded in qrels.items() for d, g in graded.items()})  # fmt: skip


class Runs(Target):
    """Runs and judgements of TREC's formats."""

    name = "run"

    def write(self, folder: Path) -> list[Path]:
        made(folder / "a")
        self.collection = toy(documents=8)
        rows = [f"q{i} Q0 d{j} {j} {3.5 - j - i / 7:.6g} x\n" for i in range(4) for j in range(3)]
        (folder / "a" / "x.run").write_text("".join(rows))
        (folder / "a" / "x.qrels").write_text("".join(f"q{i} 0 d{i} {1 + i % 2}\n" for i in range(6)))
        return [folder / "a"]

    def read(self, place: Path, mutant: Mutant) -> Any:
        from addenda.ranking import trec

        return trec.read_run(place / "x.run", self.collection), trec.read_qrels(place / "x.qrels", self.collection)

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        for name, at, found in (("x.run", 4, made[0]), ("x.qrels", 3, made[1])):
            rows = [line.split() for line in _lines(place / name)]
            said = {(row[0], row[2]): float(row[at]) for row in rows}
            same(name, said, {(q, d): v for q, held in found.items() for d, v in held.items()})
        if any(list(of.values()) != sorted(of.values(), reverse=True) for of in made[0].values()):
            raise UntrueError("a run is not read from the best answer on")


class Indexes(Target):
    """Search indexes."""

    name = "index"

    def write(self, folder: Path) -> list[Path]:
        self.words = ["documents", "first", "bm25", "format", "sha256", "vectors"]
        return [readers._index(made(folder / "a")).parent]

    def read(self, place: Path, mutant: Mutant) -> Any:
        from addenda.ranking.search import SearchIndex

        return SearchIndex.load(place / "index.safetensors")

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        try:
            held = load_file(place / "index.safetensors")
        except SafetensorError:  # "-0" is a whole number to Python's JSON, and none to Rust's
            if b"-0" not in (place / "index.safetensors").read_bytes():
                raise
            return
        texts = [bytes(t.tolist()) for t in held.values() if t.dim() == 1]
        if [[i, d.title, d.text] for i, d in made.documents.items()] not in [json.loads(t) for t in texts]:
            raise UntrueError("the documents are not those of the file")


class RerankerFolders(Target):
    """Rerankers as base, adapters and their composition: what describes them, and the tokenizer."""

    name = "reranker"

    def write(self, folder: Path) -> list[Path]:
        self.words = ["stack", "de", "task", "composition", "sha256", "settings", "batch"]
        return [readers._reranker(made(folder / "a"))]

    def mutant(self, seed: int) -> Mutant:
        some = {k: v for k, v in self.sources[0].items() if k in ("reranker.json", "tokenizer/tokenizer.json")}
        m = mutate.mutant(seed, [some], self.words)
        return Mutant(m.kind, self.sources[0] | m.files, 0, False, m.changed)

    def read(self, place: Path, mutant: Mutant) -> Any:
        from addenda.ranking.folder import read_folder

        return read_folder(place, device="cpu")

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        from addenda.compose.written import to_json

        said = json.loads((place / "reranker.json").read_bytes())
        same("settings", said["settings"], made.settings)
        plain = {k: v for k, v in said["composition"].items() if (k, v) != ("skip", "last")}
        same("composition", plain, to_json(made.composition))


_PARTS = ("corpus.jsonl", "queries.jsonl")


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_bytes().decode("utf-8-sig").split("\n") if line.strip()]


RANKING: dict[str, Callable[[Path], Target]] = {
    t.name: t for t in (OrderFiles, Collections, Runs, Indexes, RerankerFolders)
}
