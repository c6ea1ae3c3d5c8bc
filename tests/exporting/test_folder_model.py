"""Which class a folder is taken for, and what its config.json says then."""

import json

import pytest
import torch
import transformers

from addenda.core.base.errors import AddendaError
from addenda.exporting.folder_model import FolderModel, written_config
from tiny_models import make_bert, make_llama, make_tokenizer


def test_the_folder_s_own_class_where_it_has_all_sites(tmp_path):
    make_llama().save_pretrained(tmp_path)
    found = FolderModel.of(tmp_path, ["model.layers.0.mlp.up_proj", "lm_head.weight"])
    assert found.architecture == "LlamaForCausalLM" and not found.changes and found.dtype == torch.float32
    found.check_complete()
    assert written_config(found, None) == json.loads((tmp_path / "config.json").read_text())


def test_a_classifier_where_only_that_has_them(tmp_path):
    make_llama().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found = FolderModel.of(tmp_path, ["model.layers.0.mlp.up_proj", "score.weight"], 2, ("no", "yes"))
    assert found.architecture == "LlamaForSequenceClassification"
    config = written_config(found, torch.bfloat16)
    assert config["id2label"] == {0: "no", 1: "yes"} and config["label2id"] == {"no": 0, "yes": 1}
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["dtype"] == "bfloat16"
    assert config["hidden_size"] == 32 and config["pad_token_id"] == 0
    with pytest.raises(AddendaError, match=r"no weights for 1 parameters .*score\.weight"):
        found.check_complete()
    found.check_complete(["score.weight"])
    assert found.weights.unread == ("lm_head.weight",)


def test_sites_that_no_class_has_leave_the_folder_s_own(tmp_path):
    make_bert().save_pretrained(tmp_path)
    found = FolderModel.of(tmp_path, ["model.layers.0.mlp.up_proj"])
    assert found.architecture == "BertForSequenceClassification" and not found.changes


def test_the_dtype_that_most_numbers_have(tmp_path):
    model = make_llama().bfloat16()
    model.model.norm.float()
    model.save_pretrained(tmp_path)
    assert FolderModel.of(tmp_path).dtype == torch.bfloat16


def test_an_old_config_keeps_its_own_name_of_the_dtype(tmp_path):
    make_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    changed = written_config(FolderModel.of(tmp_path), torch.float16)
    assert changed["torch_dtype"] == "float16" and "dtype" not in changed
    assert transformers.LlamaConfig.from_dict(changed).dtype in (torch.float16, "float16")
