"""The runs of one subject: every arm at one rate, every seed once, whichever papers ask for it.

An arm that was run for one paper is the same run for all, so that papers that share an arm do not stand independent of
each other. `lora:rank=8|first=1` is what the training of `lora:rank=8` leaves when it is cut: it comes with it, of the
same run.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from addenda.comparing.arm import Arm, center, parse_arm
from addenda.comparing.entries import (
    BudgetRecord,
    Config,
    MethodRecord,
    SplitResult,
    TrialRecord,
    TrialSpec,
    Until,
    Validation,
)
from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.search import Chosen, Look, grid, last_steps, search
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings, control, judged, trial
from addenda.core.adapter.handle import Adapter
from addenda.core.ask.plan import plan
from addenda.core.disk.cache import cache_folder
from addenda.core.file.identity import base_of, plain
from addenda.core.file.identity import versions as computed_by
from addenda.core.file.save import save
from addenda.core.method.catalogue import build
from addenda.models.machine import hardware, versions
from addenda.statistics.spending import LOOKS
from addenda.train import checkpoint
from addenda.train.evaluate import evaluate
from recipes.store import BASE, SEEDS, Busy, Clock, Store, thinned
from recipes.subjects import Setting

SAVE_EVERY = 300.0  # seconds between two checkpoints of a run that is longer
HEAD_RATE = 3.2e-3  # where the search of a head alone starts

Cut = Callable[[Adapter, Subject, str], SplitResult]  # the result of a trained adapter, cut as the text says


class Place(Protocol):
    """Where claims are tested. void: arms that no run can say anything of, and why."""

    void: dict[str, str]

    def ensure(self, arms: Iterable[str], seeds: Sequence[int]) -> None:
        """Run what is missing."""
        ...

    def record(self, arms: Iterable[str], seeds: Sequence[int]) -> Record:
        """Return what there is, as one record in memory. Raises AddendaError for nothing."""
        ...

    def settle(self) -> None:
        """Read off the runs that are there which arms are void."""
        ...

    def forget(self) -> None:
        """Let the subject go, so that another one has room."""
        ...


class Pool:
    """The runs of a `Setting`. cuts: by the word behind an arm's |; saving: arms whose adapters stay in the cache."""

    def __init__(
        self,
        setting: Setting,
        folders: Mapping[str, str],
        root: Path,
        clock: Clock,
        cuts: Mapping[str, Cut],
        saving: Iterable[str] = (),
        margin: float | None = None,
    ):
        self.setting, self.clock, self.cuts, self.saving = setting, clock, cuts, frozenset(saving)
        self.margin = margin
        self.store = Store(root / setting.name, folders)
        self.void: dict[str, str] = {}
        self._held: tuple[int | None, Subject] | None = None
        self._identity: dict | None = None
        self._chosen: dict[str, Chosen] = {}
        self._pace: dict[str, float] = {}  # seconds a step, judging included

    def record(self, arms: Iterable[str], seeds: Sequence[int]) -> Record:
        return self.store.of(arms, seeds)

    def ensure(self, arms: Iterable[str], seeds: Sequence[int]) -> None:
        """Run what is missing. Raises Busy where another process is at some of it, after all the rest was done."""
        arms, busy = set(arms), False
        for trained in sorted({a.partition("|")[0] for a in arms}):
            with suppress(Busy):  # its rate is not known yet
                if not self._missing(trained, arms, seeds, only_read=True):  # whoever is at it is at further seeds
                    continue
            # an arm is one process's at a time: else two halve each rung of its search, and neither can go on
            with self.store.alone(f"all of {trained}") as mine:
                try:
                    for seed in self._missing(trained, arms, seeds) if mine else ():
                        busy |= not self._final(trained, seed)
                    busy |= not mine
                except Busy:
                    busy = True
        if busy:
            raise Busy

    def _missing(
        self, trained: str, arms: set[str], seeds: Sequence[int], *, only_read: bool = False
    ) -> list[int | None]:
        """Return the seeds at which an arm lacks a result that is wanted (None: of a base that is judged once).

        A void arm lacks none. only_read: raise Busy rather than search for the arm's rate.
        """
        stage, of = ("final", seeds) if trained != BASE or self.setting.drawn else ("control", (None,))
        if trained != BASE and self.chosen(trained, only_read=only_read).rate is None:
            return []
        wanted = [a for a in self.with_cuts(trained) if a == trained or a in arms]
        return [s for s in of if any(self.store.find(a, stage, s) is None for a in wanted)]

    def _final(self, trained: str, seed: int | None) -> bool:
        """Run an arm at its rate, or judge the base; False where another process is at it."""
        if trained == BASE:
            return self._base(seed)
        rate = self.chosen(trained).rate
        assert seed is not None and rate is not None, "a missing run of an arm has both"
        return self._run(TrialSpec(trained, "final", seed, rate, self.setting.steps))

    # ---- rates ----

    def chosen(self, arm: str, *, only_read: bool = False) -> Chosen:
        """Return the rate of an arm, searched for where it is not known yet; without one the arm is void.

        only_read: raise Busy rather than run anything.
        """
        if arm not in self._chosen:
            s = self.setting
            asking = search(
                grid(HEAD_RATE if arm == HEAD else center(arm), s.rates), s.first, last_steps(s.first, s.steps)
            )
            sent = None
            try:
                while True:
                    sent = self._looked(arm, asking.send(sent), only_read)  # type: ignore[arg-type]
            except StopIteration as end:
                self._chosen[arm] = end.value
                if end.value.rate is None:
                    self.void |= dict.fromkeys(self.with_cuts(arm), end.value.why or "no rate was found")
        return self._chosen[arm]

    def _looked(self, arm: str, looks: list[Look], only_read: bool) -> list[TrialRecord]:
        """Return the runs that a search asks for. Raises Busy where another process is at some of them."""
        specs, busy = [TrialSpec(arm, "search", x.seed, x.rate, x.steps) for x in looks], False
        for spec in specs:
            if self._there(spec) is None:
                busy |= only_read or not self._run(spec)
        if busy:
            raise Busy
        return [made for spec in specs if (made := self._there(spec)) is not None]

    def settle(self) -> None:
        """Read off the runs that are there which arms are void."""
        for arm in sorted({a.partition("|")[0] for a in self.store.folders} - {BASE}):
            try:
                self.chosen(arm, only_read=True)
            except Busy:
                continue

    # ---- runs ----

    def _there(self, spec: TrialSpec) -> TrialRecord | None:
        return self.store.find(spec.method, spec.stage, spec.seed, spec.rate, spec.steps)

    def with_cuts(self, trained: str) -> list[str]:
        """Return an arm that is trained, and all that is cut from it."""
        return [a for a in sorted(self.store.folders) if a.partition("|")[0] == trained]

    def _base(self, seed: int | None) -> bool:
        """Judge the untouched base, of a draw where there are draws; False where another process does."""
        stage = "control" if seed is None else "final"
        if self.store.find(BASE, stage, seed) is not None:
            return True
        with self.store.alone(f"{stage}-base-{seed}") as mine:
            if mine and self.store.find(BASE, stage, seed) is None:
                on = self.subject(seed)
                seen = judged(evaluate(on.model, examples=on.splits["validation"].first(self.setting.validation)))
                look = ((0, Validation(loss=seen.loss, accuracy=seen.accuracy)),)
                made = replace(control(on, BASE, on.tested), stage=stage, seed=seed, validation=look)
                if seed is not None:
                    made = replace(made, rate=1.0, steps=self.setting.steps)  # it has none; a final run names them
                self.store.write(thinned(made), self.config)
        return mine

    def _run(self, spec: TrialSpec) -> bool:
        """Run and write one trial with its cuts; False where another process is at it."""
        with self.store.alone(spec.name) as mine:
            if not mine:
                return False
            wanted = self._missing_cuts(spec)
            if self._there(spec) is not None and not wanted:
                return True
            print(f"  {self.setting.name}: {spec.name}", file=sys.stderr, flush=True)
            results: dict[str, SplitResult] = {}
            made = self._trained(spec, wanted, results)
            for name in wanted:  # before the whole one: where that is there, its cuts are
                result = replace(results[name], losses=None) if name in results else None  # none of what diverged
                self.store.write(replace(made, method=name, losses=None, validation=None, test=result), self.config)
            if self._there(spec) is None:
                self.store.write(thinned(made), self.config)
            checkpoint.drop(self._beside(spec))
        return True

    def _missing_cuts(self, spec: TrialSpec) -> list[str]:
        cuts = [a for a in self.with_cuts(spec.method) if "|" in a] if spec.stage == "final" else []
        return [a for a in cuts if self.store.find(a, "final", spec.seed) is None]

    def _trained(self, spec: TrialSpec, wanted: Sequence[str], results: dict[str, SplitResult]) -> TrialRecord:
        """Train and judge; put the results of the cuts that are wanted into `results`."""
        on, pace = self.subject(spec.seed), self._pace.get(spec.method, 0.0)
        self.clock.spare(pace * spec.steps)
        self.store.open(self.store.folders[spec.method], self.config)  # so that other data is refused before it trains
        started, long = time.perf_counter(), pace * spec.steps > SAVE_EVERY

        def after(adapter: Adapter) -> None:
            if spec.method in self.saving and spec.stage == "final":
                save(adapter, self._adapter_file(spec))
            for name in wanted:
                how = name.partition("|")[2]
                results[name] = self.cuts[how.partition("=")[0]](adapter, on, how)

        made = trial(
            on, self.arm(spec.method, on), TrialSettings(self.setting.batch, validation=self.setting.validation), spec,
            checkpoints=self._beside(spec) if long else None,
            save_every=max(1, round(SAVE_EVERY / pace)) if long else None, after=after,
        )  # fmt: skip
        self._pace[spec.method] = (time.perf_counter() - started) / spec.steps
        return made

    def adapter_file(self, arm: str, seed: int) -> Path:
        """Return the file of a final run's adapter; the run is repeated where the cache has lost it."""
        rate = self.chosen(arm).rate
        assert rate is not None, "asked for after `ensure`"
        spec = TrialSpec(arm, "final", seed, rate, self.setting.steps)
        if not self._adapter_file(spec).exists():
            self._trained(spec, [], {})
        return self._adapter_file(spec)

    def _adapter_file(self, spec: TrialSpec) -> Path:
        return self._beside(spec).with_name(f"{spec.name}.safetensors")

    def _beside(self, spec: TrialSpec) -> Path:
        of = sha256(str(self.store.path.resolve()).encode()).hexdigest()[:12]
        return cache_folder() / "recipes" / f"{self.setting.name}-{of}" / spec.name

    # ---- the subject, and what a record says of it ----

    def subject(self, seed: int | None) -> Subject:
        """Return the subject, that of a seed where each has its own examples. One is held at a time."""
        seed = (SEEDS[0] if seed is None else seed) if self.setting.drawn else None
        if self._held is None or self._held[0] != seed:
            self._held = None
            self._held = seed, self.setting.make(seed or 0)
        return self._held[1]

    def forget(self) -> None:
        """Let the subject go, so that another one has room."""
        self._held = None

    def arm(self, name: str, on: Subject) -> Arm:
        """Return an arm as it is put on the subject."""
        if name == HEAD:
            return Arm(HEAD, build(FULL), tuple(f"{head}.*" for head in on.heads))
        return replace(parse_arm(name, None if name == FULL else self.setting.targets), also_train=on.heads)

    def config(self, folder: str) -> Config:
        """Return what the record of a folder says of itself."""
        s, on = self.setting, self.subject(None if self._held is None else self._held[0])
        names = [a for a in sorted(self.store.folders) if self.store.folders[a] == folder]
        return Config(
            title=f"{folder} on {s.name}", created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            command="python -m recipes run", model=on.about_model, data=on.about_data, seeds=SEEDS,
            methods={name: self._about(name, on) for name in names if name != BASE or s.drawn},
            budget=BudgetRecord(kind="steps", value=s.steps, steps=s.steps, batch=s.batch),
            versions=versions(), hardware=hardware(), looks=(), identity=self._identified(on) | {"arms": names},
            margin=self.margin, until=Until(looks=LOOKS),
        )  # fmt: skip

    def _identified(self, on: Subject) -> dict:
        """Return what decides the numbers; of draws, without the examples and the head of one of them.

        A head that was fitted is no part of it: sittings may be on several processors, whose rounding it shows.
        """
        if self._identity is None:
            s = self.setting
            base = {k: v for k, v in base_of(on.model).items() if not ((s.drawn or s.fitted) and k == "weights")}
            examples = {k: e.digest for k, e in on.splits.items() if not (s.drawn and k == "train")}
            made: dict = plain({
                "subject": s.name, "base": base, "examples": examples, "steps": s.steps, "first": s.first,
                "batch": s.batch, "validation": s.validation, "rates": s.rates, "targets": s.targets,
                "versions": computed_by(),
            })  # fmt: skip
            self._identity = made
            return made
        return self._identity

    def _about(self, name: str, on: Subject) -> MethodRecord:
        trained = name.partition("|")[0]
        if trained == BASE:
            return MethodRecord(title="The base", options={}, steps=self.setting.steps)
        arm = self.arm(trained, on)
        planned = plan(on.model, arm.method, targets=arm.targets, also_train=arm.also_train)
        return MethodRecord(
            title=name, options=arm.method.options() | arm.training, trainable=planned.trainable,
            sites=len(planned.rows), targets=arm.targets if isinstance(arm.targets, str) else list(arm.targets),
            steps=self.setting.steps, void=self.void.get(name),
        )  # fmt: skip
