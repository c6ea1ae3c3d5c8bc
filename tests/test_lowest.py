"""The constraints of `make oldest`."""

import pytest

from lowest import PYPROJECT, lowest


def test_every_requirement_has_a_lowest_version():
    bounds = lowest(PYPROJECT.read_text())
    assert {"torch", "numpy", "transformers", "peft", "pytest"} <= set(bounds) and "addenda" not in bounds
    assert lowest(PYPROJECT.read_text(), "torch==9.9.9")["torch"] == "9.9.9"


def test_one_without_is_named():
    text = '[project]\nname = "a"\ndependencies = ["b>=1,<2", "c"]\n[project.optional-dependencies]\n'
    with pytest.raises(ValueError, match="'c'"):
        lowest(text)
    assert lowest(text.replace('"c"', '"c==3", "a[d]"')) == {"b": "1", "c": "3"}
