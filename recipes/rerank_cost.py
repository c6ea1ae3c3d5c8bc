"""What `recipes.rerank` takes: its runs as a list, ten steps of each arm timed, and what is left out for a limit."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from addenda.core.adapter.attach import attach
from addenda.models.load import load_model
from addenda.ranking.reranker import Reranker
from recipes.rerank_arms import Bench
from recipes.rerank_setting import CONTROLS, ENGLISH, FACTORS, PART, PLACES, Setting, part_of, sides, slug
from recipes.seconds import told

STEPS = 10  # that are timed
FEWEST = 25  # queries, below which intervals say nothing
LEFT = ("it", "da", "ja", "fr", "de", "fi")  # which language goes first: those with most and least text go last
KINDS = ("bottlenecks", "numbers")


@dataclass(frozen=True)
class Unit:
    """One run with a record of its own. what: "part", "task", "control" or "judge"; the rest as `Bench` takes it."""

    name: str
    what: str
    arm: str  # of a part its kind, of a control its name
    language: str = ENGLISH
    seed: int = 0
    rank: int | None = None
    where: str = "document"
    query: str = ENGLISH
    width: str = ""  # of --all: behind the name of a task of another width

    def __str__(self) -> str:
        return self.name

    @property
    def speed(self) -> str:
        """Under which name its time is kept."""
        return "judge" if self.what in ("judge", "control") else f"{self.what} {self.arm}"

    @property
    def needs(self) -> tuple["Unit", ...]:
        """The runs whose files this one reads: a task its English part, a judgement its task and the parts that act."""
        if self.what == "part":  # K numbers learn under the head that was fitted beside the bottlenecks
            return () if self.arm == "bottlenecks" else (_part("bottlenecks", self.language),)
        if self.what == "control":
            return ()
        kind, over = part_of(self.arm), self.arm.endswith(PART)
        if self.what == "task":
            return (_part(kind, ENGLISH),) if over else ()
        of = {"query": self.query, "document": self.language}
        task = _task(self.arm, self.seed, self.rank, self.width)
        return (task, *(_part(kind, of[side]) for side in sides(self.where))) if over else (task,)

    def file(self, bench: Bench) -> Path:
        """Return where a part or a task is kept, which a record has only numbers of."""
        if self.what == "part":
            return bench.part_at(self.arm, self.language)
        return bench.file(self.arm, self.seed, self.rank)

    def run(self, bench: Bench) -> dict:
        if self.what == "part":
            return bench.part(self.arm, self.language)
        if self.what == "task":
            return bench.task(self.arm, self.seed, rank=self.rank)
        if self.what == "control":
            return bench.control(self.arm, self.language, self.query)
        return bench.judge(
            self.arm, self.seed, self.language, rank=self.rank, where=self.where, query=self.query
        )  # fmt: skip


def _part(kind: str, language: str) -> Unit:
    return Unit(f"part-{kind}-{language}", "part", kind, language)


def _task(arm: str, seed: int, rank: int | None = None, width: str = "") -> Unit:
    return Unit(f"task-{slug(arm)}-{seed}{width}", "task", arm, seed=seed, rank=rank, width=width)


def units(setting: Setting, languages: Sequence[str], more: bool = False) -> list[Unit]:
    """Return all runs, in order: controls, arms without a part, then for each kind its parts and the arms over them.

    A machine that was given back has lost the files of parts and tasks; so what is judged with them comes soon.
    more: those of --all.
    """
    every = (ENGLISH, *languages)
    made = [Unit(f"control-{name}-{x}", "control", name, x) for x in every for name in CONTROLS]
    for kind in ("", *KINDS):
        made += [_part(kind, x) for x in every if kind]
        for arm in setting.arms:
            if kind == (part_of(arm) if arm.endswith(PART) else ""):
                for seed in setting.seeds:
                    made.append(_task(arm, seed))
                    made += [Unit(f"judged-{slug(arm)}-{seed}-{x}", "judge", arm, x, seed) for x in every]
    return made + (_further(setting, languages) if more else [])


def _further(setting: Setting, languages: Sequence[str]) -> list[Unit]:
    """Return the runs of --all: other places of the part, monolingual pairs, other widths of the bottlenecks."""
    made = [Unit(f"control-{name}-{x}-own", "control", name, x, query=x) for x in languages for name in CONTROLS]
    arm = f"pfeiffer{PART}"
    for seed in setting.seeds:
        made += [Unit(f"judged-{slug(arm)}-{seed}-{x}-{where}", "judge", arm, x, seed, where=where)
                 for where in PLACES for x in languages]  # fmt: skip
        made += [Unit(f"judged-{slug(arm)}-{seed}-{x}-own", "judge", arm, x, seed, query=x) for x in languages]
        for factor in FACTORS:
            rank = max(1, 2 * setting.part_rank // factor)
            made.append(_task(arm, seed, rank, f"-{factor}"))
            made += [Unit(f"judged-{slug(arm)}-{seed}-{x}-{factor}", "judge", arm, x, seed, rank, width=f"-{factor}")
                     for x in (ENGLISH, *languages)]  # fmt: skip
    return made


@dataclass(frozen=True)
class Speeds:
    """Seconds on this machine now: of a step by `Unit.speed`, all phases of it together; of a query under "judge"."""

    seconds: Mapping[str, float]

    def of(self, unit: Unit, setting: Setting) -> float:
        if unit.what in ("judge", "control"):
            return self.seconds["judge"] * setting.queries
        return self.seconds[unit.speed] * (setting.part_steps if unit.what == "part" else setting.steps)

    def total(self, left: Sequence[Unit], setting: Setting) -> float:
        return sum(self.of(unit, setting) for unit in left)


def timed(bench: Bench, left: Sequence[Unit]) -> Speeds:
    """Time ten steps of whatever is among these runs, and one query's documents."""
    found = {"judge": _query(bench)} if any(u.speed == "judge" for u in left) else {}
    with tempfile.TemporaryDirectory() as folder:
        for unit in left:
            if unit.speed in found:
                continue
            if unit.what == "part":
                made = bench.part(unit.arm, ENGLISH, steps=STEPS)
            else:
                part = _untrained(bench, unit.arm, Path(folder)) if unit.arm.endswith(PART) else None
                made = bench.task(unit.arm, 0, steps=STEPS, part=part)
            found[unit.speed] = made["second"]
    return Speeds(found)


