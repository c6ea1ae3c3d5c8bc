"""SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): quick to switch, and less quarrelsome when fused?

Claims. (1) Putting 1 % of the entries on and off is 5 to 16 times faster than fusing a LoRA: a matter of time, not
measured again. (2) Two adapters of different tasks, added up, lose less accuracy than two LoRAs do. (3) Alone, it is as
good as a LoRA.

Two tasks share the encoder: which library is a docstring from, and does it describe a class, a function or a method?
Each has a head of its own, fitted to the frozen features beforehand. Arms, on every linear layer: LoRA r = 8 and SHiRA
at 1 % with the largest weights, random positions, and the largest gradients. Each is trained on each task, as the runs
of the subjects docstrings and kinds; they are judged alone, then with the other task's adapter acting too (`|fused`).
The items of both tasks stand side by side, and what is lost by fusing is a difference on the same items and seeds.
"""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import addenda as ad
from addenda.comparing.entries import BudgetRecord, Config, MethodRecord, SplitResult, TrialRecord, Until
from addenda.comparing.record import Record
from addenda.comparing.trial import judged
from addenda.models.machine import hardware, versions
from addenda.statistics.spending import LOOKS
from addenda.train.evaluate import evaluate
from recipes.pool import Pool
from recipes.store import SEEDS, Busy, Store, short

NAME, FUSED = "two-tasks", "fused"


class TwoTasks:
    """Adapters of two pools, alone and both at once. Its own record holds the items of both tasks side by side."""

    def __init__(self, tasks: tuple[Pool, Pool], folders: Mapping[str, str], root: Path):
        self.tasks, self.store = tasks, Store(root / NAME, folders)
        self.settle()

    @property
    def void(self) -> dict[str, str]:
        """Arms that are void on one of the two tasks."""
        found = self.tasks[0].void | self.tasks[1].void
        return {a: found[t] for a in self.store.folders if (t := a.partition("|")[0]) in found}

    def settle(self) -> None:
        """Read off the runs that are there which arms are void."""
        for pool in self.tasks:
            pool.settle()

    def record(self, arms: Iterable[str], seeds: Sequence[int]) -> Record:
        return self.store.of(arms, seeds)

    def ensure(self, arms: Iterable[str], seeds: Sequence[int]) -> None:
        """Run what is missing: of each task, then both at once. Raises Busy where another process is at some of it."""
        trained = sorted({a.partition("|")[0] for a in arms})
        busy = False
        for pool in self.tasks:
            try:
                pool.ensure(trained, seeds)
            except Busy:
                busy = True
        for arm in trained if not busy else ():
            for seed in seeds if arm not in self.void else ():
                if self.store.find(arm, "final", seed) is None:
                    busy |= not self._fuse(arm, seed)
        if busy:
            raise Busy

    def forget(self) -> None:
        """Let both subjects go."""
        for pool in self.tasks:
            pool.forget()

    def _fuse(self, arm: str, seed: int) -> bool:
        with self.store.alone(f"fused-{arm}-{seed}") as mine:
            if mine and self.store.find(arm, "final", seed) is None:
                print(f"  {NAME}: {arm}, seed {seed}", file=sys.stderr, flush=True)
                alone = [pool.store.find(arm, "final", seed) for pool in self.tasks]
                files = [pool.adapter_file(arm, seed) for pool in self.tasks]
                tests = [t.test for t in alone if t is not None and t.test is not None]
                made = replace(alone[0] or TrialRecord(method=arm, stage="final", status="ok"), losses=None,
                               validation=None)  # fmt: skip
                if len(tests) < 2:  # one of them diverged
                    made = replace(made, status="diverged", test=None)
                    both = made
                else:
                    both = replace(made, test=short(joined([_both(pool, files) for pool in self.tasks]), seed))
                    made = replace(made, test=joined(tests))
                self.store.write(replace(both, method=f"{arm}|{FUSED}"), self._config)
                self.store.write(made, self._config)  # last: where it is there, the other is
        return mine

    def _config(self, folder: str) -> Config:
        names = [a for a in sorted(self.store.folders) if self.store.folders[a] == folder]
        known = [next(iter(pool.store.records().values())).config for pool in self.tasks]
        of = [{k: v for k, v in (c.identity or {}).items() if k != "arms"} for c in known]
        steps = known[0].budget.steps
        return Config(
            title=f"{folder} on two tasks", created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            command="python -m recipes run", model=known[0].model, data=known[0].data, seeds=SEEDS,
            methods={a: MethodRecord(title=a, options={}, steps=steps) for a in names},
            budget=BudgetRecord(kind="steps", value=steps, steps=steps, batch=known[0].budget.batch),
            versions=versions(), hardware=hardware(), looks=(), identity={"tasks": of, "arms": names},
            margin=known[0].margin, until=Until(looks=LOOKS),
        )  # fmt: skip


def _both(pool: Pool, files: Sequence[Path]) -> SplitResult:
    """Return the result on one task while the adapters of both act."""
    on = pool.subject(None)
    names = [f"task{i}" for i in range(len(files))]
    try:
        for name, file in zip(names, files, strict=True):
            ad.load(on.model, file, name=name)
        ad.switch(on.model, names)
        return judged(evaluate(on.model, examples=on.splits["test"]))
    finally:
        ad.detach(on.model)


def joined(parts: Sequence[SplitResult]) -> SplitResult:
    """Return the results on several splits as one, their items side by side."""
    items = "".join(p.items for p in parts)
    return SplitResult(accuracy=items.count("1") / len(items), items=items)
