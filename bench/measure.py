"""One step, measured: every arm in a process of its own, and one step of each in turn."""

import gc
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.arms import build, prepare, warm

WARM = 2


def in_process(function: Callable[..., Any], *arguments) -> Any:
    """The result of a function in a forked process: imports are there already, nothing else is."""
    worker = Worker(_once, function, *arguments)
    try:
        return worker.next()
    finally:
        worker.close()


def _once(function: Callable[..., Any], *arguments) -> Iterator[Any]:
    yield function(*arguments)


def step(model_name: str, arm: str, tokens: tuple[int, int], attention: str, threads: int) -> Iterator[dict]:
    """Training steps, one each time it is asked: seconds (wall, CPU), and the peak of resident bytes above the base.

    The first answer, after building and `WARM` steps, has the seconds of attach and the number of trained parameters.
    Runs in a process of its own. The loss is over all positions; AdamW takes the trained parameters, or the optimizer
    of addenda that stands behind an @ in the arm ("auto": the method's own). Schedules draw anew after every step.
    """
    from addenda import adapters, optim
    from addenda.models.machine import Peak, resident

    arm, _, trained_by = arm.partition("@")
    torch.set_num_threads(threads)
    model = build(model_name, attention)
    batch = torch.randint(0, model.config.vocab_size, tokens, generator=torch.Generator().manual_seed(1))
    warm(model)
    floor = resident() or 0
    started = time.perf_counter()
    model, trainable = prepare(arm, model)
    attach = time.perf_counter() - started
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=1e-4, fused=True) if live else None
    if trained_by:
        (adapter,) = adapters(model).values()
        optimizer = optim.build(adapter, trained_by, 1e-4)
    scheduled = scheduled_in(model)

    def one() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            for adapter in scheduled:
                adapter.step()
            optimizer.zero_grad(set_to_none=True)

    gc.collect()
    for _ in range(WARM):
        one()
    yield {"attach": attach, "trainable": trainable}
    while True:
        w, c = time.perf_counter(), time.process_time()
        with Peak() as peak:
            one()
        yield {
            "wall": time.perf_counter() - w,
            "cpu": time.process_time() - c,
            "memory": (peak.bytes or 0) - floor,
        }


def scheduled_in(model) -> list:
    """Those adapters of addenda that the model has which draw anew after every step."""
    from addenda import adapters
    from addenda.core.state.state import find_state

    held = adapters(model).values() if find_state(model) else []
    return [a for a in held if any(m.has("on_step") for m in a.methods.values())]


class Worker:
    """A forked process that goes on with a generator whenever `next` is called, and waits in between."""

    def __init__(self, function: Callable[..., Iterator[Any]], *arguments):
        context = multiprocessing.get_context("fork")
        self.arguments = arguments
        self.pipe, inner = context.Pipe()
        self.process = context.Process(target=_serve, args=(inner, function, arguments))
        self.process.start()
        inner.close()

    def next(self) -> Any:
        try:
            self.pipe.send(True)
            fine, result = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            raise SystemExit(f"{self.arguments}: the process ended, exit code {self.process.exitcode}") from None
        if not fine:
            raise SystemExit(f"{self.arguments}:\n{result}")
        return result

    def close(self) -> None:
        self.process.terminate()  # a later worker holds this pipe too: closing it would not end this one
        self.process.join()


def _serve(pipe, function, arguments) -> None:
    try:
        steps = function(*arguments)
        while True:
            pipe.recv()
            pipe.send((True, next(steps)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def alternate(jobs: Sequence[tuple], count: int, function: Callable[..., Iterator[dict]] = step) -> list[list[dict]]:
    """`count` steps of every job in turn, each job in a process of its own, the order turned by one every time.

    All of a turn fall within seconds of one another, so that their ratio outlives a change of the machine's speed.
    """
    workers = [Worker(function, *job) for job in jobs]
    try:
        about = [worker.next() for worker in workers]
        found: list[list[dict]] = [[] for _ in jobs]
        for r in range(count):
            for i in [(r + k) % len(jobs) for k in range(len(jobs))]:
                found[i].append(about[i] | workers[i].next())
        for job, made in zip(jobs, found, strict=True):
            middle = {key: statistics.median(m[key] for m in made) for key in ("wall", "memory")}
            text = f"{job[1]}: {middle['wall'] * 1e3:.0f} ms, {middle['memory'] / 1e6:.0f} MB"
            print(text, file=sys.stderr, flush=True)
        return found
    finally:
        for worker in workers:
            worker.close()


def ratios(made: Sequence[dict], other: Sequence[dict], key: str) -> list[float]:
    """Of a number to the same one of the same turn, rising."""
    return sorted(a[key] / b[key] for a, b in zip(made, other, strict=True))


def spread(found: Sequence[float]) -> str:
    """Median (lowest to highest)."""
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
