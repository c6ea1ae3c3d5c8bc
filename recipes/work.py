"""python -m recipes run: every claim, in a fixed order, until it is decided, over as many sittings as it takes.

A claim is looked at with 3, 5, 8, 12 and 20 seeds, until its verdict is there, or its interval is no wider than half
the margin on each side. Contrasts beside the one that decides are made with three seeds, when all papers are decided.
The gate comes first: on validation data, an adapter that is known to work must gain three margins over the base, else
nothing that is measured there tells methods apart, and the subject is void.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch

from addenda import AddendaError
from addenda.comparing.entries import TrialRecord
from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.stats import Comparison, analyse
from addenda.statistics.intervals import Pooled, of_answers, spread
from addenda.statistics.spending import LOOKS
from recipes import controls as _controls  # noqa: F401 – registers arms of ours
from recipes import dylora, lord
from recipes.claims import Claim, Claims, Measured, Side, Verdict, judge, names_of_sides
from recipes.pool import Place, Pool
from recipes.shira import NAME as TWO_TASKS
from recipes.shira import TwoTasks
from recipes.store import BASE, SEEDS, SHARED, Busy, Clock, TimeUp, do_all, training_loss
from recipes.subjects import CHEAPEST, SETTINGS
from recipes.trp import Nets

FAIRER = 3  # papers on fairer subjects that are run unasked
GATE_SEEDS = SEEDS[: LOOKS[0]]
DECIDED = ("holds", "does not hold", "on the margin")


# ---- where claims are tested -----------------------------------------------------------------------------------------


def folders(claims: Claims) -> dict[str, dict[str, str]]:
    """Return for each subject and arm the folder of its runs: a recipe's, or that of what several recipes name."""
    users: dict[str, dict[str, set[str]]] = {}
    for claim in (c for c in claims.claims if c.kind == "measured"):
        for place in (claim.subject, *(("docstrings", "kinds") if claim.subject == TWO_TASKS else ())):
            for arm in claim.arms:
                arm = arm.partition("|")[0] if place in ("docstrings", "kinds") and claim.subject == TWO_TASKS else arm
                users.setdefault(place, {}).setdefault(arm, set()).add(claim.recipe)
    for name, where in claims.subjects.items():
        for arm in where.gate:
            users.setdefault(name, {}).setdefault(arm, set()).update({SHARED, "gate"})
    found = {}
    for name, arms in users.items():
        trained: dict[str, set[str]] = {}
        for arm, by in arms.items():
            trained.setdefault(arm.partition("|")[0], set()).update(by)
        known = {a: SHARED if len(by) > 1 or a in (BASE, HEAD, FULL) else next(iter(by)) for a, by in trained.items()}
        found[name] = {arm: known[arm.partition("|")[0]] for arm in (*arms, *known)}
    return found


def places(claims: Claims, root: Path, clock: Clock) -> dict[str, Place]:
    """Return every place of claims.toml by name."""
    where = folders(claims)
    saved = {a for a in where.get("kinds", {}) if a != BASE}
    made: dict[str, Place] = {}
    for name, setting in SETTINGS.items():
        if name in where:
            saving = saved if name in ("docstrings", "kinds") else ()
            margin = claims.subjects[name].delta if name in claims.subjects else None
            made[name] = Pool(setting, where[name], root, clock, dylora.CUTS, saving, margin)
    if TWO_TASKS in where:
        tasks = made["docstrings"], made["kinds"]
        made[TWO_TASKS] = TwoTasks(tasks, where[TWO_TASKS], root)  # type: ignore[arg-type]
    if "trp" in where:
        made["trp"] = Nets(where["trp"], root, clock)
    if "lord" in where:
        made["lord"] = lord.Cells(root, clock)
    return made


# ---- what was measured -----------------------------------------------------------------------------------------------


def measured(claim: Claim, place: Place, found: tuple[Record, Comparison] | None, look: int) -> Measured | None:
    """Return a claim's contrast with the first `look` seeds; None where they are not all there.

    found: the record of the paper's arms with these seeds, and its statistics.
    """
    if isinstance(place, lord.Cells):
        return place.measured(claim)
    if found is None:
        return None
    seeds = _seeds(found[0], claim.a, claim.b)
    return contrast(*found, claim, claim.a, claim.b, seeds) if len(seeds) == look else None


