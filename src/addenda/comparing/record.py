"""The record: the directory that a comparison leaves behind, and from which an interrupted one goes on.

    config.json           what is compared: model, data with hashes, budget, methods, seeds, search, versions
    trials/NAME.json      one finished run each, with one character per test item ("1" right, "0" wrong)

Every file is written whole or not at all (temporary name, fsync, rename). A file that does not parse was cut off
by something stronger than this process; it is ignored, listed in `Record.ignored`, and its run is done again.
Files are strict JSON: a loss that is not finite is stored as null. What is read and checked here is handed on as the
types of `entries`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from addenda.comparing import fields
from addenda.comparing.entries import SCHEMA, Config, TrialRecord, as_json
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import DiskError, read_json, reading
from addenda.core.disk.atomic import readable, write_atomically

STAGES = ("search", "final", "control")
BASE = "base"  # the control that is the model as it came, asked without examples
FULL, HEAD = "full", "head"  # arms that are fitted, but are controls: every parameter, and nothing but a new head
# What makes two comparisons the same one. Title, command, times and hardware do not; prose about a method neither.
MATTERS = ("schema", "model", "data", "budget", "methods", "seeds", "search", "versions")
PROSE = {"title", "hypothesis", "description", "example"}
CONFIG = {"title": str, "model": dict, "data": dict, "budget": dict, "methods": dict, "seeds": list}
TRIAL = {"method": str, "stage": str, "status": str}


@dataclass(frozen=True)
class Record:
    """A record directory as read: `path`, `config`, finished `trials`, and the names of `ignored` files."""

    path: Path
    config: Config
    trials: tuple[TrialRecord, ...] = ()
    ignored: tuple[str, ...] = ()
    shorter: tuple[TrialRecord, ...] = ()  # final runs of a budget that was lengthened since; they do not count

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the record at `path`. Raises AddendaError with every missing or impossible field, by file."""
        path = Path(path)
        config = _config(path / "config.json")
        trials, ignored, problems, shorter = [], [], [], []
        for file in sorted((path / "trials").glob("*.json")):
            try:
                value = read_json(file)
            except DiskError:  # what the disk does not give now is not gone
                raise
            except AddendaError:
                ignored.append(file.name)
                continue
            wrong = _trial_problems(value, config)
            problems += [f"trials/{file.name}: {p}" for p in wrong]
            if not wrong:
                trial = TrialRecord.of(value)
                (shorter if _of_other_budget(trial, config) else trials).append(trial)
        if not problems:
            problems = _together(trials)
        if problems:
            raise AddendaError(
                f"The record {path} does not hold what a comparison writes: {'; '.join(problems)}. "
                "Delete the files named here and run the comparison again with the same --out: only they are redone."
            )
        return cls(path, config, tuple(trials), tuple(ignored), tuple(shorter))

    @classmethod
    def write_config(cls, path: str | Path, config: Config) -> "Record":
        """Start a record, or go on with the one at `path` if it is the same comparison (its config stays).

        Raises AddendaError listing the fields that differ if `path` holds another comparison.
        """
        path, asked = Path(path), as_json(config)
        file = path / "config.json"
        if not file.exists():
            _check_config(file, asked)
            _write(file, asked)  # first: a full disk leaves no folder without it
            (path / "trials").mkdir(parents=True, exist_ok=True)
            return cls.read(path)
        record = cls.read(path)
        there = as_json(record.config)
        differ = [d for field in MATTERS for d in _differences(there.get(field), asked.get(field), field)]
        if differ:
            raise AddendaError(
                f"The directory {path} already holds another comparison. It differs in {'; '.join(differ)}. "
                "Choose another --out, or repeat the command with the settings above to go on with this one."
            )
        if there["hardware"] != asked["hardware"]:
            note = other_hardware(asked["hardware"])
            if note not in record.config.notes:
                return record.changed(replace(record.config, notes=(*record.config.notes, note)))
        return record

    def changed(self, config: Config) -> "Record":
        """Write another configuration, that of a comparison that grew; return the record with it."""
        value = as_json(config)
        _check_config(self.path / "config.json", value)
        _write(self.path / "config.json", value)
        return Record.read(self.path)

    def write_trial(self, trial: TrialRecord) -> "Record":
        """Write one finished run, atomically; return the record with it. A finished run is never replaced."""
        value = as_json(trial)
        problems = _trial_problems(value, self.config)
        if problems:
            raise AddendaError(
                f"A run of {trial.method!r} cannot be recorded in {self.path}: {'; '.join(problems)}. "
                "Nothing was written; this is a fault of the caller, who should give these fields."
            )
        trial = TrialRecord.of(value)
        file = self.path / "trials" / f"{trial.name}.json"
        if file.exists() and file.name not in self.ignored:
            raise AddendaError(
                f"{file} already holds a finished run, and a run is never replaced. Ask find() before running; "
                "delete the file by hand to have it redone."
            )
        together = _together([*self.trials, trial])
        if together:
            raise AddendaError(f"This run does not fit the others in {self.path}: {'; '.join(together)}.")
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, value)
        ignored = tuple(name for name in self.ignored if name != file.name)
        return replace(self, trials=(*self.trials, trial), ignored=ignored)

    def trials_of(self, method: str | None = None, stage: str | None = None) -> list[TrialRecord]:
        """Return finished runs of one method, one stage, or both, ordered by seed, rate and steps."""
        trials = [t for t in self.trials if method in (None, t.method) and stage in (None, t.stage)]
        return sorted(trials, key=lambda t: (t.seed or 0, t.rate or 0.0, t.steps or 0))

    def find(
        self, method: str, stage: str, seed: int | None = None, rate: float | None = None, steps: int | None = None
    ) -> TrialRecord | None:
        """Return the finished run with this identity, or None if it is to do. Rate, steps: any if not given."""
        for t in self.trials_of(method, stage):
            same_rate = rate is None or (t.rate is not None and math.isclose(t.rate, rate, rel_tol=1e-9))
            if t.seed == seed and same_rate and steps in (None, t.steps):
                return t
        return None


