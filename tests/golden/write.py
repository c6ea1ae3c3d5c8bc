"""Writes the golden files: what this version saves, and what the adapted bases gave, for every later version to load.

    python tests/golden/write.py schema1        a new folder; one that exists is never written into

`schema1` was written by the code of commit 188f10b, which stored only the options that differ from their defaults, so
that a default which changes later must be remembered for these files (`Method.formerly`). `manifest.json` names, for
every file, the base, the method, all options that held, and the step; `outputs.safetensors` holds the ids and what the
model gave, in evaluation and, where nothing is random, in training.
"""

import dataclasses
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import torch
from bases import VOCAB, Kinds, Layers
from safetensors.torch import save_file
from torch import nn

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import WeightMethod

FITS = {  # what 64 × 64 and 128 × 64 need where the defaults refuse them
    "vera": {"rank": 64},
    "psoft": {"rank": 16},
    "vb-lora": {"length": 32, "vectors": 16},
    "randlora": {"rank": 16},
    "miss": {"rank": 32},
    "bat": {"rank": 32},
}
OTHER = {  # a value that differs from the default, where the general rule below gives none that fits
    "factor": 4,
    "mini": 8,
    "dropout": 0.25,
    "rho": 2.0,
    "terms": 5,
    "gamma": 4.0,
    "first": 2,
    "last": 1,
    "tokens": "1+3-5",
    "density": 0.05,
    "temperature": 2.0,
    "quasi": True,
    "frozen": True,
    "min_rank": 2,
    "unit": 2,
    "target_rank": 3,
    "levels": 3,
    "group": 4,
    "topk": 3,
    "frequencies": 50,
    "d_initial": 0.5,
    "strength": 3.0,
    "band": 3,
    "block": 16,
    "parts": 2,
    "places": 3,
    "basis": 32,
    "rank": 4,
    "alpha": 24.0,
    "vectors": 24,
    "length": 16,
    "scale": 0.5,
    "count": 30,
}
NEEDS = {  # what an option needs beside it to act at all
    ("svft", "band"): {"pattern": "banded"},
    ("shira", "block"): {"mask": "block"},
    ("oft", "terms"): {"block": 8},
    ("loldu", "alpha"): {"train_sigma": True},
    ("adalora", "target_rank"): {"rank": 6},
    ("boft", "levels"): {"block": 4},
    ("dylora", "unit"): {"rank": 8},
    ("shira", "mask"): {"density": 0.05},
    ("svft", "full_matrices"): {"pattern": "banded"},
}
SMALL = {"rank": 4, "places": 3, "vectors": 16, "length": 16, "frequencies": 50, "basis": 32}  # of files but the first
KINDS = {  # what 8 × 8, 16 × 8 and 8 × 16 need, beside SMALL
    "oft": {"block": 4}, "boft": {"block": 2, "levels": 2}, "ether": {"parts": 2}, "ether-plain": {"parts": 2},
    "vera": {"rank": 8}, "shira": {"density": 0.2}, "svft": {"pattern": "banded", "band": 2}, "c3a": {"block": 4},
    "fourierft": {"frequencies": 16}, "lokr": {"rank": 1}, "krona": {}, "mora": {"rank": 2},
    "adalora": {"rank": 4, "target_rank": 2}, "lora-ga": {"rank": 2}, "vb-lora": {"vectors": 8, "length": 4, "rank": 2},
    "clover": {"block": 4, "pairs": "none"}, "psoft": {"rank": 4}, "ssvd": {"rank": 4}, "miss": {"rank": 4},
    "bat": {"rank": 4}, "lora-xs": {"rank": 2}, "nola": {"rank": 2, "basis": 16},
}  # fmt: skip


def variants(info: ad.Info) -> Iterator[tuple[str, dict]]:
    """(what differs, options): the defaults, then each option at each other value that it may have."""
    fits = FITS.get(info.name, {})
    yield "defaults", fits
    hints = typing.get_type_hints(info.cls)
    fields = {f.name: f for f in dataclasses.fields(info.cls) if f.name not in ("bits", "ste")}
    small = fits | small_of(info)
    for name, field in fields.items():
        if name in info.preset:
            continue
        choices = [v for v in typing.get_args(hints[name]) if isinstance(v, str)] if field.type is not None else []
        values = choices or ([not field.default] if isinstance(field.default, bool) else [OTHER[name]])
        for value in values:
            if value != field.default:
                beside = NEEDS.get((info.name, name), {})
                yield f"{name}={value}", small | beside | {name: value}
    yield "bits=1", small | {"bits": 1}
    yield "bits=4,ste=plain", small | {"bits": 4, "ste": "plain"}


