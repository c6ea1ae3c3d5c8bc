"""Which arm is taken: the cheapest not worse than the best by the margin, of those shown to beat the base."""

import json
from dataclasses import replace

import pytest

from addenda.comparing.choose import COSTS, choices, choose
from addenda.comparing.entries import Config, TrialRecord
from addenda.comparing.record import Record
from addenda.comparing.stats import analyse
from addenda.core.base.errors import AddendaError

ITEMS = 4000


def answers(share, seed=0):
    """Answers whose first share is right, but for a few that change with the seed: arms differ by their shares."""
    right, moved = round(share * ITEMS), (seed * 7) % 20
    return {"accuracy": right / ITEMS, "items": "0" * moved + "1" * right + "0" * (ITEMS - right - moved)}


def a_record(path, arms, base=0.1, margin=2.0, seeds=3, command="", model="tiny", diverged=(), of="embedded", **about):
    """A record of arms {label: (share right, (memory, size, time) or None)}; time is of 10 steps."""
    methods = {k: {"title": k.partition(":")[0].upper(), "options": {}, "steps": 10} | about.get(k, {}) for k in arms}
    record = Record.write_config(path, Config.of({
        "title": "t", "command": command, "model": {"name": model}, "data": {"name": "sums"},
        "seeds": list(range(seeds)),
        "budget": {"kind": "steps", "value": 10, "batch": 4}, "methods": methods, "margin": margin, "hardware": {},
        "identity": {}, "options": {"of": of},
    }))  # fmt: skip
    if base is not None:
        control = {"method": "base", "seed": None, "stage": "control", "status": "ok", "test": answers(base)}
        record = record.write_trial(TrialRecord.of(control))
    for arm, (share, cost) in arms.items():
        for seed in range(seeds):
            trial = {"method": arm, "seed": seed, "stage": "final", "rate": 0.003, "steps": 10, "losses": [],
                     "status": "ok", "test": answers(share, seed)}  # fmt: skip
            if cost:
                trial |= {"peak_bytes": cost[0], "adapter_bytes": cost[1], "step_seconds": cost[2] / 10}
            if arm in diverged and seed == 1:
                trial |= {"status": "diverged"}
            record = record.write_trial(TrialRecord.of(trial))
    return record


def taken(record):
    return [choose(record, cost).arm for cost in COSTS]


def test_each_cost_has_its_cheapest_of_those_near_the_best(tmp_path):
    arms = {"lora": (0.500, (300, 30, 3)), "shira": (0.495, (100, 20, 2)), "vera": (0.497, (200, 10, 2.5)),
            "ia3": (0.40, (1, 1, 1))}  # fmt: skip
    record = a_record(tmp_path, arms)
    assert taken(record) == ["shira", "vera", "shira"]
    choice = choose(record, "memory")
    assert choice.not_worse == ("shira", "vera", "lora")
    assert choice.best == "lora" and choice.value == 100 and choice.price == "100 B"
    assert choice.left_out == {"ia3": "it is not shown to be within 2 points of LORA"}
    assert "less memory than LORA (300 B) and is shown not to be worse than it by 2 points" in choice.why
    assert "(difference −0.5)" in choice.why
    assert choose(record, "time").value == pytest.approx(2.0)


def test_a_wider_margin_takes_what_is_worse_by_less(tmp_path):
    arms = {"lora": (0.50, (300, 30, 3)), "ia3": (0.45, (1, 1, 1))}
    assert taken(a_record(tmp_path / "narrow", arms)) == ["lora"] * 3
    assert taken(a_record(tmp_path / "wide", arms, margin=8.0)) == ["ia3"] * 3


def test_what_is_not_shown_to_be_near_is_not_taken(tmp_path):
    """Two runs of few items could hide more than the margin, though the cheap arm did a little better than nearly."""
    record = a_record(tmp_path, {"lora": (0.50, (300, 30, 3)), "shira": (0.49, (100, 10, 1))}, seeds=3, margin=0.8)
    choice = choose(record)
    assert choice.arm == "lora"
    assert "SHIRA, with less memory, is not shown to be within 0.8 points of it" in choice.why


def test_nothing_is_recommended_that_does_not_beat_the_base(tmp_path):
    record = a_record(tmp_path, {"lora": (0.50, (3, 3, 3)), "shira": (0.495, (1, 1, 1))}, base=0.5)
    for cost, choice in choices(record).items():
        assert (choice.cost, choice.arm, choice.title, choice.command, choice.not_worse) == (cost, None, None, None, ())
        assert choice.why.startswith("None of the 2 methods is shown to beat Base, zero-shot (50")


