"""Who reads what, and what must be true of all that is read: nothing loads that was not saved.

A `Target` has sound files of one kind, the call that reads them, and a check of what was read, by other means than the
reader's own: bytes saved again, another library, or the numbers in the file. One tiny model is kept for all of them;
after every file it must be what it was.
"""

import dataclasses
import json
import math
import shlex
import struct
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import addenda as ad
import toys
from addenda.core.base.errors import AddendaError
from addenda.core.file import header as adapter_header
from addenda.core.file.methods import methods_of
from addenda.core.forward.slots import slots_of
from attacks import mutate
from attacks.mutate import Files, Mutant
from shared import METHODS, attach, stir

IDS = torch.arange(12).reshape(2, 6) * 5 % toys.VOCAB


def make_model() -> nn.Module:
    return toys.make_llama(num_hidden_layers=1, tie_word_embeddings=False)


class UntrueError(AssertionError):
    """What a reader has done with a file that it should not have."""


@dataclasses.dataclass
class Model:
    """A model that stands beside all files, and what it was."""

    live: nn.Module = dataclasses.field(default_factory=make_model)

    def __post_init__(self):
        self.modules = list(self.live.modules())
        self.classes = [type(m) for m in self.modules]
        self.tensors = {k: (t, t.detach().clone()) for k, t in self.live.state_dict(keep_vars=True).items()}
        self.flags = [t.requires_grad for t, _ in self.tensors.values()]

    def intact(self) -> None:
        """Raise UntrueError where the model is not what it was."""
        now = self.live.state_dict(keep_vars=True)
        if [type(m) for m in self.modules] != self.classes or any(slots_of(m) for m in self.modules):
            raise UntrueError("a module has another class")
        if now.keys() != self.tensors.keys() or "_addenda" in self.live.__dict__:
            raise UntrueError(f"the model has other entries: {sorted(now.keys() ^ self.tensors.keys())[:4]}")
        if any(now[k] is not t or not torch.equal(t, copy) for k, (t, copy) in self.tensors.items()):
            raise UntrueError("an entry of the model has other bits")
        if [t.requires_grad for t in now.values()] != self.flags:
            raise UntrueError("a parameter's requires_grad is another")

    def detached(self) -> None:
        """Take off what a reader has put on, after one forward with it, and look that nothing else remains."""
        try:
            with torch.no_grad():
                self.live(IDS)
        finally:
            ad.detach(self.live)
        self.intact()


class Target:
    """One kind of file. model: the one that stays; words: names that mean something in such files."""

    name = ""
    digest = False  # whether the bytes of such files are proven by a digest in them

    def __init__(self, folder: Path):
        self.model = Model()
        self.words: Sequence[str] = ()
        self.sources: list[Files] = [read_all(p) for p in self.write(folder)]

    def write(self, folder: Path) -> list[Path]:
        """Write sound files, each set into a folder of its own."""
        raise NotImplementedError

    def mutant(self, seed: int) -> Mutant:
        """Return the hostile one of a seed."""
        return mutate.mutant(seed, self.sources, self.words)

    def read(self, place: Path, mutant: Mutant) -> Any:
        """Read what lies in a folder, as users do: this is measured."""
        raise NotImplementedError

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        """Raise UntrueError where that is not what the files say."""
        raise NotImplementedError

    def clean(self) -> None:
        """Put the model back, and look that it is what it was."""
        if "_addenda" in self.model.live.__dict__:
            self.model.detached()
        else:
            self.model.intact()


