"""torch.compile for the length of a run, with what it costs and when it has paid.

Compiled are the repeated blocks of a model (its decoder layers), which share one compilation. Lengths are dynamic, so
that batches of other lengths do not compile again; attention by "sdpa" compiles once more for batches without padding.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import entrance, gradient_from

BACKEND = "inductor"


@dataclass(frozen=True)
class Compilation:
    """What compiling costs and brings, on the first batch of the run: forward and backward in seconds."""

    seconds: float  # that the first compiled steps took longer than later ones
    eager: float
    compiled: float

    @property
    def paid(self) -> int | None:
        """Steps until the wait is made up for; None for never."""
        return round(self.seconds / (self.eager - self.compiled)) if self.compiled < self.eager else None


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost repeated modules: of each ModuleList those of its commonest class; else the model."""
    found: list[nn.Module] = []
    for child in model.children():
        kind, n = Counter(map(type, child.children())).most_common(1)[0] if len(child._modules) else (None, 0)
        if isinstance(child, nn.ModuleList) and n > 1:
            found += [m for m in child if type(m) is kind]
        else:
            found += [b for b in blocks(child) if b is not child]
    return found or [model]


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Compile the blocks for the length of a `with` block; afterwards each is as it was.

    The embedding's output requires a gradient meanwhile, so that the first block is compiled together with the others.
    """
    parts = blocks(model)
    before = [part._compiled_call_impl for part in parts]
    for part in parts:
        part.compile(backend=BACKEND, dynamic=True)
    try:
        with gradient_from(*entrance(model)):
            yield
    finally:
        for part, own in zip(parts, before, strict=True):
            part._compiled_call_impl = own
        torch.compiler.reset()


def measure(loss: Callable[[], Tensor]) -> Compilation:
    """Time forward and backward of a compiled model's loss, eager first. Leaves gradients behind.

    Raises AddendaError where the compiler fails.
    """

    def step() -> float:
        started = time.perf_counter()
        made = loss()
        made.backward()
        made.item()  # waits for a GPU
        return time.perf_counter() - started

    with eager():
        usual = min(step() for _ in range(3))
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    try:
        first = [step(), step()]
    except TorchDynamoException as error:
        raise AddendaError(
            f"torch.compile failed ({str(error).strip().splitlines()[0]}). A CPU wants a C++ compiler, a "
            "GPU Triton; without them leave compile out."
        ) from error
    later = min(step() for _ in range(2))
    return Compilation(sum(first) - 2 * later, usual, later)


def eager():
    """Turn off compiling, and the use of compiled code, in a `with` block."""
    return torch.compiler.set_stance("force_eager")
