"""Commands that are killed and given again: what they leave, beside what an undisturbed run leaves.

    place = Place(folder)                     the inputs of all commands, once
    case = place.prepared(CASES["tune lora"]) what it leaves undisturbed, and how long it takes
    case.at_operations(range(40))             killed at each of these file operations, then run again
    case.at_moments(seed)                     killed at random moments, up to ten times, then left alone

Commands run in processes forked from this one, which has everything imported. A Verdict says what was lost.
"""

import contextlib
import fnmatch
import gc
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from file_operations import watch
from tiny_models import SUMS, make_llama, make_tokenizer

QUOTA = {
    "tune lora": 100, "tune adalora": 100, "tune dylora": 100, "tune mosa": 100, "tune lora-pro": 100, "tune svft": 100,
    "compress lord": 100, "compress svd-llm": 100, "compare": 50, "compare long runs": 30, "export peft": 50,
    "merge": 50, "combine": 20, "transfer": 50,
}  # fmt: skip
MOST = 10  # kills of one command before it is left alone
TUNE = "--data ../base/sums.jsonl --model ../base/model --batch 4 --dtype float32 --out out"
COMPARE = (
    "--data ../base/sums.jsonl --model ../base/model --batch 4 --seeds 1 --items 8 --dtype float32 --yes --out out"
)
COMPRESS = (
    "--model ../base/model --calibration ../base/text.txt --samples 24 --length 48 --multiple 1 --dtype float32 "
    "--out out"
)
ONE, TWO = "../base/one.safetensors", "../base/two.safetensors"
CASES = {
    "tune lora": f"tune {TUNE} --method lora:rank=2 --steps 12 --eval 0.25 --eval-every 3 --early-stop 3",
    "tune adalora": f"tune {TUNE} --method adalora:rank=4,target_rank=2 --steps 12",
    "tune dylora": f"tune {TUNE} --method dylora:rank=4 --steps 12",
    "tune mosa": f"tune {TUNE} --method mosa:rank=8 --steps 12",
    "tune lora-pro": f"tune {TUNE} --method lora:rank=2 --optimizer lora-pro --steps 12",
    "tune svft": f"tune {TUNE} --method svft:pattern=banded,band=2 --steps 12",
    "compress lord": f"compress {COMPRESS} --how lord",
    "compress svd-llm": f"compress {COMPRESS} --how svd-llm --storage pivot",
    "compare": f"compare {COMPARE} --methods lora:rank=2,shira --budget steps=4 --rates 3",
    "compare long runs": f"compare {COMPARE} --methods dylora:rank=4 --budget steps=3 --rates 1",
    "export peft": f"export {ONE} --to peft --model ../base/model --out out",
    "merge": f"merge --adapter {ONE} --model ../base/model --out out",
    "combine": f"combine {ONE} {TWO} --model ../base/model --how ties --out out/both.safetensors",
    "transfer": (
        "transfer --bundle ../base/moves/sums.bundle --source ../base/moves/source --target ../base/moves/target "
        r"--format \d\+\d=\? --count 6 --tries 32 --sample-batch 8 --batch 3 --steps 6 --rate 0.01 --max-new-tokens 6 "
        "--dtype float32 --out out"
    ),
}

# What may be another after a kill, by file: places in its JSON, or lines. All else is compared byte for byte.
FIELDS: dict[str, tuple[str, ...]] = {
    "out/run.json": (
        "created", "seconds", "step_seconds", "tokens_per_second", "tokens", "peak_memory_above_model",
        "resumed_from", "files.README.md", "sha256",
    ),
    "out/config.json": (
        "created", "predicted_seconds", "measured_step_seconds", "model.attention_seconds",
    ),
    "out/trials/*.json": ("seconds", "attach_seconds", "step_seconds", "tokens_per_second", "peak_bytes"),
    "out/compress.json": ("seconds", "stages", "memory", "speeds"),
    "out/transfer.json": ("cost", "predicted", "notes", "counts.seconds"),
}  # fmt: skip
LINES: dict[str, tuple[str, ...]] = {
    "out/README.md": (
        r"\| speed \|.*", r"\| memory above the model \|.*", r"[\d,]+ tokens of .*; \d+ s \(.*",
        r"(prefill|decode): .* tokens/s .*", r"\d+ s: sampling .*", r"\d+% of the teacher's answers were kept .*",
        r"the run was interrupted: .*",
    ),
}  # fmt: skip


@dataclass
class Verdict:
    """How a command that was killed has ended. lost: files that are not there, or not as undisturbed, and where.

    left: files that an undisturbed run does not leave; temporary: what is in the system's folder for such. same:
    whether all was as an earlier kill had left it, so that what follows is known.
    """

    kills: int = 0
    code: int = 0
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    temporary: list[str] = field(default_factory=list)
    at: str = ""
    said: str = ""
    same: bool = False

    @property
    def fine(self) -> bool:
        return self.code == 0 and not self.lost and not self.left


