"""Merging and extracting on disk: memory above start against the largest shard, and time against copying and hashing.

Each measurement is a process of its own. It starts when torch, transformers and addenda are imported and a small pair
of folders has been through the same call, so that the code of kernels and of the model's class is in memory. The check
on a probe batch is off, as it loads models. The base is SmolLM2 in float32, saved again in shards of at most 60 MB. The
adapter is a LoRA of rank 16 on every linear layer, moved at random. "tuned" is its merge; "tuned throughout" has every
weight moved, the embedding too, which is the largest shard by itself.

Copying and hashing is what a shell would do: `cp`, then SHA-256 of every copy, flushed to the disk as a merge is. The
two are timed in turn; "load" is how many processes wanted a core then. Processor seconds are what all threads worked,
whatever else ran on the machine. Parts that --arms names (time, merge, extract, between |) are measured anew, and the
others on record stay.
"""

import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.measure import in_process

SHARDS = "60MB"
EXTRACTS = {"patch": {"to": "patch"}, "lora, rank 16": {"to": "lora", "rank": 16}}
MERGES = {"merge": {}, "merge to bfloat16": {"dtype": "bfloat16", "allow_loss": 1.0}}
PARTS = ("time", "merge", "extract")


def run(given) -> tuple[dict, str]:
    parts = given.arms.split("|") if given.arms else PARTS
    folder = Path(tempfile.mkdtemp(prefix="on-disk-"))
    try:
        in_process(_prepare, folder)
        found = {"shards": _shards(folder / "base"), "memory": list(given.earlier.get("memory", []))}
        found["time"] = given.earlier.get("time")
        if "time" in parts:
            found["time"] = in_process(_time, folder, given.threads, given.rounds)
        jobs = [(what, _merge, (options,)) for what, options in MERGES.items()] if "merge" in parts else []
        if "extract" in parts:
            jobs += [(f"extract {what}, {tuned}", _extract, (tuned, options))
                     for tuned in ("tuned", "tuned throughout") for what, options in EXTRACTS.items()]  # fmt: skip
        for what, function, arguments in jobs:
            row = {"what": what} | in_process(function, folder, given.threads, *arguments)
            found["memory"] = [r for r in found["memory"] if r["what"] != what] + [row]
            print(row, file=sys.stderr, flush=True)
        return found, table(found)
    finally:
        shutil.rmtree(folder)


def table(found: dict) -> str:
    shards, times = found["shards"], found["time"]
    largest = shards["largest"]
    lines = [
        f"{shards['count']} shards, {shards['total'] / 2**20:,.0f} MiB, the largest {largest / 2**20:,.0f} MiB.", "",
        "| | MiB above start | of the largest shard | seconds |", "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in found["memory"]:
        share = row["above"] / largest
        lines.append(f"| {row['what']} | {row['above'] / 2**20:,.0f} | {share:.2f} | {row['seconds']:.1f} |")
    if times is None:
        return "\n".join(lines)
    lines += [
        "", "| | seconds | of copying and hashing | processor seconds |", "| --- | ---: | ---: | ---: |",
        f"| copying and hashing | {times['copy']['wall']:.2f} | | {times['copy']['cpu']:.2f} |",
        f"| merge | {times['merge']['wall']:.2f} | {times['ratio']:.2f} | {times['merge']['cpu']:.2f} |",
    ]  # fmt: skip
    return "\n".join(lines)


def _shards(folder: Path) -> dict:
    sizes = [p.stat().st_size for p in folder.glob("*.safetensors")]
    return {"count": len(sizes), "largest": max(sizes), "total": sum(sizes)}


def _prepare(folder: Path) -> None:
    """Write the base in shards, an adapter, and two tuned models; and the same of a model of a few kilobytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import addenda as ad
    from addenda.models.embedded import model_folder

    source = model_folder()
    small = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    torch.manual_seed(0)
    LlamaForCausalLM(small).save_pretrained(folder / "small")
    for name, start in (("base", source), ("small base", folder / "small")):
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        model.save_pretrained(folder / name, max_shard_size=SHARDS)
        adapter = ad.attach(model, "lora:rank=16")
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p) * 0.02)
        adapter.save(folder / f"{name}.safetensors")
        ad.merge(model)
        ad.detach(model, keep_merged=True)
        model.save_pretrained(folder / name.replace("base", "tuned"), max_shard_size=SHARDS)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 1e-3)
        model.save_pretrained(folder / name.replace("base", "tuned throughout"), max_shard_size=SHARDS)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "base")


def _measured(function, threads: int) -> dict:
    """Run a function, and return the seconds that it took and the resident bytes that it had above those before."""
    import gc

    import torch

    from addenda.models.machine import Peak, resident

    torch.set_num_threads(threads)
    gc.collect()
    before, started = resident() or 0, time.perf_counter()
    with Peak() as peak:
        function()
    return {"above": (peak.bytes or 0) - before, "seconds": time.perf_counter() - started}


def _merge(folder: Path, threads: int, options: dict) -> dict:
    import addenda as ad

    ad.merge_on_disk(folder / "small base", folder / "small base.safetensors", folder / "warm", check=False, **options)
    shutil.rmtree(folder / "warm")
    out = folder / "out"
    try:
        return _measured(
            lambda: ad.merge_on_disk(folder / "base", folder / "base.safetensors", out, check=False, **options), threads
        )
    finally:
        shutil.rmtree(out)


def _extract(folder: Path, threads: int, tuned: str, options: dict) -> dict:
    import addenda as ad

    warm, out = folder / "warm.safetensors", folder / "out.safetensors"
    ad.extract(folder / "small base", folder / f"small {tuned}", warm, check=False, **options)
    warm.unlink()
    try:
        measured = _measured(lambda: ad.extract(folder / "base", folder / tuned, out, check=False, **options), threads)
        return measured | {"bytes": out.stat().st_size}
    finally:
        out.unlink()


def _time(folder: Path, threads: int, rounds: int) -> dict:
    """Return wall and processor seconds of both, and the ratio of the wall ones, medians over the rounds."""
    import torch

    import addenda as ad
    from addenda.models.embedded import model_folder

    torch.set_num_threads(threads)
    source = model_folder()  # as it is: one file

    def copy() -> None:
        (folder / "copy").mkdir()
        for path in sorted(source.iterdir()):
            shutil.copyfile(path, folder / "copy" / path.name)
            with open(folder / "copy" / path.name, "rb") as file:
                hashlib.file_digest(file, "sha256")
                os.fsync(file.fileno())

    def merge() -> None:
        ad.merge_on_disk(source, folder / "base.safetensors", folder / "copy", check=False)

    turns: list[dict] = []
    for _ in range(rounds + 1):
        turn = {}
        for name, work in (("copy", copy), ("merge", merge)):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            turn[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            shutil.rmtree(folder / "copy")
        turns.append(turn)
        print(turn, file=sys.stderr, flush=True)
    turns = turns[1:]  # the first one imports the model's class
    made = {name: {k: median(t[name][k] for t in turns) for k in ("wall", "cpu")} for name in ("copy", "merge")}
    ratios = sorted(t["merge"]["wall"] / t["copy"]["wall"] for t in turns)
    return made | {"ratio": median(ratios), "ratios": ratios, "load": os.getloadavg()[0]}
