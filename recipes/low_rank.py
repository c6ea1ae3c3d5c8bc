"""The subject of `recipes.lord`: a causal LM, its texts, and every method's nested factors of all its layers on disk.

The model is walked through once; a rate is then a matter of reading the first columns of what is there.
"""

import copy
import hashlib
import json
import re
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import addenda as ad
from addenda import AddendaError
from addenda.compressing import measure
from addenda.compressing.folder import put
from addenda.compressing.gradients import weights_of
from addenda.compressing.layers import FORMS
from addenda.compressing.texts import Windows, cut, windows
from addenda.compressing.work import Work
from addenda.core.base.threads import side_by_side
from addenda.core.disk.atomic import write_atomically
from addenda.core.packed.tensor import parts_of
from addenda.core.site.site import site_at
from addenda.models.embedded import model_folder
from addenda.models.load import load_model
from addenda.models.wheels import cache_folder
from addenda.quantizing.quantize import quantize
from addenda.reducing import ranks
from addenda.reducing.choose import choose
from addenda.reducing.ranks import Layer, Ranks, Storage
from addenda.reducing.solve import solve
from addenda.reducing.walk import Walk
from addenda.train.unfinished import identity_of
from recipes.common import in_turns

ROUTES: dict[str, Storage] = {"svd": "factors", "asvd": "factors", "svd-llm": "factors", "lord": "pivot"}
SEEN, LENGTH, WINDOW = 64, 512, 256  # windows and tokens of calibration, tokens of a window that is judged
LORA = 8  # rank of the adapters that heal
HEALED, BATCH, SHORT, RATE = 40, 4, 128, 5e-4  # healing: steps, sequences a step, their tokens, AdamW's first rate


@dataclass(frozen=True)
class Arm:
    """One way to compress: a route, who gets which rank, and how the factors are stored."""

    how: str = "lord"
    allocate: str = "uniform"  # or waterfill
    weigh: str = "error"  # layers by their relative error, or by what it does to the loss
    storage: Storage = "factors"

    @property
    def multiple(self) -> int:
        """Uniform ranks are not rounded: that would leave them fewer parameters than the others fill up."""
        return 1 if self.allocate == "uniform" else 8


# ---- texts -----------------------------------------------------------------------------------------------------------


def python_texts() -> list[str]:
    """Python files of installed packages, the first of every package before the second of any, without their heads."""
    packages: dict[str, list[Path]] = {}
    root = Path(sysconfig.get_paths()["purelib"])
    for file in sorted(root.rglob("*.py")):
        inside = file.relative_to(root).parts
        if file.stat().st_size > 8192 and len(inside) > 1 and not {"tests", "testing", "_vendor"} & set(inside):
            packages.setdefault(inside[0], []).append(file)
    for files in packages.values():
        files.sort(key=lambda f: hashlib.sha256(f.name.encode()).hexdigest())
    turns = zip_longest(*(packages[p][:4] for p in sorted(packages)))
    return [f.read_text(encoding="utf-8", errors="replace")[2000:] for turn in turns for f in turn if f]


def english_texts() -> list[str]:
    """What installed packages say of themselves: the paragraphs that are prose."""
    found = {}
    for package in metadata.distributions():
        body = (package.read_text("METADATA") or "").partition("\n\n")[2]
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", body)]
        found[package.metadata["Name"]] = "\n\n".join(p for p in paragraphs if _prose(p))
    return [found[name] for name in sorted(found) if name != "addenda" and len(found[name]) > 5 * WINDOW]


def _prose(text: str) -> bool:
    plain = sum(c.isalpha() or c in " ,.'" for c in text)
    known = "http" in text or "License" in text  # licences are known by heart
    return len(text.split()) >= 12 and plain >= 0.93 * len(text) and not known


def whole_windows(tokenizer: Any, texts: list[str], n: int) -> tuple[tuple[int, ...], ...]:
    """Return up to n windows of WINDOW tokens, the first of every text before the second of any, and no short ends."""
    asked = n
    while True:
        rows = cut(tokenizer, texts, asked, WINDOW)
        whole = tuple(row for row in rows if len(row) == WINDOW)[:n]
        if len(whole) == n or len(rows) < asked:
            return whole
        asked *= 2


# ---- the subject -----------------------------------------------------------------------------------------------------


