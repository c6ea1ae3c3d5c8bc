"""What the files of a record hold, as types: `Config` of config.json, `TrialRecord` of each file in trials/.

`of` reads an object that has passed the checks in `fields`, and `as_json` writes every type here. None stands for what
a file does not say and is not written, except under the names in `nulls`. What is there under other names is kept in
`more` and written again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self
from urllib.parse import quote

SCHEMA = 1
MARGIN = 2.0  # percentage points, where none was given or kept
FIRST_STEPS = 10  # of a search whose record does not say how long its runs are


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The base of all types here. READ: how a field's value is made from JSON, where it is another there."""

    READ: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    NULLS: ClassVar[tuple[str, ...]] = ()

    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nulls(self) -> tuple[str, ...]:
        """The names that are written where their value is None, too."""
        return self.NULLS

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        """Make an entry from a JSON object that has been checked."""
        names = {f.name for f in fields(cls)} - {"more"}
        known = {k: cls.READ[k](v) if k in cls.READ and v is not None else v for k, v in value.items() if k in names}
        return cls(**known, more={k: v for k, v in value.items() if k not in names})


def as_json(value: Any) -> Any:
    """Return a value as JSON gives it back: objects for entries, lists for tuples, null for what is not finite."""
    if isinstance(value, Entry):
        named = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "more"}
        value = {k: v for k, v in named.items() if v is not None or k in value.nulls} | dict(value.more)
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if hasattr(value, "item"):  # a number of numpy's or torch's
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _pairs(value: list) -> tuple:
    return tuple(map(tuple, value))


# ---- trials/NAME.json ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Validation(Entry):
    """One look at the validation split while a run trains. items: as of a `SplitResult`, in a search."""

    NULLS: ClassVar = ("accuracy",)

    loss: float | None = None
    accuracy: float | None = None
    items: str | None = None


