"""The difference of two checkpoints as a file: it loads strictly, and acts as the dense difference in its form does."""

import shutil

import pytest
import torch
import transformers

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read, write
from addenda.exporting import checkpoint_pair
from addenda.exporting.extract import extract
from addenda.models import checkpoint_files
from architectures import batch_for, make
from shared import bits, same_bits
from tiny_models import make_bert, make_llama

NAMES = ("LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "MixtralForCausalLM", "MambaForCausalLM",
         "ConvNextForImageClassification")  # fmt: skip
IDS = torch.arange(1, 25).view(2, 12)


def tuned_of(model, size=0.02, seed=3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g).to(p) * size)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    make_llama().save_pretrained(folder / "base", max_shard_size="20KB")
    tuned_of(make_llama()).save_pretrained(folder / "tuned")
    return folder


def llama(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def main(model, batch):
    with torch.no_grad():
        y = model(**batch)
    return y.logits if hasattr(y, "logits") else y[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to", ["lora", "patch"])
def test_what_loses_nothing_is_the_tuned_model(name, to, tmp_path):
    cls = getattr(transformers, name)
    make(name).save_pretrained(tmp_path / "base", max_shard_size="8KB")
    tuned = tuned_of(cls.from_pretrained(tmp_path / "base"))
    tuned.save_pretrained(tmp_path / "tuned")
    batch = batch_for(tuned)
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x.safetensors", to=to, probe=batch)
    model = cls.from_pretrained(tmp_path / "base")
    before = main(model, batch)
    adapter = ad.load(model, tmp_path / "x.safetensors")  # strictly
    live, made = main(tuned, batch), main(model, batch)
    assert (before - live).abs().max() > 1e-3
    assert (made - live).abs().max() <= 1e-5 * max(1.0, float(live.abs().max()))
    assert report.error < 1e-5 and report.outputs.relative < 1e-4
    assert set(adapter.methods) == {s.path for s in report.sites} | set(report.copies)
    if to == "patch":
        ad.merge(model)
        ad.detach(model, keep_merged=True)
        assert same_bits(bits(model), bits(cls.from_pretrained(tmp_path / "tuned")))


LOSSY = [("lora", {"rank": 4}), ("lora", {"energy": 0.5}), ("sparse", {"density": 0.1}), ("sparse", {"count": 7}),
         ("bits", {"bits": 2}), ("bits", {})]  # fmt: skip


@pytest.mark.parametrize(("to", "options"), LOSSY)
def test_errors_are_those_of_the_dense_algebra(folders, tmp_path, to, options):
    report = extract(folders / "base", folders / "tuned", tmp_path / "x.safetensors", to=to, probe={"input_ids": IDS},
                     **options)  # fmt: skip
    base, tuned = llama(folders / "base"), llama(folders / "tuned")
    model = llama(folders / "base")
    ad.load(model, tmp_path / "x.safetensors")
    ad.merge(model)
    ad.detach(model, keep_merged=True)
    assert len(report.sites) == 16 and len(report.copies) == 5
    for row in report.sites:
        W, T, M = (m.get_submodule(row.path).weight.detach().double() for m in (base, tuned, model))
        D = T - W
        assert row.error == pytest.approx(float((M - T).norm() / D.norm()), abs=1e-5)
        if "rank" in options:  # the tail of its singular values, and no better rank-4 matrix is there
            s = torch.linalg.svdvals(D)
            assert row.error == pytest.approx(float(s[4:].norm() / s.norm()), rel=1e-5)
        if "density" in options:
            largest = D.abs().flatten().sort(descending=True).values[round(0.1 * D.numel()) :]
            assert row.error == pytest.approx(float(largest.norm() / D.norm()), rel=1e-5)
    live, made, before = (main(m, {"input_ids": IDS}) for m in (tuned, model, base))
    assert report.outputs.relative == pytest.approx(float((made - live).norm() / (live - before).norm()), rel=1e-3)
    assert report.outputs.largest == pytest.approx(float((made - live).abs().max()), rel=1e-3)
    assert report.outputs.moved == pytest.approx(float((before - live).abs().max()), rel=1e-3)


def test_it_is_an_ordinary_file_of_the_base(folders, tmp_path):
    extract(folders / "base", folders / "tuned", tmp_path / "x.safetensors", rank=2)
    header, _ = read(tmp_path / "x.safetensors")
    model = llama(folders / "base")
    written = ad.attach(model, "lora:rank=2").save(tmp_path / "own.safetensors")
    expected = {s.path: (s.kind, s.shape, s.dtype, s.hash, s.sample) for s in read(written)[0].sites}
    found = {s.path: (s.kind, s.shape, s.dtype, s.hash, s.sample) for s in header.sites}
    assert expected.items() <= found.items() and len(expected) == 14
    with pytest.raises(AddendaError, match="other base weights"):
        ad.load(tuned_of(llama(folders / "base"), seed=9), tmp_path / "x.safetensors")
    assert "lora" in ad.inspect(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("to", "options"), [*LOSSY[1:4:2], ("bits", {"bits": 2}), ("patch", {})])
def test_the_file_is_the_one_that_is_written_at_once(folders, tmp_path, to, options, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "PIECE", 100)  # smaller than every matrix, and no divisor of most
    monkeypatch.setattr(checkpoint_pair, "PIECE", 100)
    extract(folders / "base", folders / "tuned", tmp_path / "x.safetensors", to=to, check=False, **options)
    header, tensors = read(tmp_path / "x.safetensors")
    write(tmp_path / "y.safetensors", header, tensors)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    if to != "patch":
        return
    base, tuned = llama(folders / "base").state_dict(), llama(folders / "tuned").state_dict()
    for s in header.sites:
        if not s.is_head:
            name = s.path if s.path in base else f"{s.path}.weight"
            expected = torch.nonzero((base[name] != tuned[name]).flatten()).flatten().int()
            assert torch.equal(tensors[f"{s.path}/index"], expected) and len(expected) > 100
            assert torch.equal(tensors[f"{s.path}/values"], tuned[name].flatten()[expected])


def test_only_what_differs_is_in_it(folders, tmp_path):
    tuned = llama(folders / "base")
    with torch.no_grad():
        tuned.model.layers[1].self_attn.v_proj.weight[2, 3] += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(folders / "base", tmp_path / "tuned", tmp_path / "x.safetensors")
    assert [(s.path, s.form) for s in report.sites] == [("model.layers.1.self_attn.v_proj", "rank 1")]
    assert not report.copies and "1 weights as lora" in str(report)


def test_a_merge_and_an_extraction_undo_each_other(folders, tmp_path):
    model = llama(folders / "base")
    g = torch.Generator().manual_seed(0)
    adapter = ad.attach(model, "lora:rank=3")
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    adapter.save(tmp_path / "a.safetensors")
    ad.merge_on_disk(folders / "base", tmp_path / "a.safetensors", tmp_path / "tuned")
    report = extract(folders / "base", tmp_path / "tuned", tmp_path / "x.safetensors", rank=3)
    assert {s.path for s in report.sites} == set(adapter.methods) and report.error < 1e-5
    again = llama(folders / "base")
    ad.load(again, tmp_path / "x.safetensors")
    live = main(model, {"input_ids": IDS})
    assert (live - main(again, {"input_ids": IDS})).abs().max() < 1e-5


def test_a_checkpoint_in_half_precision_is_compared_with_the_rounded_base(folders, tmp_path):
    tuned = llama(folders / "base").bfloat16()
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight[0] += 1.0
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(folders / "base", tmp_path / "tuned", tmp_path / "x.safetensors", rank=1)
    assert [s.path for s in report.sites] == ["model.layers.0.mlp.up_proj"] and report.error < 0.01
    with pytest.raises(AddendaError, match="a patch holds numbers of one dtype"):
        extract(folders / "base", tmp_path / "tuned", tmp_path / "y.safetensors", to="patch")


def test_a_patch_of_half_precision_is_small_and_exact(tmp_path):
    base = make_llama().bfloat16()
    base.save_pretrained(tmp_path / "base")
    tuned_of(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"), size=1e-5).save_pretrained(
        tmp_path / "tuned"
    )
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x.safetensors", to="patch")
    _, tensors = read(tmp_path / "x.safetensors")
    assert report.outputs.largest == 0 and report.error == 0
    values = [t for k, t in tensors.items() if k.endswith("/values")]
    assert values and all(t.dtype == torch.bfloat16 for t in values)
    assert sum(t.numel() for t in values) < 0.5 * sum(p.numel() for p in base.parameters())


def test_a_classifier_that_was_tuned_from_a_bare_encoder(tmp_path):
    make_bert().bert.save_pretrained(tmp_path / "base")
    tuned = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2}
    )
    tuned_of(tuned).save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x.safetensors")
    assert {"classifier.weight", "classifier.bias"} <= set(report.copies)
    assert read(tmp_path / "x.safetensors")[0].labels == ("bad", "fair", "good")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    ad.load(model, tmp_path / "x.safetensors")
    assert (main(model, {"input_ids": IDS}) - main(tuned, {"input_ids": IDS})).abs().max() < 1e-5


