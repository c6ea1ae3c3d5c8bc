"""Several processes that make one run, on one host or more, as a launcher (torchrun, accelerate) starts them.

What the first process decides, all do, and what it may not do, none does; the run's folder is read and written by the
first alone. The others need not see it: a checkpoint to go on from is sent to those that do not. What they exchange is
JSON and bytes of files, never a pickle.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import sha256_of
from addenda.core.disk.place import is_first
from addenda.core.file.identity import differences, plain
from addenda.models.machine import processes

_GONE = ("closed by peer", "Connection reset", "Broken pipe", "gloo/transport", "Connection closed", "recv failed")
PIECE = 64 << 20  # bytes that are sent at once


def meet(backend: str | None = None, seconds: float | None = None) -> None:
    """Wait until all processes of the run are there. A process alone, and one in a group already, goes on at once."""
    if processes() > 1 and not dist.is_initialized():
        dist.init_process_group(backend, timeout=None if seconds is None else timedelta(seconds=seconds))


def apart() -> bool:
    """Return whether this run has several processes, which have met."""
    return processes() > 1 and dist.is_initialized()


def agreed(decide: Callable[[], Any]) -> Any:
    """Return in every process what the first one decides, as JSON gives it back.

    Its AddendaError is raised in all, so that none waits for one that has ended. All must call this at the same place.
    """
    if not apart():
        return decide()
    found: dict[str, Any] = {}
    error = None
    if is_first():
        try:
            found = {"value": decide()}
        except AddendaError as problem:
            error, found = problem, {"error": str(problem)}
    found = json.loads(_sent(json.dumps(found).encode(), 0))
    if error is not None:
        raise error
    if "error" in found:
        raise AddendaError(found["error"])
    return found["value"]


def any_of(flag: bool) -> bool:
    """Return whether the flag is set in any process."""
    if not apart():
        return flag
    tensor = torch.tensor(int(flag), device=_device())
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return bool(tensor.item())


def sum_of(count: torch.Tensor) -> torch.Tensor:
    """Return the sum of what every process has counted."""
    if apart():
        dist.all_reduce(count)
    return count


def check_alike(about: dict[str, Any]) -> None:
    """Raise AddendaError, in every process, where the processes would train another model, on other data, otherwise.

    about: an identity of the run, see `core.file.identity`. Two hosts have each a copy of the model and the data.
    """
    if not apart():
        return
    own = json.dumps(plain(about), sort_keys=True).encode()
    said = [json.loads(_sent(own, k)) for k in range(dist.get_world_size())]
    other = {k: differences(said[0], it) for k, it in enumerate(said) if it != said[0]}
    if other:
        k, first = next(iter(other.items()))
        raise AddendaError(
            f"The processes of this run do not agree: in process {k} (the first is 0), "
            f"{'; '.join(str(d).replace(' was ', ' is ', 1).replace(', now ', ' in the first and ', 1) for d in first)}"
            f"{f' there, and {len(other) - 1} more differ' if len(other) > 1 else ' there'}. Give every host the same "
            "model, data, options and versions; with dtype='auto' processors may differ: name the dtype."
        )


@contextlib.contextmanager
def fetched(path: Path | None) -> Iterator[Path | None]:
    """Yield, for a `with` block, a folder or file of the first process: where it lies, or a copy of it in this process.

    path: counts in the first process only. None there: None everywhere.
    """
    if not apart():
        yield path
        return
    about = agreed(
        lambda: None if path is None else {"path": str(path), "folder": path.is_dir(), "files": _files(path)}
    )
    if about is None:
        yield None
        return
    there = Path(about["path"])
    seen = is_first() or (there.exists() and _files(there) == about["files"])
    with contextlib.nullcontext() if seen else tempfile.TemporaryDirectory(prefix="addenda-") as folder:
        place = there if folder is None else Path(folder) / there.name
        if any_of(not seen):
            for name in about["files"]:
                _send(there / name if about["folder"] else there, None if seen else place / name)
        yield place if about["folder"] or seen else place / there.name


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Turn what is raised, in a `with` block, where another process has gone or is not split as this one into words."""
    try:
        yield
    except AddendaError:
        raise
    except (RuntimeError, OSError) as error:
        text = str(error)
        if isinstance(error, dist.DistError) or any(sign in text for sign in _GONE):
            raise AddendaError(
                f"Another process of this run has ended ({text.strip().splitlines()[0][:200]}). Its own message says "
                "why. Start the same launch again: it goes on from the last checkpoint, if out= (--out) has one."
            ) from error
        if "mixed torch.Tensor and DTensor" in text:
            raise AddendaError(
                f"What trains this adapter does not work on a split model ({text.strip().splitlines()[0][:200]}). "
                "Launch without --use_fsdp, or take optimizer='adamw' (--optimizer adamw)."
            ) from error
        raise


def _files(path: Path) -> dict[str, str]:
    """Return the files of a folder, or a file itself, by name, with their SHA-256."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return {file.name: sha256_of(file) for file in files}


def _send(file: Path, to: Path | None) -> None:
    """Send a file of the first process to the others, piece by piece. to: where this process writes it, or nowhere."""
    size = agreed(lambda: file.stat().st_size)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(file.open("rb")) if is_first() else None
        if to is not None:
            to.parent.mkdir(parents=True, exist_ok=True)
        target = None if to is None else stack.enter_context(to.open("wb"))
        for _ in range(0, size, PIECE):
            data = _sent(b"" if source is None else source.read(PIECE), 0)
            if target is not None:
                target.write(data)


def gathered(data: bytes) -> list[bytes]:
    """Return what every process gives, in their order."""
    return [data] if not apart() else [_sent(data, k) for k in range(dist.get_world_size())]


def _sent(data: bytes, source: int) -> bytes:
    """Return in every process the bytes that one of them has."""
    here, device = dist.get_rank() == source, _device()
    size = torch.tensor(len(data) if here else 0, device=device)
    dist.broadcast(size, source)
    buffer = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if here and data else torch.empty(0, dtype=torch.uint8)
    )
    buffer = buffer.to(device) if here else torch.empty(int(size.item()), dtype=torch.uint8, device=device)
    if size.item():
        dist.broadcast(buffer, source)
    return data if here else buffer.cpu().numpy().tobytes()


def _device() -> torch.device:
    """Return where tensors lie that the processes exchange: on the CPU, where the group can send from there."""
    backends = dist.get_backend_config() if hasattr(dist, "get_backend_config") else dist.get_backend()
    return torch.device("cpu") if "cpu" in backends or "gloo" in backends else torch.device("cuda")
