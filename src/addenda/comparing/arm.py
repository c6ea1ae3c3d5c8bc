"""An arm: what a comparison compares. Its text form is a method's, and behind each @ stands what trains it:

lora:rank=8@lora-pro:mode=full                    an optimizer with its options
mosa@consistency=1                                settings of the training that are this arm's own, see TRAINING
mosa@adamw@consistency=1,consistency_add=1        both
"""

from dataclasses import dataclass, field
from typing import Any

from addenda.core.base import ranges
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.method.catalogue import build, info, parse_spec
from addenda.core.method.contract import Method
from addenda.core.method.options import misfit, parse_value
from addenda.optim.registry import parsed

TRAINING = ("consistency", "consistency_add")  # options of `train.fit`, all of them numbers


@dataclass(frozen=True)
class Arm:
    """What is compared: a label, a method, where it is attached (None: its own targets), and what trains it."""

    label: str
    method: Method
    targets: str | tuple[str, ...]
    rates: tuple[float, ...] = ()
    optimizer: str = "auto"
    also_train: tuple[str, ...] = ()  # heads
    training: dict[str, Any] = field(default_factory=dict)  # settings of its own

    @property
    def name(self) -> str:
        """The name of the arm's method in the catalogue."""
        return name_of(self.label)


def parse_arm(label: str, targets: str | tuple[str, ...] | None = None) -> Arm:
    """Parse the text form above. Raises AddendaError for an unknown name or option in it, and what is said twice."""
    spec, *behind = label.split("@")
    optimizers = [part for part in behind if "=" not in part.partition(":")[0]]
    if len(optimizers) > 1:
        raise AddendaError(f"One optimizer trains an arm; {label!r} names {' and '.join(map(repr, optimizers))}.")
    for optimizer in optimizers:
        parsed(optimizer)
    training: dict[str, float] = {}
    for part in behind:
        if part not in optimizers:
            options = _training(part, label)
            if twice := sorted(set(options) & set(training)):
                raise AddendaError(f"{label!r} says {twice[0]}= twice.")
            training |= options
    method = build(spec)
    return Arm(label, method, targets or method.targets, (), next(iter(optimizers), "auto"), (), training)


def _training(text: str, label: str) -> dict[str, float]:
    training = {}
    for key, value in parse_spec(f"training:{text}")[1].items():
        if key not in TRAINING:
            raise AddendaError(
                f"{label!r}: an arm has no training option {key!r}.{nearest(key, TRAINING)} There are "
                f"{' and '.join(TRAINING)}; an optimizer is written without an = before its options."
            )
        number = parse_value(value, float)
        if problem := misfit(key, number, float) or "; ".join(ranges.problems({key: number})):
            raise AddendaError(f"{label!r}: {problem}.")
        training[key] = number
    return training


def name_of(label: str) -> str:
    """Return the method's name in an arm's label: "lora" of "lora:rank=8@lora+"."""
    return parse_spec(label.partition("@")[0])[0]


def center(label: str) -> float:
    """Return where a search for the rate of an arm starts: the catalogue's."""
    return info(name_of(label)).rate
