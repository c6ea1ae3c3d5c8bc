"""The recipes, end to end on a tiny encoder: each leaves a verdict, and goes on where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "train"))
from tiny_models import config, make_tokenizer
from transformers import BertConfig, BertModel

ROOT = Path(__file__).parents[2]
CLAIMS = {"svft": 3, "loldu": 4, "miss": 3, "lora_pro": 4, "dylora": 3, "shira": 3}

# in a process of its own: a recipe enters its controls into the catalogue
SCRIPT = """
import sys, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
warnings.simplefilter("error")
from recipes import __main__ as recipes, common
common.SIZES = {"train": 48, "validation": 24, "test": 24}
rows = [(f"{a} plus {b} of {l} as {k}", l, k) for a in range(9) for b in range(9)
        for l, k in zip(common.LIBRARIES, common.KINDS * 3)]
common.docstrings = lambda: rows
out, model, *rest = sys.argv[1:]
for name in recipes.NAMES:
    sys.argv = ["recipes", name, "--out", f"{out}/{name}", "--model", model, *rest]
    recipes.main()
"""


@pytest.mark.slow
def test_every_recipe_reaches_a_verdict_and_goes_on(tmp_path):
    sizes = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 384}
    BertModel(config(BertConfig, **sizes)).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "model")]
    command += ["--seeds", "2", "--steps", "12", "--rates", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, claims in CLAIMS.items():
        kept = json.loads((tmp_path / name / "verdict.json").read_text())
        assert len(kept["findings"]) == claims and kept["table"]
        assert all(f["verdict"] and f["measured"] for f in kept["findings"])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/trials/*.json")}
    before |= {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/runs/*.json")}
    assert len(before) > 40
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # nothing was run twice
