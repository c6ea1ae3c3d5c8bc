"""Merging on disk: the folder is what a merge in memory would have saved, and nothing is there where it cannot be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read, write
from addenda.core.file.rename import renamed
from addenda.exporting.merged import merge_on_disk
from addenda.models.checkpoint_files import INDEX, SINGLE, CheckpointFiles
from architectures import batch_for, make
from shared import HIDDEN, METHODS, NAMES, attach, stir, where
from tiny_models import make_bert, make_llama, make_llama_classifier, make_tokenizer

IDS = torch.arange(1, 25).view(2, 12)
BATCH = {"input_ids": IDS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "base"
    make_llama().save_pretrained(folder, max_shard_size="12KB")
    make_tokenizer().save_pretrained(folder)
    return folder


def llama(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def logits(model, batch=BATCH):
    with torch.no_grad():
        return model(**batch).logits


def trained(folder, file, method="lora:rank=2", size=0.1, **options):
    """A model with a moved adapter on it, whose file is written."""
    model = llama(folder)
    adapter = stir(ad.attach(model, method, **options), size)
    adapter.save(file)
    return model


def names(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_every_method_of_weights_gives_the_folder_that_acts_as_the_adapter(base, tmp_path, name):
    model, options = llama(base), {}
    if name in ("bitfit",):  # this model has no bias
        options = {"targets": "norm"}
    if name == "trainable-tokens":
        options = {"targets": "embedding"}
    if name == "ln-tuning":
        options = {"targets": "norm"}
    adapter = stir(attach(model, name, IDS, targets=options.get("targets", where(name))), 0.1)
    adapter.save(tmp_path / "a.safetensors")
    report = merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "out", probe={"input_ids": IDS % 8})
    live, merged = (logits(m, {"input_ids": IDS % 8}) for m in (model, llama(tmp_path / "out")))
    assert report.checked and report.effect > 1e-4
    assert set(report.sites) == set(adapter.methods) and report.total == 0
    with ad.disabled(model):
        assert (live - logits(model, {"input_ids": IDS % 8})).abs().max() > 1e-4
    assert (live - merged).abs().max() <= 1e-5 * live.abs().max()


@pytest.mark.parametrize("name", HIDDEN[:3])
def test_hidden_methods_are_refused_by_name(base, tmp_path, name):
    attach(llama(base), METHODS[name], IDS).save(tmp_path / "a.safetensors")
    with pytest.raises(AddendaError, match=f"{name} changes what modules return .*no weight can hold"):
        merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert names(tmp_path) == {"a.safetensors"}


KINDS = {
    "GPT2LMHeadModel": ["linear", "transformer.wte.weight"],  # transposed, and a tied head
    "T5ForConditionalGeneration": ["linear", "shared.weight"],  # four names for one weight
    "MixtralForCausalLM": ["linear", "*.experts.*_proj"],  # experts that lie one by one in the files
    "Qwen2MoeForCausalLM": ["linear", "*.experts.*_proj", "embedding"],
    "GptOssForCausalLM": ["*.experts.*_proj"],
    "BertForSequenceClassification": ["linear", "embedding"],
    "ViTForImageClassification": ["linear", "conv"],
    "Wav2Vec2ForCTC": ["linear"],
    "FalconForCausalLM": ["linear"],
}


@pytest.mark.parametrize("name", KINDS)
def test_every_weight_is_what_a_merge_in_memory_writes(name, tmp_path):
    made = make(name)
    made.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    model = getattr(transformers, name).from_pretrained(tmp_path / "base")
    also_train = ["classifier"] if name.startswith("Bert") else []
    stir(ad.attach(model, "lora:rank=2", targets=KINDS[name], also_train=also_train), 0.2)
    ad.adapters(model)["default"].save(tmp_path / "a.safetensors")
    report = merge_on_disk(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", probe=batch_for(model))
    assert report.effect > 1e-3 and report.moved <= report.limit
    ad.merge(model)
    ad.detach(model, keep_merged=True)
    fresh, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, expected = made.state_dict(), model.state_dict()
    for key, t in fresh.state_dict().items():
        assert torch.allclose(t, expected[key], atol=1e-7, rtol=1e-6), key
    assert any(not torch.equal(t, before[k]) for k, t in expected.items())
    one, other = (CheckpointFiles.of(tmp_path / f) for f in ("base", "out"))
    assert {k: (t.shard, t.code, t.shape) for k, t in one.tensors.items()} == {
        k: (t.shard, t.code, t.shape) for k, t in other.tensors.items()
    }
    assert names(tmp_path / "base") == names(tmp_path / "out")


def test_a_tie_stays_and_both_sides_act(tmp_path):
    model = make("GPT2LMHeadModel")
    model.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / SINGLE)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()  # both names lie in the file
    save_file(tensors, tmp_path / "base" / SINGLE, {"format": "pt"})
    stir(ad.attach(model, "lora:rank=2", targets="transformer.wte.weight"), 0.2)
    ad.adapters(model)["default"].save(tmp_path / "a.safetensors")
    merge_on_disk(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", probe=batch_for(model))
    after = load_file(tmp_path / "out" / SINGLE)
    assert torch.equal(after["lm_head.weight"], after["transformer.wte.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])
    fresh = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert fresh.lm_head.weight is fresh.transformer.wte.weight


def test_several_adapters_add_up(base, tmp_path):
    model = llama(base)
    for name, method in {"one": "lora:rank=2", "two": "shira:density=0.2"}.items():
        stir(ad.attach(model, method, name=name), 0.1, seed=len(name)).save(tmp_path / f"{name}.safetensors")
    ad.switch(model, ("one", "two"))
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    merge_on_disk(base, files, tmp_path / "out", probe=BATCH)
    merged = logits(llama(tmp_path / "out"))
    both = logits(model)
    ad.switch(model, "one")
    assert (merged - both).abs().max() <= 1e-5 * both.abs().max() < (logits(model) - both).abs().max()


def test_files_of_a_model_whose_modules_had_other_names(base, tmp_path):
    """The change, and random tensors of theirs, are those of training."""
    file, out = tmp_path / "a.safetensors", tmp_path / "out"
    expected = logits(trained(base, file, "fourierft:frequencies=16"))
    header, tensors = read(file)
    older = {"model.layers.*.self_attn.*_proj": "decoder.*.attn.*", "model": "decoder"}
    write(file, *renamed(header, tensors, older, file))
    with pytest.raises(AddendaError, match="With rename="):
        merge_on_disk(base, file, out)
    back = {"decoder.*.attn.*": "model.layers.*.self_attn.*_proj", "decoder": "model"}
    merge_on_disk(base, file, out, rename=back)
    assert torch.allclose(logits(llama(out)), expected, atol=1e-4)


def test_adapters_that_hold_a_weight_in_two_ways(base, tmp_path):
    trained(base, tmp_path / "a.safetensors", targets="q_proj")
    trained(base, tmp_path / "b.safetensors", targets="model.layers.*.self_attn.q_proj.weight")
    with pytest.raises(AddendaError, match="as a linear and as a parameter"):
        merge_on_disk(base, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "out")


def test_codes_of_few_bits(base, tmp_path):
    model = trained(base, tmp_path / "a.safetensors", "lora:rank=4,bits=2")
    model = llama(base)
    ad.load(model, tmp_path / "a.safetensors")
    merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "out", probe=BATCH)
    live = logits(model)
    assert (live - logits(llama(tmp_path / "out"))).abs().max() <= 1e-5 * live.abs().max()


# -- heads and classes -------------------------------------------------------------------------------------------------


def test_a_base_becomes_the_classifier_that_was_trained_on_it(base, tmp_path):
    model = transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    stir(ad.attach(model, "lora:rank=2", also_train=["score"]), 0.1)
    adapter = ad.adapters(model)["default"]
    adapter.labels = ("bad", "so so", "good")
    adapter.save(tmp_path / "a.safetensors")
    report = merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert report.checked
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "bad", "1": "so so", "2": "good"}
    fresh, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(fresh.score.weight, model.score.addenda.default.weight.value)
    live = logits(model)
    assert (live - logits(fresh)).abs().max() <= 1e-5 * live.abs().max()


def test_a_head_that_the_folder_has_is_replaced(tmp_path):
    make_llama_classifier().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    stir(ad.attach(model, "lora:rank=2", targets="q_proj", also_train=["score"]), 0.1)
    ad.adapters(model)["default"].save(tmp_path / "a.safetensors")
    merge_on_disk(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    fresh = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(fresh.score.weight, model.score.addenda.default.weight.value)
    assert not torch.equal(fresh.score.weight, make_llama_classifier().score.weight)


def test_an_encoder_without_a_head_becomes_a_classifier(tmp_path):
    make_bert().bert.save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    stir(ad.attach(model, "lora:rank=2", also_train=["classifier"]), 0.1)
    ad.adapters(model)["default"].save(tmp_path / "a.safetensors")
    merge_on_disk(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    fresh = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (logits(model) - logits(fresh)).abs().max() <= 1e-5


def test_a_head_that_nobody_trained_is_refused(tmp_path):
    make_bert().bert.save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    stir(ad.attach(model, "lora:rank=2"), 0.1).save(tmp_path / "a.safetensors")
    with pytest.raises(AddendaError, match=r"no weights for 2 parameters .*classifier\.weight"):
        merge_on_disk(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")


# -- dtypes and rounding -----------------------------------------------------------------------------------------------


def test_an_adapter_that_was_trained_on_the_rounded_base(base, tmp_path):
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    stir(ad.attach(model, "lora:rank=2"), 0.1).save(tmp_path / "a.safetensors")
    report = merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "out", probe=BATCH)
    assert report.dtype == "float32" and report.total == 0
    exact = llama(base)
    ad.load(exact, tmp_path / "a.safetensors", base="compatible")
    assert (logits(exact) - logits(llama(tmp_path / "out"))).abs().max() <= 1e-5


def test_another_dtype_is_that_of_weights_and_config(base, tmp_path):
    trained(base, tmp_path / "a.safetensors", size=0.5)
    report = merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "out", dtype="bfloat16", probe=BATCH)
    assert report.dtype == "bfloat16" and 0 < report.total < 0.1
    assert {t.code for t in CheckpointFiles.of(tmp_path / "out").tensors.values()} == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] * 2 == json.loads((base / INDEX).read_text())["metadata"]["total_size"]
    assert llama(tmp_path / "out").dtype == torch.bfloat16
    model = llama(base)
    ad.load(model, tmp_path / "a.safetensors")
    ad.merge(model)
    exact, merged = model.state_dict(), llama(tmp_path / "out").state_dict()
    assert all(torch.equal(t, exact[k].bfloat16()) for k, t in merged.items())  # rounded once


def test_what_rounding_would_take_is_refused_with_the_ways_out(base, tmp_path):
    model = llama(base).bfloat16()
    model.save_pretrained(tmp_path / "half")
    half = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "half")
    stir(ad.attach(half, "lora:rank=2"), 1e-4).save(tmp_path / "a.safetensors")
    before = names(tmp_path)
    with pytest.raises(
        AddendaError, match=r"Nothing was written: rounding to bfloat16 takes too much.*dtype='float32'"
    ):
        merge_on_disk(tmp_path / "half", tmp_path / "a.safetensors", tmp_path / "out", check=False)
    assert names(tmp_path) == before
    for i, way in enumerate(
        ({"dtype": torch.float32}, {"rounding": "stochastic", "allow_loss": 2.0}, {"allow_loss": 1.0})
    ):
        report = merge_on_disk(tmp_path / "half", tmp_path / "a.safetensors", tmp_path / f"out{i}", check=False, **way)
        assert not report.checked and "outputs: not checked, as check=False says" in report.notes
        assert (report.total < 1e-6) == ("dtype" in way)


# -- what is refused, and what stays ----------------------------------------------------------------------------------


def test_a_target_that_exists_is_refused_before_anything_is_read(base, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("addenda.exporting.disk_merge.read", lambda path: pytest.fail("was read"))
    with pytest.raises(AddendaError, match="is there already"):
        merge_on_disk(base, tmp_path / "no.safetensors", tmp_path / "out")
    with pytest.raises(AddendaError, match="which is read"):
        merge_on_disk(base, tmp_path / "no.safetensors", base / "out")


def test_another_base_is_refused_and_nothing_is_written(base, tmp_path):
    trained(base, tmp_path / "a.safetensors")
    other = make_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        AddendaError, match=r"1 of 14 sites differ, e\.g\. model\.layers\.1\.mlp\.up_proj\. .*Nothing was written"
    ):
        merge_on_disk(tmp_path / "other", tmp_path / "a.safetensors", tmp_path / "out")
    assert names(tmp_path) == {"a.safetensors", "other"}
    report = merge_on_disk(
        tmp_path / "other", tmp_path / "a.safetensors", tmp_path / "out", base="compatible", probe=BATCH
    )
    assert report.checked  # sixteen values of each weight are the same


def test_an_adapter_of_other_shapes(base, tmp_path):
    trained(base, tmp_path / "a.safetensors")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
    )).save_pretrained(tmp_path / "other")  # fmt: skip
    with pytest.raises(AddendaError, match=r"does not fit this LlamaForCausalLM.*the model has no model\.layers"):
        merge_on_disk(tmp_path / "other", tmp_path / "a.safetensors", tmp_path / "out")


def test_an_adapter_trained_in_another_form_of_the_base(base, tmp_path):
    model = llama(base)
    ad.quantize(model, "int8")
    stir(ad.attach(model, "lora:rank=2"), 0.1).save(tmp_path / "a.safetensors")
    with pytest.raises(AddendaError, match=r"trained on a base in int8.*merge\(model, base=…, full=…\)"):
        merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "out")


@pytest.mark.parametrize("how", ["quantised", "pickled", "code"])
def test_folders_that_cannot_be_merged_into(base, tmp_path, how):
    trained(base, tmp_path / "a.safetensors")
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    if how == "quantised":
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    if how == "code":
        config["architectures"] = ["MineForCausalLM"]
    if how == "pickled":
        for file in (tmp_path / "base").glob("*.safetensors*"):
            file.unlink()
        (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    reason = {"quantised": "quantised from", "pickled": "pickles, which can run code", "code": "running code"}[how]
    with pytest.raises(AddendaError, match=reason):
        merge_on_disk(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert names(tmp_path) == {"a.safetensors", "base"}


def test_an_adapter_that_was_not_trained(base, tmp_path):
    ad.attach(llama(base), "lora:rank=2").save(tmp_path / "a.safetensors")
    with pytest.raises(AddendaError, match="changes no weight"):
        merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "out", check=False)


@pytest.mark.parametrize("options", [{"rounding": "up"}, {"base": "any"}, {"dtype": "int8"}, {"dtype": "bflot16"}])
def test_options_are_checked_first(base, tmp_path, options):
    with pytest.raises(AddendaError, match=next(iter(options))):
        merge_on_disk(base, tmp_path / "none.safetensors", tmp_path / "out", **options)


def test_no_adapter_and_none_there(base, tmp_path):
    with pytest.raises(AddendaError, match="names no file"):
        merge_on_disk(base, [], tmp_path / "out")
    with pytest.raises(AddendaError, match="There is no file"):
        merge_on_disk(base, tmp_path / "none.safetensors", tmp_path / "out")


def test_merged_weights_that_act_otherwise_get_no_name(base, tmp_path, monkeypatch):
    """The check sees what was written: here one weight too few."""
    trained(base, tmp_path / "a.safetensors", size=0.3)
    from addenda.exporting.disk_merge import DiskMerge

    right = DiskMerge._changed

    def wrong(self, name, W, *rest):
        new, lost = right(self, name, W, *rest)
        return (W.clone() if name == "model.layers.0.mlp.down_proj.weight" else new), lost

    monkeypatch.setattr(DiskMerge, "_changed", wrong)
    with pytest.raises(AddendaError, match=r"Nothing was written: of .* outputs .* moves by"):
        merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "out", probe=BATCH)
    assert names(tmp_path) == {"a.safetensors"}


def test_an_interrupt_leaves_nothing(base, tmp_path):
    trained(base, tmp_path / "a.safetensors")

    def stop(done, total, what):
        if what == "weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_on_disk(base, tmp_path / "a.safetensors", tmp_path / "deep" / "out", progress=stop)
    assert names(tmp_path) == {"a.safetensors"}


KILLED = """
    import os, signal, sys
    from addenda.exporting.merged import merge_on_disk
    def stop(done, total, what):
        if what == "weights":
            os.kill(os.getpid(), signal.SIGKILL)
    merge_on_disk(*sys.argv[1:4], check=False, progress=stop)
"""


def test_a_kill_in_the_middle_leaves_no_such_folder_and_the_next_run_works(base, tmp_path):
    model = trained(base, tmp_path / "a.safetensors")
    arguments = [str(base), str(tmp_path / "a.safetensors"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not os.path.lexists(tmp_path / "out")
    merge_on_disk(*arguments, probe=BATCH)
    assert (logits(model) - logits(llama(tmp_path / "out"))).abs().max() <= 1e-5


def test_what_lies_beside_the_weights(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    folder = tmp_path / "base"
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"graph")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    trained(base, folder / "adapter.safetensors")
    report = merge_on_disk(folder, folder / "adapter.safetensors", tmp_path / "out", probe=BATCH)
    assert names(tmp_path / "out") == names(base) | {"1_Pooling"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert any("adapter.safetensors, onnx/model.onnx, pytorch_model.bin" in note for note in report.notes)


@pytest.mark.parametrize("given", [3, None, torch.nn.Linear(1, 1)])
def test_what_is_no_file_is_no_adapter_to_merge(given, tmp_path):
    with pytest.raises(AddendaError, match="adapter is the path of a file"):
        ad.merge_on_disk(tmp_path / "model", given, tmp_path / "out")
    assert not any(tmp_path.iterdir())
