"""What a run is: the numbers that decide its result, and the schedule of its learning rate."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from addenda.core.errors import AddendaError


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
        checks = [
            (self.steps >= 1, f"steps must be at least 1, got {self.steps}"),
            (self.batch >= 1, f"batch must be at least 1, got {self.batch}"),
            (self.rate > 0 and math.isfinite(self.rate), f"rate must be a positive number, got {self.rate}"),
            (
                self.schedule in ("linear", "cosine", "constant"),
                f"schedule must be 'linear', 'cosine' or 'constant', got {self.schedule!r}",
            ),
            (self.warmup >= 0, f"warmup must not be negative, got {self.warmup}"),
            (self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}"),
            (self.clip >= 0, f"clip must not be negative, got {self.clip}"),
            (
                1 <= self.accumulate <= self.batch,
                f"accumulate must be from 1 to batch={self.batch}, got {self.accumulate}",
            ),
            (
                0 <= self.consistency < math.inf and 0 <= self.consistency_add < math.inf,
                f"consistency and consistency_add must not be negative, got {self.consistency} and "
                f"{self.consistency_add}",
            ),
            (
                self.consistency > 0 or not self.consistency_add,
                "consistency_add weighs the second forward of the consistency term; give consistency too",
            ),
            (
                self.early_stop is None or self.early_stop >= 1,
                f"early_stop counts evaluations, at least 1, got {self.early_stop}",
            ),
        ]
        problems = [text for fine, text in checks if not fine]
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
