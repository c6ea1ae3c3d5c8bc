"""A loop on accelerate that is killed and goes on from a saved state ends with the bits of one that was not."""

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.method.catalogue import build
from shared import same_bits

METHODS = ["dylora:rank=4", "mosa:rank=8", "adalora:rank=4,target_rank=2", "lora:rank=2,dropout=0.5"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:accelerate", "ignore::UserWarning:accelerate")


@pytest.fixture(autouse=True)
def _own_state():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def begun(spec: str, base: bool = False):
    torch.manual_seed(0)
    model = toys.make_llama()
    adapter = ad.attach(model, build(spec), seed=3)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = ad.optim.build(adapter, "auto", 1e-2, steps=8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    ad.register_for_checkpointing(accelerator, adapter, base=base)
    return accelerator, model.train(), adapter, optimizer, schedule


def trained(run, steps) -> dict[str, torch.Tensor]:
    accelerator, model, adapter, optimizer, schedule = run
    for step in steps:
        ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(step))
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        schedule.step()
        adapter.step()
        optimizer.zero_grad()
    return {k: t.clone() for k, t in adapter.state_dict().items()}


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("spec", METHODS)
def test_a_loop_goes_on_with_the_same_bits(spec, base, tmp_path):
    run = begun(spec, base)
    trained(run, range(3))
    run[0].save_state(str(tmp_path))
    whole = trained(run, range(3, 8))
    assert (tmp_path / "model.safetensors").exists() == base
    torch.manual_seed(99)
    again = begun(spec, base)
    again[0].load_state(str(tmp_path))
    assert again[2].step_count == 3
    assert same_bits(trained(again, range(3, 8)), whole)


def test_what_trains_besides_is_written_too(tmp_path):
    run = begun("lora:rank=2")
    run[1].model.norm.weight.requires_grad_(True)
    run[0].save_state(str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()
    with torch.no_grad():
        run[1].model.norm.weight.add_(1)
    run[0].load_state(str(tmp_path))
    assert bool((run[1].model.norm.weight == 1).all())


def test_another_adapter_is_refused_and_nothing_is_changed(tmp_path):
    run = begun("lora:rank=2")
    trained(run, range(2))
    run[0].save_state(str(tmp_path))
    other = begun("lora:rank=3")
    before = {k: t.clone() for k, t in other[1].state_dict().items()}
    with pytest.raises(AddendaError, match="belongs to another adapter: the method is"):
        other[0].load_state(str(tmp_path))
    assert same_bits(before, other[1].state_dict())
    whole = (tmp_path / "addenda" / "adapter.safetensors").read_bytes()
    for held in (b"", whole[:-40], whole[:-1] + b"\x7f"):
        (tmp_path / "addenda" / "adapter.safetensors").write_bytes(held)
        with pytest.raises(AddendaError, match=r"adapter\.safetensors"):
            run[0].load_state(str(tmp_path))
    (tmp_path / "addenda" / "addenda.json").unlink()
    with pytest.raises(AddendaError, match=r"addenda\.json"):
        run[0].load_state(str(tmp_path))
    (tmp_path / "addenda").rename(tmp_path / "other")
    with pytest.raises(AddendaError, match="has no folder 'addenda'"):
        run[0].load_state(str(tmp_path))


def test_what_cannot_be_registered_is_refused():
    accelerator, _, adapter, *_ = begun("lora:rank=2")
    with pytest.raises(AddendaError, match=r"Expected an accelerate\.Accelerator first, got Adapter"):
        ad.register_for_checkpointing(adapter, accelerator)
    with pytest.raises(AddendaError, match="Give the adapters that attach or load returned; got str"):
        ad.register_for_checkpointing(accelerator, "default")
    ad.register_for_checkpointing(accelerator, adapter)
    assert len(accelerator._addenda_states.adapters) == 1


def test_where_the_second_adapter_does_not_fit_the_first_is_not_changed(tmp_path):
    first, second, other = begun("lora:rank=2"), begun("lora:rank=2"), begun("lora:rank=3")
    ad.register_for_checkpointing(first[0], second[2])
    trained(first, range(2))
    first[0].save_state(str(tmp_path))
    trained(first, range(2, 3))
    before, step = {k: t.clone() for k, t in first[2].state_dict().items()}, first[2].step_count
    first[0]._addenda_states.adapters[1] = other[2]
    with pytest.raises(AddendaError, match="addenda_1 belongs to another adapter"):
        first[0].load_state(str(tmp_path))
    assert same_bits(before, first[2].state_dict()) and first[2].step_count == step
