"""A bi-encoder: one vector for a text, so that documents are read once, and a query's scores are cosines.

    v = mean of the last hidden states over the text's tokens, divided by its length;   score(q, d) = v_q · v_d

As multilingual-e5 wants it (Wang et al. 2024, arXiv:2402.05672), with "query: " before what is asked and "passage: "
before what is searched. Texts are read in batches of like length.

Embeddings of many texts are kept in the cache folder, by the SHA-256 of their tokens and of the model's weights, and
read again by whoever asks for the same: at most a GiB of them, those unused the longest go first. What is damaged there
is made anew, and where nothing can be written nothing is kept. Those of a model on which adapters act never are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.disk.cache import cache_folder, trim
from addenda.core.file.identity import base_of, digest, versions
from addenda.core.file.states import keep, kept
from addenda.core.modules.borrow import training_mode
from addenda.core.state.state import find_state
from addenda.data.encode import Tokens
from addenda.data.limits import padded
from addenda.models.encoders import ENCODERS, encoder_folder
from addenda.models.machine import device_of, pick_device
from addenda.models.pretrained import encoder_in, tokenizer_in
from addenda.ranking.pairs import longest

ROOM = 1 << 30  # bytes of embeddings that are kept
FEW = 64  # texts that are not worth a file
QUERY, PASSAGE = "query: ", "passage: "


class BiEncoder:
    """An encoder of texts, and how its vectors are made.

    model: returns a `last_hidden_state`, as transformers' encoders do; of a classifier give its `base_model`. query,
    passage: what stands before both kinds of texts. max_length: tokens of a text, by default what model and tokenizer
    take; longer ones are cut. cache: whether embeddings are kept on disk.
    """

    @checked()
    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        query: str = QUERY,
        passage: str = PASSAGE,
        max_length: int | None = None,
        batch: int = 64,
        cache: bool = True,
    ):
        self.model, self.tokenizer, self.query, self.passage = model, tokenizer, query, passage
        self.max_length, self.batch, self.cache = longest(model, tokenizer, max_length), batch, cache
        self.vectors: np.ndarray | None = None  # of the documents of the index

    @classmethod
    def load(cls, source: str | Path = "e5", *, device: str | None = None, **options: Any) -> Self:
        """Load the encoder of a folder, or an embedded one where no folder is called so, in float32.

        options: as of the class. Raises AddendaError where the folder has no encoder, or lacks weights of it.
        """
        folder = encoder_folder(source)
        if not (folder / "config.json").is_file():
            raise AddendaError(
                f"Expected the folder of an encoder at {folder}, and there is no config.json. Give such a folder, or "
                f"one of {', '.join(ENCODERS)}."
            )
        model = encoder_in(folder)
        return cls(model.to(pick_device(device)).eval(), tokenizer_in(folder), **options)

    def index(self, documents: Sequence[str]) -> Self:
        """Read the documents, for `scores`. Returns itself."""
        self.vectors = self.embed(documents, self.passage)
        return self

    def scores(self, queries: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield for each query its cosine with every document of the index, float32."""
        if self.vectors is None:
            raise AddendaError("There is no document in the index yet. Call index(documents) first.")
        for vector in self.embed(queries, self.query):
            yield self.vectors @ vector

    def embed(self, texts: Sequence[str], prefix: str = "") -> np.ndarray:
        """Return the vectors of texts, (N × d) float32 of length 1. Raises AddendaError for an empty text, by position,
        and for a vector that is not finite."""
        empty = [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
        if empty:
            raise AddendaError(f"Texts to embed are empty, or are no texts: {empty[:8]}. Leave them out.")
        tokens = self._tokens(texts, prefix)
        file = self._file(tokens) if len(texts) >= FEW else None
        known = None if file is None else kept(file, lambda state: _sound(state, len(texts)))
        if known is not None:
            return known["vectors"].numpy()
        vectors = self._read(tokens)
        wild = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(wild):
            raise AddendaError(
                f"The vector of text {int(wild[0])} is not finite ({len(wild)} of {len(texts)}): the model has "
                "diverged or was damaged. Load it again."
            )
        if file is not None and vectors.nbytes <= ROOM:
            keep(file, {"vectors": torch.from_numpy(vectors)}, "embeddings")
            trim(file.parent, ROOM)
        return vectors

    def digest(self, documents: Sequence[str]) -> str:
        """Return what decides the vectors of an index: the weights, and how the first documents are read as tokens."""
        return digest([base_of(self.model), self._tokens(documents[:FEW], self.passage).ids])

    def _tokens(self, texts: Sequence[str], prefix: str) -> Tokens:
        cut: dict[str, Any] = {"truncation": True, "max_length": self.max_length} if self.max_length else {}
        made = self.tokenizer([f"{prefix}{text}" for text in texts], **cut)
        pad = next((t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if t is not None), 0)
        ids, types = made["input_ids"], made.get("token_type_ids")
        return padded(Tokens(ids, [0.0] * len(ids), "value", pad, types), self.model, self.batch)

    @torch.no_grad()
    def _read(self, tokens: Tokens) -> np.ndarray:
        order = sorted(range(len(tokens)), key=lambda i: -tokens.lengths[i])
        found: list[Tensor] = []
        with training_mode(self.model, False):
            for at in range(0, len(order), self.batch):
                batch = tokens.batch(order[at : at + self.batch])
                given = {k: t.to(device_of(self.model)) for k, t in batch.items() if k != "labels"}
                states = getattr(self.model(**given), "last_hidden_state", None)
                if states is None:
                    raise AddendaError(
                        f"A bi-encoder averages hidden states, and a {type(self.model).__name__} returns none. Give "
                        "the encoder itself, such as model.base_model."
                    )
                mask = given["attention_mask"][..., None].float()
                mean = (states.float() * mask).sum(1) / mask.sum(1)
                found.append(F.normalize(mean, dim=-1).cpu())
        vectors = torch.cat(found)
        return vectors[torch.tensor(order).argsort()].numpy()

    def _file(self, tokens: Tokens) -> Path | None:
        """Return where the embeddings of these texts are kept, or None."""
        host = find_state(self.model)
        if not self.cache or (host is not None and host.state.records):
            return None
        by = [base_of(self.model), str(device_of(self.model).type), versions()]
        of = [tokens.ids, tokens.types]
        return cache_folder() / "embeddings" / f"{digest(by)[:24]}-{digest(of)[:24]}.safetensors"


def _sound(state: Any, rows: int) -> bool:
    """Return whether a state of the cache holds so many vectors of length 1."""
    vectors = state["vectors"]
    fine = vectors.dtype == torch.float32 and vectors.dim() == 2 and len(vectors) == rows
    return fine and bool(((vectors.norm(dim=1) - 1).abs() < 1e-3).all())
