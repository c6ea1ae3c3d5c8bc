import json
import shutil

import pytest
import torch
import transformers

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.models.load import labels_beside, load_model, wanted_by
from addenda.models.machine import Peak, pick_dtype, resident
from addenda.train.evaluate import evaluate
from addenda.train.tune import tune
from tiny_models import SUMS, config, make_bert, make_llama, make_tokenizer

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
    with pytest.raises(AddendaError, match=r"has neither model\.safetensors nor"):
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


def held(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_repeated_writes_nothing(folder, tmp_path):
    out = tmp_path / "run"
    common = {"method": "lora:rank=4", "out": out, **QUICK}
    made = tune(folder, SUMS, **common)
    before = held(out)
    for name in ("README.md", "run.json", "adapter.safetensors"):
        again = tune(folder, SUMS, **common)
        assert again.resumed_from == 2 and again.path == made.path
        assert {p: v for p, v in held(out).items() if "checkpoints" not in p.parts} == {
            p: v for p, v in before.items() if "checkpoints" not in p.parts
        }
        (out / name).unlink()  # what is missing is written again, with nothing that was not measured
        tune(folder, SUMS, **common)
        assert " 0 tokens/s" not in (out / "README.md").read_text()
        before = held(out)
    longer = tune(folder, SUMS, **(common | {"steps": 4}))
    run = json.loads((out / "run.json").read_text())
    assert (longer.resumed_from, run["steps"], run["looks"][0]["changed"]) == (2, 4, {"steps": [2, 4]})
    (out / "README.md").write_text((out / "README.md").read_text() + "My notes.\n")
    tune(folder, SUMS, **(common | {"steps": 5}))
    assert (out / "README.md").read_text().endswith("My notes.\n")
    other = ad.attach(make_llama(), "shira")
    other.save(out / "adapter.safetensors")
    with pytest.raises(AddendaError, match=r"adapter\.safetensors, which would be written, and which addenda has not"):
        tune(folder, SUMS, **(common | {"steps": 6}))


def test_the_run_of_an_older_version_is_begun_again_when_asked(folder, tmp_path):
    out = tmp_path / "run"
    common = {"method": "lora:rank=4", "out": out, **QUICK}
    tune(folder, SUMS, **common)
    run = json.loads((out / "run.json").read_text())
    del run["files"], run["looks"], run["sha256"]
    (out / "run.json").write_text(json.dumps(run))
    for note in out.glob("checkpoints/checkpoint-*/addenda.json"):
        said = json.loads(note.read_text())
        note.write_text(json.dumps({k: said[k] for k in ("step", "settings", "choices")}))
        (note.parent / "optimizer.safetensors").rename(note.parent / "optimizer.pt")
    (out / "checkpoints" / "addenda.json").unlink()
    with pytest.raises(AddendaError, match=r"an older version of addenda, which wrote pickles.*resume=False"):
        tune(folder, SUMS, **common)
    assert tune(folder, SUMS, **common, resume=False).resumed_from == 0
    assert "files" in json.loads((out / "run.json").read_text())
    assert not list(out.rglob("*.pt"))


def test_the_card_of_a_quantised_run_works_as_written(folder, tmp_path, monkeypatch, capsys):
    import re
    import shlex

    from addenda.cli.main import run

    out = tmp_path / "run"
    made = tune(folder, SUMS, "lora:rank=4", out=out, quantize="nf4", **QUICK)
    card = (out / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert "addenda.quantize(model, 'nf4')" in code and "from addenda" not in code  # a card outlives paths of modules
    monkeypatch.chdir(out)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    ids = torch.arange(6)[None]
    assert torch.equal(names["model"](ids).logits, made.model(ids).logits)
    command = shlex.split(re.search(r"`addenda (.*?)`\.", card)[1])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "adapter.safetensors").write_bytes(made.path.read_bytes())
    monkeypatch.chdir(tmp_path / "elsewhere")  # away from its run.json
    with pytest.raises(SystemExit) as stopped:
        run([*command, "--max-new-tokens", "2"])
    assert not stopped.value.code, capsys.readouterr().err
    assert wanted_by("adapter.safetensors") == {"quantize": "nf4"}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"options": [], "data": 3}', '{"options": {"quantize": ["nf4"], "image_size": "x"}}', "[" * 10**5,
     '{"data": {"labels": "\\u001b[31m"}}', '{"data": {"labels": [1, null]}}', '{"options": {"image_size": 1e999}}',
     '{"a": ' + "9" * 5000 + "}", "\xff", '{"options": NaN}'],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_a_hostile_run_beside_an_adapter_says_nothing(tmp_path, text):
    ad.attach(make_llama(), "lora:rank=2").save(tmp_path / "adapter.safetensors")
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    assert wanted_by(tmp_path / "adapter.safetensors") == {}
    assert labels_beside(tmp_path / "adapter.safetensors") is None


def test_a_damaged_file_of_a_finished_run_is_written_again(tmp_path):
    def run():
        return tune(make_llama(), SUMS, "lora:rank=2", tokenizer=make_tokenizer(), out=tmp_path, **QUICK)

    assert run().tokens > 0
    kept = {n: (tmp_path / n).read_bytes() for n in ("adapter.safetensors", "README.md", "run.json")}
    for name, whole in kept.items():
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        for held in (None, b"", whole[: len(whole) // 2], bytes(flipped)):
            if name == "README.md" and held:
                continue  # it may have been edited
            (tmp_path / name).unlink() if held is None else (tmp_path / name).write_bytes(held)
            assert run().tokens == 0
            made = {n: (tmp_path / n).read_bytes() for n in kept}
            if name == "run.json":
                run_now, run_then = json.loads(made.pop(name)), json.loads(kept["run.json"])
                assert run_now["losses"] == run_then["losses"] and run_now["files"].keys() == run_then["files"].keys()
                made["README.md"] = kept["README.md"]  # with the times of this call
                for other in ("README.md", name):
                    (tmp_path / other).write_bytes(kept[other])
            assert made.items() <= kept.items()
    (tmp_path / "run.json").write_text('{"command": 3}')
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(AddendaError, match=r"holds run\.json.*, which would be written"):
        run()


def test_a_run_on_a_grown_vocabulary_goes_on_with_the_same_tokens_only(tmp_path):
    rows = dict.fromkeys(("model.embed_tokens", "lm_head"), "trainable-tokens:tokens=76")
    data = [{"question": s["question"] + "<call>", "answer": s["answer"]} for s in SUMS[:16]]

    def go(steps: int, token: str = "<call>"):
        model, tokenizer = make_llama(), make_tokenizer()
        ad.grow(model, tokenizer, [token])
        method = {"*.q_proj": "lora:rank=2", **rows}
        options = {"tokenizer": tokenizer, "out": tmp_path / "run", "steps": steps, "batch": 4, "progress": False}
        return tune(model, data, method, **options)

    assert go(2).resumed_from == 0
    made = go(3)
    assert made.resumed_from == 2
    with pytest.raises(AddendaError, match="is not the tokenizer with the new tokens of this run"):
        go(4, "<other>")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    with pytest.raises(AddendaError, match="its new tokens are others: '<call>' is number 76 there"):
        go(4, "<other>")
    fresh = make_llama()
    ad.load(fresh, made.path, tokenizer=made.tokenizer)
    assert evaluate(fresh, made.tokenizer, data).loss == evaluate(made.model, made.tokenizer, data).loss
