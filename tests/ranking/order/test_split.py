"""Rated images in two parts: by bytes, the same everywhere, and what looks alike stays together."""

import numpy as np
import pytest
from PIL import Image
from tests.ranking.order.tiny_towers import noise

from addenda import AddendaError
from addenda.core.disk.access import sha256_of
from addenda.data.examples import Picture
from addenda.ranking.order.ratings import Ratings
from addenda.ranking.order.split import difference_hash, group_keys, held_out


@pytest.fixture
def pictures(tmp_path):
    files = [noise(tmp_path / f"{i}.png", i) for i in range(40)]
    return [Picture(sha256_of(f), 0, f.name, f) for f in files]


def test_parts_are_disjoint_whole_and_the_same_in_any_order(pictures):
    ratings = Ratings(tuple(pictures), {"q": {i: float(i) for i in range(40)}})
    rest, held = held_out(ratings, 0.3)
    keys = {p.key for p in held.pictures}
    assert keys.isdisjoint(p.key for p in rest.pictures) and len(keys) + len(rest.pictures) == 40
    assert 3 <= len(keys) <= 22
    assert sorted([*rest.values["q"].values(), *held.values["q"].values()]) == [float(i) for i in range(40)]
    turned = Ratings(tuple(pictures[::-1]), {"q": {i: 0.0 for i in range(40)}})
    assert {p.key for p in held_out(turned, 0.3)[1].pictures} == keys


def test_what_looks_alike_is_on_one_side(pictures, tmp_path):
    copies = []
    for i in range(0, 40, 2):
        with Image.open(tmp_path / f"{i}.png") as image:
            image.resize((50, 50)).save(tmp_path / f"{i}.jpg", quality=80)
        copies.append(Picture(sha256_of(tmp_path / f"{i}.jpg"), 0, f"{i}.jpg", tmp_path / f"{i}.jpg"))
    keys = group_keys([*pictures, *copies])
    assert [keys[40 + n] for n in range(20)] == [keys[i] for i in range(0, 40, 2)]
    assert len(set(keys)) == 40
    ratings = Ratings((*pictures, *copies), {"q": {i: 0.0 for i in range(60)}})
    names = {p.name.split(".")[0] for p in held_out(ratings, 0.4)[1].pictures}
    assert names.isdisjoint(p.name.split(".")[0] for p in held_out(ratings, 0.4)[0].pictures)


def test_a_hash_says_which_fields_are_darker_than_their_neighbours(tmp_path):
    Image.fromarray(np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1))).save(tmp_path / "rising.png")
    picture = Picture("k", 0, "rising.png", tmp_path / "rising.png")
    assert difference_hash(picture) == 2**64 - 1
    (tmp_path / "none.png").write_bytes(b"no image")
    assert difference_hash(Picture("k", 0, "none.png", tmp_path / "none.png")) is None


@pytest.mark.parametrize("share", [0, 1, 1.5])
def test_impossible_shares_are_refused(pictures, share):
    with pytest.raises(AddendaError, match="between 0 and 1"):
        held_out(Ratings(tuple(pictures)), share)
    with pytest.raises(AddendaError, match="one part empty"):
        held_out(Ratings(tuple(pictures[:1])), 0.5)
