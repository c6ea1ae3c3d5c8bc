"""Running a program that a model has written: a process of its own, with limits, that leaves nothing behind.

    parent   a fresh folder, a process group, a limit of time; afterwards the whole group is killed
    child    this file as a script: limits of processor time, memory, file sizes, files and processes; a network
             namespace without a network where the system gives one; then a hook on Python's own audit events refuses
             processes, sockets, signals, native libraries, and writing outside of the folder

It stops programs that err: endless loops, memory, forks, a stray `rmtree`. It is no jail for programs that attack;
whoever expects these runs all of it in a container or a virtual machine. Reading files is not refused. Only the
standard library is imported here.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_REFUSED = (
    "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "subprocess.", "pty.", "socket.",
    "ctypes.", "sqlite3.", "signal.pthread_kill", "_posixsubprocess.", "resource.", "os.chown", "os.chmod",
    "os.setxattr",
)  # fmt: skip
_PATHS = {
    "os.remove": (0,), "os.rmdir": (0,), "os.rename": (0, 1), "os.link": (0, 1), "os.symlink": (1,), "os.mkdir": (0,),
    "os.truncate": (0,), "os.utime": (0,), "shutil.rmtree": (0,), "shutil.move": (0, 1), "shutil.copyfile": (1,),
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    seconds: of processor time; clock: seconds by the clock; memory: bytes of address space; file: bytes written.
    """

    seconds: int = 10
    clock: float = 60.0  # much more, so that a busy machine fails nobody
    memory: int = 1 << 30
    file: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended. passed: it ran to its end. why: "passed", "timed out", or the last line it left."""

    passed: bool
    why: str


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Execute a Python program. It has passed when it came to its end without an exception, and in no other way.

    Raises AddendaError where the system has no limits for processes (Windows).
    """
    from addenda.core.base.errors import AddendaError

    limits = limits or Limits()
    if os.name != "posix":
        raise AddendaError("Running a model's code wants the process limits of a Unix; this system has none.")
    token = secrets.token_hex(16)  # what only a program that came to its end can have caused to be written
    with tempfile.TemporaryDirectory(prefix="addenda-sandbox-", ignore_cleanup_errors=True) as folder:
        out, err = Path(folder, ".out"), Path(folder, ".err")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-I", __file__], cwd=folder, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}, start_new_session=True,
            )  # fmt: skip
            timeout = False
            try:
                request = {"program": program, "token": token, "limits": asdict(limits)}
                process.communicate(json.dumps(request).encode(), timeout=limits.clock)
            except subprocess.TimeoutExpired:
                timeout = True
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not timeout and process.returncode == 0 and _end(out) == token:
            return Outcome(True, "passed")
        if timeout or process.returncode == -signal.SIGXCPU:
            return Outcome(False, "timed out")
        return Outcome(False, _end(err) or f"ended with {process.returncode} before its end")


def _end(file: Path) -> str:
    """Return the last line of a file."""
    with file.open("rb") as f:
        f.seek(max(file.stat().st_size - 1000, 0))
        lines = f.read().decode(errors="replace").strip().splitlines()
    return lines[-1][-200:] if lines else ""


# ---- in the child ----------------------------------------------------------------------------------------------------


def _confine(limits: dict[str, Any]) -> None:
    import resource

    seconds = limits["seconds"]
    resources = {
        "CPU": (seconds, seconds + 1), "AS": (limits["memory"],) * 2, "FSIZE": (limits["file"],) * 2,
        "NOFILE": (64, 64), "CORE": (0, 0), "NPROC": (0, 0),
    }  # fmt: skip
    _without_network()
    for name, pair in resources.items():
        with contextlib.suppress(ValueError, OSError):  # a system may know a limit and not keep it
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), pair)
    home = os.path.realpath(os.getcwd())

    def outside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        where = os.path.realpath(os.fsdecode(path))
        return where != os.devnull and not where.startswith(home + os.sep)

    def hook(event: str, given: tuple) -> None:
        if event == "open":
            path, mode, flags = given
            writes = any(c in (mode or "") for c in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            refused = bool(writes) and path is not None and outside(path)
        elif event in _PATHS:
            refused = any(outside(given[i]) for i in _PATHS[event])
        else:
            refused = event.startswith(_REFUSED)
        if refused:
            raise PermissionError(f"not allowed here: {event}")

    sys.addaudithook(hook)


def _without_network() -> None:
    """Enter a network namespace of its own, which has no device, where that is permitted."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        unshare, network, user = ctypes.CDLL(None).unshare, 0x40000000, 0x10000000
        if unshare(network) and os.getuid():
            unshare(network | user)


def _child() -> None:
    request = json.load(sys.stdin)
    report = os.dup(1)  # where the end is told; what the program prints goes nowhere
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    compiled = compile(request.pop("program"), "<program>", "exec", dont_inherit=True)
    token = request.pop("token")
    _confine(request["limits"])
    exec(compiled, {"__name__": "__main__"})
    os.write(report, token.encode())
    os._exit(0)


if __name__ == "__main__":
    _child()
