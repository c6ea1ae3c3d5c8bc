"""The record: the directory that a comparison leaves behind, and from which an interrupted one goes on.

    config.json           what is compared: model, data with hashes, budget, methods, seeds, search, versions
    trials/NAME.json      one finished run each, with one character per test item ("1" right, "0" wrong)

Every file is written whole or not at all (temporary name, fsync, rename). A file that does not parse was cut off
by something stronger than this process; it is ignored, listed in `Record.ignored`, and its run is done again.
Files are strict JSON: a loss that is not finite is stored as null.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from addenda.comparing import fields
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import read_json, reading
from addenda.core.disk.atomic import readable, write_atomically

SCHEMA = 1
STAGES = ("search", "final", "control")
FULL, HEAD = "full", "head"  # arms that are fitted, but are controls: every parameter, and nothing but a new head
# What makes two comparisons the same one. Title, command, times and hardware do not; prose about a method neither.
MATTERS = ("schema", "model", "data", "budget", "methods", "seeds", "search", "versions")
PROSE = {"title", "hypothesis", "description", "example"}
CONFIG = {"title": str, "model": dict, "data": dict, "budget": dict, "methods": dict, "seeds": list}
DEFAULTS = {"created": "", "command": "", "search": None, "versions": {}, "hardware": {}, "notes": []}
TRIAL = {"method": str, "stage": str, "status": str}


@dataclass(frozen=True)
class Record:
    """One record directory as read: `path`, `config`, finished `trials`, and the names of `ignored` files."""

    path: Path
    config: dict[str, Any]
    trials: tuple[dict[str, Any], ...] = ()
    ignored: tuple[str, ...] = ()
    shorter: tuple[dict[str, Any], ...] = ()  # final runs of a budget that was lengthened since; they do not count

    @classmethod
    def read(cls, path: str | Path) -> "Record":
        """The record at `path`. Raises AddendaError with every missing or impossible field, by file."""
        path = Path(path)
        config = _config(path / "config.json")
        trials, ignored, problems, shorter = [], [], [], []
        for file in sorted((path / "trials").glob("*.json")):
            try:
                trial = read_json(file)
            except AddendaError:
                ignored.append(file.name)
                continue
            found = _trial_problems(trial, config)
            problems += [f"trials/{file.name}: {p}" for p in found]
            if not found:
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
    def write_config(cls, path: str | Path, config: Mapping[str, Any]) -> "Record":
        """Start a record, or go on with the one at `path` if it is the same comparison (its config stays).

        Raises AddendaError listing the fields that differ if `path` holds another comparison.
        """
        path, config = Path(path), _plain({"schema": SCHEMA, **DEFAULTS, **config})
        file = path / "config.json"
        if not file.exists():
            _check_config(file, config)
            _write(file, config)  # first: a full disk leaves no folder without it
            (path / "trials").mkdir(parents=True, exist_ok=True)
            return cls.read(path)
        record = cls.read(path)
        differ = [d for field in MATTERS for d in _differences(record.config.get(field), config.get(field), field)]
        if differ:
            raise AddendaError(
                f"The directory {path} already holds another comparison. It differs in {'; '.join(differ)}. "
                "Choose another --out, or repeat the command with the settings above to go on with this one."
            )
        if record.config.get("hardware") != config.get("hardware"):
            note = f"continued on other hardware ({config.get('hardware')}): times and memory come from both machines"
            if note not in record.config["notes"]:
                record.config["notes"].append(note)
                _write(file, record.config)
        return record

    def changed(self, config: Mapping[str, Any]) -> "Record":
        """The record with another configuration, written: what a comparison that grew now asks for."""
        config = _plain(config)
        _check_config(self.path / "config.json", config)
        _write(self.path / "config.json", config)
        return Record.read(self.path)

    def write_trial(self, trial: Mapping[str, Any]) -> "Record":
        """Write one finished run, atomically; returns the record with it. A finished run is never replaced."""
        trial = _plain(trial)
        problems = _trial_problems(trial, self.config)
        if problems:
            raise AddendaError(
                f"A run of {trial.get('method')!r} cannot be recorded in {self.path}: {'; '.join(problems)}. "
                "Nothing was written; this is a fault of the caller, who should give these fields."
            )
        file = self.path / "trials" / f"{trial_name(trial)}.json"
        if file.exists() and file.name not in self.ignored:
            raise AddendaError(
                f"{file} already holds a finished run, and a run is never replaced. Ask find() before running; "
                "delete the file by hand to have it redone."
            )
        together = _together([*self.trials, dict(trial)])
        if together:
            raise AddendaError(f"This run does not fit the others in {self.path}: {'; '.join(together)}.")
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, trial)
        return replace(
            self,
            trials=(*self.trials, dict(trial)),
            ignored=tuple(name for name in self.ignored if name != file.name),
        )

    def trials_of(self, method: str | None = None, stage: str | None = None) -> list[dict[str, Any]]:
        """Finished runs of one method, one stage, or both, ordered by seed, rate and steps."""
        found = [t for t in self.trials if method in (None, t["method"]) and stage in (None, t["stage"])]
        return sorted(found, key=lambda t: (t.get("seed") or 0, t.get("rate") or 0.0, t.get("steps") or 0))

    def find(
        self, method: str, stage: str, seed: int | None = None, rate: float | None = None, steps: int | None = None
    ) -> dict[str, Any] | None:
        """The finished run with this identity, or None if it is still to do. Rate and steps: any if not given."""
        for t in self.trials_of(method, stage):
            same_rate = rate is None or (t.get("rate") is not None and math.isclose(t["rate"], rate, rel_tol=1e-9))
            if t.get("seed") == seed and same_rate and steps in (None, t.get("steps")):
                return t
        return None


def trial_name(trial: Mapping[str, Any]) -> str:
    """File name of a run, without suffix: `final-lora-seed0-rate0.001-steps40`. Safe on every file system."""
    label = quote(str(trial["method"]).replace(" ", "_"), safe="")
    parts = [trial["stage"], label]
    for field in ("seed", "rate", "steps"):
        if trial.get(field) is not None:
            value = trial[field]
            parts.append(f"{field}{value:.10g}" if isinstance(value, float) else f"{field}{value}")
    return "-".join(parts)


def _config(file: Path) -> dict[str, Any]:
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
    return {**DEFAULTS, "notes": [], **config}


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


def _of_other_budget(trial: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a final run has fewer steps than the budget that was asked for since."""
    steps = config["methods"].get(trial["method"], {}).get("steps")
    return trial["stage"] == "final" and None not in (steps, trial.get("steps")) and trial["steps"] != steps


