"""One prepared run on a GPU, of at most eight minutes: python -m bench gpu [--device cuda] [--quick] [--out FOLDER].

contracts   the contract tests of every method, there: the tests that are marked on_device
steps       step time and memory against the frozen base's floor and against PEFT, as bench.steps has them on a CPU
memory      what `ad.plan` foretells of a step's memory against the allocator's peak
tune        `ad.tune`, save and load, on the embedded model, or a random one where its wheel cannot be had

Each part is a process of its own with its own limit, and says what it has found row by row: one that fails, or takes
too long, loses its last row and no other part. `--device cpu --quick` tries the script itself in about two minutes.
"""

import contextlib
import copy
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.steps import PAIRS

ROOT = Path(__file__).parents[1]
Rows = Iterator[tuple[str, Any]]
MARK = "bench.gpu row: "  # in front of a row in what a part prints
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
CONTRACTS = [
    f"tests/{name}.py"
    for name in ("core/test_contracts", "core/site/test_site", "core/method/test_contract", "train/test_generate")
]
WARM = 3  # steps; the first three of an adapter look for dead tensors


@dataclass(frozen=True)
class Part:
    """A part of the check, which runs in a process of its own.

    limit: seconds, start and imports included. rows: what is found, by name, on a device, quickly or not.
    """

    limit: float
    rows: Callable[[str, bool], Rows]


def run(given) -> tuple[dict, str]:
    """Every part in turn: {part: {"seconds", "ended", "found"}}, and what is to be read of it."""
    found = {"device": _about(given.device), "quick": given.quick}
    for name, part in PARTS.items():
        found[name] = _in_process(name, part.limit, given.device, given.quick)
        print(f"{name}: {found[name]['ended']} after {found[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    return found, table(found)


def _about(device: str) -> dict:
    about = {"device": device, "cuda": torch.version.cuda}
    if device.startswith("cuda") and torch.cuda.is_available():
        of = torch.cuda.get_device_properties(device)
        about |= {"name": of.name, "memory": of.total_memory, "capability": f"{of.major}.{of.minor}"}
    return about


def _in_process(name: str, limit: float, device: str, quick: bool) -> dict:
    """The rows of one part, and how it ended. What it still runs when the limit is reached is killed with it."""
    command = [sys.executable, "-m", "bench.gpu", name, device, *(["--quick"] if quick else [])]
    started, rows, late = time.monotonic(), {}, threading.Event()
    options: dict = {"cwd": ROOT, "env": _environment(), "text": True, "start_new_session": True}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, **options) as process,
    ):

        def stop() -> None:
            late.set()
            _kill(process)

        clock = threading.Timer(limit, stop)
        clock.start()
        try:
            for line in process.stdout or ():
                if line.startswith(MARK):
                    key, value = json.loads(line.removeprefix(MARK))
                    rows[key] = value
            code = process.wait()
        finally:
            clock.cancel()
            _kill(process)
        errors.seek(0)
        last = errors.read()[-2000:]
    ended = (
        f"stopped at its limit of {limit:.0f} s" if late.is_set() else "finished" if code == 0 else f"failed: {last}"
    )
    return {"seconds": round(time.monotonic() - started, 1), "ended": ended, "found": rows}


def _kill(process: subprocess.Popen) -> None:
    """The process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """With this checkout's package first, installed or not."""
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


# -- contracts -----------------------------------------------------------------------------------------------------


def contracts(device: str, quick: bool) -> Rows:
    """How many contract tests passed, and the names of those that did not, as they come."""
    command = [sys.executable, "-m", "pytest", *CONTRACTS, "-m", "on_device", "--device", device, "-vv", "--tb=line"]
    if quick:
        command += ["-k", "(lora or houlsby) and (start or count or checkpointing or raw or plan)"]
    elif importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:
        command += ["-n", "8"]
    counts, failed, last = dict.fromkeys(OUTCOMES, 0), [], []
    streams: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **streams) as process:
        for line in process.stdout or ():
            outcome = next((w for w in line.split() if w in OUTCOMES), None)
            if "::" not in line or outcome is None or line.startswith(OUTCOMES):  # the summary names them once more
                last = [*last, line.rstrip()][-30:]
                continue
            counts[outcome] += 1
            if outcome in ("FAILED", "ERROR"):
                failed.append(next(w for w in line.split() if "::" in w).partition("::")[2])
            if sum(counts.values()) % 25 == 0:
                yield "counts", counts
                yield "failed", failed
    yield "counts", counts
    yield "failed", failed
    yield "end", last if failed or not counts["PASSED"] else last[-1:]


# -- steps ---------------------------------------------------------------------------------------------------------


