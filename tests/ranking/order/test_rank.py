"""A folder in order: scores that depend on image and sentence alone, caches that change nothing, files left alone."""

import os
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from tests.ranking.order.tiny_towers import apart, image

from addenda import AddendaError
from addenda.ranking.order import features
from addenda.ranking.order import rank as ranking
from addenda.ranking.order.adapter import OrderAdapter
from addenda.ranking.order.file import Made, Scale, save_order
from addenda.ranking.order.rank import ImageOrder, images_in
from addenda.ranking.order.ratings import Ratings
from addenda.ranking.order.settings import OrderSettings
from addenda.ranking.order.towers import load_towers
from addenda.ranking.order.train import train_order

SMALL = OrderSettings(width=16, heads=2, layers=1, after=1, prompts=2, tokens=2, ratio=2)
SCALES = {"how many red squares": Scale(3.0, 2.0), "sharp photos": Scale(0.0, 1.0)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("order")
    vit, bert = apart(place)
    for i in range(40):
        image(place / "photos" / ("sub" if i % 3 else "") / f"{i:02d}.png", i * 5)
    towers = load_towers(image=vit, text=bert)
    about = Made(SMALL, (16, 12), towers.identity, SCALES)
    save_order(place / "order.safetensors", OrderAdapter(SMALL, 16, 12, seed=1), about)
    return place, towers


@pytest.fixture
def order(made, tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    place, towers = made
    return ImageOrder.load(place / "order.safetensors", towers)


def test_an_order_is_of_scores_best_first_in_the_query_s_units(order, made):
    pictures = images_in(made[0] / "photos")
    assert len(pictures) == 40
    rows = order.rank(pictures, "how many red squares")
    assert [r.rank for r in rows] == list(range(1, 41))
    assert [r.score for r in rows] == sorted((r.score for r in rows), reverse=True)
    assert len({r.score for r in rows}) > 20
    patches = torch.stack([dict(order.features.of([p]))[0] for p in pictures[:3]])
    with torch.no_grad():
        values = order.adapter(patches, *order.towers.tokens("how many red squares")).values * 2 + 3
    by_name = {r.picture.name: r.score for r in rows}
    torch.testing.assert_close(torch.tensor([by_name[p.name] for p in pictures[:3]]), values, rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_the_order_of_images_to_the_bit(order, made):
    pictures = images_in(made[0] / "photos")
    order.cache = order.features.cache = False
    there = order.scores(pictures, "sharp photos")
    back = order.scores(pictures[::-1], "sharp photos")
    assert [there[i] for i in range(40)] == [back[39 - i] for i in range(40)]
    alone = order.scores(pictures[5:6], "sharp photos")
    assert alone[0] == pytest.approx(there[5], abs=1e-5)


def test_scores_are_within_a_hair_whatever_the_batch(order, made, monkeypatch):
    pictures = images_in(made[0] / "photos")
    order.cache = order.features.cache = False
    found = order.scores(pictures, "sharp photos")
    for images, scored in ((1, 1), (7, 3), (64, 50)):
        monkeypatch.setattr(features, "BATCH", images)
        monkeypatch.setattr(ranking, "BATCH", scored)
        again = order.scores(pictures, "sharp photos")
        assert max(abs(again[i] - found[i]) for i in range(40)) <= 1e-5


def test_the_encoders_have_the_same_bits_after_training_and_ranking(made, tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))
    towers = load_towers(image=made[0] / "vit", text=made[0] / "bert")
    pictures = images_in(made[0] / "photos")

    def digests():
        return [sha256(b"".join(t.numpy().tobytes() for t in tower.state_dict().values())).hexdigest()
                for tower in (towers.image, towers.text)]  # fmt: skip

    before = digests()
    ratings = Ratings(tuple(pictures), {"red": {i: float(i % 5) for i in range(40)}})
    patches, _ = features.all_of(features.Features(towers), pictures)
    trained = train_order(towers, ratings, patches, settings=SMALL, steps=3, batch=8)
    ImageOrder(towers, trained.adapter, trained.made).rank(pictures, "blue")
    assert digests() == before


def test_what_is_kept_gives_the_same_bits_and_spares_the_work(order, made, monkeypatch):
    pictures = images_in(made[0] / "photos")
    first = order.scores(pictures, "sharp photos")
    assert order.features.made == 40
    with monkeypatch.context() as patched:
        patched.setattr(order.adapter, "forward", lambda *_, **__: pytest.fail("scored again"))
        assert order.scores(pictures, "sharp photos") == first
    order.scores(pictures, "red")
    assert order.features.made == 40  # another sentence, no second look at the images
    for file in (ranking.cache_folder() / "patches").rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    for file in (ranking.cache_folder() / "scores").rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert order.scores(pictures, "sharp photos") == first
    assert order.features.made == 80


def test_the_nearest_trained_query_is_told(order):
    assert order.nearest("sharp photos") == ("sharp photos", 1.0)
    query, similarity = order.nearest("how many blue squares")
    assert query in SCALES and -1 <= similarity < 1
    with pytest.raises(AddendaError, match="empty"):
        order.rank([], " ")


def test_equal_scores_in_another_process(order, made):
    place, _ = made
    pictures = images_in(place / "photos")[:5]
    here = [order.scores(pictures, "red")[i] for i in range(5)]
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from addenda.ranking.order.rank import ImageOrder, images_in\n"
        "from addenda.ranking.order.towers import load_towers\n"
        "p = sys.argv[1]; t = load_towers(image=p + '/vit', text=p + '/bert')\n"
        "o = ImageOrder.load(p + '/order.safetensors', t, cache=False)\n"
        "s = o.scores(images_in(p + '/photos')[:5], 'red'); print([s[i] for i in range(5)])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(place)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == str(here)


def test_patches_of_another_encoder_are_not_taken_for_these(order, made, tmp_path):
    pictures = images_in(made[0] / "photos")[:4]
    first = order.scores(pictures, "red")
    torch.manual_seed(8)
    vit, bert = apart(tmp_path)
    towers = load_towers(image=vit, text=bert)
    about = Made(SMALL, (16, 12), towers.identity, SCALES)
    other = ImageOrder(towers, order.adapter, about)
    found = other.scores(pictures, "red")
    assert other.features.made == 4 and found != first
    other.cache = other.features.cache = False
    assert other.scores(pictures, "red") == found
    assert order.scores(pictures, "red") == first


def test_where_nothing_can_be_kept_the_order_is_the_same(order, made, tmp_path, monkeypatch):
    pictures = images_in(made[0] / "photos")[:4]
    first = order.scores(pictures, "red")
    (tmp_path / "file").touch()  # a folder cannot be made in its place, as on a disk that is full or can only be read
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "file" / "cache"))
    again = ImageOrder.load(made[0] / "order.safetensors", order.towers)
    assert again.scores(pictures, "red") == first and again.features.made == 4


