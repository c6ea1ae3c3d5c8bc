"""The real part of `recipes.trans_lora`: SmolLM2-135M learns from its own first 15 layers, healed on plain text.

Made once a (task, seed) and shared by all arms: the source adapter (LoRA r = 8), the bundle, the synthetic inputs with
their margins, and the answers. Then the target learns, in as many steps each,

    real          N other inputs, real labels               bare_teacher  `filtered`, answers of the source's bare base
    real_inputs   the same, the teacher's answers           dora          `filtered`, a DoRA learns
    filtered      N synthetic inputs that passed            svft          `filtered`, an SVFT adapter has answered
    unfiltered    the first N of all that were made         from_copy     `filtered`, beginning at `copied`
    seeds         the five seeds                            chain         a third base, of 22 layers, from `filtered`'s
    random        N lines of plain text

and without training `copied` (layer i to layer i) and `projected`. The last four of the right column are run for the
first task only. The base is healed once, with one seed: that it is a good model is no part of what is claimed.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from addenda import AddendaError
from addenda.compressing.texts import texts_of, windows
from addenda.core.adapter.attach import attach, detach
from addenda.core.adapter.blocks import disabled
from addenda.core.adapter.load import load
from addenda.core.disk.cache import cache_folder
from addenda.core.file.identity import versions
from addenda.core.merge.merge import merge
from addenda.core.state.state import names_on
from addenda.data.encode import Tokens, encode
from addenda.data.encoded import IGNORE
from addenda.models.embedded import model_folder
from addenda.models.load import load_model
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit
from addenda.transferring.bundle import read_bundle
from addenda.transferring.controls import copied, projected
from addenda.transferring.distil import distil
from addenda.transferring.gather import Gathered, gather
from addenda.transferring.inputs import inputs_of
from addenda.transferring.label import label
from addenda.transferring.make_bundle import make_bundle
from addenda.transferring.report import distances, leaked
from addenda.transferring.sides import Opened, Sides
from addenda.transferring.synthesise import Caps, Sampler
from recipes.store import WAIT, lock_of
from recipes.trans_lora_tasks import NUMBERS, data, drawn

SHARED = ("source", "bundle", "pool")
ARMS = ("real", "real_inputs", "filtered", "unfiltered", "seeds", "random", "bare_teacher", "copied", "projected")
FURTHER = ("dora", "svft", "from_copy", "chain")  # of the first task
QUICK = ("real", "filtered", "seeds", "random", "copied")
READ = {  # what a unit reads that others have left
    "source": (), "bundle": ("source",), "real": (), "copied": ("source",), "projected": ("source",),
    "chain": ("source", "bundle", "filtered"), "an arm": ("source", "bundle"),
}  # fmt: skip
FIRST = 5  # seeds of `real` that come before all else: whether its accuracy is steady enough
METHOD = "lora:rank=8"


@dataclass(frozen=True)
class Setting:
    """What decides a record's numbers. count: N; tries: samples at most; test: items; third: layers of a last base."""

    layers: int = 15
    third: int = 22
    heal_steps: int = 400
    heal_batch: int = 8
    heal_length: int = 128
    heal_rank: int = 64
    count: int = 500
    tries: int = 4000
    steps: int = 400
    judge_steps: int = 100
    batch: int = 8
    rate: float = 1e-3
    temperature: float = 0.7
    lines: int = 2
    max_new_tokens: int = 24
    test: int = 998


@dataclass(frozen=True)
class Unit:
    """One thing to be run at one seed of one task."""

    task: str
    seed: int
    what: str

    def __str__(self) -> str:
        return f"{self.task}, seed {self.seed}: {self.what}"


def units(tasks: Sequence[str], seeds: Sequence[int], quick: bool = False) -> list[Unit]:
    """Return what is to be run, in order: first the arm of real labels at five seeds, then seed by seed."""
    made = [] if quick else [Unit(t, s, "real") for t in tasks for s in seeds[:FIRST]]
    for seed in seeds:
        for task in tasks:
            arms = QUICK if quick else ARMS + (FURTHER if task == NUMBERS else ())
            made += [Unit(task, seed, what) for what in (*SHARED, *arms)]
    return list(dict.fromkeys(made))


