"""What a compression is asked for."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.ranges import MANY, RANGES, Range
from addenda.reducing.ranks import Storage
from addenda.reducing.solve import Split, check

Allocation = Literal["waterfill", "uniform", "energy", "sensitivity", "asvd"]
ALLOCATIONS = ("waterfill", "uniform", "energy", "sensitivity", "asvd")
STORAGES: tuple[Storage, ...] = ("factors", "pivot")
WEIGHINGS = ("auto", "error", "loss")
_NUMBERS = {n: RANGES[n] for n in ("remove", "share", "rise", "floor", "multiple", "samples", "judge", "batch", "seed")}
_NUMBERS["length"] = Range(2, MANY, whole=True)  # a token, and one to predict it from
_MEANINGS = {
    "remove": "the share of the compressed layers' parameters to do without, between 0 and 1: 0.2 keeps 80 %",
    "share": "that of the outputs' energy to keep: 0.99 loses 1 %",
    "rise": "how much of its perplexity a type of layer may add alone: 0.01 allows 1 %",
    "floor": "a share of the uniform rank, between 0 and 1",
}
_OF_PIECES = ("how", "storage", "center", "samples", "length", "batch", "seed")


@dataclass(frozen=True)
class CompressionSettings:
    """How `compress` makes a model smaller: by how much, along which route, and which layer keeps which rank.

    how: the route, see `reducing.solve`, which has split and center too. remove: the share of the chosen layers'
    parameters (or multiplications) to do without. of: which of the two. storage: "factors", or "pivot", see
    `reducing.ranks`.
    allocate: who gets which rank, see there; share: of the outputs' energy, for "energy"; rise: of the perplexity, for
    "sensitivity"; floor: of the uniform rank, for "waterfill"; weigh: layers against each other in it, by the relative
    error of their outputs alone, or by what such an error does to the loss; auto: the latter for a causal LM, which has
    one. multiple: of every rank.
    samples, length: windows of text for calibration, and their tokens; judge: windows to judge by; batch: how many go
    through the model at once. sequential: every block is solved on what the compressed blocks before it put out.
    """

    how: str = "lord"
    remove: float = 0.2
    of: Literal["parameters", "flops"] = "parameters"
    allocate: Allocation = "waterfill"
    share: float = 0.99
    rise: float = 0.01
    floor: float = 0.5
    weigh: Literal["auto", "error", "loss"] = "auto"
    multiple: int = 8
    storage: Storage = "factors"
    split: Split = "left"
    center: bool = False
    sequential: bool = False
    samples: int = 64
    length: int = 512
    judge: int = 16
    batch: int = 4
    seed: int = 0

    def settled(self, causal: bool) -> "CompressionSettings":
        """Return the settings with `auto` decided, for a causal LM or another model."""
        weighs = causal and self.allocate == "waterfill"
        return replace(self, weigh="loss" if weighs else "error") if self.weigh == "auto" else self

    def wants_loss(self) -> str | None:
        """Return the option that only a causal LM can meet, or None."""
        needs = {
            "--how fwsvd": self.how == "fwsvd",
            f"--allocate {self.allocate}": self.allocate in ("sensitivity", "asvd"),
            "--weigh loss": self.weigh == "loss" and self.allocate == "waterfill",
        }
        return next((option for option, needed in needs.items() if needed), None)

    def of_pieces(self) -> dict[str, Any]:
        """Return the settings that each layer's nested solutions depend on; the others choose among these, or judge."""
        return {name: value for name, value in asdict(self).items() if name in _OF_PIECES}

    def __post_init__(self):
        check(self.how, self.center, self.split)
        if self.allocate not in ALLOCATIONS:
            raise AddendaError(
                f"There is no allocation {self.allocate!r}.{nearest(self.allocate, ALLOCATIONS)} "
                f"Known: {', '.join(ALLOCATIONS)}."
            )
        for name, values in (("of", ("parameters", "flops")), ("storage", STORAGES), ("weigh", WEIGHINGS)):
            if getattr(self, name) not in values:
                raise AddendaError(f"{name} must be {' or '.join(values)}, got {getattr(self, name)!r}.")
        for name, allowed in _NUMBERS.items():
            if problem := allowed.refusal(name, getattr(self, name)):
                meaning = f" It is {_MEANINGS[name]}." if name in _MEANINGS else ""
                raise AddendaError(f"{problem}.{meaning}")
