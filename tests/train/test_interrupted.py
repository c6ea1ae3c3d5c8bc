"""Ctrl-C and SIGTERM, as terminals and schedulers send them: a command says what is kept, and the same one goes on.

It ends with 130 or 143.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import SUMS, make_llama, make_tokenizer

TUNE = ["--method", "lora:rank=2", "--steps", "40", "--out", "run"]
COMPARE = ["--methods", "lora:rank=2,shira", "--budget", "steps=4", "--seeds", "1", "--rates", "1", "--items", "10",
           "--general", "none", "--out", "run", "-y"]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS), encoding="utf-8")
    return tmp_path


def heard_by_the_command():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell would ignore it


def call(place, arguments, until=None, sent=signal.SIGINT):
    """(exit code, all that was said); a signal is sent at the first line that holds `until`."""
    source = str(Path(__file__).parents[2] / "src")
    with subprocess.Popen(
        [sys.executable, "-m", "addenda", *arguments], cwd=place, text=True, encoding="utf-8",
        env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}, preexec_fn=heard_by_the_command,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        said = []
        for line in running.stderr:
            said.append(line)
            if until is not None and until in line:
                running.send_signal(sent)
                until = None
    return running.returncode, "".join(said)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("command", "at", "kept", "goes_on"), [
    (["tune", *TUNE], "step 20/40", "Kept: step ", "went on from step "),
    (["compare", *COMPARE], "base judging", "Kept: 1 finished runs in run.", "Going on with run: 1 runs are done."),
])  # fmt: skip
def test_sigterm_and_the_same_command_again(command, at, kept, goes_on, place):
    arguments = [*command, "--model", "model", "--data", "sums.jsonl", "--batch", "4"]
    code, said = call(place, arguments, until=at, sent=signal.SIGTERM)
    assert code == 143, said
    assert "stopped by SIGTERM" in said
    assert kept in said
    assert "The same command goes on there." in said
    assert "Traceback" not in said
    code, said = call(place, arguments)
    assert code == 0, said
    assert goes_on in said


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_before_anything_is_kept(place):
    arguments = ["tune", *TUNE, "--model", "model", "--data", "sums.jsonl", "--batch", "4"]
    code, said = call(place, arguments, until="reading the data")
    assert code == 130, said
    assert "Traceback" not in said
    assert not (place / "run" / "adapter.safetensors").exists()
