"""Running one idea in a forked child: what it was refused with, what that took, and what it has touched."""

import ctypes
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType

from attacks.readers import READERS, model
from marks import differences, snapshot

HERE = Path(__file__).parent
SECONDS, MEMORY = 1.0, 64 << 20  # what an idea may take
_LONGEST = 10  # seconds until a child is given up
_ROOM = 4 << 30  # bytes of addresses: what would take the machine with it fails
_FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.", "os.exec", "os.posix_spawn", "socket.", "ctypes.dlopen")
_WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")


@dataclass
class Outcome:
    """What became of one idea. words: of the refusal; wrong: all that should not have been."""

    idea: str
    reader: str
    what: str
    seconds: float = 0.0
    memory: int = 0  # bytes at the peak, above what the process had
    words: str = ""
    wrong: list[str] = field(default_factory=list)


def ideas() -> dict[str, Path]:
    """All ideas by name, and the files that a search has found: failures/READER/NAME."""
    found = {file.stem: file for file in sorted((HERE / "ideas").glob("*.py"))}
    kept = sorted(p for p in (HERE / "failures").glob("*/*") if not p.name.startswith("."))
    return found | {f"{p.parent.name}/{p.name}": p for p in kept}


def attack(name: str, file: Path) -> Outcome:
    """Make what an idea makes and have it read, in a child and in a folder of its own."""
    with tempfile.TemporaryDirectory() as place:
        answer = _in_child(lambda: asdict(_attacked(name, file, Path(place))))
    return Outcome(**answer) if answer else Outcome(name, "", "", SECONDS, MEMORY, "", ["the process died"])


def _attacked(name: str, file: Path, folder: Path) -> Outcome:
    if file.suffix == ".py":
        idea = _imported(file)
        outcome = Outcome(name, idea.READER, (idea.__doc__ or "").strip())
        made, harmless = idea.make(READERS[idea.READER].sound(folder), folder), getattr(idea, "READ", False)
    else:
        outcome, harmless = Outcome(name, file.parent.name, "A search has found it."), False
        made = Path(shutil.copytree(file, folder / "x") if file.is_dir() else shutil.copy(file, folder))
    for path in [made] if isinstance(made, Path) else made:  # one after the other: each may replace the last
        signal.alarm(_LONGEST)
        found = _read(outcome.reader, path)
        signal.alarm(0)
        if not (found["words"] or harmless):
            found["wrong"].append(f"{path.name}: it was read")
        outcome.seconds = max(outcome.seconds, found["seconds"])
        outcome.memory = max(outcome.memory, found["memory"])
        outcome.words = outcome.words or found["words"].replace(str(folder), "…")
        outcome.wrong += found["wrong"]
    return outcome


def _imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"attacks.ideas.{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def warm() -> None:
    """Read a sound one of every kind, so that a child imports nothing: its memory and time are those of the file."""
    with tempfile.TemporaryDirectory() as place:
        for name, reader in READERS.items():
            folder = Path(place) / name
            folder.mkdir()
            found = _read(name, reader.sound(folder))
            assert not found["wrong"] or name in ("gguf", "compressed"), (name, found)  # there a sound one wants more


def _in_child(work: Callable[[], dict]) -> dict | None:
    """Run it in a fork of this process, and return what it returns; None where that has died."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: the child uses none of them
        child = os.fork()
    if not child:
        try:
            os.close(read)
            os.write(write, json.dumps(work()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


EVENTS: list[str] = []
_hooked: list[bool] = []


def _watch(event: str, arguments: tuple) -> None:
    if not _hooked:
        return
    if event.startswith(_FORBIDDEN) or event in _WRITES:
        EVENTS.append(f"{event} {str(arguments)[:80]}")
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        EVENTS.append(f"{event} {arguments[0]!r} {arguments[1]}")


sys.addaudithook(_watch)


def _read(reader: str, path: Path) -> dict:
    """Read it, and say what that took and what was wrong."""
    on = model()
    before, files = snapshot(on), _listing(path)
    words, wrong = "", []
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, limits[1]))
    EVENTS.clear()
    ctypes.CDLL(None).malloc_trim(0)  # what was used to make the file is not there to be used again
    Path("/proc/self/clear_refs").write_text("5")
    at_start, started = _peak(), time.perf_counter()
    _hooked.append(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[reader].read(path, on)
    except Exception as error:
        from addenda.core.base.errors import AddendaError

        words = str(error)
        if not isinstance(error, AddendaError):
            wrong.append(f"{path.name}: {type(error).__name__}: {words[:200]} {_place(error)}")
        if any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E for c in words):
            wrong.append(f"{path.name}: a message that moves a terminal: {words[:200]!r}")
        if len(words) > 6000:
            wrong.append(f"{path.name}: a message of {len(words):,} characters")
    finally:
        _hooked.clear()
        seconds, memory = time.perf_counter() - started, _peak() - at_start
        resource.setrlimit(resource.RLIMIT_AS, limits)
    wrong += [f"{path.name}: {event}" for event in EVENTS]
    if words:
        wrong += [f"{path.name}: {d[:200]}" for d in differences(before, snapshot(on))]
    wrong += [] if _listing(path) == files else [f"{path.name}: files were changed"]
    return {"seconds": seconds, "memory": memory, "words": words[:300], "wrong": wrong}


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _listing(path: Path) -> list[tuple]:
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in _all(path.parent))


def _all(folder: Path) -> Iterator[Path]:
    return folder.rglob("*")


def _peak() -> int:
    """Bytes of memory at the peak since it was last reset."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) << 10
