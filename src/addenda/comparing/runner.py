"""Where the runs of a comparison take place: here, one after another.

A runner is called with the runs that are wanted and yields each as it ends, in whatever order; `recorded` tells it that
one is in the record, so that what was kept for going on with it can go.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from addenda.comparing.arm import Arm
from addenda.comparing.entries import TrialRecord, TrialSpec
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings, trial
from addenda.train import checkpoint
from addenda.train.fit import Event
from addenda.train.tracking import Tracking

CHECKPOINT_SECONDS = 300.0  # of training between two checkpoints of one run

Watched = Callable[[str, str, int | None, float | None], Callable[[Event], None] | None]


def untold(*_: Any) -> None:
    """Be told of a run, and do nothing."""


class Runner(Protocol):
    """What runs trials. folder: where the checkpoints of unfinished ones are."""

    @property
    def folder(self) -> Path: ...

    def __call__(self, specs: Sequence[TrialSpec]) -> Iterator[tuple[TrialSpec, TrialRecord]]: ...

    def recorded(self, spec: TrialSpec) -> None: ...


@dataclass(frozen=True)
class OneByOne:
    """Runs one after another in this process. pace: seconds of a step, by arm; watch: told of each run's begin.

    tracking: where a run of a name is logged."""

    subject: Subject
    arms: Sequence[Arm]
    settings: TrialSettings
    folder: Path
    pace: Mapping[str, float]
    watch: Watched
    tracking: Callable[[str], Tracking | None] = untold

    def __call__(self, specs: Sequence[TrialSpec]) -> Iterator[tuple[TrialSpec, TrialRecord]]:
        by_label = {arm.label: arm for arm in self.arms}
        for spec in specs:
            pace = self.pace.get(spec.method, 1.0)
            long = pace * spec.steps > CHECKPOINT_SECONDS  # a shorter run is quicker repeated than saved ten times
            yield spec, trial(
                self.subject, by_label[spec.method], self.settings, spec,
                progress=self.watch(spec.method, spec.stage, spec.seed, spec.rate),
                checkpoints=self.folder / spec.name if long else None,
                save_every=max(1, round(CHECKPOINT_SECONDS / pace)), tracking=self.tracking(spec.name),
            )  # fmt: skip

    def recorded(self, spec: TrialSpec) -> None:
        """Drop the checkpoints of a run that is in the record."""
        checkpoint.drop(self.folder / spec.name)
