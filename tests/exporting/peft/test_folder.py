"""A folder of PEFT as files: either of the two names it, what is written is PEFT's form, and dtypes are kept."""

import json

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import toys
from addenda.core.base.errors import AddendaError
from addenda.exporting.peft.folder import read_folder, write_folder
from peft_folders import CONFIG, WEIGHTS, by_peft

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB
KEY = "base_model.model.a.lora_A.weight"


def test_the_folder_or_one_of_its_files_names_it(tmp_path):
    by_peft(toys.make_llama, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "peft", IDS)
    for path in (tmp_path / "peft", tmp_path / "peft" / CONFIG, tmp_path / "peft" / WEIGHTS):
        folder = read_folder(path)
        assert folder.type == "LORA" and len(folder.tensors) == 4
    with pytest.raises(AddendaError, match=r"has no adapter_config"):
        read_folder(tmp_path / "nowhere")


def test_what_is_written_has_pefts_form_and_keeps_dtypes(tmp_path):
    write_folder(tmp_path, {"peft_type": "LORA", "r": 2}, {KEY: torch.ones(3, 2, dtype=torch.bfloat16).T})
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and file.get_tensor(KEY).dtype == torch.bfloat16
    assert json.loads((tmp_path / CONFIG).read_text(encoding="utf-8")) == {"peft_type": "LORA", "r": 2}
    assert read_folder(tmp_path).tensors[KEY].shape == (2, 3)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [({}, "holds no tensor"), ({KEY: torch.ones(2, dtype=torch.complex64)}, "complex64"),
     ({KEY: torch.full((2,), float("inf"))}, "not finite"), ({"model.a.weight": torch.ones(2)}, "does not begin")],
)  # fmt: skip
def test_tensors_that_are_no_adapter_are_refused(tensors, words, tmp_path):
    write_folder(tmp_path, {"peft_type": "LORA"}, {KEY: torch.ones(2)})
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(AddendaError, match=words):
        read_folder(tmp_path)