class Place:
    """A folder with a tiny model, text, examples and two adapters, in which commands are run one after the other."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.work, self.base, self.temporary = (self.folder / name for name in ("work", "base", "tmp"))
        self.said, self.seconds = self.folder / "said.txt", 0.0
        if not self.base.exists():
            _write_inputs(self.base)

    def clear(self) -> None:
        for folder in (self.work, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def prepared(self, name: str) -> "Case":
        """Run a command undisturbed, twice: once for what is to be imported, once for the clock and the files."""
        case = Case(self, name, CASES[name].split())
        if name == "transfer" and not (self.base / "moves").exists():
            from lister import write_transfer

            (self.base / "moves").mkdir()
            write_transfer(self.base / "moves")
        for _ in range(2):
            self.clear()
            code = self.run(case.work)
            case.seconds = self.seconds
            if code:
                raise AssertionError(f"{name} does not run undisturbed: {code}\n{self.told()}")
            for module in json.loads((self.folder / "modules.json").read_text()):
                with contextlib.suppress(Exception):
                    importlib.import_module(module)
        case.wanted = self.files()
        gc.freeze()  # a command collects garbage before it measures memory
        return case

    def run(self, work: Callable[[], None], within: float | None = None) -> int | None:
        """Do some work in a forked process; return its exit code, None where it was killed.

        within: how many seconds of work it is left; of its processor, since others may use the machine.
        """
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                warnings.resetwarnings()  # of tests, where they are errors
                work()
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                os._exit(code)
        if within is None:
            _, status, used = os.wait4(pid, 0)
            self.seconds = used.ru_utime + used.ru_stime
            return os.waitstatus_to_exitcode(status)
        while _worked(pid) < within:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.01))  # a process that waits for the disk does not work
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return None if code == -signal.SIGKILL else code

    def told(self) -> str:
        return self.said.read_text(errors="replace")[-3000:]

    def files(self) -> dict[str, bytes]:
        return {
            p.relative_to(self.work).as_posix(): p.read_bytes() for p in sorted(self.work.rglob("*")) if p.is_file()
        }

    def folders(self) -> list[str]:
        return [f"{p.relative_to(self.work).as_posix()}/" for p in sorted(self.work.rglob("*")) if p.is_dir()]

    def state(self) -> str:
        """A hash of all names and bytes that are there, by which one state of the disk is known from another."""
        found = hashlib.sha256()
        for path in sorted(self.work.rglob("*")):
            name = re.sub(r"/\.tmp\w{6}$", "/.tmp", path.relative_to(self.work).as_posix())  # of safetensors
            found.update(repr((name, path.is_dir())).encode())
            if path.is_file():
                found.update(hashlib.sha256(path.read_bytes()).digest())
        return found.hexdigest()


@dataclass
class Case:
    """One command. seconds: of work, undisturbed; wanted: the files that it leaves then."""

    place: Place
    name: str
    arguments: list[str]
    seconds: float = 0.0
    wanted: dict[str, bytes] = field(default_factory=dict)
    known: dict[str, Verdict] = field(default_factory=dict)  # by what a kill has left

    def work(self) -> None:
        """Run the command in this process, which is a forked one."""
        known, place = set(sys.modules), self.place
        os.environ |= {
            "ADDENDA_CACHE": str(place.folder / "cache"),
            "TMPDIR": str(place.temporary),
            "TOKENIZERS_PARALLELISM": "false",
        }
        tempfile.tempdir = None  # looked up anew
        handle = os.open(place.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(place.work)
        sys.argv = ["addenda", *self.arguments]
        from addenda.cli.main import run

        if self.name == "compare long runs":  # so long that they keep checkpoints of their own
            import addenda.comparing.runner as comparing

            vars(comparing)["CHECKPOINT_SECONDS"] = 0.0
        try:
            run()
        finally:
            new = [name for name in sys.modules if name not in known]
            (place.folder / "modules.json").write_text(json.dumps(new))

    def operations(self) -> list[str]:
        """What the command does to files, undisturbed, in order."""
        self.place.clear()
        seen = watch(self.work, self.place.work)
        assert seen.code == 0, self.place.told()
        return list(map(str, seen.operations))

    def at_operation(self, number: int, half: bool = False) -> Verdict | None:
        """Kill at one file operation, counted from 0, and run again; None where there are not so many."""
        self.place.clear()
        seen = watch(self.work, self.place.work, stop=number, half=half)
        if not seen.killed:
            return None
        state, at = self.place.state(), f"{number}{' by half' if half else ''}: {seen.operations[-1]}"
        if state in self.known:
            return replace(self.known[state], at=at, same=True)
        self.known[state] = verdict = replace(self._ended(self.place.run(self.work), 1), at=at)
        return verdict

    def at_moments(self, seed: int, most: int = MOST) -> Verdict:
        """Kill at random moments, again and again, then leave it alone."""
        draw, kills, moments = random.Random(f"{self.name} {seed}"), 0, []
        self.place.clear()
        code: int | None = None
        started = time.perf_counter()
        while code is None and kills < most:
            moments.append(draw.uniform(0, 1.1 * self.seconds))
            code = self.place.run(self.work, within=moments[-1])
            kills += code is None
        if code is None:
            code = self.place.run(self.work)
        verdict = self._ended(code, kills)
        verdict.seconds = time.perf_counter() - started
        verdict.at = ", ".join(f"{m:.3f} s" for m in moments[:kills])
        return verdict

    def _ended(self, code: int | None, kills: int) -> Verdict:
        files = self.place.files()
        folders = {f"{above.as_posix()}/" for name in self.wanted for above in Path(name).parents}
        left = [name for name in files if name not in self.wanted]
        left += [name for name in self.place.folders() if name not in folders]
        if code == 2 and "is there already" in self.place.told():  # what was killed had just finished
            code = 0
        lost = (
            [] if code else [d for name, data in self.wanted.items() for d in differences(name, data, files.get(name))]
        )
        said = self.place.told() if code or lost else ""
        temporary = [p.name for p in sorted(self.place.temporary.iterdir())]
        return Verdict(kills=kills, code=code or 0, lost=lost, left=left, temporary=temporary, said=said)


def _worked(pid: int) -> float:
    """Seconds that the main thread of a process has run."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def differences(name: str, wanted: bytes, found: bytes | None) -> list[str]:
    """Where a file is not as it is to be, apart from FIELDS and LINES."""
    if found is None:
        return [f"{name} is not there"]
    if wanted == found or name.endswith("/report.html"):  # which is drawn of the record: compared there
        return []
    for pattern, fields in FIELDS.items():
        if fnmatch.fnmatch(name, pattern):
            try:
                a, b = (json.loads(data) for data in (wanted, found))
            except ValueError as error:
                return [f"{name}: {error}"]
            return [f"{name}: {where}" for where in _apart(_without(a, fields), _without(b, fields), "")]
    for pattern, lines in LINES.items():
        if fnmatch.fnmatch(name, pattern):
            a, b = (_without_lines(data.decode(), lines) for data in (wanted, found))
            return [f"{name}: {x!r} -> {y!r}" for x, y in zip(a, b, strict=False) if x != y] + (
                [] if len(a) == len(b) else [f"{name}: {len(a)} lines -> {len(b)}"]
            )
    pairs = enumerate(zip(wanted, found, strict=False))
    at = next((i for i, (x, y) in pairs if x != y), min(len(wanted), len(found)))
    pieces = f"{wanted[at : at + 40]!r} -> {found[at : at + 40]!r}"
    return [f"{name}: {len(wanted)} bytes -> {len(found)}, from byte {at}: {pieces}"]


