"""Choosing what has changed most: against a sort of everything at once, with ties, exclusions and every dtype."""

import pytest
import torch

from addenda import AddendaError
from addenda.train import most_changed as module
from addenda.train.most_changed import Trained, at_random, most_changed


def made(*shapes, kind=torch.float32, levels=None):
    for i, shape in enumerate(shapes):
        base = torch.randn(shape).to(kind)
        change = torch.randn(shape) if levels is None else torch.randint(-levels, levels + 1, shape).float() / 4
        yield Trained(
            f"t{i}",
            base.float() + change if levels is None else base.float().zero_() + change,
            base if levels is None else base.zero_(),
        )


def by_sorting(tensors, k, taken=None):
    """The K largest by a stable sort of one long list."""
    entries = []
    for order, t in enumerate(tensors):
        out = set((taken or {}).get(t.path, torch.empty(0)).tolist())
        flat = (t.value.double() - t.base.double()).abs().flatten().tolist()
        entries += [(-d, order, i) for i, d in enumerate(flat) if i not in out]
    chosen = sorted(entries)[:k]
    return {t.path: p for n, t in enumerate(tensors) if (p := sorted(i for _, order, i in chosen if order == n))}


def as_lists(found):
    return {path: positions.tolist() for path, positions in found.items()}


SHAPES = ((7, 5), (11,), (3, 4, 2), (6, 9), (1,))


@pytest.mark.parametrize("chunk", [4, 1 << 17])
@pytest.mark.parametrize("levels", [None, 2, 0])
def test_it_is_what_a_sort_gives(levels, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    tensors = list(made(*SHAPES, levels=levels))
    total = sum(t.size for t in tensors)
    changed = sum(int((t.value != t.base).sum()) for t in tensors)
    for k in {1, 2, 40, changed - 1, changed, changed + 1, total - 1, total} & set(range(1, total + 1)):
        found = most_changed(tensors, k)
        assert sum(map(len, found.values())) == k
        assert as_lists(found) == by_sorting(tensors, k), k


def test_equal_changes_are_taken_from_the_first():
    tensors = list(made((4, 4), (4,), levels=0))
    assert as_lists(most_changed(tensors, 17)) == {"t0": list(range(16)), "t1": [0]}
    same = [Trained(t.path, t.base - 0.5, t.base) for t in tensors]
    assert as_lists(most_changed(same, 3)) == {"t0": [0, 1, 2]}


def test_what_is_taken_is_not_taken_again():
    tensors = list(made(*SHAPES, levels=2))
    first = most_changed(tensors, 30)
    again = most_changed(tensors, 25, first)
    assert as_lists(again) == by_sorting(tensors, 25, first)
    assert not any(set(again[p].tolist()) & set(first.get(p, torch.empty(0)).tolist()) for p in again)
    total = sum(t.size for t in tensors)
    assert sum(map(len, most_changed(tensors, total - 30, first).values())) == total - 30
    with pytest.raises(AddendaError, match=f"There are {total - 30} numbers to choose from, and k={total - 29}"):
        most_changed(tensors, total - 29, first)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_layouts(kind):
    tensors = [Trained("a", torch.randn(9, 6, dtype=torch.float64).to(kind).t(), torch.randn(6, 9).to(kind))]
    tensors.append(Trained("b", torch.randn(5), torch.randn(5)))
    if kind == torch.float64:  # which float32 could not tell apart
        tensors.append(Trained("c", torch.tensor([1e-9, 2e-9], dtype=kind) + 1, torch.ones(2, dtype=kind)))
    total = sum(t.size for t in tensors)
    for k in (1, 13, total - 1):
        exact = [Trained(t.path, t.value.double(), t.base.double()) for t in tensors]
        assert as_lists(most_changed(tensors, k)) == by_sorting(exact, k)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(AddendaError, match="t has values that are not finite"):
        most_changed([Trained("t", torch.tensor([0.0, bad]), torch.zeros(2))], 1)


def test_random_positions_are_k_of_all_and_each_as_likely():
    sizes, counts = {"a": 10, "b": 30, "c": 5}, torch.zeros(45)
    for seed in range(400):
        found = at_random(sizes, 9, seed)
        assert sum(map(len, found.values())) == 9
        for path, start in (("a", 0), ("b", 10), ("c", 40)):
            counts[found.get(path, torch.empty(0)).long() + start] += 1
    expected = 400 * 9 / 45
    assert float(((counts - expected) ** 2 / expected).sum()) < 90, "χ² with 44 degrees of freedom"
    first = at_random(sizes, 20, 0)
    more = at_random(sizes, 25, 0, first)
    both = {p: sorted(first[p].tolist() + more[p].tolist()) for p in sizes}
    assert both == {p: list(range(n)) for p, n in sizes.items()}
    assert as_lists(at_random(sizes, 20, 0)) == as_lists(first)
    with pytest.raises(AddendaError, match="There are 25 numbers"):
        at_random(sizes, 26, 0, first)
