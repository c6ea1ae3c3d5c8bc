"""An arm: what a comparison compares. Its text form is a method's, with the optimizer behind an @."""

from dataclasses import dataclass

from addenda.core.method import Method
from addenda.core.registry import build, info, parse_spec
from addenda.optim.registry import parsed


@dataclass(frozen=True)
class Arm:
    """What is compared: a label, a method, where it is attached (None: its own targets), and what trains it."""

    label: str
    method: Method
    targets: str | tuple[str, ...]
    rates: tuple[float, ...] = ()
    optimizer: str = "auto"
    also_train: tuple[str, ...] = ()  # heads

    @property
    def name(self) -> str:
        """Of the method in the catalogue."""
        return name_of(self.label)


def parse_arm(label: str, targets: str | tuple[str, ...] | None = None) -> Arm:
    """ "lora:rank=8" or "lora:rank=8@lora-pro:mode=full". Raises AddendaError for an unknown name or option in it."""
    spec, at, optimizer = label.partition("@")
    if at:
        parsed(optimizer)
    method = build(spec)
    return Arm(label, method, targets or method.targets, (), optimizer if at else "auto")


def name_of(label: str) -> str:
    return parse_spec(label.partition("@")[0])[0]


def center(label: str) -> float:
    """Where a search for the rate of an arm starts: the catalogue's."""
    return info(name_of(label)).rate
