"""Finished runs of one subject on disk, in a record for each recipe and one for what several recipes name.

    records/recipes2/SUBJECT/RECIPE/     the arms that one recipe names, a record as `addenda compare` writes it
    records/recipes2/SUBJECT/shared/     those that several name, the untouched base, and full fine-tuning

Several processes may be at work: each locks the run that it is at, and reads again what others have finished. Items are
kept of every run, their losses of the first three seeds, training losses as means over blocks: a record stays small.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from addenda import AddendaError
from addenda.comparing.entries import Config, Growth, SplitResult, TrialRecord
from addenda.comparing.record import Record
from addenda.core.disk.cache import cache_folder
from addenda.core.disk.lock import Lock
from addenda.core.file.identity import goes_on, look

SEEDS = tuple(range(100, 120))  # of final runs: none that an earlier record has
BASE = "base"
SHARED = "shared"
BLOCKS = 120  # of training losses in a final run
WITH_LOSSES = 3  # seeds that keep the loss of each item
WAIT = 20  # seconds until another process is asked again

Unit = TypeVar("Unit")  # what a recipe makes one run of


class Busy(Exception):  # noqa: N818 – no error
    """Another process is at a run that is wanted."""


class TimeUp(Exception):  # noqa: N818 – no error
    """The next run would not end in this sitting."""


@dataclass
class Clock:
    """How long a sitting may last. hours: None for without end."""

    hours: float | None = None
    started: float = field(default_factory=time.monotonic)

    def spare(self, seconds: float) -> None:
        """Raise TimeUp where so many seconds are not left."""
        if self.hours is not None and time.monotonic() - self.started + seconds > self.hours * 3600:
            raise TimeUp


def do_all(left: Sequence[Any], done: Callable[[Any], bool], clock: Clock) -> None:
    """Do what is left; what another process is at, `done` being False, is asked for again later. Raises TimeUp."""
    while left := [one for one in left if not done(one)]:
        print(f"Waiting for another process, at {', '.join(map(str, left[:3]))}.", file=sys.stderr, flush=True)
        clock.spare(WAIT)
        time.sleep(WAIT)


def lost(left: Iterable[Unit], reads: Callable[[Unit], Iterable[Unit]], there: Callable[[Unit], bool]) -> set[Unit]:
    """Return the runs whose files these read and the cache has not, and what is read to make those again."""
    found, asked = set(), list(left)
    while asked:
        for read in reads(asked.pop()):
            if read not in found and not there(read):
                found.add(read)
                asked.append(read)
    return found


def lock_of(folder: Path, name: str) -> Lock:
    """Return the lock of what one process at a time does in a folder of records. It lies in the cache folder."""
    key = hashlib.sha256(f"{folder.resolve()}\x1f{name}".encode()).hexdigest()[:24]
    return Lock(cache_folder() / "recipes" / "locks" / key)


class Store:
    """The records of a subject. folders: of every arm, the folder that its runs are kept in."""

    def __init__(self, path: Path, folders: Mapping[str, str]):
        self.path, self.folders = path, folders
        self._records: dict[str, Record] = {}

    def records(self, again: bool = False) -> dict[str, Record]:
        """Return the records on disk by folder. again: another process may have written to them."""
        if again or not self._records:
            files = self.path.glob("*/config.json")
            self._records = {f.parent.name: Record.read(f.parent) for f in sorted(files)}
        return self._records

    def find(
        self, arm: str, stage: str, seed: int | None, rate: float | None = None, steps: int | None = None
    ) -> TrialRecord | None:
        """Return a finished run, or None."""
        found = (r.find(arm, stage, seed, rate, steps) for r in self.records().values())
        return next((t for t in found if t is not None), None)

    def of(self, arms: Iterable[str], seeds: Sequence[int]) -> Record:
        """Return what there is of some arms and seeds as one record, in memory. Raises AddendaError for nothing."""
        known, wanted = self.records(), {*arms}
        if not known:
            raise AddendaError(f"{self.path} holds no record yet. Run `python -m recipes run`.")
        methods = {a: m for r in known.values() for a, m in r.config.methods.items() if a in wanted}
        trials = [t for r in known.values() for t in r.trials if t.stage != "search" and t.method in wanted]
        trials = [t for t in trials if t.seed is None or t.seed in seeds]
        config = replace(next(iter(known.values())).config, methods=methods, seeds=tuple(seeds), search=None)
        return Record(self.path, config, tuple(trials))

    @contextmanager
    def alone(self, name: str) -> Iterator[bool]:
        """Whether this process may do what is named so; what others have finished meanwhile is read again."""
        lock = lock_of(self.path, name)
        mine = lock.take()
        try:
            if mine:
                self.records(again=True)
            yield mine
        finally:
            lock.release()

    def open(self, folder: str, config: Callable[[str], Config]) -> Record:
        """Return a folder's record, made where it is missing, and made larger where there are more arms now.

        config: what a folder says of itself, with an identity whose `arms` may grow. Raises AddendaError where the runs
        that are there are of another base, other data, settings or versions.
        """
        path, now = self.path / folder, config(folder)
        known = self._records.get(folder) or (Record.read(path) if (path / "config.json").exists() else None)
        if known is None:
            known = Record.write_config(path, now)
        there, here = dict(known.config.identity or {}), dict(now.identity or {})
        if set(there.get("arms", ())) >= set(here.get("arms", ())):
            here["arms"] = there.get("arms")  # another process may have been given more
        way = "Choose another --root, or run it with the versions that it was begun with."
        grown = goes_on(f"{path}", there, here, grows={"arms": _more}, way=way)
        if grown:
            looks = (*(known.config.looks or ()), Growth.of(look(grown, f"{len(known.trials)} runs")))
            known = known.changed(replace(now, created=known.config.created, looks=looks))
        self._records[folder] = known
        return known

    def write(self, made: TrialRecord, config: Callable[[str], Config]) -> None:
        """Write a run to its arm's folder; see `open`."""
        folder = self.folders[made.method]
        self._records[folder] = self.open(folder, config).write_trial(made)


def _more(there: list[str], now: list[str]) -> bool:
    return set(now) > set(there)


def thinned(made: TrialRecord) -> TrialRecord:
    """Return what is kept of a run: training losses as means of blocks (none of a search), a shorter test result."""
    losses = made.losses
    if losses:
        width = max(1, round(len(losses) / BLOCKS))
        blocks = [losses[i : i + width] for i in range(0, len(losses), width)]
        losses = tuple((b[-1][0], round(fmean(v for _, v in b if v is not None), 4)) for b in blocks)
    if made.stage == "search":
        losses = ()
    return replace(made, losses=losses, test=made.test and short(made.test, made.seed))


def short(result: SplitResult, seed: int | None) -> SplitResult:
    """Return a result with losses to a thousandth, of the first seeds alone."""
    kept = result.losses and (seed is None or seed < SEEDS[0] + WITH_LOSSES)
    losses = tuple(None if v is None else round(v, 3) for v in result.losses or ()) if kept else None
    return replace(result, losses=losses, loss=None if result.loss is None else round(result.loss, 4))


def training_loss(record: Record, arm: str, seed: int, batches: int) -> float:
    """Return the mean training loss of a run's last batches, out of its blocks. Raises AddendaError for none."""
    made = record.find(arm, "final", seed)
    steps = [(step, loss) for step, loss in (made.losses or ()) if loss is not None] if made else []
    if not steps:
        raise AddendaError(f"{record.path} has no training losses of {arm}, seed {seed}.")
    first = steps[-1][0] - batches
    return fmean(loss for step, loss in steps if step > first)
