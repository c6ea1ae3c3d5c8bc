import gzip
import json
import os
import shutil
import warnings
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from addenda.core.base.errors import AddendaError
from addenda.data import idx
from addenda.data.images import parts, pool
from addenda.data.prepare import Preparation
from addenda.data.read import read, splits_of
from pictures import NAMES, picture, write


def pixels(data):
    return sorted((e.label, np.asarray(e.open().convert("RGB")).tobytes()) for e in data.examples)


def wanted(count=12, start=0):
    return sorted((label, picture(label, i).tobytes()) for label in (0, 1) for i in range(start, start + count))


def rows(folder):
    return [{"image": str(p), "label": p.parent.name} for p in sorted(folder.glob("*/*.png"))]


def write_idx(folder, prefix, images, labels, zipped=True):
    for name, values in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        head = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape)
        made = head + values.astype(np.uint8).tobytes()
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(made))
        else:
            (folder / name).write_bytes(made)


def test_every_source_gives_the_same_pictures(tmp_path):
    tree = write(tmp_path / "tree")
    made = rows(tree)
    bytes_of = [{"image": {"bytes": Path(r["image"]).read_bytes(), "path": "x.png"}, "label": r["label"]} for r in made]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    held = datasets.Dataset.from_dict({k: [r[k] for r in made] for k in ("image", "label")}, features=features)
    held.save_to_disk(str(tmp_path / "disk"))
    datasets.DatasetDict({"train": held, "test": held.select([0, 5])}).save_to_disk(str(tmp_path / "dict"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bytes_of), tmp_path / "d.parquet")
    beside = [r | {"image": str(tmp_path / r["image"]).removeprefix(f"{tmp_path}/")} for r in made]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, beside)))
    opened = [{"img": Image.open(r["image"]), "label": r["label"]} for r in made]
    arrays = [{"picture": np.asarray(Image.open(r["image"])), "label": r["label"]} for r in made]
    for source in (tree, held, tmp_path / "disk", tmp_path / "dict", tmp_path / "d.parquet", tmp_path / "d.jsonl",
                   bytes_of, opened, arrays):  # fmt: skip
        data = read(source, task="image")
        assert pixels(data) == wanted(), source
        assert data.labels == NAMES and data.form == "image"
    assert len(read(tmp_path / "dict", task="image", split="test")) == 2
    assert read(tree, task="image").digest == read(shutil.copytree(tree, tmp_path / "copy"), task="image").digest


def test_splits_are_folders(tmp_path):
    write(tmp_path / "train", 8)
    write(tmp_path / "val", 3, start=8)
    write(tmp_path / "test", 4, start=20)
    assert parts(tmp_path) == splits_of(tmp_path, "image") == ["train", "validation", "test"]
    assert pixels(read(tmp_path, task="image", split="validation")) == wanted(3, 8)
    assert pixels(read(tmp_path, task="image", split="test")) == wanted(4, 20)
    with pytest.raises(AddendaError, match=r"no split 'ood'; it has train, validation, test"):
        read(tmp_path, task="image", split="ood")


def test_the_first_of_a_folder_are_of_all_classes(tmp_path):
    labels = [e.label for e in read(write(tmp_path, 40), task="image").examples]
    assert 10 < sum(labels[:40]) < 30
    assert labels == [e.label for e in read(tmp_path, task="image").examples]


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path, zipped):
    images = np.random.default_rng(0).integers(0, 256, (30, 5, 7))
    labels = np.arange(30) % 10
    write_idx(tmp_path, "train", images, labels, zipped)
    write_idx(tmp_path, "t10k", images[:4], labels[:4], zipped)
    data = read(tmp_path, task="image")
    assert [e.label for e in data.examples] == labels.tolist()
    assert np.array_equal(np.stack([np.asarray(e.open()) for e in data.examples]), images)
    assert data.labels == tuple("0123456789")
    assert parts(tmp_path) == ["train", "test"]
    assert len(read(tmp_path, task="image", split="test")) == 4
    assert data.examples[3].name.endswith("-images-idx3-ubyte" + ".gz" * zipped + ", image 3")


