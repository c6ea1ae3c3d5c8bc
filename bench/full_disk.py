"""A disk that fills at many byte counts: every command that writes, on small disks of its own (tmpfs).

Each trial is a disk of a number of pages with a file of somebody else's on it, and for commands that may replace their
own file an earlier one. The command runs there. Either it fits and has written what it writes on a large disk, byte for
byte apart from times; or it ends with code 2 and one message that says that the disk is full, nothing has its final
name that is not whole, what was there is unchanged, and no hidden file is left. Then the disk is made larger and the
same command must end as on a large one.

Sizes go from no page at all to the most that the command has in use on a large disk, which is found first. Disks are
mounted in a namespace of their own and end with the process; commands are forked from one that has imported what they
import. `--arms` names commands, between |; --rounds is the most sizes of one command, --quick three.
"""

import ctypes
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PAGE, LARGE = 4096, 256 << 20
THEIRS, TEXT = "theirs.txt", "precious\n"
# What may differ between two equal runs, and nothing else: times, speeds, memory, and how far the last call had to go.
TIMES = {
    "created", "seconds", "step_seconds", "attach_seconds", "measured_step_seconds", "predicted_seconds", "stages",
    "tokens_per_second", "speeds", "peak_memory_above_model", "peak_bytes", "memory", "resumed_from", "tokens",
}  # fmt: skip
Arguments = Callable[[Path, Path], list]  # (inputs, out) → what stands behind `addenda`


def _on(inputs: Path) -> list:
    return ["--model", inputs / "model", "--data", inputs / "data", "--dtype", "float32"]


def _export(door: str, *more) -> Arguments:
    return lambda i, out: ["export", i / "a.safetensors", "--to", door, "--model", i / "model", "--out", out, *more]


# By name: what is written, and the command. "file": its earlier one may be replaced; "new": a file where nothing is;
# "folder": a folder where nothing is; "work": one that keeps what is done when the disk is full.
COMMANDS: dict[str, tuple[str, Arguments]] = {
    "tune": ("work", lambda i, out: ["tune", *_on(i), "--out", out, "--steps", 12, "--batch", 4]),
    "tune adalora": ("work", lambda i, out: ["tune", *_on(i), "--out", out, "--steps", 6, "--batch", 4, "--method",
                                             "adalora"]),
    "compare": ("work", lambda i, out: ["compare", *_on(i), "--out", out, "--methods", "lora:rank=2", "--rates", 1,
                                        "--seeds", 1, "--budget", "steps=2", "--batch", 4, "--yes"]),
    "compress": ("work", lambda i, out: ["compress", "--model", i / "model", "--how", "svd", "--length", 64,
                                         "--samples", 8, "--out", out]),
    "compress dense": ("folder", lambda i, out: ["compress", "--how", "dense", "--model", i / "low", "--out", out]),
    "compress 1bit": ("file", lambda i, out: ["compress", i / "a.safetensors", "--how", "1bit", "--out", out]),
    "export peft": ("folder", _export("peft")),
    "export vllm": ("folder", _export("vllm")),
    "export merged": ("folder", _export("merged")),
    "export kohya": ("new", _export("kohya")),
    "export gguf": ("new", _export("gguf")),
    "import": ("new", lambda i, out: ["import", i / "peft", "--model", i / "model", "--dtype", "float32", "--out",
                                      out]),
    "merge": ("folder", lambda i, out: ["merge", "-a", i / "a.safetensors", "--model", i / "model", "--out", out]),
    "merge no check": ("folder", lambda i, out: ["merge", "-a", i / "a.safetensors", "--model", i / "shards",
                                                 "--no-check", "--dtype", "bfloat16", "--allow-loss", 1, "--out",
                                                 out]),
    "extract": ("new", lambda i, out: ["extract", "--base", i / "model", "--tuned", i / "tuned", "--rank", 2, "--out",
                                       out]),
    "extract patch": ("new", lambda i, out: ["extract", "--base", i / "model", "--tuned", i / "tuned", "--to", "patch",
                                             "--out", out]),
    "reduce": ("new", lambda i, out: ["reduce", i / "a.safetensors", "--to", "lora", "--rank", 1, "--model",
                                      i / "model", "--dtype", "float32", "--out", out]),
    "combine": ("file", lambda i, out: ["combine", i / "a.safetensors", i / "b.safetensors", "--model", i / "model",
                                        "--dtype", "float32", "--out", out]),
    "items": ("file", lambda i, out: ["eval", *_on(i), "--split", "train", "--items", out]),
    "page": ("file", lambda _, out: ["methods", "--page", out]),
    "doors": ("file", lambda _, out: ["methods", "--doors", out]),
}  # fmt: skip
SUFFIX = {"export gguf": ".gguf", "page": ".md", "doors": ".md"}


