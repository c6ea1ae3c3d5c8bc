"""What `ad.compare` returns: the record, and which arm of it to take."""

from functools import cached_property

from addenda.comparing.choose import Choice, Cost, choices
from addenda.comparing.record import Record
from addenda.comparing.stats import Comparison, analyse


class Result(Record):
    """A record with what follows from it, computed when it is first asked for."""

    @cached_property
    def comparison(self) -> Comparison:
        """The statistics of the record."""
        return analyse(self)

    @cached_property
    def choices(self) -> dict[Cost, Choice]:
        """The arm to take where "memory", "size" or "time" counts."""
        return choices(self, self.comparison)

    @property
    def choice(self) -> Choice:
        """The arm to take where memory counts."""
        return self.choices["memory"]
