"""Image classification from a folder to an adapter and back, on tiny random models."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.models.kinds import task_in
from addenda.models.load import load_model, wanted_by
from addenda.models.preparation import preparation_of
from addenda.train import attention, compiled
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit
from addenda.train.tune import tune
from pictures import NAMES, config, save_backbone, write
from shared import same_bits, values

QUICK = {"steps": 2, "batch": 8, "dtype": "float32", "progress": False}


@pytest.fixture
def model(tmp_path):
    return save_backbone(tmp_path / "model")


@pytest.fixture
def tree(tmp_path):
    return write(tmp_path / "tree", 16)


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_a_new_head_is_trained_saved_and_loaded(tmp_path, tree, kind):
    folder = save_backbone(tmp_path / kind, kind)
    seen = []
    out = tmp_path / "run"
    made = tune(
        folder, tree, "lora:rank=4", out=out, rate=1e-2, eval_data=0.3, steps=40, batch=8, dtype="float32",
        progress=seen.append,
    )  # fmt: skip
    assert type(made.model).__name__ == f"{kind}ForImageClassification"
    assert {"classifier.weight", "classifier.bias"} <= set(made.adapter.methods)
    assert made.model.config.id2label == {0: "blue", 1: "red"}
    assert made.after["accuracy"] > 0.9 > made.before["accuracy"]
    assert (made.unit, made.tokens) == ("images", 40 * 8 if made.tokens % 8 == 0 else made.tokens)
    assert {e.unit for e in seen} == {"images"}
    run = json.loads((out / "run.json").read_text())
    assert run["data"]["labels"] == ["blue", "red"] and run["data"]["form"] == "image" and run["unit"] == "images"
    card = (out / "README.md").read_text()
    assert "AutoModelForImageClassification as Auto" in card and "num_labels=2" in card and "images/s" in card
    other = load_model(folder, dtype="float32", seed=5, **wanted_by(made.path))
    ad.load(other.model, made.path)
    tested = read(tree, task="image").split(0.3)[1]
    assert "".join(map(str, evaluate(other.model, other.tokenizer, tested).items)) == made.after["items"]
    again = tune(folder, tree, "lora:rank=4", out=out, rate=1e-2, eval_data=0.3, steps=40, batch=8, dtype="float32",
                 progress=False)  # fmt: skip
    assert again.resumed_from == 40 and again.losses == made.losses


def test_the_loss_is_the_models_own(model, tree):
    loaded = load_model(model, labels=2, dtype="float32")
    images = encode(read(tree, task="image"), loaded.tokenizer)
    found = evaluate(loaded.model, examples=images, batch=5)
    with torch.no_grad():
        out = loaded.model(**images.batch(range(len(images))))
    assert found.loss == pytest.approx(out.loss.item(), rel=1e-5)
    assert found.items == (out.logits.argmax(-1) == torch.tensor(images.labels)).int().tolist()
    assert (found.unit, found.tokens) == ("images", 32) and "images/s" in str(found)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("keep", [None, 0])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, model, tree, keep):
    from addenda.data.pixels import decode

    def run(**options):
        loaded = load_model(model, labels=2, dtype="float32")
        train = decode(read(tree, task="image"), loaded.tokenizer, keep=keep)
        adapter = ad.attach(loaded.model, ad.LoRA(rank=2, dropout=0.25), also_train=loaded.heads, seed=3)
        return adapter, fit(loaded.model, adapter, train, steps=9, batch=8, rate=1e-2, accumulate=2, **options)

    def killed(event):
        if event.step == 7:
            raise KilledError

    whole, result = run()
    with pytest.raises(KilledError):
        run(out=tmp_path / "c", save_every=3, progress=killed)
    torch.manual_seed(99)
    parts, again = run(out=tmp_path / "c", save_every=3, resume=True)
    assert again.resumed_from == 6 and again.losses == result.losses
    assert same_bits(values(whole), values(parts))


def test_another_size_is_another_run(tmp_path, model, tree):
    options = QUICK | {"out": tmp_path / "run"}
    made = tune(model, tree, "lora", image_size=8, **options)
    assert made.tokenizer.size == (8, 8)
    assert wanted_by(made.path) == {"labels": 2, "image_size": 8}
    assert load_model(model, **wanted_by(made.path)).tokenizer.size == (8, 8)
    with pytest.raises(AddendaError, match="belongs to another run: data was"):
        tune(model, tree, "lora", image_size=12, **options)


def test_images_are_not_grouped_by_length(model, tree):
    loaded = load_model(model, labels=2, dtype="float32")
    train = encode(read(tree, task="image"), loaded.tokenizer)
    losses = []
    for group in (True, False):
        adapter = ad.attach(loaded.model, "lora", also_train=loaded.heads, name=str(group))
        losses.append(fit(loaded.model, adapter, train, steps=3, batch=8, group=group).losses)
        ad.detach(loaded.model)
    assert losses[0] == losses[1]


def test_bfloat16_reads_pixels_of_its_own(model, tree):
    made = tune(model, tree, **(QUICK | {"dtype": "bfloat16"}))
    assert next(made.model.parameters()).dtype == torch.bfloat16
    assert np.isfinite(made.losses[-1][1])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("shira:mask=gradient", {}),
        ("lora-ga", {}),
        ("lora", {"checkpointing": True}),
        ("lora", {"accumulate": 2, "early_stop": 1}),
        ("lora", {"attention": "eager"}),
    ],
)
def test_other_ways(model, tree, method, options):
    evaluated = {"eval_data": 0.25} if "early_stop" in options else {}
    assert tune(model, tree, method, **QUICK, **options, **evaluated).steps == 2


def test_attention_is_measured_on_images(model, tree):
    loaded = load_model(model, labels=2, dtype="float32")
    found = attention.measure(loaded.model, encode(read(tree, task="image"), loaded.tokenizer), 4)
    assert set(found.seconds) == {"sdpa", "eager"} and not loaded.model.training
    assert len(compiled.blocks(loaded.model)) == 2


def test_a_loaded_module_brings_its_preparation(model, tree):
    loaded = load_model(model, labels=2, dtype="float32")
    made = tune(loaded.model, tree, tokenizer=loaded.tokenizer.sized(8), **QUICK)
    assert made.model is loaded.model
    with pytest.raises(AddendaError, match=r"wants its tokenizer= \(for images a Preparation"):
        tune(loaded.model, tree, **QUICK)
    with pytest.raises(AddendaError, match="image_size is for folders"):
        tune(loaded.model, tree, tokenizer=loaded.tokenizer, image_size=8, **QUICK)


def test_convolutional_models(tmp_path, tree):
    options = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 2}
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**options)).save_pretrained(tmp_path / "res")
    made = tune(tmp_path / "res", tree, "lora:rank=2", targets="conv", image_size=16, **QUICK)
    assert made.adapter.trainable > 0
    assert ad.plan(made.model, "lora:rank=2", targets="conv", batch=2, length=16).step.floor > 0
    ad.detach(made.model)
    base = load_model(tmp_path / "res", dtype="float32").model
    assert not any(m.training or "train" in vars(m) for m in made.model.modules())
    assert same_bits(dict(made.model.named_buffers()), dict(base.named_buffers()))  # batch norms have learned nothing
    assert same_bits({k: p for k, p in made.model.named_parameters()}, dict(base.named_parameters()))


def test_classifiers_keep_their_own_names(tmp_path, tree):
    torch.manual_seed(0)
    made = transformers.ViTForImageClassification(config(transformers.ViTConfig, num_labels=2))
    made.config.id2label = {0: "red", 1: "blue"}
    made.save_pretrained(tmp_path / "own")
    tuned = tune(tmp_path / "own", tree, **QUICK)
    assert tuned.model.config.id2label == {0: "red", 1: "blue"}
    with pytest.raises(AddendaError, match=r"takes images of 16 × 16 pixels only, .* resized to 8 × 8"):
        tune(tmp_path / "own", tree, image_size=8, **QUICK)
    (tree / "blue").rename(tree / "middle")
    with pytest.raises(AddendaError, match="middle is of no known class"):
        tune(tmp_path / "own", tree, **QUICK)


def test_corrupt_images_are_skipped_on_request_and_counted(tmp_path, model, tree):
    shutil.copytree(tree, tmp_path / "harmed")
    (tmp_path / "harmed" / "blue" / "003.png").write_bytes(b"nothing")
    with pytest.raises(AddendaError, match=r"blue/003.png: .*--skip-corrupt"):
        tune(model, tmp_path / "harmed", **QUICK)
    made = tune(model, tmp_path / "harmed", skip_corrupt=True, out=tmp_path / "run", **QUICK)
    assert made.skipped == ("blue/003.png",)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["data"]["examples"] == 31 and run["data"]["skipped"] == 1
    assert "1 corrupt images left out" in (tmp_path / "run" / "README.md").read_text()
    found = evaluate(made.model, made.tokenizer, tmp_path / "harmed", skip_corrupt=True)
    assert found.skipped == ("blue/003.png",) and len(found.items) == 31


def test_a_subset_is_judged_by_its_other_half(tmp_path, model, tree):
    made = tune(model, tree, subset="4/class", out=tmp_path / "run", **QUICK)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["data"]["examples"] == run["data"]["eval_examples"] == 8 == len(made.after["items"])
    assert run["options"]["subset"] == "4/class"
    with pytest.raises(AddendaError, match="64/class takes 128"):
        tune(model, tree, subset="64/class", **QUICK)


def test_what_a_model_is_for():
    assert task_in(config()) == "image"
    assert task_in(config(transformers.ViTConfig, architectures=["ViTForImageClassification"])) == "image"
    assert task_in(transformers.BertConfig(architectures=["BertModel"])) == "label"
    assert task_in(transformers.LlamaConfig(architectures=["LlamaForCausalLM"])) == "causal"


def test_models_of_texts_have_no_image_size(tmp_path, tree):
    from tiny_models import make_llama, make_tokenizer

    make_llama().save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(AddendaError, match="image_size is for models that read images"):
        load_model(tmp_path / "llama", image_size=8)
    loaded = load_model(tmp_path / "llama", dtype="float32")
    with pytest.raises(AddendaError, match="holds image examples, which a LlamaForCausalLM cannot learn"):
        tune(loaded.model, read(tree, task="image"), tokenizer=loaded.tokenizer, **QUICK)


def test_the_folder_says_how_images_are_prepared(model, tree):
    said = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_normalize": False}
    (model / "preprocessor_config.json").write_text(json.dumps(said))
    loaded = load_model(model, labels=2, dtype="float32")
    assert loaded.tokenizer == preparation_of(model)
    images = encode(read(tree, task="image"), loaded.tokenizer)
    assert images.batch([0])["pixel_values"].shape == (1, 3, 8, 8)
    assert 0 <= images.batch([0])["pixel_values"].min() <= images.batch([0])["pixel_values"].max() <= 1
    assert images.names == NAMES
