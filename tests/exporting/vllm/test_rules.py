"""What `check` says of folders that are wrong for vLLM; what vLLM itself does with each is in `test_served.py`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bench.served import llama, moved
from bench.served_folders import FOLDERS, MOST, STRICTER, make
from safetensors.torch import load_file, save_file

import addenda as ad
from addenda.exporting.vllm import RANKS, check


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model and a folder that vLLM serves."""
    model, folder = llama(), tmp_path_factory.mktemp("good") / "adapter"
    ad.export(moved(ad.attach(model, ad.LoRA(rank=4, alpha=8), targets="linear", name="a")), "vllm", folder)
    return model, folder


@pytest.mark.parametrize("wrong", [*FOLDERS, *STRICTER], ids=lambda w: w.name)
def test_every_wrong_folder_is_named_by_what_is_wrong_with_it(good, tmp_path, wrong):
    model, folder = good
    problems = check(make(folder, wrong, tmp_path / "wrong"), max_lora_rank=MOST, config=model)
    assert bool(problems) == bool(wrong.says)
    assert not wrong.says or wrong.says in problems[0]


def test_a_config_or_a_folder_of_the_base_will_do_instead_of_the_model(good, tmp_path):
    model, folder = good
    llama().save_pretrained(tmp_path / "base")
    short = make(folder, next(w for w in FOLDERS if w.name == "a path one word short"), tmp_path / "short")
    config = type(model.config).from_pretrained(tmp_path / "base", local_files_only=True)
    for base in (model, config, tmp_path / "base", str(tmp_path / "base")):
        assert check(folder, config=base) == []
        assert "is none that" in check(short, config=base)[0]
    assert check(short) == []  # without the base nobody can know


def test_without_the_base_fused_names_are_told_by_their_looks(good, tmp_path):
    _, folder = good
    fused = make(folder, next(w for w in FOLDERS if w.name == "fused names"), tmp_path / "fused")
    assert "looks like several layers in one" in check(fused)[0]


def test_a_model_that_is_built_with_fused_layers_takes_their_names():
    transformers = pytest.importorskip("transformers")
    from addenda.exporting.vllm.places import places

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    with torch.device("meta"):
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **heads))
    assert {"model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"} <= set(places(model))


def test_a_model_that_vllm_serves_without_lora_is_said_to_be_one(bert, good):
    assert "BertForSequenceClassification is not known" in check(good[1], config=bert)[0]


def test_what_is_no_folder_is_a_problem_and_no_error(tmp_path):
    assert "adapter_config.json" in check(tmp_path / "nothing")[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    assert "pickle" in check(tmp_path)[0]  # vLLM would open it


@pytest.mark.parametrize("rank", [0, 4, 24, 1024])
def test_a_maximum_that_vllm_does_not_take_is_refused(good, rank):
    with pytest.raises(ad.AddendaError, match="max_lora_rank is one of 1, 8"):
        check(good[1], max_lora_rank=rank)


def test_the_way_out_of_a_rank_names_what_vllm_can_be_started_with(good, tmp_path):
    folder = make(good[1], next(w for w in FOLDERS if w.name == "rank above the maximum"), tmp_path / "high")
    assert check(folder, max_lora_rank=16) == []
    assert "--max-lora-rank 16" in check(folder, max_lora_rank=8)[0]
    assert RANKS[-1] == 512


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (3, "got a int"),
        ({"model_type": "llama"}, "got a dict"),
        ("no such folder", "Expected the folder of a transformers model at no such folder"),
        (Path(__file__).parent, "no config.json in it"),
        ("", "names nothing"),
    ],
)
def test_a_base_that_is_none_is_refused(good, base, said):
    with pytest.raises(ad.AddendaError, match=said):
        check(good[1], config=base)


def test_a_base_whose_config_is_damaged_is_refused(good, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ad.AddendaError, match=r"transformers cannot read .*config\.json"):
        check(good[1], config=tmp_path)


def test_a_base_in_a_wrapper_is_the_base(good):
    assert check(good[1], config=torch.nn.DataParallel(good[0])) == []


@pytest.mark.parametrize("named", [5, "head", ["head"], {"head": 1}, [5], [["score"]]])
def test_modules_to_save_of_any_kind_is_a_problem_and_no_error(good, tmp_path, named):
    shutil.copytree(good[1], tmp_path / "other")
    config = json.loads((good[1] / "adapter_config.json").read_text())
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": named}))
    assert "vLLM takes no module as a whole but a classifier's" in check(tmp_path / "other", config=good[0])[0]


def test_experts_that_are_there_in_part_are_said_to_lack(mixtral, tmp_path):
    adapter = moved(ad.attach(mixtral, ad.LoRA(rank=2), targets="*.experts.down_proj", name="a"))
    ad.export(adapter, "vllm", tmp_path / "whole")
    assert check(tmp_path / "whole", config=mixtral) == []
    tensors = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    kept = {k: t for k, t in tensors.items() if "layers.0.block_sparse_moe.experts.1." not in k}
    save_file(kept, tmp_path / "whole" / "adapter_model.safetensors")
    assert "lacks 3 of its 12 experts' layers" in check(tmp_path / "whole", config=mixtral)[0]


def test_the_record_is_of_these_folders_and_of_answers_within_1e_4():
    record = json.loads((Path(__file__).parents[3] / "records" / "bench" / "served.json").read_text())["found"]
    assert {name: row["vllm"] for name, row in record["wrong"].items()} == {
        w.name: w.served for w in (*FOLDERS, *STRICTER)
    }
    rows = [row for model in ("tiny", "smollm2") for row in record[model]["cases"].values()]
    assert max(row["difference"] for row in rows) < 1e-4 and min(row["moved"] for row in rows) > 0.01
