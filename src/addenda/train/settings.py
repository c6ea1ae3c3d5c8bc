"""What a run is: the numbers that decide its result, each with its sentence, and the schedule of its learning rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from addenda.core.base import ranges
from addenda.core.base.errors import AddendaError


def _option(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Settings:
    """The numbers of a run. Its fields are keywords of `fit` and `tune`, and options of `addenda tune` but for `clip`.

    The sentence of a field is its help on the command line; `fit` says more. A checkpoint holds all of them, with what
    "auto" has chosen (attention, loss, optimizer) in its place, and a resumed run must have the same.
    """

    steps: int = field(metadata={"doc": "Optimizer steps."})
    batch: int = _option(16, "Examples a step.")
    rate: float = _option(1e-3, "Highest learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = _option("linear", "linear, cosine or constant.")
    warmup: float = _option(0.05, "Warm-up: steps, or a share below 1.")
    weight_decay: float = _option(0.0, "Of the adapter, copies of norms and biases left out.")
    clip: float = _option(1.0, "Largest norm of the gradient; 0: no limit.")
    accumulate: int = _option(1, "Parts of a batch, to save memory.")
    seed: int = _option(0, "Of start, order and dropout.")
    group: bool = _option(True, "Rows of like length together.")
    data: str = ""  # digest of the training data and its order; no option
    early_stop: int | None = _option(None, "Evaluations without gain.")
    consistency: float = _option(0.0, "Weight of a term that makes two draws of mosa, dylora, … or dropout agree.")
    consistency_add: float = _option(0.0, "Weight of the second draw's own loss beside it.")
    attention: str | None = _option("auto", "auto measures sdpa and eager here; a name takes that one.")
    loss: Literal["auto", "logits", "chunked"] = _option(
        "auto", "auto, logits (of all labels at once) or chunked (saves memory)."
    )
    compile: bool = _option(False, "torch.compile; says after how many steps it pays.")
    optimizer: str = _option("auto", "Default: the method's own; else adamw, lora-pro, … (see methods).")
    checkpointing: bool = _option(False, "Compute activations again, to save memory.")
    lean: bool = _option(False, "Only what gated MLPs and norms make, which costs little.")

    def __post_init__(self):
        given = asdict(self)
        problems = ranges.problems(given)
        problems += [f"{k} must be a number, got None" for k in ranges.RANGES if k in given and given[k] is None
                     and k != "early_stop"]  # fmt: skip
        if self.schedule not in ("linear", "cosine", "constant"):
            problems.append(f"schedule must be 'linear', 'cosine' or 'constant', got {self.schedule!r}")
        if self.loss not in ("auto", "logits", "chunked"):
            problems.append(f"loss must be 'auto', 'logits' or 'chunked', got {self.loss!r}")
        if not isinstance(self.attention, str | None):
            problems.append(f"attention is a name, 'auto' or None, got {self.attention!r}")
        if not problems and self.accumulate > self.batch:
            problems.append(f"accumulate must be from 1 to batch={self.batch}, got {self.accumulate}")
        if not problems and self.consistency_add and not self.consistency:
            problems.append("consistency_add weighs the second forward of the consistency term; give consistency too")
        if problems:
            raise AddendaError(f"These settings cannot be: {'; '.join(problems)}.")

    def stops_at(self, losses: Sequence[float]) -> bool:
        """Return whether a run stops early, with these losses of its evaluations so far."""
        return (
            self.early_stop is not None
            and len(losses) > 0
            and len(losses) - 1 - losses.index(min(losses)) >= self.early_stop
        )

    def multiplier(self) -> Callable[[int], float]:
        """Return the learning rate of step 0, 1, … as a share of `rate`: never 0, so that no step is wasted."""
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


DOCS: dict[str, str] = {f.name: f.metadata["doc"] for f in fields(Settings) if f.metadata}  # of the options


def check_options(
    *, optimizer: Any = "auto", dead: str = "raise", eval_every: Any = None, save_every: Any = None, **given: Any
) -> None:
    """Raise AddendaError for a run's options that cannot be, as far as that can be judged without a model."""
    from addenda.optim.registry import parsed  # with it comes torch, for which `--help` does not wait

    Settings(**{k: v for k, v in given.items() if k in DOCS})
    if isinstance(optimizer, str) and optimizer != "auto":
        parsed(optimizer)
    elif not (isinstance(optimizer, str) or callable(optimizer)):
        raise AddendaError(f"optimizer= is a name or a function (adapter, rate, weight_decay), got {optimizer!r}.")
    if dead not in ("raise", "warn"):
        raise AddendaError(f"dead must be 'raise' or 'warn', got {dead!r}.")
    for name, every in (("eval_every", eval_every), ("save_every", save_every)):
        if not isinstance(every, int | Sequence | None) or isinstance(every, str):
            raise AddendaError(f"{name} counts steps, or is a list of them; got {every!r}.")