def test_the_best_stays_the_measure_where_it_is_not_shown_to_beat_the_base(tmp_path):
    """An arm that is near a worse one is not near the best, whose seeds may only scatter."""
    arms = {"lora": (0.53, (3, 3, 3)), "shira": (0.5, (2, 2, 2)), "vera": (0.495, (1, 1, 1))}
    record = a_record(tmp_path, arms)
    assert choose(record).arm == "lora"

    def doubtful(found):
        pairs = (replace(p, verdict="undecided") if {p.a, p.b} == {"lora", "base"} else p for p in found.pairs)
        return replace(found, pairs=tuple(pairs))

    choice = choose(record, comparison=doubtful(analyse(record)))
    assert (choice.arm, choice.best, choice.command) == (None, None, None)
    assert choice.why.startswith("The best, LORA (53")
    assert choice.why.endswith("is shown to be within 2 points of it.")
    wide = replace(record, config=replace(record.config, margin=5.0))
    choice = choose(wide, comparison=doubtful(analyse(wide)))
    assert (choice.arm, choice.best) == ("vera", "lora")
    assert (
        "the best (53\N{NO-BREAK SPACE}%), is left out: it is not shown to beat Base, zero-shot. VERA is" in choice.why
    )


def test_diverged_arms_are_left_out_and_named(tmp_path):
    arms = {"lora": (0.50, (3, 3, 3)), "shira": (0.50, (1, 1, 1))}
    choice = choose(a_record(tmp_path / "one", arms, diverged=("shira",)))
    assert choice.arm == "lora"
    assert choice.left_out == {"shira": "it diverged in some run"}
    choice = choose(a_record(tmp_path / "all", arms, diverged=tuple(arms)))
    assert choice.why == "Every method is void or diverged in some run."


def test_full_fine_tuning_is_no_answer_but_is_told_of(tmp_path):
    record = a_record(tmp_path, {"lora": (0.50, (3, 3, 3)), "full": (0.60, (1, 1, 1))})
    choice = choose(record)
    assert choice.arm == "lora"
    assert choice.why.endswith("Full fine-tuning is better by 10.0 points.")


def test_costs_that_nobody_measured(tmp_path):
    choice = choose(a_record(tmp_path / "none", {"lora": (0.5, None)}))
    assert choice.arm is None and choice.best == "lora"
    assert choice.why == "The record does not hold the memory of any method that is not worse than the best, LORA."
    choice = choose(a_record(tmp_path / "some", {"lora": (0.5, None), "shira": (0.499, (1, 1, 1))}))
    assert choice.arm == "shira" and choice.left_out["lora"] == "its memory is not in the record"


def test_a_negative_cost_is_none(tmp_path):
    choice = choose(a_record(tmp_path, {"lora": (0.5, (3, 3, 3)), "shira": (0.5, (-1e17, 1, 1))}))
    assert choice.arm == "lora" and choice.left_out == {"shira": "its memory is not in the record"}


def test_a_record_without_a_control_is_chosen_from(tmp_path):
    choice = choose(a_record(tmp_path, {"lora": (0.5, (1, 1, 1))}, base=None))
    assert choice.arm == "lora"
    assert choice.why == "LORA is the best (50\N{NO-BREAK SPACE}%), and no other takes less memory."


def test_the_folder_of_a_record_is_chosen_from(tmp_path):
    record = a_record(tmp_path / "record", {"lora": (0.5, (1, 1, 1))})
    assert choose(record.path) == choose(str(record.path)) == choose(record)
    with pytest.raises(AddendaError, match="nothing"):
        choose(tmp_path / "nothing")
    with pytest.raises(AddendaError, match="record is the path of a file or folder, got a thing in memory"):
        choose(3)  # type: ignore[arg-type]


def test_a_choice_is_json_and_a_cost_is_one_of_three(tmp_path):
    record = a_record(tmp_path, {"lora": (0.5, (1, 1, 1))})
    choice = choose(record)
    assert json.loads(json.dumps(choice.as_json()))["not_worse"] == ["lora"]
    with pytest.raises(AddendaError, match="A cost is one of memory, size, time, got 'money'"):
        choose(record, "money")  # type: ignore[arg-type]
