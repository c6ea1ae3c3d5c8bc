"""Models whose parameters are spread over processes (FSDP2's DTensors): gathering, filling and refusing them.

Attach comes first, then sharding. A sharded model trains, switches, saves and goes on from checkpoints; what would read
or write whole weights (attach, load, merge, detach) says no.
"""

from typing import Any

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError


def is_sharded(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor; a sharded one gathered from all processes, each of which must call this at the same place."""
    local: Any = tensor.detach()
    return local.full_tensor() if is_sharded(tensor) else local


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor; of a sharded one every process, given all of them, takes its own."""
    local: Any = tensor.detach()
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(local.device, local.dtype), local.device_mesh, local.placements)
    local.copy_(values)


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise AddendaError where any parameter of the model is sharded."""
    if any(is_sharded(p) for p in model.parameters()):
        raise AddendaError(
            f"The model is sharded, so {what}. Save the adapter, which works, and load the file onto a model that is "
            "not sharded."
        )


def writes(gathered: bool) -> bool:
    """Return whether this process writes the file: where tensors were gathered, only the first one does."""
    if not gathered:
        return True
    import torch.distributed as dist

    return dist.get_rank() == 0


def wait(gathered: bool) -> None:
    """Wait, where tensors were gathered, until every process has come here."""
    if gathered:
        import torch.distributed as dist

        dist.barrier()
