"""A checkpoint written like another: equal bytes where nothing changes, and a file that others read where it does."""

import pytest
import torch
from safetensors.torch import load_file

from addenda.core.base.errors import AddendaError
from addenda.models.checkpoint_files import INDEX, CheckpointFiles
from addenda.models.checkpoint_writer import Added, CheckpointWriter
from tiny_models import make_llama


@pytest.fixture
def files(tmp_path):
    model = make_llama()
    model.model.norm.weight.data += torch.rand(32)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "out").mkdir()
    return CheckpointFiles.of(tmp_path / "model")


def test_a_copy_has_the_same_bytes(files, tmp_path):
    with CheckpointWriter(files, tmp_path / "out") as writer:
        writer.copy_rest()
    writer.write_index()
    for shard in files.shards:
        assert (tmp_path / "out" / shard).read_bytes() == (files.folder / shard).read_bytes()
    assert CheckpointFiles.of(tmp_path / "out").index["weight_map"] == files.index["weight_map"]


def test_one_tensor_is_another_and_the_rest_is_copied(files, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    changed = torch.randn(files.tensors[name].shape)
    with CheckpointWriter(files, tmp_path / "out") as writer:
        writer.write(name, changed)
        writer.copy_rest()
    for shard in files.shards:
        for key, t in load_file(tmp_path / "out" / shard).items():
            assert torch.equal(t, changed if key == name else files.read(key))


def test_another_dtype_more_tensors_and_fewer(files, tmp_path):
    head, dropped = torch.randn(3, 32), "lm_head.weight"
    added = {"score.weight": Added((3, 32), torch.bfloat16)}
    with CheckpointWriter(files, tmp_path / "out", dtype=torch.bfloat16, added=added, dropped=[dropped]) as writer:
        writer.write("score.weight", head)
        writer.copy_rest()
    writer.write_index()
    made = CheckpointFiles.of(tmp_path / "out")
    assert made.tensors.keys() == (files.tensors.keys() - {dropped}) | {"score.weight"}
    assert made.index["metadata"]["total_size"] == sum(t.size for t in made.tensors.values())
    assert torch.equal(made.read("score.weight"), head.bfloat16())
    for shard in made.shards:  # another reader's eyes
        for key, t in load_file(tmp_path / "out" / shard).items():
            assert t.dtype == torch.bfloat16
            assert key == "score.weight" or torch.equal(t, files.read(key).bfloat16())


def test_what_was_forgotten_is_an_error(files, tmp_path):
    with (
        pytest.raises(AddendaError, match=r"tensors were not written, e\.g\. lm_head\.weight"),
        CheckpointWriter(files, tmp_path / "out") as writer,
    ):
        writer.write("model.norm.weight", torch.zeros(32))


def test_another_shape_is_an_error(files, tmp_path):
    with (
        pytest.raises(AddendaError, match=r"model\.norm\.weight is to be \[32\], got \[31\]"),
        CheckpointWriter(files, tmp_path / "out") as writer,
    ):
        writer.write("model.norm.weight", torch.zeros(31))


def test_bytes_are_copied_where_the_system_cannot(files, tmp_path, monkeypatch):
    monkeypatch.delattr("os.copy_file_range", raising=False)
    monkeypatch.delattr("os.pwrite", raising=False)
    with CheckpointWriter(files, tmp_path / "out") as writer:
        writer.copy_rest()
    for shard in files.shards:
        assert (tmp_path / "out" / shard).read_bytes() == (files.folder / shard).read_bytes()
    assert not (tmp_path / "out" / INDEX).exists()


def test_numbers_beyond_the_new_dtype_are_refused_and_infinities_of_the_old_one_kept(tmp_path):
    model = make_llama()
    model.model.norm.weight.data[0] = 1e6
    model.model.norm.weight.data[1] = float("inf")
    model.save_pretrained(tmp_path / "model")
    files = CheckpointFiles.of(tmp_path / "model")
    for dtype, fits in ((torch.float16, False), (torch.bfloat16, True)):
        (tmp_path / str(dtype)).mkdir()
        with CheckpointWriter(files, tmp_path / str(dtype), dtype=dtype) as writer:
            if fits:
                writer.copy_rest()
            else:
                with pytest.raises(AddendaError, match="beyond what float16 holds"):
                    writer.copy_rest()
                writer._left.clear()
    made = CheckpointFiles.of(tmp_path / "torch.bfloat16").read("model.norm.weight")
    assert made[1] == float("inf") and bool(made[2:].isfinite().all())