def contrast(record: Record, told: Comparison, claim: Claim, a: Side, b: Side, seeds: Sequence[int]) -> Measured:
    """Return metric of a minus metric of b over some seeds."""
    if claim.metric == "loss":
        one, other = ([training_loss(record, str(side), seed, claim.batches or 1) for seed in seeds] for side in (a, b))
        gaps = [x - y for x, y in zip(one, other, strict=True)]
        return Measured(fmean(gaps), stdev(gaps) / len(gaps) ** 0.5, len(gaps) - 1, len(gaps), claim.batches or 1)
    if isinstance(a, str) and isinstance(b, str):
        found = told.pair(a, b)
        if found is not None and found.seeds:
            sign = 1 if found.a == a else -1
            error, df = found.error, found.df
            return Measured(100 * sign * found.difference, 100 * error, df, found.seeds, found.items)
    x = np.stack([_answers(record, a, seed) - _answers(record, b, seed) for seed in seeds])
    own = Pooled(float(x.mean(1).var(ddof=1)), len(seeds) - 1)
    error, df = spread(*of_answers(x, own), x.shape[1], own.freedom)
    return Measured(100 * float(x.mean()), 100 * float(error), float(df), *x.shape)


def beside(claim: Claim, place: Place) -> list[tuple[str, Measured]]:
    """Return the contrasts of a claim that are printed and not tested, by their words, with all seeds there are."""
    if not claim.also or isinstance(place, lord.Cells):
        return []
    try:
        record = place.record(claim.arms, SEEDS)
        told = analyse(record)
    except AddendaError:
        return []
    found = []
    for a, b in claim.also:
        seeds = _seeds(record, a, b)
        if len(seeds) > 1:
            with suppress(AddendaError):  # a run of it diverged
                found.append((f"{_said(a)} − {_said(b)}", contrast(record, told, claim, a, b, seeds)))
    return found


def _said(side: Side) -> str:
    return side if isinstance(side, str) else f"({' − '.join(side)})"


def _seeds(record: Record, *sides: Side) -> list[int]:
    """Return the seeds that every arm of a contrast has. A base that nothing is drawn for has all of them."""
    found = [
        {t.seed for t in record.trials_of(arm, "final")}
        for arm in names_of_sides(*sides) if record.find(arm, "control") is None
    ]  # fmt: skip
    return sorted(s for s in set.intersection(*found) if s is not None) if found else []


def _answers(record: Record, side: Side, seed: int) -> np.ndarray:
    """Return 0 and 1 of each item, those of a second arm subtracted."""
    rows = [_items(record.find(arm, "final", seed) or record.find(arm, "control")) for arm in names_of_sides(side)]
    return rows[0] if len(rows) == 1 else rows[0] - rows[1]


def _items(made: TrialRecord | None) -> np.ndarray:
    if made is None or made.test is None:
        raise AddendaError(f"{made.name if made else 'a run'} diverged, and has no answers.")
    return np.frombuffer(made.test.items.encode(), dtype=np.uint8).astype(float) - 48


def gate(name: str, claims: Claims, made: Mapping[str, Place]) -> tuple[float, str | None]:
    """Return by how many points the gate's arm gains on validation data, and why the subject is void (None: it is not).

    Nan where it has not been measured yet, and where there is no gate. Two tasks have that of the first.
    """
    name = "docstrings" if name == TWO_TASKS else name
    where, place = claims.subjects[name], made[name]
    if not where.gate:
        return float("nan"), None
    try:
        record = place.record(where.gate, GATE_SEEDS)
    except AddendaError:
        return float("nan"), None
    seen = []
    for arm in where.gate:
        runs = record.trials_of(arm, "final") or record.trials_of(arm, "control")
        looks = [t.last_look.accuracy for t in runs if t.last_look and t.last_look.accuracy is not None]
        if not looks:
            return float("nan"), None
        seen.append(100 * fmean(looks))
    gain = seen[0] - seen[1]
    if gain >= 3 * where.delta:
        return gain, None
    return gain, (
        f"the gate failed: {where.gate[0]} gains {gain:.1f} points over {where.gate[1]} on validation data, and "
        f"{3 * where.delta:g} are wanted" + ("; the subject was mended once, and is not again" if where.mended else "")
    )


def verdicts(paper: Sequence[Claim], claims: Claims, made: Mapping[str, Place]) -> dict[str, Verdict]:
    """Return the verdicts of one paper's claims, as the records have them: each at the first look that decided it."""
    tested = [c for c in paper if c.kind == "measured"]
    void: dict[str, str] = {}
    for claim in tested:
        lost = [f"{a}: {made[claim.subject].void[a]}" for a in claim.primary if a in made[claim.subject].void]
        if why := gate(claim.subject, claims, made)[1] or "; ".join(lost):
            void[claim.id] = why
    decided: dict[str, Verdict] = {}
    told = judge(paper, {}, void)
    for look in LOOKS:
        records = {c.subject: _analysed(paper, made[c.subject], look) for c in tested}
        found = {i: v.measured for i, v in decided.items() if v.measured is not None}
        for claim in tested:
            if claim.id in decided or claim.id in void:
                continue
            try:
                now = measured(claim, made[claim.subject], records[claim.subject], look)
            except AddendaError as error:  # a run of it diverged
                void[claim.id] = str(error)
                continue
            last = told[claim.id].measured
            if now is not None or last is not None:
                found[claim.id] = now or last  # type: ignore[assignment]
        told = judge(paper, found, void) | decided
        decided |= {i: v for i, v in told.items() if v.word in DECIDED}
    return told


