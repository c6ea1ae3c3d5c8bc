"""BM25 against the formula written out, and words in the languages that it is used for."""

import math
import sys

import numpy as np
import pytest

from addenda.core.base.errors import AddendaError
from addenda.ranking.bm25 import Bm25, words

DOCUMENTS = ["a small database, a fast one", "Fast tools", "database database", "…", "a tool for a small task"]


def by_hand(query: str, documents: list[str], k1: float = 1.2, b: float = 0.75) -> list[float]:
    counted = [words(d) for d in documents]
    mean = sum(map(len, counted)) / len(counted)
    scores = [0.0] * len(documents)
    for word in words(query):
        n = sum(word in own for own in counted)
        idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
        for i, own in enumerate(counted):
            tf = own.count(word)
            scores[i] += idf * tf / (tf + k1 * (1 - b + b * len(own) / mean))
    return scores


@pytest.mark.parametrize("query", ["fast database", "a a tool", "unknown", "small unknown FAST", "!"])
def test_scores_are_those_of_the_formula(query):
    (found,) = Bm25(DOCUMENTS).scores([query])
    np.testing.assert_allclose(found, by_hand(query, DOCUMENTS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Große Übersicht: SQLite-Datenbank", ["grosse", "übersicht", "sqlite", "datenbank"]),
        ("l’éditeur d'images", ["l", "éditeur", "d", "images"]),
        ("È più veloce", ["è", "più", "veloce"]),
        ("Blåbærgrød på dansk", ["blåbærgrød", "på", "dansk"]),
        ("Työpöytäympäristö", ["työpöytäympäristö"]),
        ("軽量なデータベース", ["軽量", "量な", "なデ", "デー", "ータ", "タベ", "ベー", "ース"]),
        ("SQLite3用のツール、字", ["sqlite3", "用の", "のツ", "ツー", "ール", "字"]),
        ("ﾃﾞｰﾀ", ["デー", "ータ"]),
        ("e\u0301diteur snake_case 3.1", ["éditeur", "snake", "case", "3", "1"]),
        ("— …", []),
    ],
)
def test_words_of_six_languages(text, found):
    assert words(text) == found


def test_documents_without_a_word_are_refused():
    with pytest.raises(AddendaError, match="documents with words"):
        Bm25(["…", "—"])


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(AddendaError, match=r'pip install "addenda\[ranking\]"'):
        Bm25(["a"])