def _untrained(bench: Bench, arm: str, folder: Path) -> Path:
    """Return the file of a part that has learned nothing: it takes as long as one that has."""
    rank, kind = bench.setting.part_rank, part_of(arm)
    file = folder / f"{kind}.safetensors"
    if not file.exists():
        model = load_model(bench.model, task="label", labels=1).model
        method = f"pfeiffer:rank={rank}" if kind == "bottlenecks" else f"sparse:total={bench.numbers(rank)}"
        attach(model, method, also_train=(), name="part").save(file, without_base=True)
    return file


def _query(bench: Bench) -> float:
    """Return the seconds of one query's documents."""
    collection, _ = bench.learned(few=True)
    loaded = load_model(bench.model, task="label", labels=1)
    reranker = Reranker(loaded.model, loaded.tokenizer, max_length=bench.setting.max_length)
    query = next(iter(collection.queries.values()))
    documents = [d.whole for d in collection.documents.values()][: bench.setting.depth]
    reranker.rank(query, documents)
    started = time.perf_counter()
    reranker.rank(query, documents)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Plan:
    """What will be run. said: what was left out, in words; seconds: that all of it takes; fits: within the limit."""

    languages: tuple[str, ...]
    queries: int
    seconds: float
    fits: bool
    said: tuple[str, ...]


def plan(
    setting: Setting, speeds: Speeds, within: float | None, done: Callable[[Unit, int], bool], more: bool = False,
    processes: int = 1,
) -> Plan:  # fmt: skip
    """Leave out languages, then queries, until what is not done fits into so many seconds of so many processes.

    Never a seed.

    At least the language with the most text, that with the least, and `FEWEST` queries stay; where these do not fit
    either the plan says so, and several sittings make it.
    """

    def seconds(languages: Sequence[str], queries: int) -> float:
        left = [u for u in units(setting, languages, more) if not done(u, queries)]
        return speeds.total(left, replace(setting, queries=queries)) / processes

    languages, queries, said = list(setting.languages), setting.queries, []
    if within is not None:
        out = sorted(languages, key=lambda x: LEFT.index(x) if x in LEFT else -1)
        gone = []
        while seconds(languages, queries) > within and len(languages) > 2:
            gone.append(out.pop(0))
            languages.remove(gone[-1])
        if gone:
            said.append(f"left out: the language{'s' * (len(gone) > 1)} {', '.join(gone)}")
        while seconds(languages, queries) > within and queries > FEWEST:
            queries = max(FEWEST, queries - 5)
        if queries < setting.queries:
            said.append(f"left out: {setting.queries - queries} of {setting.queries} queries in each language")
    total = seconds(languages, queries)
    fits = within is None or total <= within
    if not fits:
        said.append(f"what is left takes {told(total)}, more than {told(within)}: the same command goes on, sitting by "
                    "sitting, with all of its seeds")  # fmt: skip
    return Plan(tuple(languages), queries, total, fits, tuple(said))


def cost_lines(left: Sequence[Unit], speeds: Speeds, setting: Setting, processes: int = 1) -> list[str]:
    """Return what the runs that are not done take, by what they are, and what so many processes need for all."""
    lines, kinds = [], dict.fromkeys(u.speed for u in left)
    for kind in kinds:
        of = [u for u in left if u.speed == kind]
        unit = "a query" if kind == "judge" else "a step"
        name = "judging" if kind == "judge" else kind
        numbers = f"{speeds.seconds[kind]:>9.3f} s {unit:<8} {told(speeds.total(of, setting)):>9}"
        lines.append(f"{name:<24} {len(of):>4} runs {numbers}")
    total = speeds.total(left, setting)
    by = f"  {told(total / processes)} of {processes} processes" if processes > 1 else ""
    return [*lines, f"{'in all':<24} {len(left):>4} runs {'':>20} {told(total):>9}{by}"]
