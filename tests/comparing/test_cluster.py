"""Runs on a Ray cluster are those of one process; what dies is begun again; what cannot be reached is said at once."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from tests.comparing.test_run import QUIET, files, run  # noqa: F401

from addenda.comparing import cluster
from addenda.comparing.record import Record
from addenda.comparing.run import Watch
from addenda.core.base.errors import AddendaError

SEARCH = {"rates": 3, "seeds": 2, "methods": ["lora:rank=2"], "around": {"lora:rank=2": 0.03}}


@pytest.fixture(scope="module")
def address():
    """The address of a cluster of two nodes with one processor each."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'addenda[ray]'")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    two.add_node(num_cpus=1)
    yield two.address
    two.shutdown()


def same(one, two):
    """Whether two records hold the same runs with the same numbers."""
    assert {t.name for t in one.trials} == {t.name for t in two.trials}
    for t in one.trials:
        other = two.find(t.method, t.stage, t.seed, t.rate, t.steps)
        assert (other.losses, other.validation, other.status) == (t.losses, t.validation, t.status)
        assert t.test is None or (t.test.items, t.test.losses) == (other.test.items, other.test.losses)
    assert {k: (m.void, m.steps) for k, m in one.config.methods.items()} == {
        k: (m.void, m.steps) for k, m in two.config.methods.items()
    }


def workers():
    """The processes of a cluster that are at a run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::_there" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Killer(threading.Thread):
    """Kills workers that are at a run, at most so many."""

    def __init__(self, most):
        super().__init__(daemon=True)
        self.left, self.killed, self.over = most, 0, threading.Event()

    def run(self):
        while self.left and not self.over.wait(0.02):
            for process in workers()[: self.left]:
                process.kill()
                process.wait()
                self.left, self.killed = self.left - 1, self.killed + 1


@pytest.mark.slow
def test_a_cluster_gives_the_record_of_one_process_though_workers_die(files, address):  # noqa: F811
    one = run(files, **SEARCH)
    killer, ended = Killer(2), []
    killer.start()
    watch = Watch(say=lambda text: None, trial=lambda *what: ended.append(what))
    try:
        two = run(files, out=files[2].parent / "away", ray=address, watch=watch, **SEARCH)
    finally:
        killer.over.set()
        killer.join()
    assert killer.killed == 2
    same(one, two)
    assert len(ended) == len(two.trials)
    note = next(n for n in two.config.notes if "Ray cluster" in n)
    assert "2 nodes (2 processors)" in note and not (files[2].parent / "away" / "partial").exists()
    again = run(files, out=files[2].parent / "away", ray=address, **SEARCH)
    assert again.config == two.config


@pytest.mark.slow
def test_what_dies_each_time_is_said_and_the_rest_is_kept(files, address, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cluster, "AGAIN", 0)
    killer = Killer(1)
    killer.start()
    with pytest.raises(AddendaError, match=r"The workers of 1 runs died 1 times \(final-.*: WorkerCrashedError\)"):
        run(files, rates=1, ray=address)
    killer.over.set()
    assert killer.killed == 1 and len(Record.read(files[2]).trials_of(stage="final")) == 3
    same(run(files, rates=1, out=files[2].parent / "here"), run(files, rates=1))  # goes on without a cluster, too


@pytest.mark.slow
def test_what_a_run_raises_is_raised_here(files, address):  # noqa: F811
    def lost(*_):
        raise AddendaError("raised over there")

    with cluster.reached(address):
        import ray

        runner = cluster.OnCluster.__new__(cluster.OnCluster)
        runner.held, runner.watch = None, QUIET.trial
        runner.there = ray.remote(lost)
        with pytest.raises(AddendaError, match=r"^raised over there$"):
            list(runner([cluster.TrialSpec("lora", "final", 0, 1e-3, 4)]))


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on(files, address):  # noqa: F811
    model, data, out = files
    command = [sys.executable, "-m", "addenda", "compare", "--model", model, "--data", data, "--out", out, "--methods",
               "lora:rank=2,shira", "--budget", "steps=4", "--seeds", 2, "--batch", 4, "--rates", 1, "--dtype",
               "float32", "--items", 10, "--general", "none", "--ray", address, "--yes"]  # fmt: skip
    driver = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len(list((out / "trials").glob("final-*.json"))) < 1:
        assert driver.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = {p: p.read_bytes() for p in (out / "trials").glob("*.json")}
    assert len(done) < 5
    subprocess.run([str(c) for c in command], check=True, capture_output=True, timeout=400)
    assert len(Record.read(out).trials_of(stage="final")) == 4
    assert all(p.read_bytes() == before for p, before in done.items())


def refused(files, address, says):  # noqa: F811
    loaded = []
    with pytest.raises(AddendaError, match=says):
        run(files, ray=address, watch=Watch(say=loaded.append))
    assert not loaded and not Path(files[2]).exists()


def test_an_address_where_nothing_is(files, monkeypatch):  # noqa: F811
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'addenda[ray]'")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    refused(files, f"127.0.0.1:{port}", rf"No Ray cluster answers at 127.0.0.1:{port} \(.*refused.*ray start --head")
    for text in ("127.0.0.1", "here:there", "ray://host:1", "host:0", "host:65536", ""):
        refused(files, text, r"expected HOST:PORT of a cluster's head, auto or local")
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 3.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        refused(files, f"127.0.0.1:{silent.getsockname()[1]}", "what is there does not speak as Ray's head does")


def test_trackers_follow_runs_here_alone(files, monkeypatch):  # noqa: F811
    monkeypatch.setattr(cluster, "reached", lambda address: nullcontext())
    with pytest.raises(AddendaError, match="report_to= is told of runs in this process; with ray= they are elsewhere"):
        run(files, ray="auto", report_to="tensorboard")
    assert not Path(files[2]).exists()


def test_without_ray(files, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(files, "auto", r"ray= needs Ray .*pip install 'addenda\[ray\]'")
