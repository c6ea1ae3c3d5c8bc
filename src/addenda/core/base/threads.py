"""Work on several sites at once, in threads that share torch's own among them."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def side_by_side(most: int) -> Iterator[Callable[[Callable, list], Iterable]]:
    """Yield a `map` that runs in at most `most` threads; the plain one where torch has one thread.

    A factorisation of a few hundred rows gains little from a second thread, and waits for it where the machine is
    busy; two of them beside each other take half the time.
    """
    threads = torch.get_num_threads()
    workers = min(threads, most, 4)
    if workers < 2:
        yield map
        return
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,)) as pool:
            yield partial(_in_mode_of_caller, pool.map)
    finally:
        torch.set_num_threads(threads)
        give_back()


def _in_mode_of_caller(apply: Callable[[Callable, list], Iterable], function: Callable, jobs: list) -> Iterable:
    """Run jobs in threads in the modes of here: recording gradients, and inference mode, are of each thread alone."""
    recording, inferring = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(job: Any) -> Any:
        with torch.set_grad_enabled(recording), torch.inference_mode() if inferring else contextlib.nullcontext():
            return function(job)

    return apply(run, jobs)


@contextmanager
def at_most(threads: int | None) -> Iterator[None]:
    """Have torch use at most so many threads in a `with` block; None: as many as it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def give_back() -> None:
    """Return free pages to the system, where the C library can (glibc); elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
