"""A forward with an adapter for each group of rows, against the same rows through each adapter alone."""

import pytest
import torch

import addenda as ad
from addenda.core.adapter.blocks import grouped
from addenda.core.base.errors import AddendaError
from addenda.core.forward.grouped import Groups, Part
from addenda.core.modules.streams import Stream
from shared import stir

SIZES = (2, 2, 1)
METHODS = ("lora:rank=1", "lora:rank=2", "ia3")


def parts(sizes=SIZES, slots=(0, 1, 2)):
    return [Part(i, Stream(n, torch.Generator())) for i, n in zip(slots, sizes, strict=True)]


@pytest.fixture
def three(tiny):
    for i, method in enumerate(METHODS):
        stir(ad.attach(tiny, method, name=f"a{i}", also_train=["score"]), 0.3, seed=i)
    return tiny


def test_rows_of_each_group_take_their_adapter_and_heads(three):
    batch = torch.randint(0, 32, (5, 6))
    want = []
    for i, rows in enumerate(batch.split(SIZES)):
        ad.switch(three, f"a{i}")
        want.append(three(rows))
    groups = Groups()
    with grouped(three, ["a0", "a1", "a2"], groups):
        groups.set(parts())
        torch.testing.assert_close(three(batch), torch.cat(want))
        groups.set(parts((1, 4), (2, 0)))  # others, in another order
        got = three(batch)
        groups.set([Part(2)])
        torch.testing.assert_close(three(batch[:1]), got[:1])
        torch.testing.assert_close(three(batch[4:]), want[2])
    ad.switch(three, "a0")
    torch.testing.assert_close(got[1:], three(batch[1:]))


def test_gradients_reach_their_own_group_alone(three):
    batch, groups = torch.randint(0, 32, (5, 6)), Groups()
    with grouped(three, ["a0", "a1", "a2"], groups):
        groups.set(parts())
        three(batch)[2:4].square().sum().backward()
    grads = {n: [p.grad for p in a.parameters()] for n, a in ad.adapters(three).items()}
    assert all(g is not None and bool(g.any()) for g in grads["a1"])
    assert not any(bool(g.any()) for n in ("a0", "a2") for g in grads[n] if g is not None)


def test_a_batch_of_other_rows_is_refused(three):
    groups = Groups(tuple(parts()))
    groups.set(groups.parts)
    with grouped(three, ["a0", "a1", "a2"], groups), pytest.raises(AddendaError, match="first dimension"):
        three(torch.randint(0, 32, (4, 6)))


def test_rows_that_are_labels():
    groups = Groups()
    groups.set(parts((2, 2)[:2], (0, 1)), labels=(3, 5))
    assert [at for _, at in groups.cuts(torch.zeros(8, 4), "a head")] == [slice(0, 3), slice(3, 8)]
    assert [at for _, at in groups.cuts(torch.zeros(8, 4, 2), "a layer")] == [slice(0, 4), slice(4, 8)]
