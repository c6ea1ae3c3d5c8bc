"""The runs of a comparison on a Ray cluster: the same trial, wherever there is room.

Whoever asks keeps the record. A worker gets the subject once, as it is here (a head that was drawn is drawn once), and
computes with as many threads, so that on equal processors a run gives the same numbers as here. A run whose worker dies
is begun again elsewhere, `AGAIN` times; the others are recorded first. Images are read from the paths that they have
here, and there are no checkpoints within a run.
"""

import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from addenda.comparing.arm import Arm
from addenda.comparing.entries import TrialRecord, TrialSpec
from addenda.comparing.runner import Watched
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings, trial
from addenda.core.base.errors import AddendaError
from addenda.models.machine import device_of, versions
from addenda.train import attention, checkpoint

AGAIN = 3  # times that a run is begun again after its worker died
ANSWER_SECONDS = 30.0  # that a cluster has to answer
SEARCHED = "auto", "local"  # addresses that Ray finds itself: a cluster that runs here, one for this process alone

P = ParamSpec("P")
R = TypeVar("R")


def on_cluster(function: Callable[P, R]) -> Callable[P, R]:
    """Connect to the cluster that ray= names before a function is called, and leave it afterwards."""

    @wraps(function)
    def connected(*args: P.args, **kwargs: P.kwargs) -> R:
        address = kwargs.get("ray")
        if address is None:
            return function(*args, **kwargs)
        with reached(str(address)):
            return function(*args, **kwargs)

    return connected


@contextmanager
def reached(address: str) -> Iterator[None]:
    """Be connected to a cluster inside a `with` block; a connection that this process has already is used as it is.

    Raises AddendaError where Ray is not installed, nothing answers, or the workers have other versions than this
    process.
    """
    try:
        import ray
    except ImportError as error:
        raise AddendaError(f"ray= needs Ray ({error}). Install it: pip install 'addenda[ray]'.") from None
    if ray.is_initialized():
        yield
        return
    if address not in SEARCHED:
        _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _silent(address, str(error)) from error
    try:
        _check_versions()
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise AddendaError where no cluster answers: Ray itself would wait for minutes, and then end the process."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise AddendaError(f"ray={address!r}: expected HOST:PORT of a cluster's head, {' or '.join(SEARCHED)}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        health = [sys.executable, "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
        subprocess.run(health, timeout=ANSWER_SECONDS, check=True, capture_output=True)
    except OSError as error:
        raise _silent(address, str(error)) from None
    except subprocess.SubprocessError:
        raise _silent(address, "what is there does not speak as Ray's head does") from None


def _silent(address: str, why: str) -> AddendaError:
    return AddendaError(
        f"No Ray cluster answers at {address} ({why}). Start one with `ray start --head`, give its HOST:PORT, or take "
        "ray='local' for one on this machine. Nothing was loaded."
    )


def _check_versions() -> None:
    """Raise AddendaError where a worker has not what computes here."""
    import ray
    from ray.exceptions import RayError

    here = versions()
    try:
        there = ray.get(ray.remote(versions).options(num_cpus=1).remote(), timeout=10 * ANSWER_SECONDS)
    except RayError as error:
        raise AddendaError(f"The cluster's workers cannot import addenda as it is here: {error}") from error
    if other := [f"{k} {there.get(k)} there, {here[k]} here" for k in here if there.get(k) != here[k]]:
        raise AddendaError(f"The cluster's workers have other versions, so runs would differ: {'; '.join(other)}.")


def nodes() -> str:
    """Return what runs are on, as a record's note."""
    import ray

    alive, have = [n for n in ray.nodes() if n["Alive"]], ray.cluster_resources()
    parts = [f"{have[k]:g} {what}" for k, what in (("CPU", "processors"), ("GPU", "GPUs")) if have.get(k)]
    return f"Runs took place on a Ray cluster of {len(alive)} nodes ({', '.join(parts)}): times and memory are theirs."


@dataclass(frozen=True)
class Work:
    """What a worker holds. attention, threads: as in the process that asks."""

    subject: Subject
    arms: Mapping[str, Arm]
    settings: TrialSettings
    attention: str | None
    threads: int


class OnCluster:
    """A runner on the cluster that this process is connected to. watch: told of each run when it has ended."""

    def __init__(
        self, subject: Subject, arms: Sequence[Arm], settings: TrialSettings, folder: Path, attention: str | None,
        watch: Watched,
    ):  # fmt: skip
        import ray

        self.folder, self.watch = folder, watch
        work = Work(subject, {a.label: a for a in arms}, settings, attention, torch.get_num_threads())
        self.held = ray.put(work)
        most = max((n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]), default=1)
        gpu = {"num_gpus": 1} if device_of(subject.model).type == "cuda" else {}
        self.there = ray.remote(_there).options(
            num_cpus=max(1, min(work.threads, int(most))), max_retries=0, scheduling_strategy="SPREAD", **gpu
        )

    def __call__(self, specs: Sequence[TrialSpec]) -> Iterator[tuple[TrialSpec, TrialRecord]]:
        import ray
        from ray.exceptions import RayError, RayTaskError

        left, lost = dict.fromkeys(specs, AGAIN), {}
        going = {self.there.remote([self.held], spec): spec for spec in specs}
        try:
            while going:
                (ref, *_), _ = ray.wait(list(going), num_returns=1)
                spec = going.pop(ref)
                try:
                    made = ray.get(ref)
                except RayTaskError as error:  # raised by the run itself, as it would be here
                    raise error.cause from None
                except RayError as error:
                    if left[spec]:
                        left[spec] -= 1
                        going[self.there.remote([self.held], spec)] = spec
                    else:
                        lost[spec] = f"{spec.name}: {type(error).__name__}"
                else:
                    self.watch(spec.method, spec.stage, spec.seed, spec.rate)
                    yield spec, made
        finally:
            for ref in going:
                ray.cancel(ref, force=True)
        if lost:
            raise AddendaError(
                f"The workers of {len(lost)} runs died {AGAIN + 1} times ({'; '.join(lost.values())}), for want of "
                "memory perhaps. Every other run is in the record; the same command goes on there."
            )

    def recorded(self, spec: TrialSpec) -> None:
        """Drop the checkpoints of a run that is in the record, which an earlier call may have left here."""
        checkpoint.drop(self.folder / spec.name)


_held: dict[Any, Work] = {}  # of a worker: what it got last


def _there(held: list, spec: TrialSpec) -> TrialRecord:
    """Run a trial in a worker. held: a list of one reference, so that Ray does not fetch it for every run."""
    work = _work(held[0])
    return trial(work.subject, work.arms[spec.method], work.settings, spec)


def _work(held: Any) -> Work:
    import ray

    if held not in _held:
        work: Work = ray.get(held)
        torch.set_num_threads(work.threads)
        attention.put(work.subject.model, work.attention)
        _held.clear()
        _held[held] = work
    return _held[held]