def read_all(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(what: str, one: Any, other: Any) -> None:
    if one != other:
        raise UntrueError(f"{what}: {str(one)[:200]} in the file, {str(other)[:200]} as loaded")


def same_tensor(what: str, one: Tensor, other: Tensor) -> None:
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(*raw):
        raise UntrueError(f"{what} has other bits: {one.dtype} {list(one.shape)}, {other.dtype} {list(other.shape)}")


# -- adapter files -----------------------------------------------------------------------------------------------------

_Q, _UP, _BOTH = ["*.q_proj"], ["*.up_proj"], ["*.q_proj", "*.up_proj"]
# what is attached, where, and how it is saved: every way in which a file can hold an adapter
ADAPTERS: dict[str, tuple[Any, dict, dict]] = {
    "lora with a head": ("lora", {"targets": _BOTH, "also_train": ["lm_head"]}, {}),
    "one bit": (ad.LoRA(rank=4, bits=1), {"targets": _BOTH}, {}),
    "latent": (ad.LoRA(rank=4, bits=2), {"targets": _Q, "also_train": ["lm_head"]}, {"latent": True}),
    "svft": (METHODS["svft"], {"targets": _BOTH}, {}),
    "svft with its basis": (METHODS["svft"], {"targets": _Q}, {"basis": True}),
    "vera": ("vera", {"targets": _BOTH}, {}),
    "vb-lora": ("vb-lora", {"targets": _BOTH}, {}),
    "two methods": ({"*.q_proj": METHODS["lora"], "*.up_proj": METHODS["shira"]}, {}, {}),
    "dylora": ("dylora", {"targets": _BOTH}, {}),
    "lokr": ("lokr", {"targets": _BOTH}, {}),
    "dora": ("dora", {"targets": _Q}, {}),
    "boft": ("boft", {"targets": _Q}, {}),
    "fourierft": ("fourierft", {"targets": _UP}, {}),
    "trainable-tokens": ("trainable-tokens", {"targets": ["*embed_tokens"]}, {}),
    "full": ("full", {"targets": ["*.k_proj"]}, {}),
    "prefix": ("prefix", {}, {}),
    "houlsby": ("houlsby", {}, {}),
    "mosa": ("mosa", {"targets": _Q}, {}),
}  # fmt: skip


class AdapterFiles(Target):
    name, digest = "adapter", True

    def write(self, folder: Path) -> list[Path]:
        self.words = [*(i.name for i in ad.catalogue()), *(n for n, _ in self.model.live.named_modules() if n)]
        for what, (method, where, how) in ADAPTERS.items():
            model = self.model.live
            adapter = (
                ad.attach(model, method, **where) if isinstance(method, dict) else attach(model, method, IDS, **where)
            )
            stir(adapter).save(made(folder / what) / "adapter.safetensors", **how)
            ad.detach(model)
        return [folder / what for what in ADAPTERS]

    def read(self, place: Path, mutant: Mutant) -> Any:
        return ad.load(self.model.live, place / "adapter.safetensors", base=self.base(mutant))

    def base(self, mutant: Mutant) -> Literal["exact", "compatible"]:
        return "compatible" if sum(map(len, mutant.files.values())) % 4 == 0 else "exact"

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        """Nothing loads without a right digest; with one, what is saved again says all that the file said."""
        file = place / "adapter.safetensors"
        header, tensors = adapter_header.read(file)
        if header.schema > 1 and not mutant.sealed and mutant.files not in self.sources:
            raise UntrueError("it loads, and its bytes are not those that were saved")
        again, kept = adapter_header.read(made.save(place / "again.safetensors", basis=header.basis, latent=True))
        same("seed", header.seed, again.seed)
        same("step", header.step, again.step)
        same("labels", header.labels, again.labels)
        same("new rows", header.vocabulary, again.vocabulary)
        same("pools", [set(p) for p in header.pools], [set(p) for p in again.pools])
        (methods, copy), (others, copies) = methods_of(header, file), methods_of(again, file)
        same("methods", methods, others)
        if again.head or header.head:
            same("options of heads", copy, copies)
        sites = {s.path: s for s in again.sites}
        same("sites", {s.path for s in header.sites}, sites.keys())
        for s in header.sites:
            t = sites[s.path]
            exact = () if self.base(mutant) == "compatible" else ("dtype", "hash")
            for field in ("kind", "shape", "form", "packed", "origin", *exact):
                same(f"{s.path}: {field}", getattr(s, field), getattr(t, field))
            same(f"{s.path}: method", s.is_head or methods[s.method], t.is_head or others[t.method])
            same(f"{s.path}: trained", set(s.trainable), set(t.trainable))
            same(f"{s.path}: frozen", set(s.frozen), set(t.frozen))
            same(f"{s.path}: checks", s.checks.keys(), t.checks.keys())
        same("tensors", tensors.keys(), kept.keys())
        derived = {f"{s.path}/{k}" for s in header.sites for k in s.checks}
        for k, tensor in tensors.items():
            same_tensor(k, tensor.to(kept[k].dtype) if k in derived else tensor, kept[k])


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- adapters of other programs ----------------------------------------------------------------------------------------


class Imported(Target):
    """An adapter that `import_adapter` reads."""

    file = ""
    methods: ClassVar[dict[str, Any]] = {}

    def write(self, folder: Path) -> list[Path]:
        self.words = [n for n, _ in self.model.live.named_modules() if n]
        import gguf  # noqa: F401  here, and not in every child
        import peft  # noqa: F401

        for what, method in self.methods.items():
            model = self.model.live
            adapter = stir(attach(model, method, IDS, targets=_BOTH))
            place = folder / what
            ad.export(adapter, self.name, place / self.file if self.file else place)
            ad.detach(model)
            for extra in place.glob("README*"):
                extra.unlink()
        return [folder / what for what in self.methods]

    def read(self, place: Path, mutant: Mutant) -> Any:
        return ad.import_adapter(self.model.live, place / self.file if self.file else place)

    def deltas(self, made: Any) -> dict[str, Tensor]:
        """What each site adds to its weight, in float64, out × in."""
        from addenda.core.site.site import site_at
        from shared import effective

        found = {}
        for path in made.methods:
            site = site_at(made.model, path)
            found[path] = effective(site, torch.float64).double() - self.model.tensors[f"{path}.weight"][1].double()
        return found

    def equal(self, made: Any, expected: dict[str, Tensor]) -> None:
        found = self.deltas(made)
        same("sites", {k for k, d in expected.items() if bool((d != 0).any())} - found.keys(), set())
        for path, delta in found.items():
            there = expected.get(path)
            if there is None:
                raise UntrueError(f"{path} is changed, and the file has nothing of it")
            scale = max(1e-6, float(there.abs().max()))
            W = float(self.model.tensors[f"{path}.weight"][1].abs().max())
            if math.isfinite(scale) and not float((delta - there).abs().max()) <= 1e-4 * scale + 1e-6 * W:
                raise UntrueError(f"{path}: ΔW is another than the file's, by {float((delta - there).abs().max()):.2g}")


class PeftFolders(Imported):
    name = "peft"
    methods: ClassVar = {
        k: METHODS[k] for k in ("lora", "rslora", "dora", "vera", "loha", "lokr", "oft", "vb-lora", "miss")
    }

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        """PEFT itself answers with the same numbers, wherever it takes the folder."""
        from peft import PeftModel, get_peft_model_state_dict

        with torch.no_grad():
            ours = self.model.live(IDS).logits
        ad.detach(self.model.live)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config = json.loads((place / "adapter_config.json").read_text())
                size = max(
                    float(t.float().abs().max()) for t in load_file(place / "adapter_model.safetensors").values()
                )
                if max(size, abs(config.get("lora_alpha") or 0)) > 1e6 or (config.get("oft_block_size") or 0) < 0:
                    return  # float32 decides nothing there; and of such blocks PEFT itself never comes to an end
                theirs = PeftModel.from_pretrained(make_model(), str(place)).eval()
                with torch.no_grad():
                    wanted = theirs(IDS).logits
                if get_peft_model_state_dict(theirs).keys() != load_file(place / "adapter_model.safetensors").keys():
                    return  # tensors that it leaves out without a word, since target_modules names other modules
            except Exception:
                return
        if bool(torch.isfinite(wanted).all()) and not torch.allclose(ours, wanted, rtol=1e-3, atol=1e-4):
            raise UntrueError(f"PEFT answers otherwise, by {float((ours - wanted).abs().max()):.2g}")


class KohyaFiles(Imported):
    name, file = "kohya", "kohya.safetensors"
    methods: ClassVar = {"lora": METHODS["lora"], "alpha": ad.LoRA(rank=4, alpha=None)}

    def write(self, folder: Path) -> list[Path]:
        """LoRA as it is exported here, and what only others write: LoHa, LoKr and DoRA."""
        at, rng = "lycoris_model_layers_0_self_attn_q_proj", torch.Generator().manual_seed(0)
        forms = {
            "loha": {"hada_w1_a": (8, 4), "hada_w1_b": (4, 8), "hada_w2_a": (8, 4), "hada_w2_b": (4, 8), "alpha": ()},
            "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()},
            "dora": {"lora_up.weight": (8, 4), "lora_down.weight": (4, 8), "dora_scale": (8, 1), "alpha": ()},
        }
        for name, form in forms.items():
            tensors = {f"{at}.{k}": torch.randn(shape, generator=rng) for k, shape in form.items()}
            save_file(tensors, made(folder / name) / self.file, {"ss_network_dim": "4"})
        return [*super().write(folder), *(folder / name for name in forms)]

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        """ΔW is alpha / rank · up · down, of the numbers in the file as safetensors reads them."""
        tensors = load_file(place / self.file)
        flat = {p.replace(".", "_"): p for p, _ in self.model.live.named_modules()}
        expected: dict[str, Tensor] = {}
        for key in tensors:
            stem, _, suffix = key.partition(".")
            if suffix != "lora_up.weight" or f"{stem}.dora_scale" in tensors:
                continue
            path = next(p for f, p in flat.items() if stem.endswith(f) and len(stem) - len(f) < 20 and f)
            up, down = (tensors[f"{stem}.{k}.weight"].double() for k in ("lora_up", "lora_down"))
            up, down = up.reshape(-1, down.shape[0]), down.flatten(1)
            alpha = float(tensors[f"{stem}.alpha"]) if f"{stem}.alpha" in tensors else len(down)
            expected[path] = alpha / len(down) * up @ down
        others = any("lora_up" not in k and "lora_down" not in k and "alpha" not in k for k in tensors)
        if not others:
            self.equal(made, expected)


class GgufFiles(Imported):
    name, file = "gguf", "adapter.gguf"
    methods: ClassVar = {"lora": METHODS["lora"], "alpha": ad.LoRA(rank=4, alpha=None), "rslora": METHODS["rslora"]}

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        """ΔW is B · A with llama.cpp's scale, of the numbers in the file as gguf's own reader has them."""
        import gguf

        reader = gguf.GGUFReader(place / self.file)
        field = reader.get_field("adapter.lora.alpha")
        alpha = 0.0 if field is None else float(field.contents())
        tensors = {
            t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type)).double() for t in reader.tensors
        }
        expected = {}
        names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
        names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
        names |= {"ffn_down": "mlp.down_proj"}
        for name, A in tensors.items():
            if not name.endswith(".lora_a"):
                continue
            stem = name.removesuffix(".lora_a")
            B = tensors[f"{stem}.lora_b"]
            delta = (alpha / len(A) if alpha else 1.0) * B @ A
            _, block, inner, _ = stem.split(".")
            if inner in ("attn_q", "attn_k"):
                heads = 2 if inner == "attn_q" else 1
                delta = delta.reshape(heads, -1, 2, delta.shape[1]).transpose(1, 2).reshape(delta.shape)
            expected[f"model.layers.{block}.{names[inner]}"] = delta
        self.equal(made, expected)


