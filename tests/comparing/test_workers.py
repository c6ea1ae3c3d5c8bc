"""Runs in processes of their own are those of this one; what dies is begun again; nothing outlives who asked."""

import os
import signal
import subprocess
import sys
import threading
import time
import types
from contextlib import suppress
from dataclasses import dataclass

import psutil
import pytest
import torch
from tests.comparing.test_cluster import SEARCH, same
from tests.comparing.test_run import QUIET, files, run, undrawn  # noqa: F401
from torch import nn

from addenda.comparing import workers
from addenda.comparing.entries import TrialRecord, TrialSpec
from addenda.comparing.record import Record
from addenda.comparing.request import Watch
from addenda.comparing.runner import untold
from addenda.core.base.errors import AddendaError

SPEC = TrialSpec("lora", "final", 0, 1e-3, 4)


def alive(of=None):
    """The workers of a process, this one unless another is given, that are at work or wait for it."""
    found = []
    for process in psutil.Process(of).children():
        with suppress(psutil.Error):
            if workers.SERVE in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Killer(threading.Thread):
    """Kills workers as soon as there are some, at most so many."""

    def __init__(self, most):
        super().__init__(daemon=True)
        self.left, self.over = most, threading.Event()

    def run(self):
        while self.left and not self.over.wait(0.02):
            for process in alive()[: self.left]:
                process.kill()
                self.left -= 1

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


@dataclass
class Made:
    """How a run is made in these tests: by a worker that has no model."""

    subject: object = None
    folder: object = None
    watch: object = untold
    tracking: object = untold
    raises: tuple = ()  # a class of errors, and what one is made of

    def __call__(self, specs):
        for spec in specs:
            print("noise, which is no answer")
            if self.raises:
                raise self.raises[0](*self.raises[1:])
            note = f"{torch.get_num_threads()} threads, process {os.getpid()}"
            yield spec, TrialRecord(**vars(spec), status="ok", note=note)


def made_by(alone, count=1, specs=(SPEC,)):
    with workers.InProcesses(alone, count) as beside:
        return dict(beside(specs))


def test_workers_give_the_record_of_one_process_though_one_dies(files):  # noqa: F811
    one, ended, threads = run(files, **SEARCH), [], torch.get_num_threads()
    watch = Watch(say=lambda text: None, trial=lambda *what: ended.append(what))
    with Killer(1) as killer:
        two = run(files, out=files[2].parent / "beside", workers=2, watch=watch, **SEARCH)
    assert killer.left == 0 and not alive() and torch.get_num_threads() == threads
    same(one, two)
    assert len(ended) == len(two.trials)
    note = next(n for n in two.config.notes if "processes side by side" in n)
    assert "by 2 processes" in note and not (files[2].parent / "beside" / "partial").exists()
    again = run(files, out=files[2].parent / "beside", **SEARCH)
    assert again.config == two.config and "workers" not in two.config.options


def test_a_worker_has_the_threads_of_who_asks_and_what_it_prints_is_no_answer():
    specs = [SPEC, TrialSpec("lora", "final", 1, 1e-3, 4)]
    notes = [made.note for made in made_by(Made(), specs=specs).values()]
    assert len(set(notes)) == 1 and notes[0].startswith(f"{torch.get_num_threads()} threads")
    assert str(os.getpid()) not in notes[0]


def test_what_dies_each_time_is_said_and_the_rest_is_kept(monkeypatch):
    monkeypatch.setattr(workers, "AGAIN", 0)
    specs, kept = [TrialSpec("lora", "final", seed, 1e-3, 4) for seed in range(3)], []
    says = r"The workers of 1 runs died 1 times \(final-lora-seed\d.*: ended with -9\).*fewer workers="

    def kept_of(beside):
        for spec, _ in beside(specs):
            kept.append(spec)

    with Killer(1), workers.InProcesses(Made(), 1) as beside, pytest.raises(AddendaError, match=says):
        kept_of(beside)
    assert len(kept) == 2