@dataclass(frozen=True, kw_only=True)
class SplitResult(Entry):
    """A whole split judged. items: one character for each item, "1" right, "0" wrong; losses: of each, in nats."""

    READ: ClassVar = {"losses": tuple}

    accuracy: float
    loss: float | None = None
    items: str
    losses: tuple[float | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TextResult(Entry):
    """The general text judged. loss: mean over its tokens, in nats; losses: of each of its windows, alike in length."""

    READ: ClassVar = {"losses": tuple}

    loss: float | None = None
    losses: tuple[float | None, ...]


def _looks(value: list) -> tuple[tuple[int, Validation], ...]:
    return tuple((step, Validation.of(look)) for step, look in value)


@dataclass(frozen=True, kw_only=True)
class TrialRecord(Entry):
    """One finished run. losses, validation: (step, value) of each look; None: nothing was trained.

    stage: "search", "final" or "control". status: "ok", or what became of it. trainable: numbers that were trained.
    general: the loss on a general text, where that was measured. grouped: how many runs were trained at once; times and
    memory are then those of the arm alone, as it was tried, see `Grouping`.
    """

    READ: ClassVar = {
        "losses": _pairs, "validation": _looks, "test": SplitResult.of, "ood": SplitResult.of, "general": TextResult.of,
    }  # fmt: skip
    NULLS: ClassVar = ("seed",)

    method: str
    seed: int | None = None
    stage: str
    rate: float | None = None
    steps: int | None = None
    trainable: int | None = None
    attach_seconds: float | None = None
    status: str
    note: str | None = None
    losses: tuple[tuple[int, float | None], ...] | None = None
    validation: tuple[tuple[int, Validation], ...] | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    images_per_second: float | None = None
    peak_bytes: int | None = None
    test: SplitResult | None = None
    ood: SplitResult | None = None
    general: TextResult | None = None
    grouped: int | None = None
    adapter_bytes: int | None = None
    seconds: float | None = None

    @property
    def nulls(self) -> tuple[str, ...]:
        """The names that are written where their value is None, too: of a run that trained, its memory."""
        return self.NULLS if self.losses is None else (*self.NULLS, "peak_bytes")

    @property
    def name(self) -> str:
        """The name of the run's file, without suffix."""
        return trial_name(self.method, self.stage, self.seed, self.rate, self.steps)

    @property
    def last_look(self) -> Validation | None:
        """The validation split as it was judged last."""
        return self.validation[-1][1] if self.validation else None

    def on(self, split: str) -> SplitResult | None:
        """Return the result on "test" or "ood"."""
        return {"test": self.test, "ood": self.ood}[split]


@dataclass(frozen=True)
class TrialSpec:
    """A run that is wanted: of which arm, in which stage, and how. Its fields are a finished run's identity."""

    method: str
    stage: str
    seed: int
    rate: float
    steps: int

    @property
    def name(self) -> str:
        """The name of the run's file, without suffix."""
        return trial_name(self.method, self.stage, self.seed, self.rate, self.steps)


def trial_name(
    method: str, stage: str, seed: int | None = None, rate: float | None = None, steps: int | None = None
) -> str:
    """Return the file name of a run, without suffix: `final-lora-seed0-rate0.001-steps40`. Safe on any file system."""
    parts = [stage, quote(method.replace(" ", "_"), safe="")]
    for name, value in (("seed", seed), ("rate", rate), ("steps", steps)):
        if value is not None:
            parts.append(f"{name}{value:.10g}" if isinstance(value, float) else f"{name}{value}")
    return "-".join(parts)


# ---- config.json -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Grouping(Entry):
    """Whether an arm's runs are trained several at once, found before the first run. why: where they are not.

    runs: as many were tried at once, ratio times as fast as one after another; most: as many run at once. step_seconds,
    pace (tokens or images a second), peak_bytes: of a run alone; where any arm of a record is grouped, of all arms.
    """

    pays: bool = False
    most: int | None = None
    runs: int | None = None
    ratio: float | None = None
    step_seconds: float | None = None
    pace: float | None = None
    peak_bytes: int | None = None
    why: str | None = None


def _groupings(value: Mapping[str, Any]) -> dict[str, Grouping]:
    return {label: Grouping.of(made) for label, made in value.items()}


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Entry):
    """The base. note: its dtype and why; attention: the chosen implementation, with seconds of those measured."""

    name: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    note: str | None = None
    trust_remote_code: bool | None = None
    quantize: str | None = None
    attention: str | None = None
    attention_seconds: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class TextRecord(Entry):
    """The general text. sha256: of the text; python: the version whose it is, where it is Python's; length: tokens."""

    name: str | None = None
    sha256: str | None = None
    python: str | None = None
    windows: int | None = None
    length: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataRecord(Entry):
    """The data. sizes, hashes, skipped: by split; prepared: how images are; example: one of the test split.

    general: the text that forgetting is measured on, where it is.
    """

    READ: ClassVar = {"general": TextRecord.of}

    name: str | None = None
    sizes: Mapping[str, int] | None = None
    hashes: Mapping[str, str | None] | None = None
    metric: str | None = None
    subset: str | None = None
    description: str | None = None
    example: Mapping[str, Any] | None = None
    prepared: str | None = None
    skipped: Mapping[str, int] | None = None
    general: TextRecord | None = None


@dataclass(frozen=True, kw_only=True)
class BudgetRecord(Entry):
    """What every arm may spend: `value` of its kind. steps: of the longest final run; batch: examples a step."""

    kind: str | None = None
    value: float | None = None
    steps: int | None = None
    batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class MethodRecord(Entry):
    """One arm. options: of the method, its optimizer and its own training; rates: tried; steps: of a final run.

    void: why it has no final runs, where its search ended without a rate or it was left out for the time.
    """

    READ: ClassVar = {"rates": tuple}

    title: str | None = None
    options: Mapping[str, Any] | None = None
    hypothesis: str | None = None
    trainable: int | None = None
    sites: int | None = None
    targets: str | list[str] | None = None
    rates: tuple[float, ...] | None = None
    steps: int | None = None
    void: str | None = None


