"""A process killed at any of its file operations, whatever library makes them: the kernel stops it at every one.

A seccomp filter hands each system call that changes a file or folder to the parent (Python's own, and those of torch's
and safetensors' native writers alike); the parent lets it pass, kills the process just before it, or writes half of
what was to be written and kills it then. Just before one is just after the one before: nothing between changes a file.
Linux on x86-64 only; no privilege is needed.
"""

import ctypes
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

CALLS = {
    1: "write", 2: "open", 18: "pwrite64", 20: "writev", 40: "sendfile", 74: "fsync", 75: "fdatasync", 76: "truncate",
    77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link", 87: "unlink", 88: "symlink",
    90: "chmod", 91: "fchmod", 257: "openat", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 265: "linkat",
    266: "symlinkat", 268: "fchmodat", 280: "utimensat", 285: "fallocate", 296: "pwritev", 316: "renameat2",
    326: "copy_file_range", 328: "pwritev2", 437: "openat2",
}  # fmt: skip
FOLDERS = {"openat": (1,), "mkdirat": (1,), "unlinkat": (1,), "renameat": (1, 3), "renameat2": (1, 3),
           "linkat": (1, 3), "symlinkat": (2,), "fchmodat": (1,), "utimensat": (1,), "openat2": (1,)}  # fmt: skip
PATHS = {"rename": (0, 1), "link": (0, 1), "symlink": (1,)}
ON_HANDLE = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "fsync", "fdatasync", "ftruncate", "fchmod",
             "fallocate")  # fmt: skip
WRITES = ("write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range")  # what can be done by half
_SECCOMP, _PIDFD_GETFD = 317, 438
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTICE, _ANSWER = "=QII iIQ 6Q", "=QqiI"
_CONTINUE = 1


def supported() -> bool:
    """Whether the kernel can do this for us."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


@dataclass(frozen=True)
class Operation:
    """One system call that changes a file. size: bytes to be written, where it writes."""

    name: str
    path: str
    size: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.path}" + (f" ({self.size:,} bytes)" if self.size else "")


@dataclass
class Watched:
    """What a process did. code: its exit code, negative for a signal; killed: whether it was killed here."""

    operations: list[Operation] = field(default_factory=list)
    code: int = 0
    killed: bool = False


def watch(work: Callable[[], None], folder: Path, *, stop: int | None = None, half: bool = False) -> Watched:
    """Do some work in a forked process and list the operations on what is below a folder.

    stop: kill it at the operation of this number (from 0), just before, or with `half` of its bytes written.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        code = 99
        try:
            listener = _install()
            socket.send_fds(theirs, [b"x"], [listener])
            os.close(listener)
            theirs.close()
            work()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    theirs.close()
    seen = Watched()
    _, handles, *_ = socket.recv_fds(ours, 1, 1)
    ours.close()
    if handles:
        try:
            _listen(handles[0], pid, os.path.realpath(folder), seen, stop, half)
        finally:
            os.close(handles[0])
    seen.code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return seen


