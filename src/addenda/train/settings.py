"""What a run is: the numbers that decide its result, and the schedule of its learning rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from addenda.core.base import ranges
from addenda.core.base.errors import AddendaError
from addenda.optim.registry import parsed


@dataclass(frozen=True)
class Settings:
    """The numbers of a run; a checkpoint holds them, and a resumed run must have the same.

    steps: optimizer steps; batch: examples a step; rate: the highest learning rate; warmup: steps, or a share of them
    below 1; clip: the largest norm of the gradient (0: no limit); accumulate: parts that a batch is cut into, for
    memory; the result is the same up to rounding. consistency, consistency_add: see `train.consistency`. attention …
    lean: how it is computed, which decides the bits.
    """

    steps: int
    batch: int = 16
    rate: float = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    group: bool = True
    data: str = ""  # digest of the training data and its order
    early_stop: int | None = None
    consistency: float = 0.0
    consistency_add: float = 0.0
    attention: str | None = None
    loss: str = "logits"
    compile: bool = False
    optimizer: str = "adamw"
    checkpointing: bool = False
    lean: bool = False

    def __post_init__(self):
        given = asdict(self)
        problems = ranges.problems(given)
        problems += [f"{k} must be a number, got None" for k in ranges.RANGES if k in given and given[k] is None
                     and k != "early_stop"]  # fmt: skip
        if self.schedule not in ("linear", "cosine", "constant"):
            problems.append(f"schedule must be 'linear', 'cosine' or 'constant', got {self.schedule!r}")
        if not problems and self.accumulate > self.batch:
            problems.append(f"accumulate must be from 1 to batch={self.batch}, got {self.accumulate}")
        if not problems and self.consistency_add and not self.consistency:
            problems.append("consistency_add weighs the second forward of the consistency term; give consistency too")
        if problems:
            raise AddendaError(f"These settings cannot be: {'; '.join(problems)}.")

    def multiplier(self) -> Callable[[int], float]:
        """The learning rate of step 0, 1, …, as a share of `rate`: never 0, so that no step is wasted."""
        total, kind = self.steps, self.schedule
        warm = min(round(self.warmup * total) if self.warmup < 1 else int(self.warmup), total - 1)

        def share(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            left = max(total - step, 1) / (total - warm)
            if kind == "constant":
                return 1.0
            return left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left))

        return share

    def differences(self, other: dict) -> list[str]:
        """What a checkpoint's settings have that these have not."""
        return [f"{k} was {other.get(k)!r}, now {v!r}" for k, v in asdict(self).items() if other.get(k) != v]


def check_options(
    *,
    loss: str = "auto",
    optimizer: Any = "auto",
    attention: str | None = "auto",
    dead: str = "raise",
    eval_every: Any = None,
    save_every: Any = None,
    **given: Any,
) -> None:
    """What can be said of a run's options before there is a model. given: among them those of `Settings`.

    Raises AddendaError.
    """
    Settings(**{k: v for k, v in given.items() if k in _SETTINGS})
    if loss not in ("auto", "logits", "chunked"):
        raise AddendaError(f"loss must be 'auto', 'logits' or 'chunked', got {loss!r}.")
    if isinstance(optimizer, str) and optimizer != "auto":
        parsed(optimizer)
    elif not (isinstance(optimizer, str) or callable(optimizer)):
        raise AddendaError(f"optimizer= is a name or a function (adapter, rate, weight_decay), got {optimizer!r}.")
    if dead not in ("raise", "warn"):
        raise AddendaError(f"dead must be 'raise' or 'warn', got {dead!r}.")
    if not isinstance(attention, str | None):
        raise AddendaError(f"attention= is a name, 'auto' or None, got {attention!r}.")
    for name, every in (("eval_every", eval_every), ("save_every", save_every)):
        if not isinstance(every, int | Sequence | None) or isinstance(every, str):
            raise AddendaError(f"{name} counts steps, or is a list of them; got {every!r}.")


_SETTINGS = frozenset(f.name for f in fields(Settings))