def _trial_problems(trial: Any, config: Mapping[str, Any]) -> list[str]:
    problems = _missing(trial, TRIAL) or fields.bounded(trial) or fields.TRIAL(trial, "")
    if problems:
        return problems
    if trial["stage"] not in STAGES:
        problems.append(f"stage: expected one of {', '.join(STAGES)}, came {trial['stage'][:80]!r}")
    if trial["method"] not in config["methods"] and not trial["method"].startswith("base"):
        problems.append(f"method: {trial['method'][:200]!r} is not among {', '.join(config['methods'])[:500]}")
    if trial["stage"] == "final" and trial.get("seed") is None:
        problems.append("seed: expected an integer, came nothing")
    if trial["stage"] in ("final", "search") and trial["method"] in config["methods"] and trial.get("rate") is None:
        problems.append("rate: expected a positive number, came nothing")
    needed = trial["stage"] != "search" and trial["status"] == "ok"
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
    return problems


def _together(trials: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the runs as a set: different numbers of items, or one final run twice."""
    problems = []
    for split in ("test", "ood"):
        lengths = {trial_name(t): len(t[split]["items"]) for t in trials if t.get(split)}
        if len(set(lengths.values())) > 1:
            problems.append(f"{split}.items: every run must answer the same items, but the lengths are {lengths}")
    final = [(t["method"], t["seed"]) for t in trials if t["stage"] == "final"]
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


def _plain(value: Any) -> Any:
    """As JSON will give it back: lists for tuples, strings for keys, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):  # a number of numpy's or torch's
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _write(file: Path, value: Any) -> None:
    """Write `value` as JSON to `file`: whole, on disk, or not at all."""
    write_atomically(file, (readable(value) + "\n").encode())
