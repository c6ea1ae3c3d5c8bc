"""Documents that say nearly the same, which are therefore no negatives of each other's queries.

Two documents are near where the sets of their word triples have a Jaccard similarity |A ∩ B| / |A ∪ B| of `SIMILAR` or
more; in scripts without spaces a character is a word. Common triples are counted for all pairs by sparse products, so
all that are near are found, none by chance; the cost is the sum of the squares of how many documents share a triple.
"""

import re
from collections.abc import Mapping

import numpy as np
from scipy import sparse

SIMILAR = 0.5
_ROWS = 1024  # documents compared with all others at once
_SCRIPTS = r"\u0e00-\u0e7f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai, Khmer, Japanese, Chinese
_WORD = re.compile(rf"[{_SCRIPTS}]|[^\W{_SCRIPTS}]+")


def near(texts: Mapping[str, str], similar: float = SIMILAR) -> dict[str, frozenset[str]]:
    """Return, by document, the others that are near it; those with none are left out. texts: by id."""
    names, numbers = list(texts), dict[tuple[str, ...], int]()
    rows = [[numbers.setdefault(s, len(numbers)) for s in shingles(texts[name])] for name in names]
    sizes = np.array([len(row) for row in rows], dtype=np.float64)
    columns = np.array([number for row in rows for number in row], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    ones = np.ones(len(columns), dtype=np.float32)
    table = sparse.csr_matrix((ones, columns, starts), shape=(len(names), max(len(numbers), 1)))
    shared = np.flatnonzero(np.bincount(columns, minlength=max(len(numbers), 1)) > 1)  # others are in no intersection
    table = sparse.csr_matrix(table[:, shared])
    turned, found = sparse.csr_matrix(table.T), dict[str, frozenset[str]]()
    for start in range(0, len(names), _ROWS):
        common = sparse.coo_matrix(table[start : start + _ROWS] @ turned)
        left, right = common.row + start, common.col
        alike = (left != right) & (common.data >= similar * (sizes[left] + sizes[right] - common.data))
        for i in np.unique(left[alike]):
            found[names[i]] = frozenset(names[j] for j in right[alike & (left == i)])
    return found


def shingles(text: str, length: int = 3) -> set[tuple[str, ...]]:
    """Return the runs of three words of a text, in lower case; of a shorter one all of its words."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + length]) for i in range(max(len(words) - length + 1, min(len(words), 1)))}