def test_more_images_than_are_held_at_once_have_the_same_scores(order, made, monkeypatch):
    pictures = images_in(made[0] / "photos")
    order.cache = order.features.cache = False
    whole = order.scores(pictures, "red")
    monkeypatch.setattr(ranking, "HELD", 32)
    assert order.scores(pictures, "red") == pytest.approx(whole, abs=1e-5)


def test_odd_images_are_taken_or_refused_by_name(order, tmp_path, monkeypatch):
    folder = tmp_path / "odd"
    image(folder / "good.png", 3)
    Image.new("CMYK", (9, 9)).save(folder / "cmyk.jpg")
    Image.fromarray(torch.arange(64, dtype=torch.int32).view(8, 8).numpy() * 900).convert("I;16").save(
        folder / "deep.png"
    )
    Image.new("RGB", (1, 1), "red").save(folder / "one.png")
    frames = [Image.new("P", (8, 8), c) for c in (1, 9)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    assert len(order.rank(images_in(folder), "red")) == 5
    whole = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:-30])
    with pytest.raises(AddendaError, match=r"cut\.png"):
        order.rank(images_in(folder), "red")
    rows = order.rank(images_in(folder), "red", skip_corrupt=True)
    assert len(rows) == 5 and list(order.skipped) == ["cut.png"]
    (tmp_path / "bomb").mkdir()
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    for side in (5_000, 30_000):  # few bytes that say so many pixels: the smaller one is Pillow's business no more
        (tmp_path / "bomb" / "bomb.png").write_bytes(head_of_png(side, side))
        with pytest.raises(AddendaError, match=r"bomb\.png: .*pixels"):
            order.rank(images_in(tmp_path / "bomb"), "red")


def head_of_png(width, height):
    """A PNG of a few bytes that says it has so many pixels of one bit."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_photo_that_says_how_it_was_held_is_turned(order, tmp_path):
    image(tmp_path / "a.png", 70)
    with Image.open(tmp_path / "a.png") as upright:
        about = Image.Exif()
        about[0x0112] = 6  # the camera was turned: the first row is the right-hand side
        upright.rotate(90, expand=True).save(tmp_path / "b.png", exif=about)
        upright.rotate(90, expand=True).save(tmp_path / "c.png")
    by_name = {r.picture.name: r.score for r in order.rank(images_in(tmp_path), "red")}
    assert by_name["a.png"] == by_name["b.png"] != by_name["c.png"]


def test_folders_are_walked_once_and_named_where_they_cannot_be_read(tmp_path):
    image(tmp_path / "a" / "1.png", 1)
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    odd = os.fsencode(tmp_path / "a") + b"/\xff.png"
    with open(odd, "wb") as f:
        f.write((tmp_path / "a" / "1.png").read_bytes())
    assert len(images_in(tmp_path / "a")) == 2
    (tmp_path / "a" / "empty.png").touch()
    with pytest.raises(AddendaError, match=r"empty\.png: the file is empty"):
        images_in(tmp_path / "a")
    told: list[str] = []
    assert len(images_in(tmp_path / "a", skip_corrupt=True, skipped=told)) == 2
    assert told == ["empty.png: the file is empty"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(AddendaError, match="holds no image"):
        images_in(tmp_path / "nothing")
    with pytest.raises(AddendaError, match="Expected a folder"):
        images_in(tmp_path / "none")


def test_scores_by_other_settings_are_not_taken_for_these(order, made):
    """Tensors alike, which only the settings say how to read."""
    pictures = images_in(made[0] / "photos")[:4]
    first = order.scores(pictures, "red")
    summed = replace(SMALL, pool="sum")
    adapter = OrderAdapter(summed, 16, 12)
    adapter.load_state_dict(order.adapter.state_dict())
    other = ImageOrder(order.towers, adapter, replace(order.made, settings=summed))
    found = other.scores(pictures, "red")
    assert found != first
    other.cache = False
    assert other.scores(pictures, "red") == found


def test_what_is_far_is_told_by_how_near_sentences_on_other_things_are(order, monkeypatch):
    """Cosines of e5 begin at 0.75, so that no number of its own says what is far."""
    for floor in (0.1, 0.76):
        with monkeypatch.context() as patched:
            patched.setattr(order, "nearest", lambda sentence, floor=floor: ("red", floor))
            above = 1 - floor
            assert order.far(floor) and order.far(floor + 0.2 * above)
            assert not order.far(floor + 0.4 * above) and not order.far(1.0)
    assert order.nearest(ranking.ELSEWHERE[0])[1] <= 1
