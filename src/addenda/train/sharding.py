"""A model split over the processes of a run (FSDP2), as accelerate does it, once the adapter is attached.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 -m addenda tune …

Every process reads the whole model first: an adapter is attached to whole weights. On CPUs accelerate takes no notice
of `--use_fsdp` and would train whole copies; here it is done there too.
"""

import os
from typing import Any

from addenda.core.base.errors import AddendaError


def check_launch() -> None:
    """Raise AddendaError for what a launcher asks for and a run would not do, or would do with other numbers."""
    asked = os.environ.get
    if (precision := asked("ACCELERATE_MIXED_PRECISION", "no").lower()) != "no":
        raise AddendaError(
            f"The launcher asks for mixed precision in {precision}, which would change the numbers. Launch with "
            "--mixed_precision no; dtype= (--dtype) is that of the base, and the adapter stays in float32."
        )
    if (backend := asked("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise AddendaError(
            f"The launcher asks for torch.compile by {backend}. Launch with --dynamo_backend no, and give compile=True "
            "(--compile), which compiles the repeated blocks."
        )
    if _on("ACCELERATE_USE_FSDP") and asked("FSDP_VERSION", "1") != "2":
        raise AddendaError(
            "The launcher asks for FSDP 1, whose flat tensors mix the base with the adapter. Launch with "
            "--fsdp_version 2, or without --use_fsdp."
        )


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def take_up(accelerator: Any) -> None:
    """Let an Accelerator split the model where that was asked for; on CPUs too."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    if _on("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        state.distributed_type = DistributedType.FSDP
    if (plugin := getattr(state, "fsdp_plugin", None)) is not None:
        plugin.cpu_ram_efficient_loading = False  # whole weights are there, with the adapter on them
