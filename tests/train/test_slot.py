"""One run of a group: a loss in parts, and what its options are."""

import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train.slot import ALONE, Run, Slot
from tiny_models import SUMS, make_llama, make_tokenizer


def made(**options):
    model = make_llama()
    adapter = ad.attach(model, "lora:rank=2")
    train = encode(read(SUMS), make_tokenizer())
    return Slot(model, 0, Run(adapter, {"steps": 2, "batch": 4, "accumulate": 2} | options), train, None), train


def test_a_step_of_two_parts_is_the_mean_over_its_labels():
    slot, train = made()
    slot.next()
    counts = [slot.labels[k] for k in range(2)]
    assert len(slot.micro) == 2 and slot.items == sum(counts)
    assert slot.long(0) == max(train.lengths[i] for i in slot.micro[0])
    losses = [slot.told(torch.tensor(2.0 * n)) for n in counts]  # 2 nats each
    assert all(loss is not None for loss in losses) and slot.loss == pytest.approx(2.0)
    assert slot.told(torch.tensor(float("nan"))) is None
    slot.take()
    assert "diverged" in str(slot.error) and not slot.goes_on


@pytest.mark.parametrize("option", ALONE)
def test_what_is_trained_alone(option):
    with pytest.raises(AddendaError, match=f"{option}: a run with that is trained alone"):
        made(**{option: 1})
