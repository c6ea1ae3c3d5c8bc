"""Models whose parameters are spread over processes (FSDP2's DTensors): what is, and the whole of it.

Attach comes first, then sharding. A sharded model trains, switches, saves and goes on from checkpoints; what would read
or write whole weights (attach, load, merge, detach) says no.
"""

from typing import Any

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError


def is_sharded(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of a sharded one all of it, gathered. Every process must ask for it at the same place."""
    held: Any = tensor.detach()
    return held.full_tensor() if is_sharded(tensor) else held


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor; of a sharded one every process, given all of them, takes its own."""
    held: Any = tensor.detach()
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(held.device, held.dtype), held.device_mesh, held.placements)
    held.copy_(values)


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise AddendaError where any parameter of the model is sharded."""
    if any(is_sharded(p) for p in model.parameters()):
        raise AddendaError(
            f"The model is sharded, so {what}. Save the adapter, which works, and load the file onto a model that is "
            "not sharded."
        )


def writes(gathered: bool) -> bool:
    """Whether this process writes a file of gathered tensors: one of them does, everybody else's is its own."""
    if not gathered:
        return True
    import torch.distributed as dist

    return dist.get_rank() == 0


def wait(gathered: bool) -> None:
    """Wait until every process is here, where tensors were gathered."""
    if gathered:
        import torch.distributed as dist

        dist.barrier()
