"""What a call of `compare` asks for, when it has been checked and its model and data are loaded."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from addenda.comparing.arm import Arm
from addenda.comparing.budget import Budget
from addenda.comparing.record import Record
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings
from addenda.core.base.visible import visible
from addenda.train.fit import Event


@dataclass(frozen=True)
class Watch:
    """How a comparison tells what it does. say: a sentence; ask: yes or no, before the long part.

    trackers: names of those that are told of every loss, see `train.trackers`."""

    say: Callable[[str], None] = lambda text: print(visible(text), file=sys.stderr, flush=True)
    ask: Callable[[str], bool] = lambda question: True
    trial: Callable[[str, str, int | None, float | None], Callable[[Event], None] | None] = lambda *_: None
    done: Callable[[Record], None] = lambda record: None
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """A comparison that is wanted. seeds: to be run first; of_number: no more are added, whatever they leave open.

    identity: what decides its numbers, see `grow`; options: of the call, see `more`; workers: runs made at once.
    """

    subject: Subject
    arms: list[Arm]
    settings: TrialSettings
    budget: Budget
    seeds: int
    until: str | None
    max_minutes: float | None
    of_number: bool
    margin: float
    search_steps: int | None
    within: float | None
    identity: Mapping[str, Any]
    options: Mapping[str, Any]
    command: str
    title: str | None
    workers: int = 1
