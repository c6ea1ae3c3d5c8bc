"""What is copied beside weights, and what is not."""

from pathlib import Path

import pytest

from addenda.core.base.errors import AddendaError
from addenda.exporting.other_files import copy_others


def test_settings_are_copied_and_weights_are_not(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    kept = ["config.json", "tokenizer.json", "README.md", "modeling.py", "1_Pooling/config.json", "images/plot.png"]
    left = ["pytorch_model.bin", "pytorch_model.bin.index.json", "adapter.safetensors", "adapter_config.json",
            "model.safetensors.index.json", "onnx/model.onnx", "old.ckpt", "model.Q4.gguf"]  # fmt: skip
    for name in [*kept, *left, ".git/HEAD", ".cache/x.json", "checkpoint-5/trainer_state.json", "model.safetensors"]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    (base / "elsewhere").symlink_to(tmp_path)
    (base / "blob.json").symlink_to(base / "config.json")  # as the hub's cache keeps files
    out.mkdir()
    behind = copy_others(base, out, ["model.safetensors", "config.json"])
    assert sorted(behind) == sorted([*left, "elsewhere"])
    copied = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    assert set(copied) == {*kept[1:], "blob.json"}
    assert all(p.read_text() == name for name, p in copied.items() if name != "blob.json")
    assert not copied["blob.json"].is_symlink() and copied["blob.json"].read_text() == "config.json"


def test_a_folder_with_nothing_else(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    assert copy_others(tmp_path / "base", tmp_path / "out", []) == []
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file whose reading the system refuses")
def test_an_error_of_the_disk_says_whether_it_was_read_or_written(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    (base / "tokenizer.json").symlink_to("/proc/self/mem")
    with pytest.raises(AddendaError, match=r"base/tokenizer\.json cannot be read \(Input/output error"):
        copy_others(base, out, [])
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").write_text("{}")
    (out / "tokenizer.json").unlink()
    out.rmdir()
    out.write_text("")
    with pytest.raises(AddendaError, match=r"Could not write at .*out/tokenizer\.json"):
        copy_others(base, out, [])
