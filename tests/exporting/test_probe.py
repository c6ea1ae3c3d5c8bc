"""A batch to try a model on, and the proof of effect."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda import AddendaError
from addenda.exporting.install import install
from addenda.exporting.probe import effect, outputs_of, probe_for, probe_of
from shared import METHODS, stir
from toys import make_bert, make_dinov2, make_gpt2, make_llama, make_t5, make_vit

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_bert, make_t5, make_vit, make_dinov2])
def test_the_probe_of_a_model_runs_through_it_and_is_always_the_same(make):
    model = make()
    batch, again = probe_of(model), probe_of(make())
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    with torch.no_grad():
        assert all(bool(t.isfinite().all()) for t in model(**batch).values() if isinstance(t, torch.Tensor))
    ids = batch.get("input_ids")
    assert ids is None or len(ids.unique()) > 4


def test_a_model_without_a_config_needs_a_probe_of_its_own():
    with pytest.raises(AddendaError, match="Give probe="):
        probe_of(nn.Linear(2, 2))


def copy_of(adapter, name, factor):
    def scaled(t):
        return {k: v * factor if k == "B" else v for k, v in t.stored().items()}

    return install(adapter.model, {p: (t.method, scaled(t)) for p, t in adapter.sites()}, name=name)


def test_effect_tells_equal_from_absent_from_other():
    model = make_llama()
    adapter = stir(ad.attach(model, METHODS["lora"]))
    batch = probe_of(model)
    equal = effect(adapter, copy_of(adapter, "equal", 1.0), batch)
    assert equal.difference == 0 and equal.moved > 0.01 * equal.size
    with pytest.raises(AddendaError, match="no effect"):
        effect(adapter, copy_of(adapter, "absent", 0.0), batch, exact=False)
    with pytest.raises(AddendaError, match="acts otherwise"):
        effect(adapter, copy_of(adapter, "other", 1.1), batch)
    near = effect(adapter, copy_of(adapter, "near", 1.1), batch, exact=False)
    assert 0.01 < near.relative < 1
    assert [*ad.adapters(model)] == ["default", "equal", "absent", "other", "near"]


def test_an_adapter_that_moves_nothing_proves_nothing():
    model = make_llama()
    adapter = ad.attach(model, METHODS["lora"])
    with pytest.raises(AddendaError, match="moves no output"):
        effect(adapter, adapter, probe_of(model))


def test_outputs_leave_the_model_as_it_was():
    model = make_llama()
    stir(ad.attach(model, METHODS["lora"]))
    model.train()
    base = outputs_of(model, (), probe_of(model)).main
    ad.switch(model, None)
    with torch.no_grad():
        assert torch.equal(base, model.eval()(**probe_of(model)).logits)
    ad.switch(model, "default")
    model.train()
    outputs_of(model, (), probe_of(model))
    assert model.training and "default" in str(ad.status(model))


def test_what_rounding_does_in_a_deep_model_is_no_other_adapter(monkeypatch):
    from addenda.exporting import probe

    model = make_llama()
    adapter = stir(ad.attach(model, METHODS["lora"]))
    near, batch = copy_of(adapter, "near", 1 + 1e-4), probe_of(model)
    with pytest.raises(AddendaError, match="acts otherwise"):
        effect(adapter, near, batch)
    monkeypatch.setattr(probe, "_noise", lambda *_: 1e-2)  # as if float32 were that far from float64
    assert 0 < effect(adapter, near, batch).difference < 2e-2
    monkeypatch.undo()
    assert 0 < probe._noise(adapter, batch) < 1e-5


def test_an_adapter_of_few_tokens_is_probed_with_these():
    model = make_llama(vocab_size=500, tie_word_embeddings=False)
    seen = set(probe_of(model)["input_ids"].flatten().tolist())
    ours = [i for i in range(500) if i not in seen][7:9]
    adapter = stir(ad.attach(model, f"trainable-tokens:tokens={ours[0]}+{ours[1]}"), 0.3)
    batch = probe_for(adapter)
    assert set(ours) <= set(batch["input_ids"].flatten().tolist())
    assert effect(adapter, adapter, batch).moved > 0
    for other in (stir(ad.attach(make_llama(), METHODS["lora"])), stir(ad.attach(make_gpt2(), "bitfit"))):
        assert all(torch.equal(t, probe_of(other.model)[k]) for k, t in probe_for(other).items())


def test_a_probe_that_does_not_run_is_called_a_probe():
    adapter = stir(ad.attach(make_llama(), METHODS["lora"]))
    for wrong in ("words", {"foo": torch.ones(1)}, torch.ones(2, 2)):
        with pytest.raises(AddendaError, match="probe") as error:
            outputs_of(adapter.model, (), wrong)
        assert "verify" not in str(error.value)
