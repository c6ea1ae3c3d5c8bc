"""Two processes: attach, then DDP or FSDP2; the same training as in one process, on the whole batch."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import addenda as ad
import toys
from addenda.core.file.states import read_state, write_state
from addenda.optim import build
from addenda.train.states import load_state, state_of

METHODS = {  # one for each path through the core, and one whose values change every step
    "lora:rank=2": "lora-pro:mode=full",
    "dora:rank=2": "adamw",
    "shira:density=0.1": "adamw",
    "oft:block=4": "adamw",
    "loha:rank=2": "adamw",
    "dylora:rank=4": "adamw",
}
WORLD, STEPS = 2, 3
pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not dist.is_available() or not dist.is_gloo_available(), reason="wants gloo"
)


def prepared(method: str) -> tuple[toys.Tiny, ad.Adapter]:
    torch.manual_seed(0)
    model = toys.Tiny()
    return model, ad.attach(model, method, name="a", also_train=["score"])


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(0, n, (4, 6), generator=generator) for n in (toys.VOCAB, 4))  # type: ignore[return-value]


def train(model: torch.nn.Module, adapter: ad.Adapter, optimizer: torch.optim.Optimizer, ids, labels) -> None:
    for _ in range(STEPS):
        for half in (slice(None, None, 2), slice(1, None, 2)):  # gradients of two pieces accumulate
            torch.nn.functional.cross_entropy(model(ids[half]).flatten(0, 1), labels[half].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.5)
        optimizer.step()
        adapter.step()
        optimizer.zero_grad()


def alone(method: str, trained_by: str) -> dict[str, Tensor]:
    model, adapter = prepared(method)
    train(model, adapter, build(adapter, trained_by, 1e-2), *batch())
    return {k: t.clone() for k, t in adapter.state_dict().items()}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for k, t in tensors.items()}


def process(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    # of the four examples, one of each accumulated piece to each process: the mean of means is the mean of all
    own = slice(2 * rank, 2 * rank + 2)
    ids, labels = (t[own] for t in batch())
    found = {}
    for method, trained_by in METHODS.items():
        model, adapter = prepared(method)
        before = {k: t.clone() for k, t in model.state_dict().items() if ".addenda." not in k}
        if kind == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
            wrapped, trained_by = model, "adamw"
            with pytest.raises(ad.AddendaError, match="shard"):
                ad.attach(model, "ia3", name="b")
            with pytest.raises(ad.AddendaError, match="shard"):
                ad.detach(model)
            with pytest.raises(ad.AddendaError, match="shard"):
                ad.merge(model)
        made = build(adapter, trained_by, 1e-2)
        train(wrapped, adapter, made, ids, labels)
        after = whole({k: t for k, t in model.state_dict().items() if ".addenda." not in k})
        assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith("score")), method
        found[method] = whole(adapter.state_dict())
        adapter.load_state_dict({k: torch.zeros_like(t) for k, t in found[method].items()})
        assert all(not t.any() for t in whole(adapter.state_dict()).values())
        adapter.load_state_dict(found[method])
        if kind == "fsdp2" or rank == 0:
            adapter.save(f"{folder}/{method.partition(':')[0]}.safetensors")
        state, file = state_of(made), Path(folder, "state.safetensors")
        if rank == 0:
            write_state(file, state)
        dist.barrier()
        again = build(adapter, trained_by, 1e-2)
        load_state(again, read_state(file), file)
        ended = []
        for optimizer in (made, again):
            adapter.load_state_dict(found[method])
            adapter.draw(STEPS)
            train(wrapped, adapter, optimizer, ids, labels)
            ended.append(whole(adapter.state_dict()))
        assert all(torch.equal(ended[0][k], ended[1][k]) for k in ended[0]), method
        assert not all(torch.equal(ended[0][k], found[method][k]) for k in ended[0])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(kind: str, tmp_path: Path) -> None:
    mp.spawn(process, (kind, str(tmp_path)), nprocs=WORLD)  # pyright: ignore[reportPrivateImportUsage]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    for method, trained_by in METHODS.items():
        expected = alone(method, trained_by if kind == "ddp" else "adamw")
        start = prepared(method)[1].state_dict()
        assert any(not torch.equal(expected[k], start[k]) for k in start)
        for key, tensor in expected.items():
            assert torch.equal(first[method][key], second[method][key]), (method, key)
            torch.testing.assert_close(
                first[method][key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
        model = prepared(method)[0]
        ad.detach(model)
        loaded = ad.load(model, tmp_path / f"{method.partition(':')[0]}.safetensors").state_dict()
        assert all(torch.equal(loaded[k], first[method][k]) for k in loaded)