# -- what runs leave ---------------------------------------------------------------------------------------------------


class Checkpoints(Target):
    """A checkpoint: the adapter, states without pickles, a note that has the hash of each."""

    name = "checkpoint"

    def write(self, folder: Path) -> list[Path]:
        from addenda.core.file.states import write_state
        from addenda.train import checkpoint

        model, self.words = self.model.live, ["optimizer.safetensors", "adapter.safetensors", "step", "files"]
        adapter = ad.attach(model, METHODS["lora"], targets=_BOTH)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for _ in range(2):
            model(IDS).logits.square().mean().backward()
            optimizer.step(), schedule.step(), adapter.step(), optimizer.zero_grad()
        staging, final = made(folder / "staging"), folder / "checkpoint-2"
        checkpoint.write(adapter, staging, {"rate": 1e-3}, {"attention": "sdpa"}, identity={"base": "x"})
        write_state(staging / checkpoint.OPTIMIZER, optimizer.state_dict())
        write_state(staging / checkpoint.SCHEDULER, schedule.state_dict())
        write_state(
            staging / "rng_state.safetensors", {"cpu": torch.arange(64).byte(), "python": (3, (1, 2**31), None)}
        )
        (staging / checkpoint.STATE).write_text(json.dumps({"global_step": 2, "log_history": [{"loss": 1.5}]}))
        checkpoint.finish(staging, final, 3)
        ad.detach(model)
        return [final]

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.adapter = ad.attach(self.model.live, METHODS["lora"], targets=_BOTH)
        self.start = {k: t.detach().clone() for k, t in self.adapter.state_dict().items()}

    def read(self, place: Path, mutant: Mutant) -> Any:
        """Each state alone, as if its hash had been made right, and then the whole."""
        from addenda.core.file.states import read_state
        from addenda.train import checkpoint

        states = {}
        for name in ("optimizer.safetensors", "scheduler.safetensors", "rng_state.safetensors"):
            if name == mutant.changed:
                try:
                    states[name] = read_state(place / name)
                except AddendaError:
                    states[name] = None
        checkpoint.begun(place), checkpoint.is_own(place), checkpoint.latest(place.parent)
        try:
            if wrong := checkpoint.damage(place):
                raise AddendaError(wrong)
            step = checkpoint.restore(self.adapter, place)
        except AddendaError:
            if not any(s is not None for s in states.values()):
                raise
            step = None
        return states, step

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        from addenda.core.file.states import read_state, write_state
        from addenda.train import checkpoint

        states, step = made
        if step is not None:
            if mutant.changed != checkpoint.NOTE and mutant.files != self.sources[mutant.source]:
                raise UntrueError(f"{mutant.changed} is not what was saved, and the run goes on from it")
            same("step", json.loads(mutant.files[checkpoint.NOTE])["step"], step)
        for name, state in states.items():
            if state is not None:
                held = load_file(place / name)
                write_state(place / "again.safetensors", state)
                if not alike(read_state(place / "again.safetensors"), state):
                    raise UntrueError(f"{name} is read as what is written otherwise")
                tensors = list(tensors_in(state))
                for key, tensor in held.items():
                    if not any(t.numel() == tensor.numel() and t.dtype == tensor.dtype for t in tensors):
                        raise UntrueError(f"{name}: the tensor {key} is not in the state")

    def clean(self) -> None:
        self.adapter.load_state_dict(self.start)
        self.adapter.draw(0)


