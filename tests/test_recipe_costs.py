"""What recipes will cost, and the command that runs them."""

import sys

import pytest
from recipes import __main__ as command
from recipes import costs, work
from recipes.claims import read_claims
from recipes.costs import arm_seconds, priced
from recipes.subjects import SETTINGS

from addenda import AddendaError


def test_an_arm_s_seconds_are_those_of_its_search_and_its_final_runs():
    """Five rates on two seeds for 600 steps, two for 1,200, four more beyond the grid, then eight seeds."""
    setting = SETTINGS["docstrings"]
    searched = 2 * (5 * 600 + 2 * 1200 + 4 * 1200)
    looks = 2 * (5 + 2 + 4)
    assert arm_seconds(setting, 0.01, 0.0, 0.0, 8) == pytest.approx(0.01 * (searched + 8 * 2400))
    assert arm_seconds(setting, 0.0, 1.0, 0.0, 8) == looks + 8 * 4
    assert arm_seconds(setting, 0.0, 0.0, 1.0, 8) == 8


def test_prices_are_the_cheapest_first_and_count_a_shared_arm_once(tmp_path, monkeypatch):
    claims = read_claims()
    seen: list[str] = []

    class Subject:
        splits, tested = {"validation": range(4000)}, {"test": None}

    class Pool:
        def __init__(self, setting, *_):
            self.setting = setting

        def subject(self, seed):
            if self.setting.name.startswith("garments"):
                raise AddendaError("Fashion-MNIST is not at its place.")
            return Subject()

        def arm(self, name, on):
            seen.append(f"{self.setting.name}: {name}")
            return name

    monkeypatch.setattr(costs, "Pool", Pool)
    monkeypatch.setattr(costs, "step_seconds", lambda *_: 0.01)
    monkeypatch.setattr(costs, "forward_seconds", lambda *_: 1.0)
    monkeypatch.setattr(costs, "_alone", lambda measure, *given: measure(*given))
    monkeypatch.setattr(costs, "fashion", lambda *_: (_ for _ in ()).throw(AddendaError("no images")))
    found = priced(claims, tmp_path)
    assert [p.hours for p in found] == sorted(p.hours for p in found)
    assert len(set(seen)) == len(seen) and "docstrings: lora:rank=8" in seen
    assert not any(p.subject.startswith("garments") or p.subject == "trp" for p in found)
    pro = next(p for p in found if p.paper.startswith("LoRA-Pro") and p.subject == "docstrings")
    assert (pro.arms, pro.shared) == (4, 1)  # LoRA r = 8 is paid for SVFT
    assert "1 more are paid above" in pro.words()
    shira = [p.subject for p in found if p.paper.startswith("SHiRA, arXiv:2406.13175") and "language" not in p.paper]
    assert sorted(shira) == ["docstrings", "kinds"]


@pytest.mark.parametrize(
    ("argv", "said"), [(["run", "lora"], "There is no recipe 'lora'"), (["run", "--hours", "0"], "above 0 is wanted"),
                       (["run", "--hours", "nan"], "above 0 is wanted")],
)  # fmt: skip
def test_a_mistake_is_refused_before_anything_is_loaded(argv, said, monkeypatch):
    monkeypatch.setattr(work, "places", lambda *_: pytest.fail("something was loaded"))
    monkeypatch.setattr(sys, "argv", ["recipes", *argv])
    with pytest.raises(AddendaError, match=said):
        command.main()


def test_the_command_runs_the_papers_that_are_named(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(command, "run", lambda claims, papers, root, clock: asked.append((papers, root, clock.hours)))
    for argv in (["run"], ["run", "svft", "one-bit"], ["run", "--subject", "sort-numbers", "--hours", "2.5"]):
        monkeypatch.setattr(sys, "argv", ["recipes", *argv, "--root", str(tmp_path)])
        command.main()
    assert len(asked[0][0]) == 13 and asked[0][2] is None
    assert [p.partition(",")[0] for p in asked[1][0]] == ["SVFT", "1-bit adapters", "1-bit adapters"]
    assert len(asked[2][0]) == 3 and all(p.endswith("a language model") for p in asked[2][0]) and asked[2][2] == 2.5
    assert capsys.readouterr().err.count("The time is up") == 3