def test_idx_files_that_are_damaged(tmp_path):
    images, labels = np.zeros((3, 2, 2)), np.zeros(3)
    write_idx(tmp_path, "train", images, labels, zipped=False)
    file = tmp_path / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for content, says in [
        (whole[:-1], "claims 12 bytes of values and holds 11"),
        (whole + b"1", "claims 12 bytes of values and holds more"),
        (whole[:7], "expected 00 00 08 03"),
        (b"\x89PNG" + whole, "begins with 89 50 4e 47"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "it claims 4294967295 × 4294967295"),
    ]:
        file.write_bytes(content)
        with pytest.raises(AddendaError, match=says):
            read(tmp_path, task="image")
    file.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(AddendaError, match="cannot be read as idx"):
        read(tmp_path, task="image")
    write_idx(tmp_path, "train", images, np.zeros(4), zipped=True)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(AddendaError, match=r"holds 3 images .* 4 labels"):
        read(tmp_path, task="image")
    write_idx(tmp_path, "train", images, np.ones(3), zipped=True)
    with pytest.raises(AddendaError, match=r"labels-idx1-ubyte.gz' holds 1, expected one of 'only'"):
        read(tmp_path, task="image", labels=["only"])


def test_fashion_mnist_is_looked_for_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "PLACE", tmp_path / "fashion-mnist")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AddendaError, match="apt-get install dataset-fashion-mnist"):
        read("fashion-mnist", task="image")
    (tmp_path / "fashion-mnist").mkdir()
    write_idx(tmp_path / "fashion-mnist", "train", np.zeros((2, 28, 28)), np.array([9, 0]))
    monkeypatch.chdir(tmp_path.parent)
    data = read("fashion-mnist", task="image")
    assert [data.labels[e.label] for e in data.examples] == ["Ankle boot", "T-shirt/top"]
    turned = read("fashion-mnist", task="image", labels=data.labels[::-1])  # as a model may have them
    assert [turned.labels[e.label] for e in turned.examples] == ["Ankle boot", "T-shirt/top"]
    assert [e.label for e in turned.examples] == [0, 9]


def test_folders_that_hold_other_things(tmp_path):
    write(tmp_path, 2)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "blue" / ".DS_Store").write_text("")
    (tmp_path / "blue" / "Thumbs.db").write_text("")
    assert len(read(tmp_path, task="image")) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(AddendaError, match=r"1 things in .*/empty holds no image"):
        read(tmp_path, task="image")
    (tmp_path / "empty").rmdir()
    (tmp_path / "blue" / "notes.txt").write_text("")
    (tmp_path / "red" / "more").mkdir()
    with pytest.raises(AddendaError, match=r"2 things.*notes.txt is no image by its ending.*more is a folder inside"):
        read(tmp_path, task="image")


def test_splits_without_class_folders_are_told(tmp_path):
    write(tmp_path / "made", 1)
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        shutil.copy(tmp_path / "made" / "blue" / "000.png", tmp_path / "flat" / split)
    says = r"flat/test holds images but no class folder.* expected test/CLASS/IMAGE. Sort them"
    for call in (parts, lambda path: read(path, task="image")):
        with pytest.raises(AddendaError, match=says):
            call(tmp_path / "flat")
        with pytest.raises(AddendaError, match=r"flat/train holds images but no class folder"):
            call(tmp_path / "flat" / "train")
    write(tmp_path / "flat" / "train", 2)
    (tmp_path / "flat" / "train" / "000.png").unlink()
    assert len(read(tmp_path / "flat", task="image")) == 4 and parts(tmp_path / "flat") == ["train"]
    with pytest.raises(AddendaError, match=r"flat/test holds images but no class folder"):
        read(tmp_path / "flat", task="image", split="test")
    (tmp_path / "made" / "red").rename(tmp_path / "made" / "train")  # one class of others
    assert read(tmp_path / "made", task="image").labels == ("blue", "train")


def test_images_beside_the_class_folders_are_told(tmp_path):
    write(tmp_path / "train", 2)
    write(tmp_path / "test", 2)
    (tmp_path / "readme.txt").write_text("")
    assert len(read(tmp_path, task="image")) == 4
    for place in (tmp_path, tmp_path / "train", tmp_path / "test"):
        shutil.copy(tmp_path / "train" / "blue" / "000.png", place / "stray.PNG")
    says = r"2 things .*{}/stray.PNG is an image beside the class folders; .*/train/stray.PNG is an image beside"
    with pytest.raises(AddendaError, match=says.format(tmp_path)):
        read(tmp_path, task="image")
    (tmp_path / "stray.PNG").unlink()
    with pytest.raises(AddendaError, match=r"1 things .*/test/stray.PNG is an image beside the class folders"):
        read(tmp_path, task="image", split="test")
    shutil.copy(tmp_path / "train" / "stray.PNG", write(tmp_path / "classes", 1))
    with pytest.raises(AddendaError, match=r"1 things .*classes/stray.PNG is an image beside"):
        read(tmp_path / "classes", task="image")