class NoTwoArgumentsError(Exception):
    """Can be written as a pickle, and not be read."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(("error", "says"), [
    ((AddendaError, "raised over there"), "^raised over there$"),
    ((NoTwoArgumentsError, 1, 2), "^NoTwoArgumentsError: 1 and 2$"),
])  # fmt: skip
def test_what_a_run_raises_is_raised_here(error, says):
    with pytest.raises(AddendaError, match=says):
        made_by(Made(raises=error))
    assert not alive()


@pytest.mark.parametrize("where", ["a lambda", "a class of nowhere"])
def test_what_cannot_be_handed_over_is_said(where, monkeypatch):
    nowhere = types.ModuleType("of_nowhere")
    nowhere.Held = type("Held", (), {"__module__": "of_nowhere"})
    monkeypatch.setitem(sys.modules, "of_nowhere", nowhere)
    subject = (lambda: None) if where == "a lambda" else nowhere.Held()
    with pytest.raises(AddendaError, match=r"cannot be handed to a worker .*Leave workers= \(--workers\) out"):
        made_by(Made(subject))
    assert not alive()


def test_a_worker_that_cannot_begin_says_why(monkeypatch):
    monkeypatch.setattr(workers, "AGAIN", 0)
    monkeypatch.setattr(workers, "SERVE", "raise SystemExit('no such thing here')")
    with pytest.raises(AddendaError, match=r"died 1 times .*no such thing here"):
        made_by(Made())


def test_what_lies_in_the_current_folder_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # as of the installed command
    (tmp_path / "pickle.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom _pickle import *\n")
    assert made_by(Made())[SPEC].status == "ok" and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("options", "says"), [
    ({"ray": "auto"}, "both say where runs are made"),
    ({"report_to": "tensorboard"}, "with workers= they are elsewhere"),
    ({"grouped": True}, "workers take runs one by one"),
    ({"workers": 0}, "workers"), ({"workers": True}, "workers"), ({"workers": 1.5}, "workers"),
])  # fmt: skip
def test_what_workers_cannot_do_is_said_before_anything_is_loaded(files, options, says):  # noqa: F811
    loaded = []
    if options.get("report_to") == "tensorboard":
        pytest.importorskip("tensorboard")
    with pytest.raises(AddendaError, match=says):
        run(files, watch=Watch(say=loaded.append), **({"workers": 2} | options))
    assert not loaded and not files[2].exists()


def test_a_model_on_another_device_is_refused():
    workers.check_device(nn.Linear(2, 2, device="meta"), 1)
    with pytest.raises(AddendaError, match="workers=2 are for the CPU, and the model is on meta"):
        workers.check_device(nn.Linear(2, 2, device="meta"), 2)


def test_each_gets_its_share_of_the_threads():
    count = workers.sharing_threads(lambda *, workers=1: torch.get_num_threads())
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert [count(workers=n) for n in (1, 2, 3, 9)] == [4, 2, 1, 1] and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_who_asked_and_the_comparison_goes_on(files, sent):  # noqa: F811
    model, data, out = files
    command = [sys.executable, "-m", "addenda", "compare", "--model", model, "--data", data, "--out", out, "--methods",
               "lora:rank=2,shira", "--budget", "steps=4", "--seeds", 2, "--batch", 4, "--rates", 1, "--dtype",
               "float32", "--items", 10, "--general", "none", "--workers", 2, "--yes"]  # fmt: skip
    driver = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len(list((out / "trials").glob("final-*.json"))) < 1:
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    there = alive(driver.pid)
    assert there
    driver.send_signal(sent)
    driver.wait()
    assert not psutil.wait_procs(there, timeout=30)[1]
    done = {p: p.read_bytes() for p in (out / "trials").glob("*.json")}
    subprocess.run([str(c) for c in command], check=True, capture_output=True, timeout=400)
    assert len(Record.read(out).trials_of(stage="final")) == 4
    assert all(p.read_bytes() == text for p, text in done.items())
