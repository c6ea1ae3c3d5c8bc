"""Models whose parameters are spread over processes (FSDP2's DTensors): gathering, filling and refusing them.

Attach comes first, then sharding. A sharded model trains, switches, saves and goes on from checkpoints; what would read
or write whole weights (attach, load, merge, detach) says no.
"""

from typing import Any

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor, or what a parameter holds, is spread over processes."""
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor; a sharded one gathered from all processes, each of which must call this at the same place."""
    local: Any = tensor.detach()
    return local.full_tensor() if is_sharded(tensor) else local


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Return values as a tensor of their shape is kept: of a sharded one every process, given all, takes its own."""
    local: Any = like.detach()
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(local.device), local.device_mesh, local.placements)


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor; of a sharded one every process, given all of them, takes its own."""
    tensor.detach().copy_(spread(values.to(tensor.dtype), tensor))


def give_back(model: nn.Module) -> None:
    """Drop whole weights that a forward of a sharded model has gathered and left for a backward that did not come.

    What is written into them is lost, and reading their memory by other libraries keeps the next step from freeing it.
    """
    if not any(is_sharded(p) for p in model.parameters()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
