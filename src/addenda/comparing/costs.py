"""What a comparison will take: measured step by step before it starts, and made to fit a limit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from time import perf_counter

from addenda.comparing.arm import Arm
from addenda.comparing.budget import Budget
from addenda.comparing.search import cost
from addenda.comparing.shots import evaluate_with_cache
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings, attached, looks
from addenda.train.fit import fit

LEAST_ITEMS = 200  # of the test split, where time is short


@dataclass(frozen=True)
class Costs:
    """Seconds of what a comparison is made of. step: one training step of each arm; judge: test and ood once.

    look: validation once; further: rates tried beyond an edge of the grid."""

    step: dict[str, float]
    judge: float
    look: float
    controls: int
    seeds: int
    budget: Budget
    search_steps: int | None
    further: int

    def steps(self, arm: Arm) -> int:
        """Return steps of a final run: the budget's, or as many as its seconds allow."""
        seconds = self.budget.kind == "seconds"
        return max(1, round(self.budget.value / self.step[arm.label])) if seconds else self.budget.steps

    def first(self, arm: Arm) -> int:
        """Return the steps of a first look at a rate: a quarter, at least 10, unless said."""
        return self.search_steps or max(min(10, self.steps(arm)), self.steps(arm) // 4)

    def total(self, arms: list[Arm]) -> float:
        """Return the predicted wall time of everything, controls included."""
        total = self.judge * (1 + 1.5 * self.controls)  # shots are read once, but attended to by every question
        for arm in arms:
            n, step = len(arm.rates), self.step[arm.label]
            total += step * cost(n, self.first(arm), self.further) + self.look * (n if n > 1 else 0)
            run = step * self.steps(arm) + self.judge + len(looks(self.steps(arm), "final")) * self.look
            total += self.seeds * run
        return 1.05 * total


def measure(
    subject: Subject,
    arms: list[Arm],
    settings: TrialSettings,
    budget: Budget,
    seeds: int,
    search_steps: int | None,
    further: int,
    tell: Callable[[str], None],
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
    """Drop test items, then rates, then the full control, then methods from the end, until the prediction fits.

    Returns all of it as it is then, and one sentence about each thing that was dropped.
    """
    notes: list[str] = []
    asked = costs.total(arms)
    why = f"{minutes(asked)} were predicted, more than the {minutes(within)} allowed"
    items = len(subject.splits["test"])
    if asked > within and items > LEAST_ITEMS:
        notes.append(f"Only the first {LEAST_ITEMS} of {items} test items are judged: {why}.")
        costs = replace(costs, judge=costs.judge * LEAST_ITEMS / items)
        subject = subject.limited(LEAST_ITEMS)
    before = rates = len(arms[0].rates)
    for n in (2, 1):
        if rates > n and costs.total(arms) > within:
            middle = [a.rates[rates // 2 - (n == 2) : rates // 2 + 1] for a in arms]
            arms = [replace(a, rates=m) for a, m in zip(arms, middle, strict=True)]
            rates = n
    if rates < before:
        notes.append(f"The search was cut to {rates} learning rate{'s' * (rates > 1)} per method: {why}.")
    while costs.total(arms) > within and len(arms) > 1:
        notes.append(f"{arms[-1].label} was left out: {why}.")
        arms = arms[:-1]
    return costs, arms, subject, notes


def step_seconds(subject: Subject, arm: Arm, settings: TrialSettings, tell: Callable[[str], None]) -> float:
    """Return seconds of one training step of an arm: the faster of two after a first one."""
    train, model = subject.splits["train"], subject.model
    rows = [[i % len(train) for i in range(k * settings.batch, (k + 1) * settings.batch)] for k in range(3)]
    tell(f"measuring {arm.label}")
    times: list[float] = []
    steps: dict = {"steps": rows, "rate": 1e-6, "attention": None, "optimizer": arm.optimizer, **arm.training}
    with attached(subject, arm, settings, seed=0, batches=1) as adapter:
        fit(model, adapter, train, **steps, progress=lambda e: times.append(perf_counter()))
    return min(b - a for a, b in pairwise(times))


def forward_seconds(subject: Subject, split: str) -> float:
    """Return seconds that judging a whole split takes, from a part of it."""
    part = subject.splits[split].first(128)
    evaluation = evaluate_with_cache(subject.model, part)
    return evaluation.seconds / len(part) * len(subject.splits[split])


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
