"""BM25: documents by the words that they share with a query, in any language (by `bm25s`, the extra "ranking").

    score(q, d) = Σ_w ln(1 + (N − n_w + ½) / (n_w + ½)) · tf / (tf + k1 (1 − b + b |d| / mean |d|))      w a word of q

Lucene's form, k1 = 1.2 and b = 0.75; a word that a query has twice counts twice. Words are runs of letters and digits,
compared without regard to case and to how Unicode writes them; there are no stems and no stop words, which every
language would want its own of. Han characters and kana are not written in words: they count as pairs of neighbours.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from addenda.core.base.errors import AddendaError

K1, B = 1.2, 0.75
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
_EAST = f"々〆〇{_KANA}\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"  # and Han characters
_RUN = re.compile(rf"[{_EAST}]+|[^\W_{_EAST}]+")
_FIRST = re.compile(rf"[{_EAST}]")


def words(text: str) -> list[str]:
    """Return what BM25 counts in a text, in order: words in lower case, and pairs of Han characters and kana."""
    found = []
    for run in _RUN.findall(unicodedata.normalize("NFKC", text).casefold()):
        if len(run) > 1 and _FIRST.match(run):
            found += [a + b for a, b in pairwise(run)]
        else:
            found.append(run)
    return found


class Bm25:
    """Documents, indexed by their words.

    Raises AddendaError where `bm25s` is not installed, or there is no word in any document.
    """

    def __init__(self, documents: Sequence[str]):
        library = _library()
        counted = [words(d) for d in documents]
        if not any(counted):
            raise AddendaError("BM25 wants documents with words, and there is none in any of these.")
        self._count = len(counted)
        self._index = library.BM25(k1=K1, b=B, method="lucene")
        self._index.index(counted, show_progress=False)

    def scores(self, queries: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield for each query the scores of all documents, float32; 0 where they share no word."""
        for query in queries:
            known = [w for w in words(query) if w in self._index.vocab_dict]
            if known:
                yield self._index.get_scores(known)
            else:
                yield np.zeros(self._count, dtype=np.float32)


def _library() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise AddendaError(
            f'BM25 is computed by bm25s: {error}. Run `pip install "addenda[ranking]"`, or take a bi-encoder as the '
            "first stage."
        ) from None
    return bm25s