def other_hardware(now: Mapping[str, Any]) -> str:
    """Return the note of a record that was gone on with on another machine."""
    return f"continued on other hardware ({now}): times and memory come from both machines"


def _config(file: Path) -> Config:
    with reading(file):
        there = file.exists()
    if not there:
        raise AddendaError(
            f"No record at {file.parent}: a directory with a config.json was expected. "
            "Give the directory that `addenda compare --out` wrote."
        )
    try:
        config = read_json(file)
    except AddendaError as error:
        raise AddendaError(
            f"{error} It says what was compared and cannot be guessed: start again in another --out."
        ) from error
    _check_config(file, config)
    return Config.of(config)


def _check_config(file: Path, config: Any) -> None:
    problems = _missing(config, CONFIG) or fields.bounded(config) or fields.CONFIG(config, "")
    if not problems and all(config["budget"].get(k) is None for k in ("value", "steps")):
        problems = ["budget: expected a number of steps, seconds or parameters, came nothing"]
    if not problems and config.get("schema") != SCHEMA:
        problems = [f"schema: expected {SCHEMA}, came {repr(config.get('schema'))[:80]}"]
    if not problems:
        problems = [f"methods.{k}: expected an object" for k, m in config["methods"].items() if not isinstance(m, dict)]
    if problems:
        raise AddendaError(
            f"{file} is not the configuration of a comparison: {'; '.join(problems)}. "
            "Give the directory that `addenda compare --out` wrote, or read it with the version that wrote it."
        )


def _of_other_budget(trial: TrialRecord, config: Config) -> bool:
    """Return whether a final run has fewer steps than the budget that was asked for since."""
    steps = config.methods[trial.method].steps if trial.method in config.methods else None
    return trial.stage == "final" and None not in (steps, trial.steps) and trial.steps != steps