def run(given) -> tuple[dict, str]:
    names = given.arms.split("|") if given.arms else list(COMMANDS)
    folder = Path(tempfile.mkdtemp(prefix="full-disk-"))
    found: dict[str, Any] = dict(given.earlier)
    try:
        if (reason := forked(can_mount, folder)) is not None:
            raise SystemExit(f"No disk can be mounted here ({reason}), so that nothing was measured.")
        warm()
        if problem := forked(prepare, folder / "in"):
            raise SystemExit(problem)
        for name in names:
            found[name] = measured(folder, name, 3 if given.quick else given.rounds)
            print(name, found[name], file=sys.stderr, flush=True)
        return found, table(found)
    finally:
        shutil.rmtree(folder)


def table(found: dict) -> str:
    lines = ["| command | fits in bytes | sizes tried | stopped | went on | faults |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, row in found.items():
        counts = f"{row['sizes']} | {row['stopped']} | {row['went_on']} | {len(row['faults'])}"
        lines.append(f"| {name} | {row['bytes']:,} | {counts} |")
    sums = [sum(row[k] for row in found.values()) for k in ("sizes", "stopped", "went_on")]
    lines.append(f"| all | | {' | '.join(map(str, sums))} | {sum(len(r['faults']) for r in found.values())} |")
    return "\n".join(lines)


def measured(folder: Path, name: str, most: int) -> dict:
    """Return how many bytes a command needs, and how trials on smaller disks ended."""
    started = time.perf_counter()
    reference = forked(trial, folder, name, None, None)
    faults: list = [*reference["faults"]]
    sizes = sorted({round(reference["peak"] * k / most) for k in range(most)})
    ended = [(pages, forked(trial, folder, name, pages, reference["files"])) for pages in sizes]
    for pages, row in ended:
        faults += [f"{pages} pages: {fault}" for fault in row["faults"]]
    return {
        "bytes": reference["peak"] * PAGE,
        "sizes": len(sizes),
        "stopped": sum(row["stopped"] for _, row in ended),
        "went_on": sum(row["went_on"] for _, row in ended),
        "faults": faults,
        "seconds": round(time.perf_counter() - started, 1),
    }


def trial(
    folder: Path, name: str, room: int | None, reference: dict | None, inputs: str = "in", *, real: bool = True
) -> dict:
    """Run a command where the disk is too small, and again where it is large; return what was wrong.

    room: free pages of the disk; without a real disk bytes that a file may have.
    """
    kind, arguments = COMMANDS[name]
    disk, out = (mounted if real else emptied)(folder), folder / "disk" / f"out{suffix_of(name)}"
    (disk / THEIRS).write_text(TEXT)
    if kind == "file" and room is not None and room % 2:  # an earlier one, of the command's own
        shutil.copyfile(folder / "in" / f"earlier {name}", out)
    before, given = state(disk), arguments(folder / inputs, out)
    own = used(disk)
    if room is not None and real:
        resize(disk, own + room)
    code, told, peak = command(given, folder / "told", watched=disk, most=None if real else room)
    after, faults = state(disk), []
    stopped = code != 0
    if stopped:
        faults += refused(code, told) + kept(before, after, kind, out.name)
        if real:
            resize(disk, LARGE // PAGE)
        code, told, _ = command(given, folder / "told")
        after = state(disk)
        if code != 0:
            faults.append(f"the same command ended with {code} on a larger disk: {told[-600:]}")
    files = {n: normal(n, data) for n, data in after.items() if n != THEIRS}
    if reference is not None and code == 0:
        faults += [f"{n} is another than on a large disk: {differing(files.get(n), reference.get(n))}"
                   for n in sorted({*files, *reference}) if files.get(n) != reference.get(n)]  # fmt: skip
    if after.get(THEIRS) != TEXT.encode():
        faults.append(f"{THEIRS} is not what it was")
    most = max((len(data) for n, data in after.items() if n != THEIRS), default=0)
    went_on = stopped and code == 0
    return {"stopped": stopped, "went_on": went_on, "faults": faults, "files": files, "peak": peak - own, "most": most}


def refused(code: int, told: str, says: str = r"disk is (too )?full|No space left") -> list[str]:
    """Return what is wrong with how a command was refused: its code, and its one message."""
    faults = [] if code == 2 else [f"ended with {code}: {told[-900:]}"]
    lines = [line for line in told.splitlines() if line.startswith("addenda: ")]
    if "Traceback" in told:
        faults.append(f"a traceback: {told[-900:]}")
    elif len(lines) != 1 or not re.search(says, lines[0]):
        faults.append(f"its message: {told[-600:]}")
    return faults


def kept(before: dict, after: dict, kind: str, out: str) -> list[str]:
    """Return what a command that ended on a full disk has lost, changed or left behind."""
    faults = [f"{n} is gone or changed" for n, data in before.items() if after.get(n) != data]
    new = {n: data for n, data in after.items() if n not in before}
    if kind == "work":
        faults += [f"{n} is left" for n in new if not n.startswith((f"{out}/", f"{out}.unfinished/"))]
        faults += [f"{n} is not whole" for n, data in new.items() if not _is_whole(n, data)]
    else:
        faults += [f"{n} is left" for n in new]
    faults += [f"{n} is left" for n in new if any(part.startswith(".") for part in n.split("/")) and kind == "work"]
    return faults


def normal(name: str, data: bytes) -> str:
    """Return a file's content as it must be in every run, times taken out."""
    if name.endswith(".json") and _is_json(data):
        value = _without_times(json.loads(data))
        if isinstance(value, dict):
            value.pop("sha256", None)  # of the file itself, times and all
            value.get("files", {}).pop("README.md", None)
        return json.dumps(value, sort_keys=True)
    if name.endswith("README.md"):  # says in sentences how long it took; a call that found all done measures no speed
        lines = [line for line in data.decode().splitlines() if not re.search("speed|memory|tokens/s", line)]
        return re.sub(r"-?\d[\d.,e+-]*", "#", "\n".join(lines))
    if name.endswith(".html"):  # draws how long it took
        return "whole" if data.rstrip().endswith(b"</html>") else "cut"
    return f"{len(data)} bytes, {hashlib.sha256(data).hexdigest()}"


def differing(one: str | None, other: str | None) -> str:
    """Return in which entries two files of JSON differ, or what two others are."""
    if one is None or other is None or not one.startswith("{") or not other.startswith("{"):
        return f"{one} and {other}"
    a, b = json.loads(one), json.loads(other)
    return ", ".join(f"{k}: {a.get(k)!r:.80} and {b.get(k)!r:.80}" for k in sorted({*a, *b}) if a.get(k) != b.get(k))


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def _is_whole(name: str, data: bytes) -> bool:
    if not name.endswith(".safetensors"):
        return _is_json(data) if name.endswith(".json") else bool(data) or name.endswith("/")
    import safetensors

    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def suffix_of(name: str) -> str:
    """Return how the name of what a command writes ends; empty for a folder."""
    kind, _ = COMMANDS[name]
    return SUFFIX.get(name, "" if kind in ("work", "folder") else ".safetensors")


def state(disk: Path) -> dict[str, bytes]:
    """Return the files below a folder, hidden ones too; empty folders with a slash."""
    found = {}
    for path in sorted(disk.rglob("*")):
        name = str(path.relative_to(disk))
        if path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found


# -- processes and disks -----------------------------------------------------------------------------------------------


def warm() -> None:
    """Import what commands import, so that the processes forked from this one need not."""
    import gc

    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import gguf  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch
    import transformers.trainer
    from transformers.models.llama import modeling_llama, tokenization_llama  # noqa: F401

    import addenda.cli.main
    import addenda.combining.combine
    import addenda.comparing.run
    import addenda.compressing.run
    import addenda.exporting.export
    import addenda.exporting.extract
    import addenda.exporting.merged
    import addenda.train.trainer
    import addenda.train.tune  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    gc.collect()
    gc.freeze()


def forked(function: Callable, *arguments, **options) -> Any:
    """Call a function in a forked process and return what it returns."""
    read, write = os.pipe()
    if (child := fork()) == 0:
        try:
            os.close(read)
            try:
                result = {"result": function(*arguments, **options)}
            except BaseException:
                result = {"error": traceback.format_exc()}
            with os.fdopen(write, "w") as f:
                json.dump(result, f)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    os.waitpid(child, 0)
    if "error" in (answer := json.loads(text)):
        raise RuntimeError(answer["error"])
    return answer["result"]


def fork() -> int:
    """Fork this process; return 0 in the new one, and its number in the old one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of newer Pythons, where a library has started a thread
        child = os.fork()
    if child == 0 and (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)  # torch's pool of threads is made anew now, while one thread asks for it: several race
    return child


def cli(arguments: list, told: Path, most: int | None = None) -> int:
    """Start a command in a forked process, which writes both its streams to a file; return the process's number.

    most: bytes that any other file of it may have.
    """
    if child := fork():
        return child
    code, handle = 1, os.open(told, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    read, write = (handle, handle) if most is None else os.pipe()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        from addenda.cli.main import run as command_line

        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            command_line([str(a) for a in arguments])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            for end in (1, 2, write):
                os.close(end)
            os.write(handle, os.read(read, 1 << 16))
        os._exit(code)


def told_of(told: Path) -> str:
    """Return what a command has written, without the bars of other libraries."""
    return "\n".join(line.split("\r")[-1] for line in told.read_text(errors="replace").split("\n"))


def command(
    arguments: list, told: Path, *, watched: Path | None = None, most: int | None = None
) -> tuple[int, str, int]:
    """Run a command in a forked process; return its exit code, what it wrote on both streams, most pages in use."""
    child = cli(arguments, told, most)
    peak, (done, status) = 0, (0, 0) if watched else os.waitpid(child, 0)
    while watched and not done:
        peak = max(peak, used(watched))
        time.sleep(0.0005)
        done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status), told_of(told), peak


def used(disk: Path) -> int:
    """Return how many pages of a disk are in use."""
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // PAGE


_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def emptied(folder: Path) -> Path:
    """Return an empty folder in the place of a disk."""
    shutil.rmtree(folder / "disk", ignore_errors=True)
    (folder / "disk").mkdir()
    return folder / "disk"


def mounted(folder: Path) -> Path:
    """Mount an empty disk at `folder`/disk that this process and its children see, and return its path."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWNS if user == 0 else _CLONE_NEWNS | _CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "no namespace of its own")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount(b"none", Path("/"), None, _MS_REC | _MS_PRIVATE)
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    _mount(b"none", disk, b"tmpfs", 0, f"size={LARGE}")
    return disk


def resize(disk: Path, pages: int) -> None:
    """Let a disk in memory hold so many pages, at least one."""
    _mount(b"none", disk, b"tmpfs", _MS_REMOUNT, f"size={max(pages, 1) * PAGE}")


def read_only(disk: Path) -> None:
    """Let nothing be written to a disk in memory any more."""
    _mount(b"none", disk, b"tmpfs", _MS_REMOUNT | _MS_RDONLY)


def _mount(source: bytes, target: Path, kind: bytes | None, flags: int, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data.encode() or None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def can_mount(folder: Path) -> str | None:
    """Return why no disk can be mounted here; None where one can."""
    try:
        mounted(folder)
    except (OSError, AttributeError) as error:
        return str(error)
    return None


def prepare(inputs: Path, first: int = 0, names: Iterable[str] = tuple(COMMANDS)) -> str | None:
    """Write a tiny model, data, adapters and whatever else the commands read; return what went wrong, or None.

    first: of the seeds, and of the sums in the data; the model is always the same one. names: of commands; what only
    others read is not made.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import torch

    import addenda as ad
    from tiny_models import make_llama, make_tokenizer

    inputs.mkdir(parents=True)
    (inputs / "data").mkdir()
    rows = [f'{{"question": "{a}+{b}=?", "answer": "{a + b}"}}\n' for a in range(first, first + 5) for b in range(5)]
    (inputs / "data" / "train.jsonl").write_text("".join(rows))
    model = make_llama()
    for name, size in (("model", "5GB"), ("shards", "40KB")):
        model.save_pretrained(inputs / name, max_shard_size=size)
        make_tokenizer().save_pretrained(inputs / name)
    for name, seed in (("a", first), ("b", first + 1)):
        live = make_llama()
        torch.manual_seed(seed)
        adapter = ad.attach(live, "lora:rank=2", targets="attention", name=name)
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(torch.randn_like(p) * 0.1)
        adapter.save(inputs / f"{name}.safetensors")
    read = {"export peft": ("peft", ["import"]), "export merged": ("tuned", ["extract", "extract patch"]),
            "compress": ("low", ["compress dense"])}  # fmt: skip
    made = {name: inputs / out for name, (out, readers) in read.items() if {*readers} & {*names}}
    made |= {n: inputs / f"earlier {n}" for n, (kind, _) in COMMANDS.items() if kind == "file" and n in names}
    for name, out in made.items():
        place = out.with_suffix(suffix_of(name)) if out.name.startswith("earlier") else out
        code, told, _ = command(COMMANDS[name][1](inputs, place), inputs / "told")
        if code:
            return f"{name}: {told}"
        if place != out:
            place.rename(out)
    return None
