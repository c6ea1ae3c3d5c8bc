"""The docstrings that recipes are judged by: none that anything was judged by before."""

import pytest
from recipes import subjects
from recipes.subjects import SETTINGS, fresh_splits, joined

from addenda.data.docstrings import KINDS, LIBRARIES, splits

KINDS_OF = {name: i for i, name in enumerate(KINDS)}


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str, str]]:
    """As many texts as there are, with few of two libraries, in the order that reading them gives."""
    made = []
    for i in range(26_000):
        library = LIBRARIES[i % 8] if i % 8 not in (1, 2) or i % 3 == 0 else "torch"
        made.append((f"Text number {i} says something.", library, KINDS[i % 3]))
    return made


def texts(data) -> set[str]:
    return {e.text for e in data.examples}


@pytest.mark.parametrize("task", ["library", "kind"])
def test_the_new_test_split_shares_nothing_with_what_was_used_before(rows, task):
    found = fresh_splits(rows, task)
    old = {name: splits(rows, name) for name in ("library", "kind")}
    used = {text for parts in old.values() for data in parts.values() for text in texts(data)}
    assert not texts(found["test"]) & used
    assert not texts(fresh_splits(rows, "library")["test"]) & texts(fresh_splits(rows, "kind")["test"])
    assert texts(found["train"]) == texts(old[task]["train"])
    assert texts(found["validation"]) == texts(old[task]["validation"]) | texts(old[task]["test"])
    assert not texts(found["train"]) & texts(found["validation"])
    assert len(texts(found["test"])) == len(found["test"].examples) >= 4800


def test_classes_are_capped_and_the_order_is_another_hash_s(rows):
    found = fresh_splits(rows, "library")["test"]
    counts = [sum(e.label == k for e in found.examples) for k in range(len(LIBRARIES))]
    assert max(counts) == 850 and min(counts) < 850
    labels = {row[0]: row[1] for row in rows}
    assert all(labels[e.text] == LIBRARIES[int(e.label)] for e in found.examples)
    first = [e.label for e in found.examples[:400]]
    assert len(set(first)) == len(LIBRARIES)  # a prefix is a fair sample
    again = fresh_splits(list(rows), "library")["test"]
    assert again.digest == found.digest


def test_two_tasks_in_one_have_words_in_front_and_their_own_classes(rows):
    parts = [fresh_splits(rows, task)["train"] for task in ("library", "kind")]
    both = joined(parts)
    assert len(both.examples) == sum(len(p.examples) for p in parts)
    assert both.labels == (*LIBRARIES, *KINDS)
    for e in both.examples[:200]:
        word, _, text = e.text.partition(": ")
        assert (word == "library") == (e.label < len(LIBRARIES)) and text.startswith("Text number")
    assert joined(parts[:1]) is parts[0]


def test_every_search_ends_with_half_a_final_run_and_five_rates():
    assert all(s.rates == 5 and 4 * s.first == s.steps for s in SETTINGS.values())
    assert [name for name, s in SETTINGS.items() if s.drawn] == ["few-50", "few-two"]
    assert SETTINGS["docstrings"].steps == 2400 and subjects.MOST["library"] == 850