def _trial_problems(trial: Any, config: Config) -> list[str]:
    problems = _missing(trial, TRIAL) or fields.bounded(trial) or fields.TRIAL(trial, "")
    if problems:
        return problems
    method, stage = trial["method"], trial["stage"]
    if stage not in STAGES:
        problems.append(f"stage: expected one of {', '.join(STAGES)}, came {stage[:80]!r}")
    if method not in config.methods and not method.startswith("base"):
        problems.append(f"method: {method[:200]!r} is not among {', '.join(config.methods)[:500]}")
    if stage == "final" and trial.get("seed") is None:
        problems.append("seed: expected an integer, came nothing")
    if stage in ("final", "search") and method in config.methods and trial.get("rate") is None:
        problems.append("rate: expected a positive number, came nothing")
    needed = stage != "search" and trial["status"] == "ok"
    for split in ("test", "ood"):
        value = trial.get(split)
        if value is None:
            if needed and split == "test":
                problems.append("test: missing, and a finished run must have it")
            continue
        items = value.get("items") if isinstance(value, dict) else None
        if not isinstance(items, str) or not items or set(items) - {"0", "1"}:
            problems.append(f"{split}.items: expected a string of 0 and 1, one character per item")
        elif len(items) > fields.ITEMS:
            problems.append(f"{split}.items: {len(items):,} items, and at most {fields.ITEMS:,} are read")
        elif value.get("accuracy") is None:
            problems.append(f"{split}.accuracy: expected a number, came None")
        elif wrong := fields.share(value["accuracy"], f"{split}.accuracy"):
            problems += wrong
        elif abs(items.count("1") / len(items) - value["accuracy"]) > 1e-3:
            problems.append(f"{split}.accuracy: {value['accuracy']} is not the share of 1 in {split}.items")
        elif (losses := value.get("losses")) is not None and len(losses) != len(items):
            problems.append(f"{split}.losses: {len(losses):,} numbers for {len(items):,} items")
    if trial.get("general") is not None and not trial["general"].get("losses"):
        problems.append("general.losses: expected a number for each window, came nothing")
    return problems


def _together(trials: Sequence[TrialRecord]) -> list[str]:
    """Return what is wrong with the runs as a set: different numbers of items, or one final run twice."""
    problems = []
    for split in ("test", "ood"):
        lengths = {t.name: len(result.items) for t in trials if (result := t.on(split))}
        if len(set(lengths.values())) > 1:
            problems.append(f"{split}.items: every run must answer the same items, but the lengths are {lengths}")
    texts = {t.name: len(t.general.losses) for t in trials if t.general}
    if len(set(texts.values())) > 1:
        problems.append(f"general.losses: every run must read the same windows, but their numbers are {texts}")
    final = [(t.method, t.seed) for t in trials if t.stage == "final"]
    for key in sorted({k for k in final if final.count(k) > 1}):
        problems.append(f"method {key[0]!r}, seed {key[1]}: two final runs, one is expected")
    return problems


def _missing(value: Any, fields: Mapping[str, type]) -> list[str]:
    if not isinstance(value, dict):
        return [f"expected an object, came {type(value).__name__}"]
    return [
        f"{name}: expected {kind.__name__}, came {'nothing' if name not in value else repr(value[name])[:80]}"
        for name, kind in fields.items()
        if not isinstance(value.get(name), kind)
    ]


def _differences(there: Any, now: Any, where: str) -> list[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [k for k in dict.fromkeys([*there, *now]) if k not in PROSE]
        return [d for k in keys for d in _differences(there.get(k), now.get(k), f"{where}.{k}")]
    return [] if there == now else [f"{where} ({there!r} there, {now!r} now)"]


def _write(file: Path, value: Any) -> None:
    """Write `value` as JSON to `file`: whole, on disk, or not at all."""
    write_atomically(file, (readable(value) + "\n").encode("utf-8", "backslashreplace"))
