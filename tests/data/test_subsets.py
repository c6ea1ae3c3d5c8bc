import numpy as np
import pytest

from addenda.core.base.errors import AddendaError
from addenda.data.examples import Data, Labelled, Picture
from addenda.data.read import read
from addenda.data.subsets import Subset


def many(n, classes=4, seed=0):
    labels = np.random.default_rng(seed).integers(0, classes, n)
    made = tuple(Picture(f"{i:064x}", int(c), str(i), b"") for i, c in enumerate(labels))
    return Data(made, "image", tuple("abcdefghij"[:classes]))


def keys(data):
    return [e.key for e in data.examples]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_so_many_of_every_class(n):
    data = many(400)
    learn, choose = Subset.parse(f"{n}/class").of(data)
    for part in (learn, choose):
        assert np.bincount([e.label for e in part.examples]).tolist() == [n] * 4
        assert len(set(keys(part))) == 4 * n
        assert part.labels == data.labels
    assert not set(keys(learn)) & set(keys(choose))
    fewer = Subset.parse(f"{max(1, n // 2)}/class").of(data)[0]
    assert set(keys(fewer)) <= set(keys(learn))  # a larger set holds the smaller ones


def test_it_depends_on_the_examples_alone():
    data = many(300)
    turned = Data(data.examples[::-1], "image", data.labels)
    assert keys(Subset.parse("4/class").of(data)[0]) == keys(Subset.parse("4/class").of(turned)[0])
    other = Subset.parse("4/class@1").of(data)[0]
    assert set(keys(other)) != set(keys(Subset.parse("4/class").of(data)[0]))


def test_vtabs_thousand():
    data = many(1500)
    learn, choose = Subset.parse("vtab").of(data)
    assert (len(learn), len(choose)) == (800, 200)
    assert not set(keys(learn)) & set(keys(choose))
    assert len({*keys(learn), *keys(choose)}) == 1000
    with pytest.raises(AddendaError, match=r"vtab takes 800 \+ 200 different examples, .* has 999"):
        Subset.parse("vtab").of(Data(data.examples[:999], "image", data.labels))


def test_copies_count_once():
    data = many(64)
    twice = Data(data.examples * 2, "image", data.labels)
    assert keys(Subset.parse("2/class").of(twice)[0]) == keys(Subset.parse("2/class").of(data)[0])
    with pytest.raises(AddendaError, match=r"64/class takes 128 different examples .* fewer of a \(\d+\)"):
        Subset.parse("64/class").of(twice)


def test_texts_have_classes_too():
    rows = [{"text": f"{i}", "label": "ab"[i % 2]} for i in range(20)]
    learn, _ = Subset.parse("3/class").of(read(rows, task="label"))
    assert sorted(e.label for e in learn.examples) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(AddendaError, match="wants examples with classes"):
        Subset.parse("3/class").of(Data((Labelled("a", 0.5),), "label"))


@pytest.mark.parametrize("text", ["8", "0/class", "-1/class", "8/klass", "vtab@", "vtab@x", ""])
def test_what_is_no_subset(text):
    with pytest.raises(AddendaError, match="such as 8/class, vtab"):
        Subset.parse(text)
