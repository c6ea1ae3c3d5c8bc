"""Exporting: written, read back, shown to act; or nothing is written."""

import pytest
import torch

import addenda as ad
from addenda import AddendaError
from addenda.exporting import export as exporting
from addenda.exporting.doors import DOORS, Door
from addenda.exporting.formats import format_of
from addenda.exporting.probe import probe_of
from shared import METHODS, attach, same_bits, stir
from shared import bits as bits_of
from toys import make_llama


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_lora_goes_out_comes_in_and_acts_the_same(tmp_path):
    model = make_llama()
    adapter = stir(ad.attach(model, METHODS["lora"]))
    before = bits_of(model)
    report = ad.export(adapter, "peft", tmp_path / "out")
    assert report.exact and set(report.errors) == set(adapter.methods) and report.effect.moved > 0
    assert "read back: " in str(report) and all(len(line) <= 80 for line in str(report).splitlines())
    assert [*ad.adapters(model)] == ["default"] and same_bits(before, bits_of(model))
    assert format_of(tmp_path / "out") == "peft" and "LORA" in ad.inspect(tmp_path / "out")
    other = make_llama()
    assert ad.import_adapter(other, tmp_path / "out").name == "default"
    batch = probe_of(model)
    with torch.no_grad():
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits, rtol=0, atol=1e-6)


def test_an_approximation_says_how_near_it_is(tmp_path):
    model = make_llama()
    adapter = stir(ad.attach(model, METHODS["svft"]))
    with pytest.raises(AddendaError, match="rank= or energy="):
        ad.export(adapter, "peft", tmp_path / "out")
    assert everything(tmp_path) == []
    low, high = (ad.export(adapter, "peft", tmp_path / f"{r}", rank=r) for r in (2, 8))
    assert not low.exact and max(low.errors.values()) > 0.1 and "an approximation" in str(low)
    assert high.exact and high.effect.relative < 1e-4 < low.effect.relative


def test_what_acts_otherwise_when_read_back_is_not_written(tmp_path, monkeypatch):
    model = make_llama()
    adapter = stir(ad.attach(model, METHODS["lora"]))
    real = Door.read

    def doubled(self, path, model):
        forms = real(self, path, model)
        for _, p in forms.sites.values():
            p["B"] = 2 * p["B"]
        return forms

    def silent(self, path, model):
        forms = real(self, path, model)
        for _, p in forms.sites.values():
            p["B"] = 0 * p["B"]
        return forms

    for wrong, said in ((doubled, "acts otherwise"), (silent, "no effect")):
        monkeypatch.setattr(Door, "read", wrong)
        with pytest.raises(AddendaError, match=said):
            ad.export(adapter, "peft", tmp_path / "out")
        assert everything(tmp_path) == [] and [*ad.adapters(model)] == ["default"]


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    model = make_llama()
    adapter = stir(ad.attach(model, METHODS["lora"]))

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "effect", stopped)
    with pytest.raises(KeyboardInterrupt):
        ad.export(adapter, "peft", tmp_path / "out")
    assert everything(tmp_path) == [] and [*ad.adapters(model)] == ["default"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"door": "pefd"}, "no door 'pefd'.*peft"),
        ({"uniform": True}, "has no option 'uniform'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"door": None}, "no door None"),
        ({"second": {"nothing.here": torch.eye(2)}}, "second= has moments at 'nothing.here'"),
        ({"out": "taken"}, "there already"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, change, said):
    (tmp_path / "taken").write_text("theirs")
    adapter = stir(ad.attach(make_llama(), METHODS["lora"]))
    given = {"door": "peft", "out": "out"} | change
    with pytest.raises(AddendaError, match=said):
        ad.export(adapter, given.pop("door"), tmp_path / given.pop("out"), **given)
    assert everything(tmp_path) == ["taken"] and (tmp_path / "taken").read_text() == "theirs"


@pytest.mark.parametrize("door", DOORS)
def test_hidden_methods_merged_and_idle_changes_are_refused_at_every_door(tmp_path, door):
    ids = torch.arange(10)[None]
    with pytest.raises(AddendaError, match=r"houlsby.*activations"):
        ad.export(stir(attach(make_llama(), "houlsby", ids)), door, tmp_path / "a")
    fresh = ad.attach(make_llama(tie_word_embeddings=False), METHODS["lora"])
    with pytest.raises(AddendaError, match="moves no output"):
        ad.export(fresh, door, tmp_path / "b")
    stir(fresh)
    ad.merge(fresh.model)
    with pytest.raises(AddendaError, match="unmerge"):
        ad.export(fresh, door, tmp_path / "c")
    assert everything(tmp_path) == []


def test_our_own_file_is_sent_to_load(tmp_path):
    adapter = stir(ad.attach(make_llama(), METHODS["lora"]))
    file = adapter.save(tmp_path / "own.safetensors")
    with pytest.raises(AddendaError, match=r"addenda\.load"):
        ad.import_adapter(make_llama(), file)


def test_what_is_no_adapter_or_no_model_is_told(tmp_path):
    model = make_llama()
    with pytest.raises(AddendaError, match="of an adapter, got a LlamaForCausalLM"):
        ad.export(model, "peft", tmp_path / "out")
    with pytest.raises(AddendaError, match="Module as the model, got str"):
        ad.import_adapter("model", tmp_path)
    assert everything(tmp_path) == []


def test_refused_sites_are_told_once_for_each_reason(tmp_path):
    adapter = stir(ad.attach(make_llama(tie_word_embeddings=False), METHODS["lora"], also_train=["lm_head"]))
    with pytest.raises(AddendaError, match=r"^1 of \d+ sites .*lm_head.weight \(full copy\): "):
        ad.export(adapter, "gguf", tmp_path / "out")
    houlsby = stir(attach(make_llama(), "houlsby", torch.arange(10)[None]))
    with pytest.raises(AddendaError, match=r"layers\.\*\.mlp\.down_proj@output × 2 \(houlsby\)") as error:
        ad.export(houlsby, "peft", tmp_path / "out")
    assert str(error.value).count("it changes activations") == 1 and everything(tmp_path) == []


def test_what_rounding_takes_is_told_in_figures_that_show_it(tmp_path):
    adapter = stir(ad.attach(make_llama(), METHODS["lora"]))
    report = ad.export(adapter, "gguf", tmp_path / "out.gguf", dtype="f16")
    assert 0 < max(report.errors.values()) < 1e-3 and "e-04" in str(report) and "0.000" not in str(report)
    assert all(len(line) <= 80 for line in str(report).splitlines())


def test_an_export_inside_a_block_leaves_the_caller_in_it(tmp_path):
    model = make_llama(tie_word_embeddings=False).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        base = model(ids).logits
        adapter = stir(ad.attach(model, "lora:rank=2"))
        acting = model(ids).logits
        with ad.disabled(model):
            for door in ("peft", "merged"):
                ad.export(adapter, door, tmp_path / door)
                assert torch.equal(model(ids).logits, base)
            ad.reduce(adapter, rank=1)
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, acting) and not torch.equal(acting, base)
