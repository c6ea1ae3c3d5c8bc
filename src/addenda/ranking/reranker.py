"""A cross-encoder that orders documents for a query: it reads both together, and gives one score.

    reranker = ad.Reranker(model, tokenizer)
    reranker.rank("a lightweight database", {"sqlite3": "…", "postgresql": "…"}, top_k=10)   # [("sqlite3", 4.1), …]

The scores are the model's own output, without a sigmoid: they order the documents of one query, and nothing else is
promised of them. Pairs are read in batches of like length, so that little is padded, and come back in their order.
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from addenda.compose.composition import composed
from addenda.compose.stack import Composition
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.core.modules.borrow import training_mode
from addenda.data.limits import padded
from addenda.models.load import load_model
from addenda.models.machine import device_of
from addenda.ranking.collection import Collection, Document, Run
from addenda.ranking.folder import FILE, is_folder, read_folder
from addenda.ranking.pairs import Named, by_row, longest, passages
from addenda.train.loss import inputs_of

Text = str | Document
Ranked = list[tuple[Any, float]]  # (id or position, score), the best first


class Reranker:
    """A model with one output for a query and a document, and what it is read with.

    model: a sequence classifier with num_labels=1, with or without adapters; what acts on it acts. composition: of its
    adapters, which acts while documents are ranked (`ad.composed`). max_length: tokens of a pair, by default what model
    and tokenizer take; only the document is cut. stride: read long documents in passages that share so many tokens,
    the best of which counts; None: read their beginning. batch: pairs read at once.
    Raises AddendaError for a model with another number of outputs, and a number out of its range.
    """

    @checked()
    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        composition: Composition | None = None,
        *,
        max_length: int | None = None,
        stride: int | None = None,
        batch: int = 32,
    ):
        outputs = getattr(getattr(model, "config", None), "num_labels", 1)
        if outputs != 1:
            raise AddendaError(
                f"A reranker gives one score, and this {type(model).__name__} has {outputs} outputs. Load it with "
                "labels=1 (num_labels=1)."
            )
        self.model, self.tokenizer, self.composition = model, tokenizer, composition
        self.max_length, self.stride, self.batch = longest(model, tokenizer, max_length), stride, batch

    @classmethod
    @checked()
    def load(
        cls, path: str | Path, *, base: str | Path | None = None, device: str | None = None, dtype: str = "float32"
    ) -> "Reranker":
        """Open what `ranking.export` has written: base, adapters and composition, or a merged cross-encoder.

        base: the folder of the base, where only its hash is in there. Raises AddendaError, before a weight is read, for
        a folder that is damaged or was edited (`ranking.folder`).
        """
        if is_folder(path := path_of(path)):
            opened = read_folder(path, base=base, device=device, dtype=dtype)
            return cls(opened.model, opened.tokenizer, opened.composition, **opened.settings)
        if base is not None:
            raise AddendaError(f"base= is for a folder with {FILE}, which {path} has not: it holds a whole model.")
        loaded = load_model(path, task="label", labels=1, device=device, dtype=dtype)
        if loaded.fresh:
            raise AddendaError(
                f"{path} has no weights for {', '.join(loaded.fresh[:4])}: it is an encoder, and no reranker. Train "
                "one on it, ranking.train.train_reranker."
            )
        return cls(loaded.model, loaded.tokenizer)

    @checked()
    def rank(self, query: str, documents: Sequence[Text] | Mapping[str, Text], *, top_k: int | None = None) -> Ranked:
        """Return (id, score) of the documents, the best first; of a list (position, score).

        Equal scores keep the order given. top_k: only so many. Raises AddendaError for an empty text, a query that
        leaves no room for a document, and a score that is not finite, by name.
        """
        if isinstance(documents, str) or not isinstance(documents, Sized):
            got = "one text" if isinstance(documents, str) else f"a {type(documents).__name__}"
            raise AddendaError(f"rank wants a list of documents, or texts by id, not {got}. Give [document].")
        ids = list(documents) if isinstance(documents, Mapping) else range(len(documents))
        texts = documents.values() if isinstance(documents, Mapping) else documents
        pairs = [(query, _text(d)) for d in texts]
        scores = self._scores(pairs, lambda i: ("the query", f"document {ids[i]!r}"))
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [(ids[i], float(scores[i])) for i in order]

    @checked()
    def predict(self, pairs: Sequence[tuple[str, Text]]) -> np.ndarray:
        """Return the score of each (query, document), float32, in order. Raises AddendaError as `rank` does."""
        if isinstance(pairs, str) or not isinstance(pairs, Sized):
            raise AddendaError(f"predict wants a list of pairs, [(query, document)], not a {type(pairs).__name__}.")
        wrong = next((i for i, p in enumerate(pairs) if not _is_pair(p)), None)
        if wrong is not None:
            raise AddendaError(f"Pair {wrong} is not a (query, document): {str(pairs[wrong])[:80]!r}.")
        return self._scores([(q, _text(d)) for q, d in pairs], by_row)

    @checked()
    def rerank(self, collection: Collection, run: Run, *, depth: int = 50) -> Run:
        """Return a run with the best `depth` documents of each query in this reranker's order.

        Those below keep their order, behind. Where two scores of the run are equal the document that comes first in it
        stands first. Raises AddendaError as `rank` does, by id, and for ids that the collection has not.
        """
        _check_ids(collection, run)
        ranked = {q: sorted(scores, key=lambda d, of=scores: -of[d]) for q, scores in run.items()}
        asked = [(q, d) for q, documents in ranked.items() for d in documents[:depth]]
        pairs = [(collection.queries[q], collection.documents[d].whole) for q, d in asked]
        scores = self._scores(pairs, lambda i: (f"query {asked[i][0]!r}", f"document {asked[i][1]!r}"))
        made: dict[str, dict[str, float]] = {q: {} for q in run}
        for (q, d), score in zip(asked, scores.tolist(), strict=True):
            made[q][d] = score
        for q, documents in ranked.items():
            top = dict(sorted(made[q].items(), key=lambda item: -item[1]))
            made[q] = top | behind(min(top.values(), default=0.0), documents[depth:])
        return made

    @torch.no_grad()
    def _scores(self, pairs: Sequence[tuple[str, str]], named: Named) -> np.ndarray:
        """Return the score of each pair, (N) float32: of its passages the best."""
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        read = passages(self.tokenizer, pairs, self.max_length, stride=self.stride, named=named)
        tokens, device = padded(read.tokens, self.model, self.batch), device_of(self.model)
        order = sorted(range(len(tokens)), key=lambda i: -tokens.lengths[i])
        scores = np.empty(len(order), dtype=np.float32)
        acting = nullcontext() if self.composition is None else composed(self.model, self.composition)
        with acting, training_mode(self.model, False):
            for at in range(0, len(order), self.batch):
                rows = order[at : at + self.batch]
                batch = {k: t.to(device) for k, t in tokens.batch(rows).items()}
                logits = getattr(self.model(**inputs_of(self.model, batch)), "logits", None)
                if logits is None or tuple(logits.shape) != (len(rows), 1):
                    found = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
                    raise AddendaError(
                        f"A reranker gives one score for each pair, and the model gave {found} for {len(rows)} of them."
                    )
                scores[rows] = logits[:, 0].float().cpu().numpy()
        if not np.isfinite(scores).all():
            wild = [int(i) for i in np.flatnonzero(~np.isfinite(scores))]
            query, document = named(read.owner[wild[0]])
            raise AddendaError(
                f"The score of {query} and {document} is {scores[wild[0]]} ({len(wild)} of {len(scores)} are not "
                "finite). The model has diverged or was damaged, or its numbers overflow in half precision: load it "
                "with dtype='float32'."
            )
        if len(scores) == len(pairs):
            return scores
        best = np.full(len(pairs), -np.inf, dtype=np.float32)
        np.maximum.at(best, read.owner, scores)
        return best


def _is_pair(given: Any) -> bool:
    return isinstance(given, Sized) and not isinstance(given, str) and len(given) == 2


def _text(document: Text) -> str:
    return document.whole if isinstance(document, Document) else document


def behind(least: float, documents: Iterable[str]) -> dict[str, float]:
    """Return scores of documents that were not read, in their order, below the least score of those that were."""
    return {d: least - 1.0 - k for k, d in enumerate(documents)}


def _check_ids(collection: Collection, run: Run) -> None:
    """Raise AddendaError for queries and documents of a run that a collection has not."""
    queries = [q for q in run if q not in collection.queries]
    documents = [d for scores in run.values() for d in scores if d not in collection.documents]
    for what, unknown in (("query", queries), ("document", documents)):
        if unknown:
            raise AddendaError(
                f"The run names {what} {unknown[0]!r}, which the collection {collection.name!r} has not "
                f"({len(unknown)} such). It is a run of another collection: give the one that belongs to it."
            )