def test_buffers_that_differ_are_said(tmp_path):
    name = "ResNetForImageClassification"
    make(name).save_pretrained(tmp_path / "base")
    tuned = tuned_of(make(name))
    tuned.resnet.embedder.embedder.normalization.running_mean += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x.safetensors", check=False)
    assert any("no adapter holds buffers: resnet.embedder" in note for note in report.notes)
    assert report.outputs is None and "outputs: not compared, as check=False says" in report.notes


# -- what is refused -------------------------------------------------------------------------------------------------


def test_the_same_model(folders, tmp_path):
    with pytest.raises(AddendaError, match="there is no difference"):
        extract(folders / "base", folders / "base", tmp_path / "x.safetensors")
    shutil.copytree(folders / "base", tmp_path / "copy")
    with pytest.raises(AddendaError, match=r"Nothing differs .* the same model"):
        extract(folders / "base", tmp_path / "copy", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_target_that_exists_goes_before_all(tmp_path):
    (tmp_path / "x.safetensors").write_text("somebody's")
    with pytest.raises(AddendaError, match="is there already"):
        extract(tmp_path / "none", tmp_path / "neither", tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_text() == "somebody's"


@pytest.mark.parametrize(("options", "reason"), [
    ({"to": "loar"}, "There is no form 'loar'.*'lora'"),
    ({"to": "patch", "rank": 2}, "rank= is not read with to='patch'"),
    ({"rank": 2, "energy": 0.5}, "rank= or energy="), ({"to": "sparse"}, "density= or count="), ({"rank": 0}, "rank"),
    ({"to": "bits", "bits": 9}, "bits"),
])  # fmt: skip
def test_options(folders, tmp_path, options, reason):
    with pytest.raises(AddendaError, match=reason):
        extract(folders / "base", folders / "tuned", tmp_path / "x.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing(folders, tmp_path):
    def stop(done, path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(folders / "base", folders / "tuned", tmp_path / "x.safetensors", progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_patch_that_does_not_act_gets_no_name(folders, tmp_path, monkeypatch):
    from addenda.exporting import extract as module

    real = module._Extracted._add_patch
    monkeypatch.setattr(
        module._Extracted,
        "_add_patch",
        lambda self, changed, mark: None if "up_proj" in changed.name else real(self, changed, mark),
    )
    with pytest.raises(AddendaError, match="acts otherwise than the tuned model"):
        extract(folders / "base", folders / "tuned", tmp_path / "x.safetensors", to="patch")
    assert not list(tmp_path.iterdir())