class Arm:
    """A model that trains as an arm of `bench.arms` does, beside others in this process."""

    def __init__(self, arm: str, base: torch.nn.Module, sizes: tuple[int, int]):
        from addenda.models.machine import resident
        from bench.arms import prepare, warm
        from bench.measure import scheduled_in

        model: Any = copy.deepcopy(base)
        self.device = model.device
        vocabulary = model.config.vocab_size
        ids = torch.randint(0, vocabulary, sizes, generator=torch.Generator().manual_seed(1)).to(self.device)
        self.batch = {"input_ids": ids, "labels": ids}
        warm(model)
        loaded = resident(self.device) or 0
        self.model, self.trainable = prepare(arm, model)
        live = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(live, lr=1e-4, fused=True) if live else None
        self.scheduled = scheduled_in(self.model)
        for _ in range(WARM):
            self.once()
        self.kept = (resident(self.device) or 0) - loaded  # the adapter and its optimizer's state

    def once(self) -> None:
        self.model(**self.batch).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            for adapter in self.scheduled:
                adapter.step()
            self.optimizer.zero_grad(set_to_none=True)

    def measured(self) -> dict[str, float]:
        """Seconds of a step, and the bytes that it takes at its peak above the loaded base."""
        from addenda.models.machine import Peak, resident

        before = resident(self.device) or 0
        with Peak(self.device) as peak:
            seconds = timed(self.once, self.device)
        return {"wall": seconds, "memory": self.kept + (peak.bytes or before) - before}


def timed(function: Callable[[], None], device: torch.device) -> float:
    """Seconds until the device is done with what the function asks of it."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def steps(device: str, quick: bool) -> Rows:
    """Of each method: seconds and bytes of a step, the floor's and the peer's of the same turns."""
    from bench.arms import build

    name, sizes, turns = ("llama24m", (1, 32), 2) if quick else ("llama210m", (8, 1024), 12)
    yield "about", {"model": name, "tokens": "x".join(map(str, sizes)), "turns": turns, "dtype": "bfloat16"}
    peers = {f"ours/{spec}": peer for spec, peer in PAIRS.items()} | {"full": None, "lean/lora:rank=16": None}
    base = build(name).to(device)
    floor = Arm("floor", base, sizes)
    for arm in ("ours/lora:rank=16", "ours/miss:rank=64") if quick else peers:
        peer = peers[arm] if (peers[arm] or "").startswith("peft/") else None  # dense forms change every model's layers
        try:
            group = {"floor": floor, "own": Arm(arm, base, sizes)} | ({"peer": Arm(peer, base, sizes)} if peer else {})
            found: dict[str, list] = {key: [] for key in group}
            for turn in range(turns):
                keys = list(group)
                for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
                    found[key].append(group[key].measured())
            yield arm, {"trainable": group["own"].trainable, "peer": peer, "turns": found}
        except Exception as error:  # one arm that a peer or a device cannot run
            yield arm, {"failed": f"{type(error).__name__}: {error}"[:500]}


# -- memory --------------------------------------------------------------------------------------------------------


def memory(device: str, quick: bool) -> Rows:
    """Bytes of a step above the loaded model: as foretold, and as measured."""
    import addenda as ad
    from addenda.models.machine import Peak, resident
    from addenda.optim.plain import adamw
    from addenda.train.loss import score
    from bench.arms import build, warm

    name, (batch, length) = ("llama24m", (2, 128)) if quick else ("llama210m", (8, 1024))
    yield "about", {"model": name, "tokens": f"{batch}x{length}", "dtype": "bfloat16"}
    base = build(name).to(device)
    for method in ("lora:rank=16",) if quick else ("lora:rank=16", "dora:rank=16", "shira", "miss:rank=64", "full"):
        try:
            model: Any = copy.deepcopy(base)
            predicted = ad.plan(model, method, batch=batch, length=length).step.above
            ids = torch.zeros(batch, length, dtype=torch.long, device=device)
            tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            warm(model)
            loaded = resident(model.device) or 0
            optimizer = adamw(ad.attach(model, method), 1e-4)
            for _ in range(2):
                with Peak(model.device) as peak:
                    score(model, tokens, "causal").mean.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            measured = (peak.bytes or 0) - loaded
            yield method, {"predicted": predicted, "measured": measured, "ratio": round(predicted / measured, 3)}
            del model, optimizer
        except Exception as error:
            yield method, {"failed": f"{type(error).__name__}: {error}"[:500]}


# -- tune ----------------------------------------------------------------------------------------------------------


def tune(device: str, quick: bool) -> Rows:
    """Train, save, load into a fresh model: losses, and whether both models say the same."""
    import addenda as ad

    make, data, which = _embedded(device) if not quick else (None, None, "the embedded model is left out")
    if make is None:
        yield "model", f"random: {which}"
        make, data = _random(device)
    else:
        yield "model", which
    model, tokenizer = make()
    taken, batch = (4, 4) if quick else (40, 16)
    made = ad.tune(model, data, "lora:rank=8", tokenizer=tokenizer, steps=taken, batch=batch, rate=1e-3, progress=False)
    losses = [loss for _, loss in made.losses]
    yield "run", {
        "steps": taken, "first_loss": losses[0], "last_loss": losses[-1], "step_seconds": made.step_seconds,
        "tokens_per_second": made.tokens_per_second, "peak_memory": made.peak_memory, "choices": repr(made.choices),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = made.adapter.save(Path(folder) / "adapter.safetensors")
        fresh, _ = make()
        ad.load(fresh, file)
        ids = torch.arange(16).reshape(2, 8).to(device)
        with torch.no_grad():
            one, two = (m.eval()(input_ids=ids).logits for m in (made.model, fresh))
    yield "loaded", {"equal": torch.equal(one, two), "largest_difference": float((one - two).abs().max())}


def _embedded(device: str):
    """What makes the embedded model and its tokenizer, and its data; (None, None, why not) where they cannot be had."""
    from addenda.data.read import of_task
    from addenda.data.task import embedded_task
    from addenda.models.embedded import model_folder
    from addenda.models.load import load_model

    try:
        folder, data = model_folder(), of_task(embedded_task(), "train")
    except Exception as error:
        return None, None, f"{type(error).__name__}: {error}"[:200]

    def make():
        loaded = load_model(folder, task="causal", device=device)
        return loaded.model, loaded.tokenizer

    return make, data, folder.name


def _random(device: str):
    """A LLaMA of random weights, with a token for every character, and sums to learn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<|pad|>", "<|end|>", "<|unk|>", *"0123456789+=? \n:abcdefghijklmnopqrstuvwxyz"]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unk|>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unk|>", model_max_length=256
    )
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=len(words),
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip

    def make():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device), tokenizer

    return make, [{"question": f"{a}+{b}=?", "answer": str(a + b)} for a in range(20) for b in range(20)]


