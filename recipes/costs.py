"""python -m recipes --cost: what every paper's claims will take, in core-hours, before anything is run."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from addenda import AddendaError
from addenda.comparing.costs import forward_seconds, step_seconds
from addenda.comparing.search import cost, last_steps
from addenda.comparing.trial import TrialSettings
from addenda.statistics.spending import LOOKS
from recipes.claims import Claim, Claims
from recipes.nets import fashion
from recipes.pool import Pool
from recipes.shira import NAME as TWO_TASKS
from recipes.store import BASE, Clock
from recipes.subjects import SETTINGS, Setting
from recipes.trp import ENERGIES, EPOCHS, LAMBDAS, Arm, trained
from recipes.work import folders

SEEDS = 8  # that a claim of `trp` is likely to take


@dataclass(frozen=True)
class Price:
    """What one paper takes on one subject: core-hours, of so many trained arms. shared: arms that others pay."""

    paper: str
    subject: str
    hours: float
    arms: int
    shared: int

    def words(self) -> str:
        others = f", {self.shared} more are paid above" if self.shared else ""
        return f"{self.hours:6.2f} core-hours  {self.subject:18} {self.paper} ({self.arms} arms{others})"


def arm_seconds(setting: Setting, step: float, look: float, judging: float, seeds: int) -> float:
    """Return the seconds of an arm's search, at its longest, and of its final runs with so many seeds."""
    runs, steps = cost(setting.rates, setting.first, last_steps(setting.first, setting.steps))
    return steps * step + runs * look + seeds * (setting.steps * step + 4 * look + judging)


def priced(claims: Claims, root: Path, subjects: Iterable[str] = ()) -> list[Price]:
    """Measure a step of every arm on every subject that is here, and return what is predicted, the cheapest first.

    An arm that several papers name is counted for the first of them. subjects: these only, where any.
    """
    torch.set_num_threads(1)
    found: list[Price] = []
    where = {k: v for k, v in folders(claims).items() if not subjects or k in subjects}
    for name, setting in SETTINGS.items():
        if name in where:
            try:
                found += _on_subject(claims, Pool(setting, where[name], root, Clock(), {}))
            except AddendaError as error:
                print(f"{name}: not here. {error}")
    if "trp" in where:
        try:
            found += _nets(claims)
        except AddendaError as error:
            print(f"trp: not here. {error}")
    return sorted(found, key=lambda p: p.hours)


def _on_subject(claims: Claims, pool: Pool) -> list[Price]:
    """Measure every arm of one subject."""
    setting, on, paid, found = pool.setting, pool.subject(None), set(), []
    settings = TrialSettings(setting.batch, validation=setting.validation)
    share = min(1.0, setting.validation / len(on.splits["validation"]))
    look = _alone(forward_seconds, on, "validation") * share
    judging = sum(_alone(forward_seconds, on, split) for split in on.tested)
    deciding = {a.partition("|")[0] for c in claims.claims if setting.name in _subjects(c) for a in c.primary}
    for paper in claims.papers:
        of = [c for c in claims.of(paper) if c.kind == "measured" and setting.name in _subjects(c)]
        arms = {a.partition("|")[0] for c in of for a in c.arms} - {BASE}
        new = sorted(arms - paid)
        paid |= arms
        steps = {a: _alone(step_seconds, on, pool.arm(a, on), settings, lambda text: None) for a in new}
        seeds = {a: setting.seeds if a in deciding else LOOKS[0] for a in new}
        hours = sum(arm_seconds(setting, s, look, judging, seeds[a]) for a, s in steps.items()) / 3600
        if of:
            found.append(Price(paper, setting.name, hours, len(new), len(arms) - len(new)))
    return found


def _alone(measure: Callable[..., float], *given: object) -> float:
    """Return seconds as `measure` finds them, less what other processes took: of the processor, not of the clock."""
    wall, busy = time.perf_counter(), time.process_time()
    found = measure(*given)
    return found * min(1.0, (time.process_time() - busy) / (time.perf_counter() - wall))


def _subjects(claim: Claim) -> tuple[str, ...]:
    return ("docstrings", "kinds") if claim.subject == TWO_TASKS else (claim.subject,)


def _nets(claims: Claims) -> list[Price]:
    """Predict Trained Rank Pruning from one epoch of 1,000 images."""
    task = fashion(1000, 100)
    started = time.process_time()
    trained(task, Arm("channel", 0.95, 1e-2), 0, 1)
    epoch = (time.process_time() - started) * 10
    epochs = (len(ENERGIES) + len(LAMBDAS)) * EPOCHS // 2 + SEEDS * 5 * EPOCHS
    paper = next(c.paper for c in claims.claims if c.subject == "trp")
    return [Price(paper, "trp", epochs * epoch / 3600, 5, 0)]