class Subject:
    """The model with its texts, its layers, and the folder of their factors."""

    def __init__(self, model: Path | None, samples: int, judged: int, dtype: str = "auto"):
        self.folder = model or model_folder(lambda line: print(line, file=sys.stderr))
        loaded = load_model(self.folder, dtype=dtype, device="cpu")
        self.model, self.tokenizer, self.dtype = cast(Any, loaded.model), cast(Any, loaded.tokenizer), loaded.note
        self.shapes, _ = choose(self.model, storage="pivot")
        self.held = {p: self.model.get_submodule(p) for p in self.shapes}
        identity: dict[str, Any] = {"model": identity_of(Path(self.folder)), "dtype": self.dtype, "samples": samples}
        self.seen, self.judged = self._texts(samples, judged, identity)
        self.texts = {k: _digest(w) for k, w in (("calibration", self.seen), *self.judged.items())}
        identity |= {"calibration": self.texts["calibration"], "routes": ROUTES}
        self.work = Work(cache_folder() / f"recipe-lord-{_hash(identity)}", identity)
        self.where: dict[str, int] = {}
        self._curves: dict[str, dict[str, Any]] = {}
        self._weights: dict[str, float] = {}

    def _texts(self, samples: int, judged: int, identity: dict) -> tuple[Windows, dict[str, Windows]]:
        """Text for calibration and for judging. It is kept: another package installed meanwhile would change it."""
        kept = cache_folder() / f"recipe-lord-{_hash(identity | {'judged': judged})}.json"
        if kept.exists():
            read = json.loads(kept.read_text(encoding="utf-8"))
            seen, *others = (Windows(tuple(map(tuple, w["rows"])), w["source"], w["pad"]) for w in read)
            return seen, dict(zip(("code", "english"), others, strict=True))
        seen, _ = windows(self.tokenizer, None, samples, LENGTH)
        found = {}
        for domain, texts, name in (
            ("code", python_texts(), "Python files of installed packages"),
            ("english", english_texts(), "descriptions of installed packages"),
        ):
            rows = whole_windows(self.tokenizer, texts, judged)
            if len(rows) < judged:
                raise AddendaError(f"{name}: {len(rows)} windows of {WINDOW} tokens here; take fewer with --windows.")
            found[domain] = Windows(rows, name, seen.pad)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps([asdict(w) for w in (seen, *found.values())]).encode())
        return seen, found

    def solve(self) -> None:
        """Every method's nested factors of every layer, block by block; blocks that are done are passed by."""
        with self.work:  # one run at a time solves; what is solved, several may read
            walk = Walk(self.model, self.seen.batches(4), list(self.shapes))
            self.where = {p: i for i, piece in enumerate(walk.pieces) for p in piece.paths}
            missing = [[h for h in ROUTES if not self.work.has(f"{h}-{i:03}")] for i in range(len(walk.pieces))]
            last = max((i for i, todo in enumerate(missing) if todo), default=-1)
            for i, piece in enumerate(walk.pieces[: last + 1]):
                if not missing[i]:
                    walk.pass_by(piece)
                    continue
                started = time.perf_counter()
                moments, uses = walk.moments(piece)

                def factors(job: tuple[str, str], moments=moments) -> Any:
                    how, path = job
                    most = ranks.break_even(*self.shapes[path], ROUTES[how])
                    return solve(site_at(self.model, path).matrix, moments[path], how, rank=most)

                for how in missing[i]:
                    jobs = [(how, p) for p in piece.paths]
                    with side_by_side(len(jobs)) as each:
                        solved = dict(zip(piece.paths, each(factors, jobs), strict=True))
                    self.work.write(f"{how}-{i:03}", solved, uses)
                print(f"  {piece.name} solved in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    def layers(self, arm: Arm) -> list[Layer]:
        if arm.how not in self._curves:
            pieces = sorted(set(self.where.values()))
            self._curves[arm.how] = {
                p: about["errors"] for i in pieces for p, about in self.work.about(f"{arm.how}-{i:03}").items()
            }
        if arm.weigh == "loss" and not self._weights:
            self._weights = (self.work.notes() or {}).get("weights") or weights_of(
                self.model, Windows(self.seen.rows[:16], "").batches(1), self.shapes
            )
            self.work.note(weights=self._weights)
        weights = self._weights if arm.weigh == "loss" else {}
        return [
            Layer(p, m, n, self._curves[arm.how][p], weight=weights.get(p, 1.0), storage=arm.storage)
            for p, (m, n) in self.shapes.items()
        ]

    def ranks(self, arm: Arm, remove: float, multiple: int | None = None) -> Ranks:
        allocate = ranks.uniform if arm.allocate == "uniform" else ranks.waterfill
        return allocate(self.layers(arm), 1 - remove, multiple or arm.multiple)

    def made(self, arm: Arm, remove: float, multiple: int | None = None) -> dict[str, nn.Module]:
        """The low-rank layers of an arm."""
        found: dict[str, nn.Module] = {}
        for path, rank in self.ranks(arm, remove, multiple).items():
            if rank is not None:
                held: Any = self.held[path]
                low = self.work.read(f"{arm.how}-{self.where[path]:03}", path, rank)
                found[path] = FORMS[arm.storage].of(low.B, low.A, held.bias, held.weight.dtype).eval()
        return found

    def put(self, layers: dict[str, nn.Module]) -> None:
        """The dense model with these layers in it."""
        for path, module in (self.held | layers).items():
            put(self.model, path, module)

    def losses(self) -> dict[str, list[float]]:
        """Nats a token of every window, for the model as it stands."""
        return {k: [measure.loss_of(self.model, [b]) for b in w.batches(1)] for k, w in self.judged.items()}

    # -- what a cell holds ---------------------------------------------------------------------------------------------

    def dense(self) -> dict:
        self.put({})
        return {"kept": 1.0, "losses": self.losses()}

    def cell(self, arm: Arm, remove: float) -> dict:
        given, known = self.ranks(arm, remove), self.layers(arm)
        self.put(self.made(arm, remove))
        return {
            "kept": ranks.kept(known, given), "low": sum(r is not None for r in given.values()),
            "error": statistics.mean(float(x.errors[r]) if (r := given[x.path]) else 0.0 for x in known),
            "losses": self.losses(),
        }  # fmt: skip

    def fresh(self, arm: Arm | None, remove: float) -> dict[str, nn.Module]:
        """Layers of an arm, and copies of those that it leaves dense: what may be written to."""
        low = {} if arm is None else self.made(arm, remove)
        return {p: low[p] if p in low else copy.deepcopy(m) for p, m in self.held.items()}

    def mended(self, arm: Arm | None, remove: float, *, quantised: bool, healed: bool) -> dict:
        """After NF4, after LoRA on the factors, or after both: QLoRA over LoRD."""
        self.put(self.fresh(arm, remove))
        try:
            errors = quantize(self.model, "nf4") if quantised else {}
            weights = [w for p in self.shapes for w in self.model.get_submodule(p).parameters()]
            stored = sum(t.numel() * t.element_size() for w in weights for t in parts_of(w))
            made: dict[str, Any] = {"bytes": stored, "packed": len(errors)}
            if not healed:
                return made | {"losses": self.losses()}
            made |= self.heal() | {"losses": self.losses()}
            ad.detach(self.model)
            return made
        finally:
            self.put({})

    def heal(self, seed: int = 0) -> dict:
        """LoRA on every linear layer there is, factors where there are, on more of the standard library."""
        text, _ = windows(self.tokenizer, None, HEALED * BATCH, SHORT, seed=seed + 1)
        torch.manual_seed(seed)
        adapter = ad.attach(self.model, f"lora:rank={LORA}")
        trained = [p for p in adapter.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / HEALED)
        losses = []
        for batch in text.batches(BATCH)[:HEALED]:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = self.model(**batch, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            falling.step()
            losses.append(float(loss.detach()))
        return {"trained": sum(p.numel() for p in trained), "training": losses}

    # -- time ----------------------------------------------------------------------------------------------------------

    def latency(self, arms: dict[str, tuple[Arm, float]], rounds: int = 9) -> dict:
        """Seconds of the dense model and of these, in turns; and of single layers by the parameters they keep.

        All ranks are multiples of 8, as `addenda compress --multiple 8` has them.
        """
        forms: dict[str, Callable[[], None]] = {"dense": lambda: self.put({})}
        for name, (arm, remove) in arms.items():
            layers = self.made(arm, remove, multiple=8)
            forms[name] = lambda layers=layers: self.put(layers)
        ids = torch.tensor(self.seen.rows[:1])
        found: dict[str, Any] = {"model": measure.seconds(self.model, ids, forms, rounds=rounds), "layers": []}
        self.put({})
        dtype = next(self.model.parameters()).dtype
        for m, n in sorted(set(self.shapes.values())):
            for rows in (LENGTH, 1):
                x = torch.randn(rows, n, dtype=dtype)
                tried = {
                    r: FORMS["factors"].of(torch.randn(m, r), torch.randn(r, n), None, dtype)
                    for kept in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
                    if (r := ranks.rank_for(m, n, kept) // 8 * 8)
                }
                each = {0: nn.Linear(n, m, bias=False, dtype=dtype), **tried}
                took = in_turns(each, x, rounds, repeat=20 if rows > 1 else 200, warm=1)
                found["layers"].append(
                    {"m": m, "n": n, "rows": rows, "seconds": {r: statistics.median(s) for r, s in took.items()}}
                )
        return found


def _hash(what: dict) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def _digest(text: Windows) -> dict[str, Any]:
    ids = hashlib.sha256(json.dumps(text.rows).encode()).hexdigest()[:16]
    return {"of": text.source, "windows": len(text.rows), "tokens": text.tokens, "ids": ids}
