"""Functions run in two processes that make one run, as a launcher would start them."""

import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

WORLD = 2
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
POSSIBLE = sys.platform.startswith("linux") and dist.is_available() and dist.is_gloo_available()


@dataclass(frozen=True)
class Ended:
    """Exit codes of the processes, and all that they printed."""

    codes: list[int]
    text: str


def side_by_side(function: Callable[[], Any], folder: Path, **more: str) -> Ended:
    """Run a function in two processes forked from this one, which has what they import. more: variables for them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork, logs = multiprocessing.get_context("fork"), [folder / f"process-{rank}.log" for rank in range(WORLD)]
    children = [
        fork.Process(target=_child, args=(function, _variables(rank, port) | more, log))
        for rank, log in enumerate(logs)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        for child in children:
            child.start()
    for child in children:
        child.join(timeout=240)
        if child.is_alive():
            child.kill()
            child.join()
    codes = [1 if child.exitcode is None else child.exitcode for child in children]
    return Ended(codes, "\n".join(log.read_text(errors="replace") for log in logs))


def _variables(rank: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port,
               "OMP_NUM_THREADS": 1}  # fmt: skip
    return {k: str(v) for k, v in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _child(function: Callable[[], Any], variables: dict[str, str], log: Path) -> None:
    os.environ.update(variables)
    with open(log, "w", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        code = 0
        try:
            function()
        except BaseException:
            traceback.print_exc(file=stream)
            code = 1
        stream.flush()
        os._exit(code)  # nothing of the parent's is torn down
