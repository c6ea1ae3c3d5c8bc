"""What a comparison takes is counted by hand here, and what is dropped to fit a time is told."""

from dataclasses import dataclass, replace

from addenda.comparing.arm import parse_arm
from addenda.comparing.budget import Budget
from addenda.comparing.costs import Costs, by_the_clock, fit_within, rivals_of
from addenda.comparing.search import FURTHER, grid


@dataclass(frozen=True)
class Items:
    """A subject of which only the number of test items counts."""

    test: int = 1000
    general: object = None

    @property
    def splits(self):
        return {"test": range(self.test)}

    def limited(self, items):
        return replace(self, test=items)

    def reading(self, text):
        return replace(self, general=text)


def arms(*labels, rates=5):
    return [replace(parse_arm(label), rates=grid(1e-3, rates)) for label in labels]


def costs(step, judge=0.0, look=0.0, seeds=2, steps=40, **more):
    return Costs(step, judge, look, 0, seeds, Budget.parse(f"steps={steps}"), None, FURTHER, **more)


def test_the_prediction_counts_searches_final_runs_and_looks():
    one = costs({"lora": 2.0}, judge=100.0, look=7.0)
    # the search: 2 seeds × (5 rates × 10 steps, then 2 × 20, and one of 20 beyond); final: 2 × 40 steps, two looks each
    search = 2 * (2.0 * (5 * 10 + 2 * 20 + 20) + 7.0 * (5 + 2 + 1))
    final = 2 * (2.0 * 40 + 100 + 2 * 7.0)
    assert abs(one.total(arms("lora")) - 1.05 * (100 + search + final)) < 1e-9
    more = 2 * 3 * (2.0 * 20 + 7.0)  # four beyond, not one
    assert abs(one.most(arms("lora")) - one.total(arms("lora")) - 1.05 * more) < 1e-9
    assert abs(one.total(arms("lora", rates=1)) - 1.05 * (100 + final)) < 1e-9


def test_arms_that_leave_pay_their_first_runs_alone():
    some = costs({"lora": 1.0, "shira": 3.0, "full": 5.0}, arms=1)
    three = arms("lora", "shira", "full")
    whole = 2 * (5 * 10 + 2 * 20 + 20) + 2 * 40
    # who goes on is not known, so the dearest method is counted whole; a control never leaves
    assert abs(some.total(three) - 1.05 * (3.0 * whole + 1.0 * 2 * 5 * 10 + 5.0 * whole)) < 1e-9
    assert rivals_of(three) == ["lora", "shira"] and rivals_of(arms("lora", rates=1)) == []


def fit(within, wanted, step=1.0, **more):
    """What is left of a comparison: its costs, arms, subject and notes."""
    asked = costs(dict.fromkeys([a.label for a in wanted], step), **more)
    return fit_within(asked, wanted, Items(), within)


def test_items_go_first_then_rates_then_full_then_methods():
    wanted = arms("lora", "shira", "oft", "full")
    left, kept, subject, notes = fit(1e9, wanted, judge=100.0)
    assert (kept, subject, notes, left.arms) == (wanted, Items(), [], None)
    seen = []
    for within in (2000, 1300, 1000, 800, 500, 450, 350, 1):
        left, kept, subject, notes = fit(within, wanted, judge=100.0)
        seen.append((subject.test, len(kept[0].rates), [a.label for a in kept], left.arms))
        assert left.total(kept) <= within or "all the same" in notes[-1]
        assert {len(a.rates) for a in kept} <= {3, 5}
    three = ["lora", "shira", "oft"]
    assert seen == [
        (200, 5, [*three, "full"], None),
        (200, 3, [*three, "full"], None),
        (200, 3, three, None),
        (200, 3, three, 2),
        (200, 3, three, 1),
        (200, 3, ["lora", "shira"], 1),
        (200, 3, ["lora"], None),
        (200, 3, ["lora"], None),
    ]


def test_what_is_forgotten_is_measured_where_there_is_time():
    wanted = arms("lora")
    asked = costs({"lora": 1.0}, text=100.0)
    for within, left in ((1e9, "docstrings"), (asked.total(wanted) - 1, None)):
        _, _, subject, notes = fit_within(asked, wanted, Items(general="docstrings"), within)
        assert subject == Items(general=left)
        assert [n.partition(":")[0] for n in notes] == ([] if left else ["Forgetting is not measured"])


def test_where_nothing_is_known_arms_go_from_the_end():
    wanted = arms("lora", "shira", "oft", rates=1)
    left, kept, _, notes = fit(200, wanted)
    assert [a.label for a in kept] == ["lora", "shira"] and left.arms is None
    assert notes[-1].startswith("oft was left out: 4 minutes were predicted")


def test_the_head_alone_stays_as_the_control():
    wanted = [*arms("lora", "shira"), replace(arms("full")[0], label="head")]
    _, kept, _, notes = fit(1, wanted)
    assert [a.label for a in kept] == ["lora", "head"] and any(n.startswith("shira was left out") for n in notes)


def test_what_follows_the_clock_is_said():
    assert by_the_clock(Budget.parse("steps=40"), None) == []
    assert "within 2 minutes follows the clock" in by_the_clock(Budget.parse("steps=40"), 120.0)[0]
