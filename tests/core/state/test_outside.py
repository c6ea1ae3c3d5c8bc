"""What trains beside an adapter, or was drawn at random, is told before a file goes without it."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read
from addenda.core.state.outside import drawn_at_random
from shared import EVERY, attach, stir, where


@pytest.mark.parametrize("name", EVERY)
def test_what_trains_outside_is_named_and_stops_the_save(name, tiny, ids, tmp_path):
    file = tmp_path / "a.safetensors"
    adapter = stir(attach(tiny, name, ids, targets=where(name)))
    good = adapter.save(file).read_bytes()
    for block in tiny.layers:
        block.norm.weight.requires_grad_(True)
    tiny.score.bias.requires_grad_(True)
    with pytest.raises(AddendaError) as error:
        adapter.save(file)
    text = str(error.value)
    assert "3 tensors of the base train beside it" in text
    assert "layers.*.norm.weight (2), score.bias" in text
    assert "also_train=['layers.0.norm', 'layers.1.norm', 'score']" in text
    assert file.read_bytes() == good
    assert adapter.save(tmp_path / "b.safetensors", without_base=True).read_bytes() == good
    tiny.requires_grad_(False)
    adapter.requires_grad_(True)
    assert adapter.save(file).read_bytes() == good


def test_other_adapters_and_heads_are_not_outside(tiny, ids, tmp_path):
    one = ad.attach(tiny, "lora:rank=2", targets="q_proj", also_train=["score"], name="one")
    two = ad.attach(tiny, "vb-lora:rank=2,vectors=8,length=4", targets="up_proj", name="two")
    for adapter in (one, two):
        adapter.save(tmp_path / f"{adapter.name}.safetensors")
    assert all(p.requires_grad for p in [*one.parameters(), *two.parameters()])


def test_a_base_that_was_not_frozen(tiny, tmp_path):
    adapter = ad.attach(tiny, "lora:rank=2", freeze=False)
    with pytest.raises(AddendaError, match=r"tensors of the base train beside it.*freeze=False.*without_base=True"):
        adapter.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    adapter.save(tmp_path / "a.safetensors", without_base=True)


def test_a_new_layer_after_attach(tiny, tmp_path):
    adapter = ad.attach(tiny, "lora:rank=2", targets="q_proj")
    tiny.extra = nn.Linear(4, 2)
    with pytest.raises(AddendaError, match=r"extra\.weight, extra\.bias.*also_train=\['extra'\]"):
        adapter.save(tmp_path / "a.safetensors")


def test_a_head_that_was_drawn_and_stays_so(tiny, tmp_path):
    """The file would come back on another head: random, and frozen."""
    drawn_at_random(tiny, ["score.weight", "score.bias"])
    adapter = ad.attach(tiny, "lora:rank=2", targets="q_proj")
    with pytest.raises(AddendaError, match=r"2 tensors were drawn at random.*score\.weight.*also_train=\['score'\]"):
        adapter.save(tmp_path / "a.safetensors")
    adapter.save(tmp_path / "a.safetensors", without_base=True)
    head = ad.attach(tiny, "lora:rank=2", targets="q_proj", also_train=["score"], name="head")
    for each in (adapter, head):
        each.save(tmp_path / "b.safetensors")
    assert len(read(tmp_path / "b.safetensors")[0].heads) == 2


def test_a_plain_trainer_is_stopped_before_its_first_step(tiny, tmp_path):
    import transformers

    model = nn.Module()
    model.inner = tiny
    adapter = ad.attach(tiny, "lora:rank=2", targets="q_proj")
    tiny.score.weight.requires_grad_(True)
    callback = ad.TrainerCallback(adapter)
    state = transformers.TrainerState()
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(AddendaError, match=r"would not be in the checkpoints whole.*score\.weight"):
        callback.on_train_begin(arguments, state, None)
    other = ad.TrainerCallback(adapter, without_base=True)
    other.on_train_begin(arguments, state, None)
    state.global_step = 1
    other.on_save(arguments, state, None)
    assert (tmp_path / "checkpoint-1" / "adapter.safetensors").is_file()
    assert torch.is_tensor(tiny.score.weight)
