"""Reading a folder's shards one tensor at a time, and what is refused before any is read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from addenda.core.base.errors import AddendaError
from addenda.models import checkpoint_files
from addenda.models.checkpoint_files import INDEX, SINGLE, CheckpointFiles
from tiny_models import make_llama


@pytest.fixture
def folder(tmp_path):
    make_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def test_every_tensor_is_what_safetensors_reads(folder):
    files = CheckpointFiles.of(folder)
    assert len(files.shards) >= 4 and files.index is not None
    expected = {k: t for shard in files.shards for k, t in load_file(folder / shard).items()}
    assert files.tensors.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.equal(files.read(name), t)
        assert files.tensors[name].size == t.numel() * t.element_size()


def test_all_dtypes_and_shapes_and_writing_into_what_was_read(tmp_path, monkeypatch):
    given = {
        "half": torch.randn(3, 5).bfloat16(), "wide": torch.randn(7).double(), "one": torch.tensor(2.5),
        "whole": torch.arange(6).view(2, 3), "flags": torch.tensor([True, False, True]), "none": torch.zeros(0, 4),
        "small": torch.randn(4).half(), "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }  # fmt: skip
    save_file(given, tmp_path / SINGLE)
    files = CheckpointFiles.of(tmp_path)
    for name, t in given.items():
        read = files.read(name)
        assert torch.equal(read, t) and read.dtype == t.dtype and read.shape == t.shape
        monkeypatch.setattr(checkpoint_files, "PIECE", 2)
        pieces = [piece.clone() for piece in files.pieces(name)]
        assert torch.equal(torch.cat(pieces) if pieces else t.flatten(), t.flatten())
        assert all(p.dtype == t.dtype and len(p) <= 2 for p in pieces)
    files.read("wide").fill_(1.0)  # a copy of the reader's own
    assert torch.equal(files.read("wide"), given["wide"])


def test_a_header_of_any_length(tmp_path):
    save_file({"a": torch.arange(4, dtype=torch.float64)}, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "  # what begins behind it is at no multiple of eight any more
    if len(header) % 8 == 0:
        header += b" "
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert torch.equal(CheckpointFiles.of(tmp_path).read("a"), torch.arange(4, dtype=torch.float64))


def test_a_single_file_goes_before_an_index(folder):
    save_file({"a": torch.zeros(2)}, folder / SINGLE)
    assert list(CheckpointFiles.of(folder).tensors) == ["a"]


def edit_index(folder, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_files_that_are_missing_are_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(AddendaError, match=rf"names \d+ files, and 1 of them are not there: {shard.name}"):
        CheckpointFiles.of(folder)


def test_an_index_that_names_what_is_not_there(folder):
    edit_index(folder, lambda index: index["weight_map"].update(ghost=sorted(set(index["weight_map"].values()))[0]))
    with pytest.raises(AddendaError, match=r"1 tensors are not where it says, e\.g\. ghost"):
        CheckpointFiles.of(folder)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/tmp/x.safetensors", "pytorch_model.bin", ".hidden.safetensors"]
)
def test_an_index_that_leads_out_of_the_folder(folder, name):
    edit_index(folder, lambda index: index["weight_map"].update(ghost=name))
    with pytest.raises(AddendaError, match="no safetensors file beside it"):
        CheckpointFiles.of(folder)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"weight_map": {"a": 3}}', "{", '{"weight_map": {"a": "b.safetensors"}, "metadata": [1]}']
)
def test_an_index_that_is_none(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(AddendaError, match=r"no index of shards|not JSON"):
        CheckpointFiles.of(folder)


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AddendaError, match=r"pickled \(pytorch_model\.bin\), which is not read"):
        CheckpointFiles.of(tmp_path)


def test_a_damaged_shard_is_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(AddendaError, match=f"{shard.name} is damaged"):
        CheckpointFiles.of(folder)


def test_a_header_that_claims_gigabytes(tmp_path):
    (tmp_path / SINGLE).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(AddendaError, match="damaged"):
        CheckpointFiles.of(tmp_path)


def test_a_file_that_became_shorter(folder):
    files = CheckpointFiles.of(folder)
    name, entry = max(files.tensors.items(), key=lambda item: item[1].end)
    path = folder / entry.shard
    path.write_bytes(path.read_bytes()[: entry.end - 4])
    with pytest.raises(AddendaError, match="has become shorter"):
        files.read(name)