def alike(one: Any, other: Any) -> bool:
    """Whether two states are equal, NaN and -0.0 included."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return [*map(repr, one)] == [*map(repr, other)] and all(map(alike, one.values(), other.values()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return struct.pack("d", one) == struct.pack("d", other) if isinstance(one, float) else one == other


def tensors_in(state: Any) -> Any:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for v in state.values():
            yield from tensors_in(v)
    elif isinstance(state, (list, tuple)):
        for v in state:
            yield from tensors_in(v)


class Records(Target):
    """The record of a comparison."""

    name = "record"

    def write(self, folder: Path) -> list[Path]:
        from addenda.comparing.entries import Config, SplitResult, TrialRecord
        from addenda.comparing.record import Record

        self.words = ["lora", "final", "search", "control", "ok", "failed", "steps", "seconds", "parameters"]
        config = Config.of({
            "title": "A test", "created": "2025-06-01T00:00:00Z", "command": "addenda compare",
            "model": {"name": "tiny", "parameters": 1000, "dtype": "bfloat16"},
            "data": {"name": "sums", "description": "small", "sizes": {"test": 4}, "hashes": {"test": "ab"}},
            "budget": {"kind": "steps", "value": 40, "steps": 40, "batch": 16},
            "methods": {"lora": {"title": "LoRA", "options": {"rank": 8}}, "full": {"title": "full", "options": {}}},
            "seeds": [0, 1], "hardware": {"cpu": "x"}, "margin": 2.0,
        })  # fmt: skip
        record = Record.write_config(folder / "run", config)
        half = SplitResult(accuracy=0.5, loss=1.0, items="0101")
        for seed in (0, 1):
            record = record.write_trial(TrialRecord(
                method="lora", seed=seed, stage="final", rate=1e-3, steps=40, test=half, ood=half,
                losses=((1, 2.0), (2, 1.5)), status="ok", note="", step_seconds=0.5, peak_bytes=100, adapter_bytes=10,
                seconds=30.0,
            ))  # fmt: skip
        record.write_trial(TrialRecord(method="lora", seed=0, stage="search", rate=1e-2, steps=20, status="ok"))
        return [folder / "run"]

    def read(self, place: Path, mutant: Mutant) -> Any:
        from addenda.comparing.record import Record

        return Record.read(place)

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        """What was read says what the files say, entry by entry."""
        from addenda.comparing.choose import choices
        from addenda.comparing.entries import as_json

        said(json.loads((place / "config.json").read_bytes()), as_json(made.config), "config")
        trials = {json.dumps(as_json(t), sort_keys=True) for t in (*made.trials, *made.shorter)}
        for file in sorted((place / "trials").glob("*.json")):
            if file.name in made.ignored:
                continue
            value = json.loads(file.read_bytes())
            if not any(_contains(json.loads(t), value) for t in trials):
                raise UntrueError(f"{file.name} was read as something else")
        with suppress(AddendaError):  # a record without a finished run
            for choice in choices(made).values():
                _bearable(choice.command)


def _bearable(command: str | None) -> None:
    """Raise UntrueError for a command to be copied that says more than one line, or that code of the model may run."""
    words = shlex.split(command or "")
    if command is not None and (not command.isprintable() or words[:2] != ["addenda", "tune"]):
        raise UntrueError(f"a command to be copied is {command!r}")
    if any(w.startswith("--trust") for w in words):
        raise UntrueError(f"a command to be copied runs code: {command!r}")


def said(there: Any, made: Any, where: str) -> None:
    """Raise UntrueError where what was made does not say what a file says."""
    depth = sys.getrecursionlimit()
    sys.setrecursionlimit(20 * depth)
    try:
        fine = _contains(made, there)
    finally:
        sys.setrecursionlimit(depth)
    if not fine:
        raise UntrueError(f"{where}: {json.dumps(there)[:300]} in the file, {json.dumps(made)[:300]} as read")


def _contains(made: Any, there: Any) -> bool:
    """Whether what was made says all that a file says; null is what is not said."""
    if isinstance(there, dict):
        return isinstance(made, dict) and all(_contains(made.get(k), v) for k, v in there.items())
    if isinstance(there, list):
        return isinstance(made, list) and len(there) == len(made) and all(map(_contains, made, there))
    return type(made) is type(there) and made == there


class RunFiles(Target):
    """The YAML that a run leaves and a command reads."""

    name = "run-file"

    def write(self, folder: Path) -> list[Path]:
        from addenda.cli import run_file
        from addenda.cli.main import app

        commands = {
            c.name or c.callback.__name__.replace("_", "-"): c.callback for c in app.registered_commands if c.callback
        }
        self.commands = {n: commands[n] for n in ("tune", "compare", "compress")}
        given = {
            "tune": {"out": "run", "method": "lora:rank=4", "steps": 40, "rate": 1e-3, "targets": "q_proj,v_proj"},
            "compare": {"out": "run", "model": "m", "methods": "lora,shira", "seeds": 2},
            "compress": {"out": "run", "model": "m", "ratio": 0.5},
        }  # fmt: skip
        self.words = sorted({n for c in self.commands.values() for n in run_file._keys(c)} | self.commands.keys())
        import inspect

        for name, command in self.commands.items():
            defaults = {n: p.default for n, p in inspect.signature(command).parameters.items()}
            (made(folder / name) / "run.yaml").write_text(run_file.text_of(command, defaults | given[name], {}))
        return [folder / name for name in self.commands]

    def read(self, place: Path, mutant: Mutant) -> Any:
        from addenda.cli import run_file

        name = list(self.commands)[mutant.source]
        return run_file.read(place / "run.yaml", self.commands[name], name, tuple(self.commands))

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        """Every option that was read stands in the file, with that value as text."""
        import yaml

        text = (place / "run.yaml").read_bytes().decode("utf-8-sig")
        there = {k.replace("-", "_"): v for k, v in yaml.load(text, Loader=yaml.BaseLoader).items()}
        for option, value in made.items():
            names = [k for k in there if k.lstrip("_").replace("-", "_") in (option, f"no_{option}")]
            flat = [v for k in names for v in (there[k] if isinstance(there[k], list) else [there[k]])]
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                fine = any(isinstance(v, str) and float(v) == value for v in flat) or not names
            elif isinstance(value, str):
                fine = (
                    not names or value in flat or value.replace(";", ",") == ",".join(map(str, flat)).replace(";", ",")
                )
            else:
                fine = True
            if not fine:
                raise UntrueError(f"{option} is {value!r}, and the file says {flat}")


class Notes(Target):
    """The notes beside adapters and compressed models: run.json, compress.json, plan.json."""

    name = "note"

    def write(self, folder: Path) -> list[Path]:
        run = {
            "command": "addenda tune", "base": "m", "options": {"method": "lora", "labels": None}, "steps": 3,
            "data": {"name": "d", "labels": ["a", "b"]}, "losses": [[1, 2.0]],
            "files": {"adapter.safetensors": "0" * 64},
        }  # fmt: skip
        (made(folder / "a") / "run.json").write_text(json.dumps(run))
        self.report = _report()
        (made(folder / "b") / "compress.json").write_text(json.dumps(self.report))
        return [folder / "a", folder / "b"]

    def read(self, place: Path, mutant: Mutant) -> Any:
        from addenda.compressing.report import read_report
        from addenda.models.load import _run_beside
        from addenda.train.card import read_run

        if mutant.source == 1:
            report = read_report(place)
            return report, str(report)
        run = read_run(place)
        beside = _run_beside(place / "adapter.safetensors")
        if run is None:
            raise AddendaError("no such note")
        return run, beside

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        if mutant.source == 1:
            said(
                json.loads((place / "compress.json").read_bytes()),
                json.loads(json.dumps(dataclasses.asdict(made[0]))),
                "report",
            )
        else:
            said(json.loads((place / "run.json").read_bytes()), made[0], "run.json")


def _report() -> dict:
    from addenda.compressing.report import Report

    sample: dict[str, Any] = {}
    for f in dataclasses.fields(Report):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            sample[f.name] = {"str": "x", "int": 3, "float": 0.5}.get(str(f.type), {})
    return sample


class ModelFolders(Target):
    """The headers and the index of a model's weights."""

    name = "model"

    def write(self, folder: Path) -> list[Path]:
        self.words = list(self.model.tensors)
        self.model.live.save_pretrained(folder / "one")
        self.model.live.save_pretrained(folder / "several", max_shard_size="2KB")
        for place in ("one", "several"):
            for other in (folder / place).glob("*.json"):
                if "index" not in other.name:
                    other.unlink()
        return [folder / "one", folder / "several"]

    def read(self, place: Path, mutant: Mutant) -> Any:
        from addenda.models.checkpoint_files import CheckpointFiles

        files = CheckpointFiles.of(place)
        return {k: files.read(k).clone() for k in files.tensors}

    def check(self, place: Path, mutant: Mutant, made: Any) -> None:
        """Every tensor has the bits that safetensors itself reads."""
        names = {p.name for p in place.glob("*.safetensors")}
        if "model.safetensors" not in names:  # a file that the index does not name is of nobody
            names = set(json.loads((place / "model.safetensors.index.json").read_bytes())["weight_map"].values())
        there: dict[str, Tensor] = {}
        for name in sorted(names):
            there |= load_file(place / name)
        same("names", there.keys(), made.keys())
        for k, tensor in made.items():
            same_tensor(k, there[k], tensor)


TARGETS: dict[str, Callable[[Path], Target]] = {
    t.name: t
    for t in (AdapterFiles, PeftFolders, GgufFiles, KohyaFiles, Checkpoints, Records, RunFiles, Notes, ModelFolders)
}
