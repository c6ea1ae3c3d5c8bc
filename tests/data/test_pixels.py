import threading

import numpy as np
import pytest
import torch
from PIL import Image

from addenda.core.base.errors import AddendaError
from addenda.data import pixels
from addenda.data.encode import encode
from addenda.data.pixels import decode
from addenda.data.prepare import Preparation
from addenda.data.read import read
from pictures import NAMES, picture, write

HOW = Preparation((8, 8))


@pytest.fixture
def data(tmp_path):
    return read(write(tmp_path), task="image")


def made(data, rows, how=HOW):
    """The batch, picture by picture, without what is tested here."""
    found = [torch.from_numpy(np.array(how.pixels(data.examples[i].open()))) for i in rows]
    return how.tensor(torch.stack(found))


@pytest.mark.parametrize("keep", [None, 0, 5 * 8 * 8 * 3])
def test_a_batch_is_its_pictures(data, keep):
    images = decode(data, HOW, keep=keep)
    rows = [3, 0, 21, 3]
    batch = images.batch(rows)
    assert torch.equal(batch["pixel_values"], made(data, rows))
    assert batch["labels"].tolist() == [data.examples[i].label for i in rows]
    assert batch["labels"].dtype == torch.long
    assert len(images.kept) == {None: 24, 0: 0}.get(keep, 5)
    assert images.names == NAMES and images.kind == "class" and images.unit == "images" and not images.ragged
    assert images.lengths == [1] * 24 and images.tokens == 24
    assert torch.equal(images[3]["pixel_values"], made(data, [3])[0])


def test_a_part_shares_what_is_kept(data):
    images = decode(data, HOW)
    part = images.take([5, 2])
    assert part.kept is images.kept and part.labels == [data.examples[i].label for i in (5, 2)]
    assert torch.equal(part.batch([1])["pixel_values"], made(data, [2]))
    assert images.first(3).digest == images.take([0, 1, 2]).digest != images.digest
    assert images.first(99) is images


def test_the_digest_knows_how_images_are_prepared(data):
    assert decode(data, HOW).digest == decode(data, Preparation((8, 8), source="elsewhere"), keep=0).digest
    assert decode(data, HOW).digest != decode(data, Preparation((8, 9))).digest


def test_what_comes_next_is_decoded_meanwhile(data, monkeypatch):
    images, decoded, by = decode(data, HOW, keep=0), [], []

    def seen(p, how, real=pixels._decoded):
        decoded.append(p.key)
        by.append(threading.current_thread().name)
        return real(p, how)

    monkeypatch.setattr(pixels, "_decoded", seen)
    images.ahead([1, 2])
    for future in list(images.coming.values()):
        future.result()
    assert sorted(decoded) == sorted(data.examples[i].key for i in (1, 2))
    assert torch.equal(images.batch([2, 4])["pixel_values"], made(data, [2, 4]))
    assert len(decoded) == 3  # the second picture of the batch was the only one to be decoded
    images.ahead([7])
    assert list(images.coming) == [7]  # picture 1 was given up
    assert all(name.startswith("addenda-images") for name in by)
    kept = decode(data, HOW)
    kept.ahead([1, 2])
    assert not kept.coming


def test_corrupt_files_are_named_or_left_out(tmp_path, data):
    files = sorted(tmp_path.glob("*/*.png"))
    files[0].write_bytes(files[0].read_bytes()[:200])  # cut short
    files[13].write_bytes(b"no image at all")
    files[14].write_bytes(b"")
    harmed = read(tmp_path, task="image")
    with pytest.raises(AddendaError, match=r"3 of 24 images of .* cannot be decoded: .*--skip-corrupt") as told:
        encode(harmed, HOW)
    for name in ("blue/000.png: ", "red/001.png: ", "red/002.png: "):
        assert name in str(told.value)
    images = encode(harmed, HOW, skip_corrupt=True)
    assert len(images) == 21
    assert sorted(images.skipped) == ["blue/000.png", "red/001.png", "red/002.png"]
    assert images.labels.count(0) == 11 and len(images.pictures) == 21
    for file in files:
        file.write_bytes(b"x")
    with pytest.raises(AddendaError, match=r"None of the 24 images"):
        encode(read(tmp_path, task="image"), HOW, skip_corrupt=True)


def test_mixed_sizes_want_a_size(tmp_path):
    for i, (height, width) in enumerate([(8, 8), (8, 9)]):
        (tmp_path / f"c{i}").mkdir()
        Image.fromarray(picture(0, i, height, width)).save(tmp_path / f"c{i}" / "a.png")
    data = read(tmp_path, task="image")
    with pytest.raises(AddendaError, match=r"c\d/a.png in .* is 8 × \d pixels and c\d/a.png is 8 × \d"):
        encode(data, Preparation(None))
    assert encode(data, Preparation(None).sized(6)).batch([0, 1])["pixel_values"].shape == (2, 3, 6, 6)


def test_grey_and_palette_images_are_read(tmp_path):
    for mode in ("L", "P", "1", "RGBA", "LA"):
        (tmp_path / mode).mkdir()
        Image.fromarray(picture(0, 0)).convert(mode).save(tmp_path / mode / "a.png")
    images = encode(read(tmp_path, task="image"), HOW)
    assert images.batch(range(5))["pixel_values"].shape == (5, 3, 8, 8)


def test_pixels_in_memory_are_not_all_looked_at(monkeypatch):
    """A large idx file has nothing that could be corrupt; what would not be kept is decoded when it is wanted."""
    rows = [{"image": picture(i % 2, i), "label": i % 2} for i in range(20)]
    tried = []
    monkeypatch.setattr(pixels, "_tried", lambda p, how, real=pixels._tried: tried.append(p) or real(p, how))
    images = decode(read(rows, task="image"), HOW, keep=3 * 8 * 8 * 3)
    assert len(tried) == len(images.kept) == 3 and len(images) == 20


def test_texts_and_images_want_what_reads_them(data):
    with pytest.raises(AddendaError, match="holds images, which want a Preparation"):
        encode(data, object())
    with pytest.raises(AddendaError, match="Images have no length in tokens"):
        encode(data, HOW, max_length=4)
