"""Near duplicates against all pairs of sets compared one by one."""

import numpy as np
import pytest

from addenda.ranking import near as near_file
from addenda.ranking.near import near, shingles


def test_shingles_are_runs_of_three_words():
    assert shingles("One two, THREE four") == {("one", "two", "three"), ("two", "three", "four")}
    assert shingles("one two") == {("one", "two")} and shingles(" , ") == set()
    assert shingles("日本語 text です") == {
        ("日", "本", "語"),
        ("本", "語", "text"),
        ("語", "text", "で"),
        ("text", "で", "す"),
    }


@pytest.mark.parametrize("similar", [0.3, 0.5, 1.0])
def test_all_near_pairs_are_found(monkeypatch, similar):
    monkeypatch.setattr(near_file, "_ROWS", 7)
    rng = np.random.default_rng(0)
    texts = {}
    for i in range(60):
        words = rng.choice(list("abcdefgh"), int(rng.integers(0, 12))).tolist()
        texts[f"d{i}"] = " ".join(words)
        texts[f"e{i}"] = " ".join([*words[: int(rng.integers(0, 12))], "z"])
    found = near(texts, similar)
    sets = {name: shingles(text) for name, text in texts.items()}
    for a, one in sets.items():
        others = {
            b for b, other in sets.items() if b != a and one & other and len(one & other) >= similar * len(one | other)
        }
        assert found.get(a, frozenset()) == others
    assert found


def test_nothing_is_near_in_an_empty_collection():
    assert near({}) == {} and near({"a": "", "b": ""}) == {} and near({"a": "one two three"}) == {}