def _grids(value: Mapping[str, list]) -> dict[str, tuple[float, ...]]:
    return {k: tuple(v) for k, v in value.items()}


@dataclass(frozen=True, kw_only=True)
class SearchRecord(Entry):
    """How learning rates are searched. rates: of the grid, by arm; further: rates tried beyond it at most.

    steps: of a first run, by arm; one number for all in older records. arms: how many go on after their first runs,
    where time is short.
    """

    READ: ClassVar = {"rates": _grids}

    kind: str | None = None
    rates: Mapping[str, tuple[float, ...]] | None = None
    steps: Mapping[str, int] | int | None = None
    further: int | None = None
    arms: int | None = None

    def first_steps(self, label: str) -> int:
        """Return the steps of an arm's first runs."""
        steps = self.steps.get(label) if isinstance(self.steps, Mapping) else self.steps
        return steps or FIRST_STEPS


@dataclass(frozen=True, kw_only=True)
class Growth(Entry):
    """How a comparison was made larger: when, after what had been seen, and each entry as (there, now)."""

    when: str = ""
    seen: str = ""
    changed: Mapping[str, list] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LookTaken(Entry):
    """One look of a comparison that adds seeds until it decides: seeds of every arm, when, the pairs still open."""

    READ: ClassVar = {"undecided": _pairs}

    seeds: int = 0
    when: str = ""
    undecided: tuple[tuple[str, str], ...] = ()


def _taken(value: list) -> tuple[LookTaken, ...]:
    return tuple(map(LookTaken.of, value))


@dataclass(frozen=True, kw_only=True)
class Until(Entry):
    """How a comparison adds seeds until it decides, see `until`. looks: the seeds at which it may be looked at.

    seconds: predicted for the whole with the seeds of each; taken: the looks so far; stopped: why no more.
    """

    READ: ClassVar = {"looks": tuple, "seconds": tuple, "taken": _taken}

    looks: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    max_minutes: float | None = None
    taken: tuple[LookTaken, ...] = ()
    stopped: str | None = None


def _methods(value: Mapping[str, Any]) -> dict[str, MethodRecord]:
    return {label: MethodRecord.of(method) for label, method in value.items()}


def _growths(value: list) -> tuple[Growth, ...]:
    return tuple(map(Growth.of, value))


@dataclass(frozen=True, kw_only=True)
class Config(Entry):
    """The configuration of a comparison. identity, looks: see `grow`; None in records from before they were kept.

    margin: the difference, in percentage points, below which two arms count as equal; None: `MARGIN`. until: None where
    seeds were asked for by their number. options: of the call, see `more`.
    """

    READ: ClassVar = {
        "search": SearchRecord.of, "notes": tuple, "model": ModelRecord.of, "data": DataRecord.of,
        "budget": BudgetRecord.of, "methods": _methods, "seeds": tuple, "grouped": _groupings,
        "looks": _growths, "until": Until.of,
    }  # fmt: skip
    NULLS: ClassVar = ("search",)

    schema: int = SCHEMA
    created: str = ""
    command: str = ""
    search: SearchRecord | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    title: str
    model: ModelRecord
    data: DataRecord
    budget: BudgetRecord
    methods: Mapping[str, MethodRecord]
    seeds: tuple[int, ...]
    margin: float | None = None
    until: Until | None = None
    options: Mapping[str, Any] | None = None
    identity: Mapping[str, Any] | None = None
    looks: tuple[Growth, ...] | None = None
    predicted_seconds: float | None = None
    grouped: Mapping[str, Grouping] | None = None
    measured_step_seconds: Mapping[str, float] | None = None

    @property
    def identified(self) -> Mapping[str, Any]:
        """The arms in the identity, by label: those too that were dropped before they ran."""
        return (self.identity or {}).get("methods") or {}
