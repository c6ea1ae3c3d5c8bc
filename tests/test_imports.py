"""What only pictures, reports and data files need waits until one is made or read."""

import subprocess
import sys
from pathlib import Path

import pytest

SLOW = {"matplotlib", "PIL", "jinja2", "datasets"}
LOOK = f"print(*sorted({SLOW} & ({{name.partition('.')[0] for name in set(sys.modules) - theirs}})))"
HELP = """
from contextlib import redirect_stdout, suppress
from io import StringIO
from addenda.cli.main import run
with redirect_stdout(StringIO()) as page, suppress(SystemExit):
    run(["--help"])
assert "compare" in page.getvalue()
"""
TUNE = """
from transformers import Trainer  # which takes some of them itself
theirs = {name for name in sys.modules if name.partition(".")[0] in SLOW}
import addenda
from tiny_models import SUMS, make_llama, make_tokenizer
addenda.tune(make_llama(), SUMS, "lora:rank=2", tokenizer=make_tokenizer(), steps=1, progress=False)
import addenda.comparing.run
"""


@pytest.mark.parametrize(
    "code",
    ["import addenda", HELP, "import addenda; addenda.catalogue(); addenda.tune",
     "import toys, addenda; addenda.attach(toys.Tiny(), 'lora:rank=2')", TUNE],
    ids=["addenda", "help", "names", "attach", "tune and compare"],
)  # fmt: skip
def test_pictures_and_reports_are_waited_for(code):
    lines = [f"import sys; SLOW = {SLOW}; theirs = set()", code, LOOK]
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