def _analysed(paper: Sequence[Claim], place: Place, look: int) -> tuple[Record, Comparison] | None:
    """Return the record of what decides a paper's claims, with the first `look` seeds, and its statistics.

    Without the arms beside them, which come later: variances are pooled, and a verdict is not to change by those. None
    where there is none.
    """
    if isinstance(place, lord.Cells):
        return None
    try:
        record = place.record([a for c in paper for a in c.primary], SEEDS[:look])
        return (record, analyse(record)) if any(t.seed == SEEDS[look - 1] for t in record.trials) else None
    except AddendaError:
        return None


# ---- running ---------------------------------------------------------------------------------------------------------


def order(claims: Claims, subjects: Iterable[str] = ()) -> list[str]:
    """Return papers in the order in which they are run: small subjects, then the cheapest fairer ones.

    subjects: these only, where any.
    """
    wanted = set(subjects)
    of = {p: {c.subject for c in claims.of(p) if c.kind == "measured"} for p in claims.papers}
    if wanted:
        return [p for p in claims.papers if of[p] <= wanted]
    large = {name for name, s in SETTINGS.items() if not s.small}
    small = [p for p in claims.papers if not of[p] & large]
    cheap = [p for name in CHEAPEST for p in claims.papers if of[p] == {name}]
    return [*sorted(small, key=lambda p: bool(of[p] & {"trp", "lord"})), *cheap[:FAIRER]]


def run(claims: Claims, papers: Sequence[str], root: Path, clock: Clock) -> bool:
    """Work through papers until every claim is decided; False where the time was up before.

    A paper that cannot be worked at, for want of data or because its records are of other data, is told and left out.
    Raises AddendaError with all of these when the others are done.
    """
    torch.set_num_threads(1)
    made = places(claims, root, clock)
    failed: dict[str, str] = {}

    def worked(step: Step, paper: str) -> bool:
        if paper in failed:
            return True
        try:
            return _worked(step, claims.of(paper), claims, made)
        except AddendaError as error:
            failed[paper] = str(error)
            print(f"{paper} is left out: {error}", file=sys.stderr, flush=True)
            return True

    try:
        for step in (_decide, _look_beside):  # what is printed and not tested comes behind all verdicts
            do_all(papers, partial(worked, step), clock)
    except TimeUp:
        return False
    if failed:
        raise AddendaError("; ".join(f"{paper}: {why}" for paper, why in failed.items()))
    return True


Step = Callable[[Sequence[Claim], Claims, Mapping[str, Place]], None]


def _worked(step: Step, paper: Sequence[Claim], claims: Claims, made: Mapping[str, Place]) -> bool:
    """Do a step for a paper's claims; False where another process is at what is wanted."""
    names = {c.subject for c in paper if c.kind == "measured"}
    here = {*names, *(("docstrings", "kinds") if TWO_TASKS in names else ())}
    for name in set(made) - here:
        made[name].forget()  # so that few subjects are in memory
    try:
        step(paper, claims, made)
    except Busy:
        return False
    return True


def _decide(paper: Sequence[Claim], claims: Claims, made: Mapping[str, Place]) -> None:
    """Run a paper's claims, look by look, until they are decided. Raises Busy."""
    tested = [c for c in paper if c.kind == "measured"]
    names = list(dict.fromkeys(c.subject for c in tested))
    for name in dict.fromkeys("docstrings" if n == TWO_TASKS else n for n in names):
        if claims.subjects[name].gate:
            made[name].ensure(claims.subjects[name].gate, GATE_SEEDS)
            gain, why = gate(name, claims, made)
            print(f"{name}: {why or f'the gate is passed, with {gain:.1f} points'}.", file=sys.stderr, flush=True)
    for look in LOOKS:
        told = verdicts(paper, claims, made)
        going_on = [c for c in tested if told[c.id].word in ("undecided", "not run")]
        for name in names:
            if arms := [a for c in going_on if c.subject == name for a in c.primary]:
                made[name].ensure(arms, SEEDS[:look])
        told = verdicts(paper, claims, made)
        for c in going_on:
            print(f"{c.id}, {look} seeds: {told[c.id].word}", file=sys.stderr, flush=True)


def _look_beside(paper: Sequence[Claim], claims: Claims, made: Mapping[str, Place]) -> None:
    """Run the contrasts beside those that decide, with few seeds. Raises Busy."""
    told = verdicts(paper, claims, made)
    for name in dict.fromkeys(c.subject for c in paper if c.kind == "measured"):
        of = [c for c in paper if c.kind == "measured" and c.subject == name]
        if arms := [a for c in of if told[c.id].word != "void" for a in c.arms]:
            made[name].ensure(arms, SEEDS[: LOOKS[0]])
