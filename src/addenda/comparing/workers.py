"""The runs of a comparison in processes of their own, several at once: small models leave most cores of a machine idle.

Whoever asks keeps the record. A worker gets the subject once, as it is here (a head that was drawn is drawn once), and
computes with as many threads, so that a run gives the same numbers as here. A run whose worker dies is begun again in
another, `AGAIN` times; the others are recorded first. Workers end with the process that began them, however it ends:
each reads from a pipe that closes then.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import nn

from addenda.comparing.entries import TrialRecord, TrialSpec
from addenda.comparing.runner import OneByOne, untold
from addenda.core.base.errors import AddendaError
from addenda.core.base.threads import at_most
from addenda.models.machine import device_of, set_aside

AGAIN = 2  # times that a run is begun again after its worker died
LAST_WORDS = 400  # characters of what a dead worker wrote
P = ParamSpec("P")
R = TypeVar("R")
SERVE = "from addenda.comparing.workers import serve; serve()"


def sharing_threads(function: Callable[P, R]) -> Callable[P, R]:
    """Have torch use the share of its threads that each of workers= gets, while a function is called.

    Raises AddendaError where ray= says that runs are made elsewhere.
    """

    @wraps(function)
    def sharing(*args: P.args, **kwargs: P.kwargs) -> R:
        count = int(kwargs.get("workers") or 1)  # type: ignore[call-overload]
        if count > 1 and kwargs.get("ray") is not None:
            raise AddendaError("ray= and workers= both say where runs are made. Give one of them.")
        with at_most(max(1, torch.get_num_threads() // count)):
            return function(*args, **kwargs)

    return sharing


def check_device(model: nn.Module, workers: int) -> None:
    """Raise AddendaError for a model that several processes cannot train side by side."""
    if workers > 1 and (device := device_of(model)).type != "cpu":
        raise AddendaError(
            f"workers={workers} are for the CPU, and the model is on {device}, which several processes would share. "
            "grouped=True (--grouped) trains several runs on it at once."
        )


class WorkerDiedError(Exception):
    """A worker ended before it answered."""


@dataclass(frozen=True)
class Failure:
    """What a worker answers in place of a run. error: raised there; begun: the work had arrived whole."""

    error: BaseException
    begun: bool = True


class Worker:
    """A process that makes one run after another."""

    def __init__(self):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # what can be imported here, can be there
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, "PYTHONPATH": paths}, start_new_session=True,  # Ctrl-C is for whoever asks
        )  # fmt: skip  # -P: what lies in the current folder is no module unless it is one here

    def begin(self, work: tuple[OneByOne, int]) -> None:
        """Hand over how runs are made, and with how many threads. Raises WorkerDiedError, and for what cannot be."""
        try:
            self._send(work)
        except WorkerDiedError:
            raise
        except Exception as error:  # whatever an object's own pickling raises
            self.end()
            raise _unsent(error) from error

    def ask(self, spec: TrialSpec) -> TrialRecord:
        """Return a run that the worker has made. Raises what the run raised, and WorkerDiedError."""
        self._send(spec)
        assert self._process.stdout is not None
        try:
            made = pickle.load(self._process.stdout)  # of a process that this one began, over a pipe of their own
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise WorkerDiedError(self._last_words()) from error
        if isinstance(made, Failure):
            raise made.error if made.begun else _unsent(made.error)
        return made

    def end(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let go of the pipes of a process that has ended."""
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with suppress(OSError):  # what was not flushed, to a process that is gone
                pipe.close()  # type: ignore[union-attr]

    def _send(self, what: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(what, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) or self._process.stdin.closed:
                raise WorkerDiedError(self._last_words()) from error
            raise

    def _last_words(self) -> str:
        self.end()
        self._log.seek(0)
        lines = self._log.read()[-LAST_WORDS:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with {self._process.returncode}"


def _unsent(error: BaseException) -> AddendaError:
    return AddendaError(
        f"The model, data and methods cannot be handed to a worker ({type(error).__name__}: {error}): classes must be "
        "importable there, so none of __main__ and no lambdas. Leave workers= (--workers) out to run them here."
    )


class InProcesses:
    """A runner whose runs are made by workers, so many at once. alone: how they would be made here.

    Used as a context manager: workers are begun when they are needed, and end with the `with` block.
    """

    def __init__(self, alone: OneByOne, count: int):
        self.alone, self.count, self.folder = alone, count, alone.folder
        self._work = (replace(alone, watch=untold, tracking=untold), torch.get_num_threads())
        self._idle: deque[Worker] = deque()
        self._all: list[Worker] = []
        self._lock, self._ended = Lock(), False

    def __enter__(self) -> "InProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._ended = True
            for worker in self._all:
                worker.end()
        for worker in self._all:
            worker.close()

    def note(self) -> str:
        """Return what runs are made by, as a record's note."""
        threads = self._work[1]
        return (
            f"Runs were made by {self.count} processes side by side, of {threads} thread{'s' * (threads > 1)} each: "
            "times and memory are those of one of them."
        )

    def __call__(self, specs: Sequence[TrialSpec]) -> Iterator[tuple[TrialSpec, TrialRecord]]:
        lost = {}
        pool = ThreadPoolExecutor(self.count, thread_name_prefix="addenda-worker")  # each waits for one worker
        try:
            going = {pool.submit(self._made, spec): spec for spec in specs}
            for future in as_completed(going):
                spec = going[future]
                try:
                    made = future.result()
                except WorkerDiedError as error:
                    lost[spec] = f"{spec.name}: {error}"
                else:
                    self.alone.watch(spec.method, spec.stage, spec.seed, spec.rate)
                    yield spec, made
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if lost:
            raise AddendaError(
                f"The workers of {len(lost)} runs died {AGAIN + 1} times ({'; '.join(lost.values())}), for want of "
                "memory perhaps: fewer workers= (--workers) take less. Every other run is in the record; the same "
                "command goes on there."
            )

    def recorded(self, spec: TrialSpec) -> None:
        """Drop the checkpoints of a run that is in the record."""
        self.alone.recorded(spec)

    def _made(self, spec: TrialSpec) -> TrialRecord:
        """Return a run, made by an idle worker or by a new one; if it dies, by another."""
        for left in reversed(range(AGAIN + 1)):
            try:
                worker = self._free()
                made = worker.ask(spec)
            except WorkerDiedError:
                if not left or self._ended:
                    raise
            else:
                self._idle.append(worker)
                return made
        raise AssertionError("the last time raises")

    def _free(self) -> Worker:
        """Return an idle worker, or a new one: there are never more at work than `count`."""
        with suppress(IndexError):
            return self._idle.popleft()
        with self._lock:
            if self._ended:
                raise WorkerDiedError("there are to be no more")
            worker = Worker()
            self._all.append(worker)
        worker.begin(self._work)
        return worker


# ---- in the worker ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Be a worker: read how runs are made and with how many threads, then make each run that is read, and answer.

    All comes as pickles on the standard input and goes as pickles to the standard output; what else writes there goes
    to the standard error. The process ends with its input, in the midst of a run too.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    asked: SimpleQueue[Any] = SimpleQueue()
    Thread(target=_read, args=(asked,), daemon=True).start()
    work = asked.get()
    if isinstance(work, Failure):
        asked.get()
        _answer(answers, work)
        return
    alone, threads = work
    torch.set_num_threads(threads)  # as many as there, be it more than a process begins with
    with set_aside():
        while True:
            spec = asked.get()
            try:
                ((_, made),) = alone([spec])
            except Exception as error:
                made = Failure(error)
            _answer(answers, made)


def _read(asked: SimpleQueue) -> NoReturn:
    """Put everything that comes where the main thread takes it from; end the process with its input."""
    while True:
        try:
            asked.put(pickle.load(sys.stdin.buffer))
        except EOFError:
            os._exit(0)
        except Exception as error:
            asked.put(Failure(error, begun=False))


def _answer(answers: Any, made: Any) -> None:
    try:
        text = pickle.dumps(made, pickle.HIGHEST_PROTOCOL)
        pickle.loads(text)  # some errors can be written and not read
    except Exception:
        text = pickle.dumps(Failure(AddendaError(f"{type(made.error).__name__}: {made.error}")))
    answers.write(text)
    answers.flush()