def _without(value: Any, fields: Iterable[str]) -> Any:
    for path in fields:
        *above, last = re.split(r"\.(?!md|json)", path)
        at = value
        for key in above:
            at = at.get(key) if isinstance(at, dict) else None
        if isinstance(at, dict) and last in at:
            at[last] = None
    return value


def _without_lines(text: str, patterns: Iterable[str]) -> list[str]:
    return [line for line in text.splitlines() if not any(re.fullmatch(p, line) for p in patterns)]


def _apart(a: Any, b: Any, at: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b):
        return [d for k in a for d in _apart(a[k], b[k], f"{at}.{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _apart(x, y, f"{at}[{i}]")]
    return [] if a == b else [f"{at} {str(a)[:80]} -> {str(b)[:80]}"]


def _write_inputs(base: Path) -> None:
    import torch

    import addenda as ad

    base.mkdir(parents=True)
    model = make_llama()
    model.save_pretrained(base / "model")
    make_tokenizer().save_pretrained(base / "model")
    (base / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS), encoding="utf-8")
    text = "".join(f"{a} times {b} is {a * b}, and {a} plus {b} is {a + b}.\n" for a in range(40) for b in range(12))
    (base / "text.txt").write_text(text, encoding="utf-8")
    for seed, name in enumerate(("one", "two")):
        adapter = ad.attach(model, "lora:rank=2", name=name, seed=seed)
        torch.manual_seed(seed)
        for p in adapter.parameters():
            p.data.normal_(0, 0.05)
        adapter.save(base / f"{name}.safetensors")
        ad.detach(model, name)