def small_of(info: ad.Info) -> dict:
    """SMALL, as far as the method has such options and its variant leaves them free."""
    fields = {f.name: f for f in dataclasses.fields(info.cls)}
    small = {k: v for k, v in SMALL.items() if k in fields and k not in info.preset}
    small = {k: v for k, v in small.items() if not isinstance(fields[k].default, bool)}
    return small | ({"target_rank": 2} if "target_rank" in fields else {})


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = {"layers": Layers, "kinds": Kinds}[name]()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3)
        for module in made.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1.0)
    return made.eval()


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).square().mean()


def adapt(model: nn.Module, method, ids: torch.Tensor, **options) -> ad.Adapter:
    """Attach, and move every trained tensor by noise of the size of a few hundred steps."""
    if method.calibration:
        options |= {"calibration": [ids], "loss": loss_of}
    return stir(ad.attach(model, method, seed=7, **options))


def stir(adapter: ad.Adapter) -> ad.Adapter:
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    adapter.draw(5)
    return adapter


def targets_of(info: ad.Info) -> list[str] | None:
    if not issubclass(info.cls, WeightMethod) or info.name in ("ln-tuning", "bitfit", "trainable-tokens", "clover"):
        return None
    return ["*.q_proj", "*.up_proj"]


def main(folder: Path) -> None:
    folder.mkdir()
    torch.set_num_threads(1)
    ids = torch.arange(40).reshape(2, 20) * 5 % VOCAB
    outputs, manifest = {"ids": ids}, {}
    for name in ("layers", "kinds"):
        save_file(base(name).state_dict(), folder / f"base-{name}.safetensors")

    def write(key: str, model: nn.Module, adapter: ad.Adapter, base: str, method, **how) -> None:
        file = f"{len(manifest):03}.safetensors"
        adapter.save(folder / file, **how)
        with torch.no_grad():
            outputs[f"{file}/eval"] = model(ids)
            training = outputs[f"{file}/eval"] if method.dropout else model.train()(ids)
            model.eval()
        if not torch.equal(training, outputs[f"{file}/eval"]):  # a schedule's values of this step
            outputs[f"{file}/train"] = training
        held = {m.name or "": m.options(defaults=True) for m in adapter.methods.values()}
        manifest[file] = {"what": key, "base": base, "methods": held, "sites": list(adapter.methods)}
        ad.detach(model)

    for info in ad.catalogue():
        if info.family == "composition":
            continue
        for what, options in variants(info):
            model = base("layers")
            targets = ["*.q_proj"] if options.get("pattern") == "topk" else targets_of(info)  # square weights only
            try:
                method = info.build(**options)
                adapter = adapt(model, method, ids, targets=targets)
            except AddendaError as error:
                print("skipped", info.name, what, str(error)[:150])
                continue
            write(f"{info.name}: {what}", model, adapter, "layers", method)
        if issubclass(info.cls, WeightMethod):
            model = base("kinds")
            method = info.build(**small_of(info) | KINDS.get(info.name, {}))
            paths = ["embed", "linear", "conv1d", "line", "plane", "volume", "matrix", "experts"]
            if method.calibration == "input":
                paths = [p for p in paths if p not in ("embed", "matrix", "experts")]
            for _ in list(paths):
                try:
                    adapter = adapt(model, method, ids, targets=paths)
                    break
                except AddendaError as error:
                    bad = [p for p in paths if f"{p}:" in str(error)] or paths[-1:]
                    paths = [p for p in paths if p not in bad]
            else:
                print("no kinds for", info.name)
                continue
            print("kinds", info.name, paths)
            write(f"{info.name}: kinds of layer", model, adapter, "kinds", method)
    for what, spec, more, how in (
        ("a head", "lora:rank=2", {"also_train": ["score"]}, {}),
        ("a head in 8 bits", "lora:rank=2,bits=4", {"also_train": ["score"], "head_bits": 8}, {}),
        ("latent", "lora:rank=2,bits=4", {}, {"latent": True}),
        ("basis", "svft:pattern=banded,band=2", {}, {"basis": True}),
        ("basis", "pissa:rank=2", {}, {"basis": True}),
        ("basis", "loldu:rank=4", {}, {"basis": True}),
    ):
        model, method = base("layers"), ad.core.method.catalogue.build(spec)
        adapter = adapt(model, method, ids, targets=["*.q_proj", "*.up_proj"], **more)
        write(f"{spec}: {what}", model, adapter, "layers", method, **how)
    model = base("layers")
    adapter = ad.attach(model, {"*.q_proj": "svft:pattern=banded,band=2", "*.up_proj": ad.DoRA(rank=2)}, seed=7)
    stir(adapter)
    write("two methods in one file", model, adapter, "layers", ad.DoRA())
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    print(len(manifest), "files")


if __name__ == "__main__":
    main(Path(__file__).parent / sys.argv[1])
