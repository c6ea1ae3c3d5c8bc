"""What a comparison will take: measured step by step before it starts, and made to fit a limit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from time import perf_counter

from addenda.comparing.arm import Arm
from addenda.comparing.budget import Budget
from addenda.comparing.record import FULL, HEAD
from addenda.comparing.search import LEAST, cost, last_steps, rungs
from addenda.comparing.shots import evaluate_with_cache
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TOGETHER, TrialSettings, attached, looks
from addenda.comparing.words import minutes
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit

LEAST_ITEMS = 200  # of the test split, where time is short
NO_TEXT = "Forgetting is not measured"  # begins the note of a text that was left out
USUAL = 1  # rate beyond a grid, in what is predicted: most searches want none, a few want several


@dataclass(frozen=True)
class Costs:
    """Seconds of what a comparison is made of. step: one training step of each arm; judge: test and ood once.

    look: validation once; text: the general text once; further: rates that may be tried beyond a grid; arms:
    how many methods go on after their first runs (None: all); workers: runs made at once."""

    step: dict[str, float]
    judge: float
    look: float
    controls: int
    seeds: int
    budget: Budget
    search_steps: int | None
    further: int
    arms: int | None = None
    text: float = 0.0
    workers: int = 1

    def steps(self, arm: Arm) -> int:
        """Return steps of a final run: the budget's, or as many as its seconds allow."""
        seconds = self.budget.kind == "seconds"
        return max(1, round(self.budget.value / self.step[arm.label])) if seconds else self.budget.steps

    def first(self, arm: Arm) -> int:
        """Return the steps of a first look at a rate: a quarter, at least 10, unless said."""
        return self.search_steps or max(min(10, self.steps(arm)), self.steps(arm) // 4)

    def last(self, arm: Arm) -> int:
        """Return the steps of a search's last runs."""
        return last_steps(self.first(arm), self.steps(arm))

    def total(self, arms: list[Arm]) -> float:
        """Return the predicted wall time of everything, controls included, one rate beyond each grid among it."""
        return self._total(arms, min(USUAL, self.further))

    def most(self, arms: list[Arm]) -> float:
        """Return the wall time where every search tries all the rates beyond its grid that it may."""
        return self._total(arms, self.further)

    def _total(self, arms: list[Arm], further: int) -> float:
        total = self.text + self.judge * (
            1 + 1.5 * self.controls
        )  # shots are read once, but attended to by every question
        begun = {arm.label: self._begin(arm) for arm in arms}
        whole = {arm.label: self._search(arm, further) + self._final(arm) for arm in arms}
        rivals = sorted(rivals_of(arms), key=lambda k: begun[k] - whole[k])  # who goes on is not known: the dearest
        left = set() if self.arms is None else set(rivals[self.arms :])
        runs = sum(begun[k] if k in left else whole[k] for k in begun)
        return 1.05 * (total + runs / self.workers)

    def _begin(self, arm: Arm) -> float:
        """Return the seconds of an arm's first runs."""
        ladder = rungs(len(arm.rates), self.first(arm), self.last(arm))
        return self._seconds(arm, cost(*ladder[0], ladder[0][1], 0)) if ladder else 0.0

    def _search(self, arm: Arm, further: int) -> float:
        return self._seconds(arm, cost(len(arm.rates), self.first(arm), self.last(arm), further))

    def _seconds(self, arm: Arm, runs: tuple[int, int]) -> float:
        return runs[0] * self.look + runs[1] * self.step[arm.label]

    def _final(self, arm: Arm) -> float:
        looked = len(looks(self.steps(arm), "final")) * self.look
        return self.seeds * (self.step[arm.label] * self.steps(arm) + self.judge + self.text + looked)


def rivals_of(arms: Sequence[Arm]) -> list[str]:
    """Return the arms of which some may leave after their first runs: methods whose rates are searched."""
    return [a.label for a in arms if a.label not in (FULL, HEAD) and len(a.rates) > 1]


def measure(
    subject: Subject,
    arms: list[Arm],
    settings: TrialSettings,
    budget: Budget,
    seeds: int,
    search_steps: int | None,
    further: int,
    tell: Callable[[str], None],
    workers: int = 1,
) -> Costs:
    """Run a few steps of every arm and judge a part of every split; return what they took."""
    look = forward_seconds(subject, "validation") * min(1, settings.validation / len(subject.splits["validation"]))
    return Costs(
        step={arm.label: step_seconds(subject, arm, settings, tell) for arm in arms},
        judge=sum(forward_seconds(subject, s) for s in subject.tested),
        look=look,
        controls=len(subject.controls),
        seeds=seeds,
        budget=budget,
        search_steps=search_steps,
        further=further,
        text=text_seconds(subject),
        workers=workers,
    )


def by_the_clock(budget: Budget, within: float | None) -> list[str]:
    """Return what of a comparison follows measured times, a sentence each: equal commands may differ there."""
    said = []
    if budget.kind == "seconds":
        said.append(
            f"The budget of {budget.value:g} seconds becomes steps by the clock: an equal command may train for a few "
            "more or fewer. budget=steps gives equal runs."
        )
    if within is not None:
        said.append(
            f"What is dropped to stay within {minutes(within)} follows the clock: an equal command may drop other test "
            "items, rates or methods. Without within= (--within) nothing is dropped. What this one drops is told, and "
            "written down, before anything is trained."
        )
    return said


def fit_within(
    costs: Costs, arms: list[Arm], subject: Subject, within: float
) -> tuple[Costs, list[Arm], Subject, list[str]]:
    """Drop the general text, test items, rates down to three, the full control, then methods, until it fits.

    Methods leave after their first runs, the worst on validation; how many is decided here. Where that is not enough,
    or no rates are searched, so that nothing is known of them, those at the end of the list are not begun.
    Returns all of it as it is then, and one sentence about each thing that was dropped.
    """
    notes: list[str] = []
    asked = costs.total(arms)
    why = f"{minutes(asked)} were predicted, more than the {minutes(within)} allowed"
    if asked > within and subject.general is not None:
        notes.append(f"{NO_TEXT}: {why}.")
        costs, subject = replace(costs, text=0.0), subject.reading(None)
    items = len(subject.splits["test"])
    if costs.total(arms) > within and items > LEAST_ITEMS:
        notes.append(f"Only the first {LEAST_ITEMS} of {items} test items are judged: {why}.")
        costs = replace(costs, judge=costs.judge * LEAST_ITEMS / items)
        subject = subject.limited(LEAST_ITEMS)
    rates = len(arms[0].rates)
    if rates > LEAST and costs.total(arms) > within:
        first = (rates - LEAST) // 2
        arms = [replace(a, rates=a.rates[first : first + LEAST]) for a in arms]
        notes.append(f"The search was cut to {LEAST} learning rates per method: {why}.")
    if costs.total(arms) > within and len(arms) > 1 and arms[-1].label == FULL:
        notes.append(f"{FULL} was left out: {why}.")
        arms = arms[:-1]
    for go_on in range(len(rivals_of(arms)) - 1, 0, -1):
        if costs.total(arms) > within:
            costs = replace(costs, arms=go_on)
    methods = [a for a in arms if a.label != HEAD]
    while costs.total(arms) > within and len(methods) > 1:
        last = methods.pop()
        notes.append(f"{last.label} was left out: {why}.")
        arms = [a for a in arms if a is not last]
    begun = len(rivals_of(arms))
    if costs.arms is not None and costs.arms < begun:
        notes.append(f"{costs.arms} of {begun} methods go on after their first runs, the best on validation: {why}.")
    else:
        costs = replace(costs, arms=None)
    if costs.total(arms) > within:
        notes.append(f"It will take about {minutes(costs.total(arms))} all the same: nothing more can be dropped.")
    return costs, arms, subject, notes


def step_seconds(subject: Subject, arm: Arm, settings: TrialSettings, tell: Callable[[str], None]) -> float:
    """Return seconds of one training step of an arm: the mean of three after a first one, of batches as runs have."""
    train, model = subject.splits["train"], subject.model
    tell(f"measuring {arm.label}")
    times: list[float] = []
    steps: dict = {
        "steps": 4, "batch": settings.batch, "rate": 1e-6, "attention": None, "optimizer": arm.optimizer, **arm.training
    }  # fmt: skip
    with attached(subject, arm, settings, seed=0, batches=1) as adapter:
        fit(model, adapter, train, **steps, progress=lambda e: times.append(perf_counter()))
    return fmean(b - a for a, b in pairwise(times))


def forward_seconds(subject: Subject, split: str) -> float:
    """Return seconds that judging a whole split takes, from a part of it."""
    part = subject.splits[split].first(128)
    evaluation = evaluate_with_cache(subject.model, part)
    return evaluation.seconds / len(part) * len(subject.splits[split])


def text_seconds(subject: Subject) -> float:
    """Return seconds that judging the general text takes, from a part of it."""
    if subject.general is None:
        return 0.0
    part = subject.general.first(TOGETHER)
    return evaluate(subject.model, examples=part, batch=TOGETHER).seconds / len(part) * len(subject.general)