# -- what is read of it --------------------------------------------------------------------------------------------

PARTS = {  # their limits leave half a minute of eight for what is around them
    "contracts": Part(165, contracts),
    "steps": Part(135, steps),
    "memory": Part(70, memory),
    "tune": Part(80, tune),
}


def table(found: dict) -> str:
    """Markdown: a line for each part, then the steps and the memory."""
    from bench.measure import ratios, spread

    about = found["device"]
    lines = [f"{about.get('name', about['device'])}, torch {torch.__version__}.", ""]
    lines += ["| part | seconds | ended | found |", "| --- | ---: | --- | --- |"]
    for name in PARTS:
        part = found[name]
        ended = part["ended"].strip().splitlines()[-1] if part["ended"].strip() else ""
        lines.append(f"| {name} | {part['seconds']:.0f} | {ended} | {_said(name, part['found'])} |")
    of = found["steps"]["found"]
    if "about" in of:
        lines += ["", ", ".join(f"{k} {v}" for k, v in of["about"].items()), "",
                  "| arm | trained | step | time / floor | memory / floor | time / peer | memory / peer |",
                  "| --- | ---: | ---: | --- | --- | --- | --- |"]  # fmt: skip
    for arm, row in of.items():
        if arm == "about":
            continue
        if "failed" in row:
            lines.append(f"| {arm} | {row['failed'].splitlines()[0]} | | | | | |")
            continue
        own, floor, peer = (row["turns"].get(key) for key in ("own", "floor", "peer"))
        wall = statistics.median(m["wall"] for m in own) * 1e3
        cells = [arm, f"{row['trainable']:,}", f"{wall:.1f} ms"]
        for other in (floor, peer):
            for key in ("wall", "memory"):
                known = other and all(m[key] > 0 for m in other)
                cells.append(spread(ratios(own, other, key)) if known else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| memory of a step | foretold, MiB | measured, MiB | ratio |", "| --- | ---: | ---: | ---: |"]
    for method, row in found["memory"]["found"].items():
        if method != "about":
            told = (
                [f"{row[k] / 2**20:,.0f}" for k in ("predicted", "measured")] if "ratio" in row else [row["failed"], ""]
            )
            lines.append(f"| {method} | {' | '.join(told)} | {row.get('ratio', '')} |")
    return "\n".join(lines)


def _said(name: str, rows: dict) -> str:
    if name == "contracts":
        counts = ", ".join(f"{n} {k.lower()}" for k, n in rows.get("counts", {}).items() if n)
        return counts + (f": {', '.join(rows['failed'][:10])}" if rows.get("failed") else "")
    if name == "tune" and "run" in rows:
        run = rows["run"]
        losses = f"loss {run['first_loss']:.3f} to {run['last_loss']:.3f}, a step {run['step_seconds']:.3f} s"
        return f"{losses}, the same after loading: {rows.get('loaded', {}).get('equal')}"
    return f"{len([k for k in rows if k != 'about'])} rows"


if __name__ == "__main__":
    _name, _device, *_more = sys.argv[1:]
    for _row in PARTS[_name].rows(_device, "--quick" in _more):
        print(MARK + json.dumps(_row), flush=True)
