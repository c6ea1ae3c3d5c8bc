"""Work on several sites at once, in threads that share torch's own among them."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

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
            yield pool.map
    finally:
        torch.set_num_threads(threads)
        give_back()


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
