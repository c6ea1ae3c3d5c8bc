import json

import pytest
import torch
import transformers
from tiny_models import SUMS, config, make_bert, make_llama, make_tokenizer

import addenda as ad
from addenda.core.errors import AddendaError
from addenda.train.evaluate import evaluate
from addenda.train.load import load_model, wanted_by
from addenda.train.machine import Peak, pick_dtype, resident
from addenda.train.tune import tune

QUICK = {"steps": 2, "batch": 8, "dtype": "float32", "progress": False}
SPAM = [{"text": "ab" * (i % 5 + 1), "label": "ham"} for i in range(12)] + [
    {"text": "9" * (i % 7 + 1), "label": "spam"} for i in range(12)
]


@pytest.fixture
def folder(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_in_an_adapter_out(folder, tmp_path, capsys):
    out = tmp_path / "run"
    seen = []
    made = tune(
        folder, SUMS, "lora:rank=4", out=out, steps=6, batch=8, rate=1e-2, eval_data=0.25, eval_every=3,
        dtype="float32", progress=seen.append, seed=7,
    )  # fmt: skip
    assert {p.name for p in out.iterdir()} == {"adapter.safetensors", "README.md", "run.json", "checkpoints"}
    assert [s for s, _ in made.losses] == list(range(1, 7))
    assert [e["step"] for e in made.evaluations] == [3, 6]
    assert made.after["loss"] == made.evaluations[-1]["loss"] < made.before["loss"]
    assert made.tokens_per_second > 0
    assert made.peak_memory > 0
    assert {e.step for e in seen} == set(range(1, 7))
    run = json.loads((out / "run.json").read_text())
    assert run["options"]["rate"] == 1e-2
    assert run["options"]["method"]["name"] == "lora"
    assert run["options"]["method"]["options"]["rank"] == 4
    assert run["data"]["examples"] + run["data"]["eval_examples"] == 64
    assert len(run["data"]["digest"]) == 64
    assert run["versions"]["torch"]
    assert run["hardware"]["cores"]
    card = (out / "README.md").read_text()
    assert "addenda.load(model" in card
    assert f"`{folder}`" in card
    again = tune(folder, SUMS, "lora:rank=4", out=out, steps=6, batch=8, rate=1e-2, eval_data=0.25, eval_every=3,
                 dtype="float32", progress=True, seed=7)  # fmt: skip
    assert again.resumed_from == 6
    assert again.losses == made.losses
    loaded = load_model(folder, dtype="float32")
    ad.load(loaded.model, made.path)
    assert evaluate(loaded.model, loaded.tokenizer, SUMS).loss == pytest.approx(
        evaluate(made.model, made.tokenizer, SUMS).loss
    )


def test_a_new_head_is_trained_saved_and_loaded(tmp_path):
    encoder = transformers.BertForMaskedLM(config(transformers.BertConfig))
    encoder.save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    made = tune(tmp_path / "encoder", SPAM, out=tmp_path / "run", eval_data=SPAM, rate=1e-2, **(QUICK | {"steps": 30}))
    heads = {"classifier.weight", "classifier.bias"}
    assert heads <= set(made.adapter.methods)
    assert made.model.config.id2label == {0: "ham", 1: "spam"}
    assert made.after["accuracy"] > 0.9
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["labels"] == ["ham", "spam"]
    other = load_model(tmp_path / "encoder", dtype="float32", seed=5, **wanted_by(made.path))
    ad.load(other.model, made.path)
    found = evaluate(other.model, other.tokenizer, SPAM)
    assert "".join(map(str, found.items)) == made.after["items"]
    with pytest.raises(AddendaError, match=r"has no weights for .*classifier.bias.* drawn at random"):
        tune(tmp_path / "encoder", SPAM, also_train=[], **QUICK)


def test_a_loaded_module_keeps_its_dtype_and_trains_its_head():
    model = make_bert().to(torch.bfloat16)
    with pytest.raises(AddendaError, match=r"in torch.bfloat16. Convert it before: model.to\(torch.float32\)"):
        tune(model, SPAM, tokenizer=make_tokenizer(), **QUICK)
    made = tune(model, SPAM, tokenizer=make_tokenizer(), **QUICK | {"dtype": "bf16"})
    assert made.model is model
    assert next(model.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in made.adapter.parameters())
    assert "classifier.weight" in made.adapter.methods
    assert made.path is None


@pytest.mark.parametrize(
    ("method", "options"), [("shira:mask=gradient", {}), (ad.LoRA(rank=2), {"activation_checkpointing": True})]
)
def test_other_ways(folder, method, options):
    assert tune(folder, SUMS, method, **QUICK, **options).steps == 2


def test_classifiers_keep_their_own_names(tmp_path):
    model = make_bert()
    model.config.id2label = {0: "spam", 1: "ham"}
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert tune(tmp_path, SPAM, **QUICK).model.config.id2label == {0: "spam", 1: "ham"}
    with pytest.raises(AddendaError, match="holds 'eggs', expected one of 'spam', 'ham'"):
        tune(tmp_path, [{"text": "a", "label": "eggs"}], **QUICK)


def test_missing_weights_and_folders_are_told(folder):
    from safetensors.torch import load_file, save_file

    with pytest.raises(AddendaError, match=r"no such folder\. Did you mean 'model'"):
        tune(folder.with_name("modl"), SUMS, **QUICK)
    with pytest.raises(AddendaError, match=r"no config.json in it"):
        tune(folder.parent, SUMS, **QUICK)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AddendaError, match=r"lacks weights of its LlamaForCausalLM: model.layers.1.mlp.up_proj.weight"):
        tune(folder, SUMS, **QUICK)
    (folder / "model.safetensors").unlink()
    with pytest.raises(AddendaError, match="could not be loaded as a causal LM"):
        tune(folder, SUMS, **QUICK)


def test_wrong_calls_are_told(folder):
    for options, says in [
        ({"epochs": 1}, "steps or epochs, not both"),
        ({"method": "lroa"}, "Did you mean .*'lora'"),
        ({"method": "lora:rnk=4"}, "no option 'rnk'"),
        ({"targets": "q_prj"}, "matches nothing"),
        ({"dtype": "int3"}, "dtype must be"),
        ({"max_length": 10}, "longer than 10 tokens"),
        ({"data": SPAM}, "lacks a column for question="),
    ]:
        with pytest.raises(AddendaError, match=says):
            tune(**({"model": folder, "data": SUMS} | QUICK | options))
    with pytest.raises(AddendaError, match="wants its tokenizer="):
        tune(make_llama(), SUMS, **QUICK)


def test_the_machine():
    kind, why = pick_dtype("auto")
    assert (kind == torch.bfloat16) == (" has amx_bf16" in why or " has avx512_bf16" in why)
    assert pick_dtype("bf16")[0] == torch.bfloat16
    floor = resident()
    with Peak() as peak:
        torch.ones(40 << 20, dtype=torch.uint8).clone()
    if floor is not None and peak.bytes is not None:
        assert 70 << 20 < peak.bytes - floor < 300 << 20