def test_a_class_that_training_lacks_is_told(tmp_path):
    write(tmp_path / "train", 2)
    write(tmp_path / "test", 2)
    (tmp_path / "test" / "blue").rename(tmp_path / "test" / "blu")
    labels = read(tmp_path, task="image").labels
    with pytest.raises(AddendaError, match=r"test/blu is of no known class Did you mean 'blue'"):
        read(tmp_path, task="image", split="test", labels=labels)
    made = [{"image": picture(0, 0), "label": "up"}]
    with pytest.raises(AddendaError, match="row 0: column 'label' holds 'up', expected one of 'blue', 'red'"):
        read(made, task="image", labels=NAMES)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ([], "holds no row"),
        ([{"image": picture(0, 0)}], "lacks a column for label="),
        ([{"photograph": picture(0, 0), "label": 0}], "lacks a column for image="),
        ([{"image": picture(0, 0), "label": None}, {"image": picture(0, 0), "label": "a"}], "row 0: .* holds None"),
        ([{"image": "nowhere.png", "label": 0}], "there is no file nowhere.png"),
        ([{"image": "iVBOR" * 1000, "label": 0}], r"there is no file 'iVBOR.*\(5,002 characters\); decode base64"),
        ([{"image": 7, "label": 0}], "holds int, an image, its bytes or its path were expected"),
        ([{"image": picture(0, 0) / 255, "label": 0}], "holds ndarray"),
        ([{"image": b"", "label": 0}], "holds bytes"),
        ([{"image": picture(0, 0), "label": 0.5}], "numbers with fractions"),
    ],
)
def test_rows_that_cannot_be_used(made, says):
    with pytest.raises(AddendaError, match=says):
        read(made, task="image")


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "YCbCr", "I;16", "turned"])
@pytest.mark.parametrize("channels", [3, 1])
def test_a_picture_in_memory_is_what_its_file_would_be(mode, channels):
    image, file = Image.fromarray(picture(0, 0, 6, 9)), BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6 if mode == "turned" else 1
    if mode == "I;16":
        image = Image.fromarray(np.arange(54, dtype=np.uint16).reshape(6, 9) * 1200)
    image = image if mode == "turned" else image.convert(mode)
    image.save(file, "tiff", exif=exif)
    how = Preparation(None, mean=None, deviation=None, channels=channels)
    opened = Image.open(BytesIO(file.getvalue()))
    assert mode in (opened.mode, "turned")
    held, stored = (read([{"image": v, "label": 0}], task="image").examples[0] for v in (opened, file.getvalue()))
    wanted = how.pixels(stored.open())
    assert np.array_equal(how.pixels(held.open()), wanted)
    assert wanted.shape == ((9, 6, channels) if mode == "turned" else (6, 9, channels))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_a_picture_whose_white_is_not_known_is_told_by_row(kind):
    made = [{"image": Image.fromarray(p), "label": i} for i, p in enumerate((picture(0, 0), np.ones((4, 4), kind)))]
    with pytest.raises(AddendaError, match=r"row 1: column 'image' .* cannot .* of mode '[FI]'.* in 8 or 16 bits"):
        read(made, task="image")


def test_a_picture_that_is_cut_is_told_by_row():
    file = BytesIO()
    Image.fromarray(picture(0, 0)).save(file, "png")
    with pytest.raises(AddendaError, match="row 0: column 'image' holds an image that cannot be taken"):
        read([{"image": Image.open(BytesIO(file.getvalue()[:200])), "label": 0}], task="image")


def test_columns_can_be_named():
    data = read([{"x": picture(0, 0), "y": "b", "label": 3}], task="image", image="x", label="y")
    assert data.labels == ("b",)


def test_equal_pictures_are_held_out_together(tmp_path):
    write(tmp_path, 20)
    for i in range(20):
        shutil.copy(tmp_path / "blue" / f"{i:03}.png", tmp_path / "blue" / f"again{i:03}.png")
    rest, held = read(tmp_path, task="image").split(0.3)
    assert not {e.key for e in rest.examples} & {e.key for e in held.examples}
    assert len(rest) + len(held) == 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_reads_with_threads_of_its_own():
    assert pool().submit(abs, -1).result() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: the child waits for none of them
        child = os.fork()
    if not child:
        try:
            os._exit(pool().submit(abs, -7).result(timeout=20))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
