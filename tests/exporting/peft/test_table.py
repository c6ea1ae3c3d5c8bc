"""Every type of PEFT 0.21.2 is read, or refused by its name with a reason and a way out."""

import json

import pytest
import torch
from bench.peft_parity import base_of
from bench.peft_rows import Row
from safetensors.torch import save_file

from addenda import AddendaError
from addenda.core.state.state import find_state
from addenda.exporting.peft.read import read
from addenda.exporting.peft.table import CONVERSIONS, why_not
from peft_checks import CONFIG, WEIGHTS, refused, saved


def types() -> list[str]:
    from peft.utils.peft_types import PeftType

    return [t.value for t in PeftType]


def test_a_conversion_stands_under_its_own_type():
    assert all(kind == c.type for kind, c in CONVERSIONS.items())
    assert not any(set(c.reads) & set(c.ignores) for c in CONVERSIONS.values())
    assert set(CONVERSIONS) <= set(types())


def test_the_others_are_refused_by_name_with_a_way_out(tmp_path):
    model, others = base_of(Row("")), [t for t in types() if t not in CONVERSIONS]
    save_file({"base_model.model.x.w": torch.ones(2)}, tmp_path / WEIGHTS)
    assert {"RANDLORA", "FOURIERFT", "PSOFT", "PROMPT_TUNING", "HIRA", "LILY", "XLORA"} <= set(others)
    for kind in others:
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(AddendaError, match=f"is a {kind} adapter of PEFT") as error:
            read(tmp_path, model)
        assert any(way in str(error.value) for way in ("addenda extract", "Train addenda's", "Keep it in PEFT")), kind
    assert find_state(model) is None


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("RANDLORA", {"r": 8}, "by a generator of its own.*addenda extract"),
        ("FOURIERFT", {"n_frequency": 20}, "positions .* are in no tensor.*addenda extract"),
        ("PSOFT", {"r": 8}, "singular vectors.*addenda extract"),
    ],
)
def test_folders_that_say_too_little_are_refused_with_the_way_out(kind, options, reason, tmp_path):
    refused(saved(tmp_path / "a", kind, target_modules=["q_proj"], **options), reason)


def test_prompts_are_refused_with_what_to_train_instead():
    for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"):
        assert "prompt or prefix method" in why_not(kind)
