"""Small packed files that would be gigabytes in memory, and folders of datasets that lead elsewhere."""

import gzip
import io
import json
import struct
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image

from addenda.core.base.errors import AddendaError
from addenda.data import idx
from addenda.data.examples import Picture
from addenda.data.read import read
from addenda.data.rows import rows_of

CHATS = [[{"role": "user", "content": "x" * (1 << 20)}, {"role": "assistant", "content": "y"}]] * 200
TABLES = {
    "rows": {"question": ["x"] * 10**6, "answer": ["y"] * 10**6},
    "text": {"question": ["x" * (1 << 20)] * 200, "answer": ["y"] * 200},
    "bytes": {"image": [b"x" * (1 << 20)] * 200, "label": ["y"] * 200},
    "chats": {"messages": CHATS},
    "pages": {"question": ["x" * (100 << 20)], "answer": ["y"]},
}


@pytest.mark.parametrize("kind", TABLES)
def test_parquet_that_repeats_itself(tmp_path, kind):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table(TABLES[kind]), file, compression="zstd")
    assert file.stat().st_size < 100_000
    started = time.perf_counter()
    with pytest.raises(AddendaError, match=r"out of|rows of one value") as error:
        rows_of(file)
    assert time.perf_counter() - started < 1
    assert str(file) in str(error.value)


def test_parquet_of_any_honest_form_is_read_as_it_is(tmp_path):
    content = {
        "question": ["a", "b", "a", None] * 50, "answer": ["yes", "no", "yes", ""] * 50, "count": [1, 2, 3, 4] * 50,
        "messages": [[{"role": "user", "content": "q"}], [], None, [{"role": "user", "content": None}]] * 50,
        "image": [{"bytes": b"1", "path": None}, None, {"bytes": None, "path": "p"}, {"bytes": b"", "path": ""}] * 50,
    }  # fmt: skip
    table = pa.table(content)
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=33)
    assert list(rows_of(tmp_path / "x.parquet")) == table.to_pylist()


def saved(folder, data=None):
    (data or Dataset.from_list([{"question": "1", "answer": "2"}] * 3)).save_to_disk(str(folder))
    return folder


def edited(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("name", ["../x.arrow", "/x.arrow", "a/x.arrow", "..", "", None, 3])
def test_a_saved_data_set_that_names_other_files(tmp_path, name):
    folder = saved(tmp_path / "saved")
    (folder / "data-00000-of-00001.arrow").rename(tmp_path / "x.arrow")
    edited(folder / "state.json", _data_files=[{"filename": name}])
    with pytest.raises(AddendaError, match="no file beside it"):
        read(folder)


def test_saved_splits_that_lead_elsewhere(tmp_path):
    parts = DatasetDict({"train": Dataset.from_list([{"question": "1", "answer": "2"}] * 3)})
    folder = saved(tmp_path / "saved", parts)
    assert len(read(folder)) == 3
    saved(tmp_path / "other")
    edited(folder / "dataset_dict.json", splits=["train", "../other"])
    with pytest.raises(AddendaError, match="no folders beside it"):
        read(folder)


@pytest.mark.parametrize("entry", [{"num_classes": 10**9}, {"names_file": "/etc/passwd"}])
def test_classes_that_are_not_named(tmp_path, entry):
    folder = saved(tmp_path / "saved")
    features = {"question": {"_type": "ClassLabel"} | entry, "answer": {"dtype": "string", "_type": "Value"}}
    edited(folder / "dataset_info.json", features=features)
    with pytest.raises(AddendaError, match=next(iter(entry))):
        read(folder)


def png(width, height):
    """A black image of any size, without one of that size in memory."""
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + width // 8) * min(height, 100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(4000, 4000), (9000, 9000), (800, 10**5)])
def test_a_small_image_of_many_pixels(tmp_path, size):
    data = png(*size)
    (tmp_path / "x.png").write_bytes(data)
    for stored in (data, tmp_path / "x.png"):
        with pytest.raises(ValueError, match="pixels out of"):
            Picture("key", 0, "x.png", stored).open()
    assert Picture("key", 0, "x.png", png(80, 80)).open().size == (80, 80)


def test_a_program_is_no_image():
    """Pillow would hand PostScript to Ghostscript."""
    out = io.BytesIO()
    Image.new("L", (4, 4)).save(out, "EPS")
    with pytest.raises(ValueError, match="its format is EPS"):
        Picture("key", 0, "x.png", out.getvalue()).open()


def test_gzipped_arrays_of_nothing(tmp_path):
    shape = (2000, 200, 200)
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as f:
        f.write(bytes((0, 0, 8, 3)) + np.array(shape, ">u4").tobytes() + bytes(80_000_000))
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as f:
        f.write(bytes((0, 0, 8, 1)) + np.array([2000], ">u4").tobytes() + bytes(2000))
    with pytest.raises(AddendaError, match="80,000,000 bytes would come out of"):
        idx.load(*idx.parts(tmp_path)["train"])
