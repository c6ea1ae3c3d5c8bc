"""What `Adapter.step` sees in the first steps (what nothing reaches or moves), and when values may be written."""

import pytest
import torch
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from shared import attach, loss_of, same_bits, stir, where


def steps(model: nn.Module, adapter: ad.Adapter, ids, optimizer, count: int = 4, schedule=None) -> None:
    for _ in range(count):
        loss_of(model, ids).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        adapter.step()
        optimizer.zero_grad()
        model.zero_grad()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_an_optimizer_made_before_attach_is_noticed(make, tiny, ids):
    optimizer = make(tiny.parameters(), 0.1)
    adapter = ad.attach(tiny, "lora:rank=2")
    with pytest.raises(AddendaError, match=r"no optimizer has moved one of them.*made before attach"):
        steps(tiny, adapter, ids, optimizer)
    assert adapter.step_count == 3


def test_a_warm_up_from_nought_is_no_alarm(tiny, ids):
    for make in (torch.optim.SGD, torch.optim.AdamW):
        adapter = ad.attach(tiny, "lora:rank=2", name=make.__name__)
        optimizer = make(adapter.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        steps(tiny, adapter, ids, optimizer, 6, schedule)


def test_an_optimizer_that_writes_past_the_versions_is_no_alarm(tiny, ids):
    class Past(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data -= 0.1 * p.grad

    adapter = ad.attach(tiny, "lora:rank=2")
    steps(tiny, adapter, ids, Past(adapter.parameters()), 5)


@pytest.mark.filterwarnings("ignore:.*had zero gradients for 3 steps")
def test_steps_that_a_scaler_skips_are_no_alarm(tiny, ids):
    adapter = ad.attach(tiny, "lora:rank=2")
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    for i in range(6):
        loss_of(tiny, ids).backward()
        if i < 4:  # an infinite gradient: nothing is moved
            adapter.parameters()[0].grad[:] = torch.inf
        else:
            optimizer.step()
        adapter.step()
        optimizer.zero_grad()


def test_accumulated_gradients_are_no_alarm(tiny, ids):
    adapter = ad.attach(tiny, "lora:rank=2")
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    for i in range(12):
        loss_of(tiny, ids).backward()
        if i % 3 == 2:
            optimizer.step()
            adapter.step()
            optimizer.zero_grad()
    assert adapter.step_count == 4


def test_a_first_step_that_leaves_layers_out_says_what_it_may_be_and_may_go_on(ids):
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.dropped = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), True

        def forward(self, x):
            return self.layers[0](x) if self.dropped else self.layers[1](self.layers[0](x))

    for dead in ("raise", "warn"):
        model = Drops()
        adapter = ad.attach(model, "lora:rank=2")
        optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        if dead == "raise":
            with pytest.raises(AddendaError, match=r"dropped at random.*without images.*dead='warn'"):
                adapter.step()
        else:
            with pytest.warns(UserWarning, match="layers.1/B"):
                adapter.step(dead="warn")
            model.dropped = False
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(3, 4)).sum().backward()
                optimizer.step()
                adapter.step(dead="warn")
    with pytest.raises(AddendaError, match="dead must be 'raise' or 'warn'"):
        adapter.step(dead="no")


@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_step_tells_of_a_replaced_module(before, tiny, ids):
    adapter = ad.attach(tiny, "lora:rank=2", targets="linear")
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1)
    for _ in range(before):
        tiny(ids).sum().backward()
        optimizer.step()
        adapter.step()
    tiny.layers[0].up_proj = torch.nn.Linear(8, 16)
    with pytest.raises(AddendaError, match=r"layers\.0\.up_proj is no longer the module"):
        adapter.step()
    assert adapter.step_count == before


@pytest.mark.parametrize("name", ["lora", "svft", "vb-lora", "fourierft"])
def test_a_save_says_that_no_step_has_moved_anything(name, tiny, ids, tmp_path):
    adapter = attach(tiny, name, ids, targets=where(name))
    file = tmp_path / "a.safetensors"
    adapter.save(file)  # before the first step there is nothing to say
    steps(tiny, adapter, ids, torch.optim.SGD(adapter.parameters(), lr=0.0), 2)
    with pytest.warns(UserWarning, match="has made 2 steps, and none of its tensors has moved"):
        adapter.save(file)
    ad.detach(tiny)
    again = ad.load(tiny, file, trainable=True)
    assert again.step_count == 2
    assert again.save(tmp_path / "b.safetensors").read_bytes() == file.read_bytes()
    steps(tiny, again, ids, torch.optim.SGD(again.parameters(), lr=0.5), 1)
    again.save(file)


@pytest.mark.parametrize("name", ["lora:rank=2", "pissa:rank=2", "dora:rank=2,bits=4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_a_converting_merge_gives_back_is_read_and_not_written_meanwhile(name, dtype, tiny):
    adapter = stir(ad.attach(tiny, name, targets="linear"))
    values = {k: t.clone() for k, t in adapter.state_dict().items()}
    ad.merge(tiny, dtype=dtype, allow_loss=1.0)
    assert same_bits(adapter.state_dict(), values)
    assert all(p.dtype == dtype for p in adapter.parameters())
    with pytest.raises(AddendaError, match=r"merge has converted.*Call unmerge\(model\) first"):
        adapter.load_state_dict({k: t + 1 for k, t in values.items()})
    ad.unmerge(tiny)
    assert same_bits(adapter.state_dict(), values)
    adapter.load_state_dict({k: t + 1 for k, t in values.items()})
    assert not same_bits(adapter.state_dict(), values)
