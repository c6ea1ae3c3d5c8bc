"""A campaign: many seeds against one target, in children of a warm process; each file's time and memory is measured.

    run(target, range(1000), folder) -> Tally

A file is refused with AddendaError, or what was read is true (`attacks.oracles`). Anything else is a fault, with the
seed that makes it again: another exception, a warning, a message that cannot be printed or has no end, more than
`SECONDS` of the processor or `MEMORY` above what the process had, a child that died or hung.
"""

import contextlib
import ctypes
import gc
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from addenda.core.base.errors import AddendaError
from attacks.mutate import Mutant
from attacks.oracles import Target, UntrueError

SECONDS, MEMORY = 1.0, 64 << 20
HANGS = 20  # seconds of the processor after which a child is ended
_ROOM = 1 << 30  # bytes of addresses above what the process has: what asks for more fails, and is a fault
_BATCH = 1000
_TEXT = 1 << 16  # characters of a message


@dataclass
class Attempt:
    """What became of one file."""

    seed: int
    kind: str
    outcome: str  # refused, loaded, or fault
    seconds: float
    memory: int  # bytes
    fault: str = ""


@dataclass
class Tally:
    """Counts of a campaign. kinds: by what was done, how many were refused and how many loaded."""

    files: int = 0
    refused: int = 0
    loaded: int = 0
    slowest: tuple[float, int] = (0.0, -1)  # seconds, seed
    largest: tuple[int, int] = (0, -1)  # bytes, seed
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    faults: list[Attempt] = field(default_factory=list)
    seconds: float = 0.0  # of the processor, all in all

    def add(self, a: Attempt) -> None:
        self.files += 1
        self.refused += a.outcome == "refused"
        self.loaded += a.outcome == "loaded"
        self.slowest = max(self.slowest, (a.seconds, a.seed))
        self.largest = max(self.largest, (a.memory, a.seed))
        counts = self.kinds.setdefault(a.kind, {})
        counts[a.outcome] = counts.get(a.outcome, 0) + 1
        if a.fault:
            self.faults.append(a)


def attempt(target: Target, seed: int, place: Path) -> Attempt:
    """Make the file of a seed, and have it read."""
    return read_one(target, seed, target.mutant(seed), place)


def read_one(target: Target, seed: int, m: Mutant, place: Path) -> Attempt:
    """Have one file read. What was read is checked, and the model is put back."""
    _lay(m, place)
    fault, outcome, made = "", "refused", None
    memory, started = _peak_from_now(), time.process_time()
    seconds = peak = 0.0
    try:
        try:
            made = target.read(place, m)
            outcome = "loaded"
        finally:
            seconds, peak = time.process_time() - started, _peak() - memory
        if outcome == "loaded":
            target.check(place, m, made)
    except AddendaError as error:
        fault = _unfit(str(error)) if outcome == "refused" else f"what was read does not save or check: {error}"[:2000]
    except UntrueError as error:
        fault = f"untrue: {error}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__}: {str(error)[:500]} ({Path(where.filename).name}:{where.lineno})"
    try:
        target.clean()
    except Exception as error:
        fault = f"{fault}; afterwards {type(error).__name__}: {error}"[:3000]
    if seconds > SECONDS:
        fault += f"; it took {seconds:.1f} s"
    if peak > MEMORY:
        fault += f"; it took {int(peak) >> 20} MiB"
    return Attempt(
        seed, m.kind + (", sealed" if m.sealed else ""), "fault" if fault else outcome, seconds, int(peak), fault
    )


def _unfit(message: str) -> str:
    if len(message) > _TEXT:
        return f"a message of {len(message):,} characters"
    try:
        message.encode()
    except UnicodeEncodeError:
        return f"a message that cannot be printed: {message[:300]!r}"
    return "" if message.strip() else "an empty message"


def _lay(m: Mutant, place: Path) -> None:
    for old in place.iterdir() if place.is_dir() else ():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name, data in m.files.items():
        file = place / name
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True)
        file.write_bytes(data)


def _peak_from_now() -> int:
    """Forget the process' peak, and return its resident memory, in bytes; 0 where the system cannot."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def _status(name: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        for line in f:
            if line.startswith(name):
                return int(line.split()[1]) << 10
    return 0


def run(
    target: Target,
    seeds: Sequence[int],
    place: Path,
    *,
    until: float | None = None,
    tally: Tally | None = None,
    told: Callable[[Tally], None] | None = None,
) -> Tally:
    """Run the seeds in children, in their order.

    until: seconds of the processor after which it ends; tally: of the seeds before these, to go on with; told: called
    whenever a child is done.
    """
    tally = tally or Tally()
    _warm(target, place)
    gc.collect()
    gc.freeze()  # what is here stays, and no child needs to copy it by looking at it
    done = 0
    while done < len(seeds) and (until is None or tally.seconds < until):
        left = None if until is None else until - tally.seconds
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = _batch(target, seeds[done : done + _BATCH], place, left)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        tally.seconds += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        for a in found:
            tally.add(a)
        done += len(found)
        if told is not None:
            told(tally)
        if not found:
            break
    return tally


def _warm(target: Target, place: Path) -> None:
    """Read what is sound, so that what is imported on first use is not imported in every child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, files in enumerate(target.sources):
            read_one(target, -1, Mutant("nothing", files, i, True, sorted(files)[0]), place)


def _batch(target: Target, seeds: Sequence[int], place: Path, until: float | None) -> list[Attempt]:
    """Run seeds in one child, and return what became of them, as far as it came: until one that has ended it."""
    current = mmap.mmap(-1, 8)  # the place in the list that the child is at
    current[:8] = struct.pack("q", -1)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(target, seeds, place, writing, current, until)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = [Attempt(**json.loads(line)) for line in pipe if line.endswith("\n")]
    _, status = os.waitpid(pid, 0)
    if status == 0:
        return found
    at = struct.unpack("q", current[:8])[0]
    if at < 0:
        raise RuntimeError("the child has not come to its first file")
    kind = target.mutant(seeds[at]).kind
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"
    hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGVTALRM
    fault = f"it {'hung' if hung else 'ended the process'}: {how}"
    return [*found[:at], Attempt(seeds[at], kind, "fault", 0.0, 0, fault)]


def _child(
    target: Target, seeds: Sequence[int], place: Path, pipe: int, current: mmap.mmap, until: float | None
) -> None:
    try:
        _bounded()
        with warnings.catch_warnings(), os.fdopen(pipe, "w") as out:
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*is of schema 1")
            for i, seed in enumerate(seeds):
                if i and until is not None and time.process_time() > until:
                    break
                current[:8] = struct.pack("q", i)
                signal.setitimer(signal.ITIMER_VIRTUAL, HANGS)
                out.write(json.dumps(vars(attempt(target, seed, place))) + "\n")
                out.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _bounded() -> None:
    """Give freed memory back at once, so that the next file's is seen, and let nothing ask for gigabytes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD, which otherwise grows
    room, (_, most) = _status("VmSize:") + _ROOM, resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (room if most == resource.RLIM_INFINITY else min(room, most), most))
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
