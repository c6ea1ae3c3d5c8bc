"""The README's Python is run as it stands."""

import re
from pathlib import Path

import pytest


@pytest.mark.slow
def test_quick_start(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "maths.safetensors").exists()