@dataclass
class Bench:
    """Runs units. tick: called after every step, and may raise to end a sitting."""

    setting: Setting
    target: Path = field(default_factory=lambda: model_folder())
    tick: Callable[[], None] = lambda: None
    kept: Path = field(default_factory=lambda: cache_folder() / "trans-lora")
    _held: dict[str, Any] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        about = repr((self.setting, str(self.target), versions()))
        return self.kept / hashlib.sha256(about.encode()).hexdigest()[:16]

    def place(self, unit: Unit) -> Path:
        return self.home / f"{unit.task}-{unit.seed}"

    # ---- bases -------------------------------------------------------------------------------------------------------

    def side(self, name: str) -> Opened:
        """Return a base: "target", "source" or "third", loaded once. The last two are healed where they are missing."""
        if name not in self._held:
            folder = self.target if name == "target" else self.healed(self._layers(name))
            loaded = load_model(folder, task="causal", dtype="float32")
            self._held[name] = Opened(loaded.model, loaded.tokenizer, name)
        return self._held[name]

    def _layers(self, name: str) -> int:
        return self.setting.layers if name == "source" else self.setting.third

    def truncated(self, layers: int) -> Opened:
        """Return the target's first layers, with its norm and head."""
        loaded = load_model(self.target, task="causal", dtype="float32")
        model: Any = loaded.model
        if layers >= len(model.model.layers):
            raise AddendaError(
                f"The target has {len(model.model.layers)} layers, and the source is to be its first {layers}."
            )
        model.model.layers = nn.ModuleList(list(model.model.layers)[:layers])
        model.config.num_hidden_layers = layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:layers]
        return Opened(model, loaded.tokenizer, f"first {layers} layers")

    def healed(self, layers: int) -> Path:
        """Return the folder of the first layers, trained for a while on plain text."""
        folder = self.home / f"base-{layers}"
        lock = lock_of(self.home, folder.name)
        while not lock.take():  # another process is at it
            self.tick()
            time.sleep(WAIT)
        try:
            if not (folder / "config.json").exists():
                self._heal(layers, folder)
        finally:
            lock.release()
        return folder

    def _heal(self, layers: int, folder: Path) -> None:
        s, side = self.setting, self.truncated(layers)
        rows, _ = windows(side.tokenizer, None, s.heal_steps * s.heal_batch, s.heal_length, judge=1)
        ids = [list(r) for r in rows.rows]
        text = Tokens(ids, [[IGNORE, *r[1:]] for r in ids], "causal", rows.pad)
        adapter = attach(side.model, f"lora:rank={s.heal_rank}", name="healing")
        fit(
            side.model, adapter, text, steps=s.heal_steps, batch=s.heal_batch, rate=s.rate, attention=None,
            progress=lambda _: self.tick(), out=self.home / f"healing-{layers}", resume=True,
        )  # fmt: skip
        merge(side.model)
        detach(side.model, keep_merged=True)
        beside = folder.with_name(f"{folder.name}.new")
        side.model.save_pretrained(beside)
        side.tokenizer.save_pretrained(beside)
        beside.rename(folder)

    # ---- units -------------------------------------------------------------------------------------------------------

    def run(self, unit: Unit, record: dict[str, Any]) -> dict[str, Any]:
        """Run a unit, and return the record of its seed with what it found."""
        started = time.perf_counter()
        found = getattr(self, f"_{unit.what}")(unit) if unit.what in SHARED else self._arm(unit)
        if found.pop("nothing", False):  # no answer of the teacher ends, so that a student stays what it was
            found["items"] = [int(c) for c in record["items"]["base"]]
        items = {unit.what: found.pop("items")} if "items" in found else {}
        items |= found.pop("more", {})
        made = dict(record) | found
        made["items"] = record.get("items", {}) | {arm: "".join(map(str, bits)) for arm, bits in items.items()}
        made["accuracies"] = {arm: round(bits.count("1") / len(bits), 5) for arm, bits in made["items"].items()}
        seconds = round(time.perf_counter() - started, 1)
        made["seconds"] = record.get("seconds", {}) | {unit.what: seconds}
        return made

    def _judged(self, side: Opened, task: str) -> list[int]:
        test = data(task, "test", range(self.setting.test))
        return evaluate(side.model, examples=encode(test, side.tokenizer), batch=32).items

    def own(self, unit: Unit) -> Any:
        """Return the inputs and labels that the source learns."""
        return drawn(unit.task, self.setting.count, unit.seed)[0]

    def other(self, unit: Unit) -> Any:
        """Return as many that it does not."""
        return drawn(unit.task, self.setting.count, unit.seed)[1]

    def _fitted(self, side: Opened, method: str, examples: Any, unit: Unit, file: Path) -> None:
        adapter = attach(side.model, method, name="learning", seed=unit.seed)
        try:
            fit(side.model, adapter, encode(examples, side.tokenizer), **self._how(unit))
            file.parent.mkdir(parents=True, exist_ok=True)
            adapter.save(file)
        finally:
            detach(side.model, "learning")

    def _how(self, unit: Unit) -> dict[str, Any]:
        s = self.setting
        return {"steps": s.steps, "batch": s.batch, "rate": s.rate, "seed": unit.seed, "attention": None,
                "progress": lambda _: self.tick()}  # fmt: skip

    def _source(self, unit: Unit) -> dict[str, Any]:
        side, file = self.side("source"), self.place(unit) / "source.safetensors"
        self._fitted(side, METHOD, self.own(unit), unit, file)
        load(side.model, file, name="teacher")
        try:
            found = self._judged(side, unit.task)
        finally:
            detach(side.model, "teacher")
        return {"more": {"source": found, "base": self._judged(self.side("target"), unit.task)}}

    def _bundle(self, unit: Unit) -> dict[str, Any]:
        side, place, s = self.side("source"), self.place(unit), self.setting
        made = make_bundle(
            side.model, side.tokenizer, place / "source.safetensors", self.own(unit), place / "task.bundle",
            name=unit.task, seed=unit.seed, steps=s.judge_steps, batch=s.batch, temperature=s.temperature,
            progress=lambda _: self.tick(),
        )  # fmt: skip
        judged = made.bundle.judged
        return {"judge": judged.accuracy, "held": judged.held}

    @contextmanager
    def sides(self, unit: Unit, target: str = "target"):
        """Give the models of a transfer, with the teacher and the discriminator on the source."""
        source, place = self.side("source"), self.place(unit)
        teacher = load(source.model, place / "source.safetensors", name="teacher", activate=False)
        try:
            judge = read_bundle(place / "task.bundle").attach(source.model, source.tokenizer, name="judge")
            yield Sides(source, source, self.side(target), teacher, judge)
        finally:
            for name in {"teacher", "judge"} & {*names_on(source.model)}:
                detach(source.model, name)

    def gathered(self, unit: Unit, target: str = "target") -> Gathered:
        """Return the synthetic inputs of a seed, those that are on disk and no more than are missing."""
        s, bundle = self.setting, read_bundle(self.place(unit) / "task.bundle")
        with self.sides(unit, target) as sides:
            sampler = Sampler(
                sides.target.model, sides.target.tokenizer, bundle.seeds, temperature=s.temperature, seed=unit.seed,
                lines=s.lines,
            )  # fmt: skip
            folder = self.place(unit) / f"made-{target}"
            folder.mkdir(parents=True, exist_ok=True)
            return gather(sampler, sides, s.count, Caps(s.tries), folder=folder, say=lambda _: self.tick())

    def _pool(self, unit: Unit) -> dict[str, Any]:
        found, bundle = self.gathered(unit), read_bundle(self.place(unit) / "task.bundle")
        real, target = list(inputs_of(self.own(unit)).texts), self.side("target")
        for made, line in zip(found.texts[:10], real, strict=False):
            print(f"    {made[:60]:<60} | {line[:60]}", file=sys.stderr)
        return {
            "counts": asdict(found.made.counts), "passed": found.passed, "made": len(found.margins),
            "filled": found.filled, "leaked": leaked(found.texts, bundle.seeds),
            "leaked_inputs": leaked(found.texts, real),
            "distance": distances(target.model, target.tokenizer, found.made.texts[:300], found.texts[:300], real),
        }  # fmt: skip

    def answers(self, unit: Unit, texts: Sequence[str], how: str = "teacher") -> Any:
        """Return the answers to inputs: of the source with its adapter, of its "bare" base, or of "svft" on it."""
        bundle = read_bundle(self.place(unit) / "task.bundle")
        prompts = [bundle.prompt(text) for text in texts]
        source, file = self.side("source"), self.place(unit) / "source.safetensors"
        if how == "svft":
            file = self.place(unit) / "svft.safetensors"
            if not file.exists():
                self._fitted(source, "svft", self.own(unit), unit, file)
        load(source.model, file, name="teacher")
        options: dict[str, Any] = {"max_new_tokens": self.setting.max_new_tokens, "batch": 32,
                                   "folder": self.home / "labels", "say": lambda _: self.tick()}  # fmt: skip
        try:
            if how == "bare":
                with disabled(source.model):
                    return label(source.model, source.tokenizer, prompts, **options)
            return label(source.model, source.tokenizer, prompts, **options)
        finally:
            detach(source.model, "teacher")

    def inputs(self, unit: Unit) -> list[str]:
        """Return the inputs that an arm learns from."""
        n = self.setting.count
        if unit.what == "real_inputs":
            return list(inputs_of(self.other(unit)).texts)
        if unit.what == "seeds":
            return list(read_bundle(self.place(unit) / "task.bundle").seeds)
        if unit.what == "random":
            lines = [
                " ".join(line.split()) for text in texts_of(None)[0][: unit.seed + 40] for line in text.splitlines()
            ]
            return [line for line in dict.fromkeys(lines) if 12 <= len(line) <= 60][unit.seed * n : (unit.seed + 1) * n]
        found = self.gathered(unit)
        return found.made.texts[:n] if unit.what == "unfiltered" else found.texts

    def _arm(self, unit: Unit) -> dict[str, Any]:
        side, target = self.side("third" if unit.what == "chain" else "target"), unit.task
        if unit.what in ("copied", "projected", "from_copy"):
            return self._carried(unit, side)
        if unit.what == "chain":
            return self._chain(unit, side)
        if unit.what == "real":
            learned: Any = self.other(unit)
        else:
            learned = self.answers(unit, self.inputs(unit), {"bare_teacher": "bare", "svft": "svft"}.get(unit.what, ""))
        method, kept = "dora:rank=8" if unit.what == "dora" else METHOD, self.place(unit) / "filtered.safetensors"
        if unit.what != "real" and not any(learned.whole):
            if unit.what == "filtered":  # the chain goes on with a student that stayed what it was
                attach(side.model, METHOD, name="student", seed=unit.seed).save(kept)
                detach(side.model, "student")
            return {"nothing": True}
        made = distil(side.model, side.tokenizer, learned, method, name="student", **self._how(unit))
        try:
            if unit.what == "filtered":
                made.adapter.save(kept)
            return {"items": self._judged(side, target)}
        finally:
            detach(side.model, "student")

    def _carried(self, unit: Unit, side: Opened) -> dict[str, Any]:
        source = self.side("source")
        teacher = load(source.model, self.place(unit) / "source.safetensors", name="teacher", activate=False)
        begin = unit.what == "from_copy"
        carry = projected if unit.what == "projected" else copied
        try:
            made = carry(teacher, side.model, name="student", rank=8 if begin else None, fill=begin, layers="same")
            if not begin:
                return {"items": self._judged(side, unit.task)}
            start = self.place(unit) / "copied.safetensors"
            made.adapter.save(start)
        finally:
            detach(source.model, "teacher")
            if "student" in names_on(side.model):
                detach(side.model, "student")
        learned = self.answers(unit, self.gathered(unit).texts)
        if not any(learned.whole):
            return {"nothing": True}
        distil(side.model, side.tokenizer, learned, start=start, name="student", **self._how(unit))
        try:
            return {"items": self._judged(side, unit.task)}
        finally:
            detach(side.model, "student")

    def _chain(self, unit: Unit, side: Opened) -> dict[str, Any]:
        bundle, texts = read_bundle(self.place(unit) / "task.bundle"), self.gathered(unit, "third").texts
        first = self.side("target")
        load(first.model, self.place(unit) / "filtered.safetensors", name="teacher")
        try:
            learned = label(
                first.model, first.tokenizer, [bundle.prompt(t) for t in texts], batch=32,
                max_new_tokens=self.setting.max_new_tokens, folder=self.home / "labels",
            )  # fmt: skip
        finally:
            detach(first.model, "teacher")
        if not any(learned.whole):
            return {"nothing": True}
        distil(side.model, side.tokenizer, learned, METHOD, name="student", **self._how(unit))
        try:
            return {"items": self._judged(side, unit.task)}
        finally:
            detach(side.model, "student")