def _install() -> int:
    """Put the filter over this process; return the handle on which its calls are told."""
    instructions = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # load the call's number
    for place, number in enumerate(CALLS):
        instructions.append(struct.pack("HBBI", 0x15, len(CALLS) - place, 0, number))  # equal: to the last instruction
    instructions.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))  # allow
    instructions.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FC00000))  # tell
    code = ctypes.create_string_buffer(b"".join(instructions))
    program = struct.pack("HxxxxxxQ", len(instructions), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no new privileges")
    listener = libc.syscall(_SECCOMP, 1, 8, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return listener


def _listen(listener: int, pid: int, folder: str, seen: Watched, stop: int | None, half: bool) -> None:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        if not any(event & select.POLLIN for _, event in poll.poll()):
            return  # nobody is left who could call
        notice = bytearray(struct.calcsize(_NOTICE))
        try:
            fcntl.ioctl(listener, _RECEIVE, notice)
        except OSError:
            continue  # whoever called has been killed
        identity, thread, _, number, _, _, *arguments = struct.unpack(_NOTICE, notice)
        operation = _operation(thread, CALLS[number], arguments, folder)
        if operation is not None:
            if stop == len(seen.operations):
                if half and operation.name in WRITES:
                    _half(pid, thread, operation, arguments)
                os.kill(pid, signal.SIGKILL)
                seen.killed = True
                seen.operations.append(operation)
                return
            seen.operations.append(operation)
        with suppress(OSError):
            fcntl.ioctl(listener, _SEND, struct.pack(_ANSWER, identity, 0, 0, _CONTINUE))


def _operation(thread: int, name: str, arguments: list[int], folder: str) -> Operation | None:
    """What a call is, where it changes something below the folder."""
    size = 0
    if name in ("sendfile", "copy_file_range"):
        paths = [_link(thread, arguments[0 if name == "sendfile" else 2])]
        size = arguments[3 if name == "sendfile" else 4]
    elif name in ON_HANDLE:
        paths = [_link(thread, arguments[0])]
        if name in ("write", "pwrite64"):
            size = arguments[2]
        elif name in WRITES:
            size = sum(length for _, length in _pieces(thread, arguments))
    elif name in FOLDERS:
        paths = [_path(thread, arguments[i], arguments[i - 1]) for i in FOLDERS[name]]
    else:
        paths = [_path(thread, arguments[i]) for i in PATHS.get(name, (0,))]
    if name in ("open", "openat") and not arguments[1 if name == "open" else 2] & (
        os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    ):
        return None
    own = [p.removeprefix(folder).lstrip("/") for p in paths if p == folder or p.startswith(folder + "/")]
    return Operation(name, " -> ".join(own), size) if own else None


def _link(thread: int, handle: int) -> str:
    try:
        return os.readlink(f"/proc/{thread}/fd/{handle & 0xFFFFFFFF}")
    except OSError:
        return ""


def _path(thread: int, address: int, folder: int | None = None) -> str:
    text = os.fsdecode(_memory(thread, address, 4096, text=True))
    if not text.startswith("/"):
        here = folder is None or (folder & 0xFFFFFFFF) == 0xFFFFFF9C  # AT_FDCWD
        try:
            above = os.readlink(f"/proc/{thread}/cwd") if here else _link(thread, folder or 0)
        except OSError:
            above = ""
        text = os.path.normpath(os.path.join(above, text))
    return os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))


def _memory(thread: int, address: int, size: int, text: bool = False) -> bytes:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        if not text:
            return memory.read(size)
        found = b""
        while b"\0" not in found and len(found) < size:  # a page at a time: the next may not be there
            found += memory.read(min(size, 4096 - (address + len(found)) % 4096))
        return found.partition(b"\0")[0]


def _pieces(thread: int, arguments: list[int]) -> list[tuple[int, int]]:
    count = arguments[2]
    numbers = struct.unpack(f"={2 * count}Q", _memory(thread, arguments[1], 16 * count))
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _half(pid: int, thread: int, operation: Operation, arguments: list[int]) -> None:
    """Do the first half of a write in the place of the process, through its own handle."""
    name = operation.name
    if name in ("sendfile", "copy_file_range"):
        source, target = (arguments[1], arguments[0]) if name == "sendfile" else (arguments[0], arguments[2])
        given, taken = _borrowed(pid, source), _borrowed(pid, target)
        at = arguments[2 if name == "sendfile" else 1]
        begin = struct.unpack("=q", _memory(thread, at, 8))[0] if at else os.lseek(given, 0, os.SEEK_CUR)
        left = max(os.fstat(given).st_size - begin, 0)
        os.write(taken, os.pread(given, min(operation.size, left) // 2, begin))
        os.close(given)
        os.close(taken)
        return
    if name in ("writev", "pwritev"):
        data = b"".join(_memory(thread, at, length) for at, length in _pieces(thread, arguments))
    else:
        data = _memory(thread, arguments[1], arguments[2])
    handle = _borrowed(pid, arguments[0])
    try:
        part = data[: len(data) // 2]
        if name in ("pwrite64", "pwritev"):
            os.pwrite(handle, part, arguments[3])
        else:
            os.write(handle, part)
    finally:
        os.close(handle)


def _borrowed(pid: int, handle: int) -> int:
    holder = os.pidfd_open(pid)
    try:
        taken = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, holder, handle & 0xFFFFFFFF, 0)
    finally:
        os.close(holder)
    if taken < 0:
        raise OSError(ctypes.get_errno(), "a handle of the process")
    return taken
