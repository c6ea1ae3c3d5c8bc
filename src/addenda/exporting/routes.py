"""How a change passes a door: exactly, as an approximation, or not at all."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Route:
    """What becomes of one method at one kind of site behind a door, and why."""

    kind: Literal["exact", "approximate", "refused"]
    why: str = ""  # the form that it takes; for "refused": the reason, and what to do instead

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}" if self.why else self.kind
