"""Writes the golden files: what this version saves, and what the adapted bases gave, for every later version to load.

    python tests/golden/write.py schema2        a new folder; one that exists is never written into

`schema1` was written by the code of commit 188f10b, with more options than are written now. It stored only those that
differ from their defaults, so that a default which changes later must be remembered for these files
(`Method.formerly`). `schema2` is the first with a digest: of each method the defaults, codes, and all kinds of layer.
`manifest.json` names, for every file, the base, the method, all options that held, and the step; `outputs.safetensors`
holds the ids and what the model gave, in evaluation and, where nothing is random, in training.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from bases import VOCAB, WIDTH, Growing, Kinds, Layers, Twins
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
    """(what differs, options): the defaults, and in codes."""
    yield "defaults", FITS.get(info.name, {})
    yield "bits=4,ste=plain", FITS.get(info.name, {}) | small_of(info) | {"bits": 4, "ste": "plain"}


def small_of(info: ad.Info) -> dict:
    """SMALL, as far as the method has such options and its variant leaves them free."""
    fields = {f.name: f for f in dataclasses.fields(info.cls)}
    small = {k: v for k, v in SMALL.items() if k in fields and k not in info.preset}
    small = {k: v for k, v in small.items() if not isinstance(fields[k].default, bool)}
    return small | ({"target_rank": 2} if "target_rank" in fields else {})


def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = {"layers": Layers, "kinds": Kinds, "growing": Growing, "twins": Twins}[name]()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3)
        for module in made.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1.0)
        if name == "twins":
            made.layers[0].self_attn.o_proj.weight.copy_(made.layers[0].self_attn.v_proj.weight)
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


def grown(table: nn.Embedding) -> nn.Embedding:
    """A table with two rows more."""
    made = nn.Embedding(len(table.weight) + 2, WIDTH)
    with torch.no_grad():
        made.weight.copy_(torch.cat([table.weight, torch.randn(2, WIDTH)]))
    return made


def targets_of(info: ad.Info) -> list[str] | None:
    if not issubclass(info.cls, WeightMethod) or info.name in ("ln-tuning", "bitfit", "trainable-tokens", "clover"):
        return None
    return ["*.q_proj", "*.up_proj"]


def main(folder: Path) -> None:
    folder.mkdir()
    torch.set_num_threads(1)
    ids = torch.arange(40).reshape(2, 20) * 5 % VOCAB
    outputs, manifest = {"ids": ids}, {}
    for name in ("layers", "kinds", "growing", "twins"):
        save_file(base(name).state_dict(), folder / f"base-{name}.safetensors")

    def write(key: str, model: nn.Module, adapter: ad.Adapter, base: str, method, ids=ids, **how) -> None:
        file = f"{len(manifest):03}.safetensors"
        adapter.save(folder / file, **how)
        if ids is not outputs["ids"]:
            outputs[f"{file}/ids"] = ids
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
    model = base("growing")
    model.embed = grown(model.embed)
    ad.grow(model, base_rows=VOCAB)
    adapter = stir(ad.attach(model, ad.LoRA(rank=2), targets=["embed", "*.q_proj"], seed=7))
    write("lora:rank=2: new rows", model, adapter, "growing", ad.LoRA(), ids=ids % (VOCAB + 2))
    model = base("twins")
    method = ad.core.method.catalogue.build("nola:rank=2,basis=16")
    adapter = stir(ad.attach(model, method, targets=["*.v_proj"], seed=7))
    file, at = folder / "renamed.safetensors", "layers.0.self_attn"
    adapter.save(file)
    ad.detach(model)
    adapter = ad.load(model, file, rename={f"{at}.v_proj": f"{at}.o_proj"})
    file.unlink()
    write("nola:rank=2,basis=16: at another path", model, adapter, "twins", method)
    save_file(outputs, folder / "outputs.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    print(len(manifest), "files")


if __name__ == "__main__":
    main(Path(__file__).parent / sys.argv[1])
