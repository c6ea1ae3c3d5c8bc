"""Telling whose adapter a file is by what is in it."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from addenda import AddendaError
from addenda.exporting.formats import format_of


def test_formats_are_told_by_content_not_by_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter_config.json").write_text("{}")
    (tmp_path / "x.safetensors").write_bytes(b"GGUF\3\0\0\0" + bytes(16))
    save_file({"lora_unet_a.lora_up.weight": torch.zeros(1)}, tmp_path / "k.bin")
    save_file({"base_model.model.a.lora_A.weight": torch.zeros(1)}, tmp_path / "p.gguf")
    names = {"folder": "peft", "x.safetensors": "gguf", "k.bin": "kohya", "p.gguf": "peft"}
    assert {name: format_of(tmp_path / name) for name in names} == names


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_are_never_opened(tmp_path, protocol):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Bomb(), protocol))
    torch.save({"a": torch.zeros(1)}, tmp_path / "b.bin")
    for name in ("a.safetensors", "b.bin"):
        with pytest.raises(AddendaError, match="is a pickle"):
            format_of(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_what_is_none_of_them_is_refused_with_what_there_is(tmp_path):
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("hello, this is no adapter")
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")  # it would be waited for
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("")
    said = {
        "model.safetensors": "a.weight",
        "text": "no sound safetensors file",
        "empty": "it is empty",
        "pipe": "a device or a pipe",
        "folder": "notes",
        "nothing": "no file",
    }
    for name, part in said.items():
        with pytest.raises(AddendaError, match=part):
            format_of(tmp_path / name)


def test_a_header_that_begins_like_a_pickle_is_none(tmp_path):
    for n in range(400):
        save_file({"base_model." + "x" * n: torch.zeros(1)}, tmp_path / "f")
        if (tmp_path / "f").read_bytes()[0] == 0x80:
            break
    else:
        raise AssertionError("no header of such a length")
    assert format_of(tmp_path / "f") == "peft"
