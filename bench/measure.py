"""One step, measured: every arm in a fresh process, arms in turn, over several rounds."""

import gc
import multiprocessing
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bench.arms import build, prepare, warm

WARM, TIMED = 2, 4


def in_process(function: Callable[..., Any], *arguments) -> Any:
    """The result of a function in a forked process: imports are there already, nothing else is."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        fine, result = receiver.recv()
    except EOFError:
        raise SystemExit(f"{arguments}: the process ended without a result (exit code {child.exitcode})") from None
    finally:
        child.join()
    if not fine:
        raise SystemExit(f"{arguments}:\n{result}")
    return result


def _send(sender, function, arguments) -> None:
    try:
        sender.send((True, function(*arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def step(model_name: str, arm: str, tokens: tuple[int, int], attention: str, threads: int) -> dict:
    """Seconds (wall, CPU) of one training step, and its peak of resident bytes above the loaded base.

    Built and called inside a fresh process. The loss is over all positions; AdamW takes the trained parameters.
    """
    from addenda.train.machine import Peak, resident

    torch.set_num_threads(threads)
    model = build(model_name, attention)
    batch = torch.randint(0, model.config.vocab_size, tokens, generator=torch.Generator().manual_seed(1))
    warm(model)
    floor = resident()
    started = time.perf_counter()
    model, trainable = prepare(arm, model)
    attach = time.perf_counter() - started
    live = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(live, lr=1e-4, fused=True) if live else None
    wall, cpu = [], []
    gc.collect()
    for i in range(WARM + TIMED):
        if i == WARM:
            peak = Peak().__enter__()
        w, c = time.perf_counter(), time.process_time()
        model(input_ids=batch, labels=batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wall.append(time.perf_counter() - w)
        cpu.append(time.process_time() - c)
    peak.__exit__()
    return {
        "wall": statistics.median(wall[WARM:]),
        "cpu": statistics.median(cpu[WARM:]),
        "memory": (peak.bytes or 0) - (floor or 0),
        "attach": attach,
        "trainable": trainable,
    }


def rounds(jobs: Iterable[tuple], count: int, function: Callable[..., dict] = step) -> dict[tuple, list[dict]]:
    """Every job `count` times, in turn; the order is turned by one from round to round."""
    jobs = list(jobs)
    found: dict[tuple, list[dict]] = {job: [] for job in jobs}
    for r in range(count):
        for job in jobs[r % len(jobs) :] + jobs[: r % len(jobs)]:
            found[job].append(in_process(function, *job))
            made = found[job][-1]
            print(f"round {r + 1}/{count} {job[1]}: {made['wall'] * 1e3:.0f} ms, {made['memory'] / 1e6:.0f} MB",
                  file=sys.stderr, flush=True)  # fmt: skip
    return found
