"""Seconds to read, check and load an adapter file of 100 MB, against safetensors' reading and one SHA-256 of the file.

The adapter is a LoRA of rank 84 on every linear layer of SmolLM2-135M in float32, moved at random. "unproven" is
`safetensors.torch.load_file` and one SHA-256 of the file, one after the other: what anybody pays who wants the tensors
and the proof. "read" is what `ad.load` begins with: header, tensors, digest, checks of form. "load" is `ad.load` onto a
model whose weights were never hashed, "base" one SHA-256 of the weights at the adapter's sites. All four by turns; the
file lies in the system's cache.
"""

import hashlib
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.measure import in_process

RANK = 84  # 102 MB


def run(given) -> tuple[dict, str]:
    folder = Path(tempfile.mkdtemp(prefix="loading-"))
    try:
        found = in_process(_seconds, folder, given.threads, given.rounds)
    finally:
        shutil.rmtree(folder)
    return found, table(found)


def table(found: dict) -> str:
    s = {what: median(values) for what, values in found["seconds"].items()}
    bound = 2 * s["unproven"] + s["base"]
    return "\n".join(
        [
            f"{found['bytes'] / 1e6:,.0f} MB, {found['tensors']:,} tensors; base {found['base_bytes'] / 1e6:,.0f} MB.",
            "",
            "| | seconds | |",
            "| --- | ---: | --- |",
            f"| load_file and a SHA-256 | {s['unproven']:.3f} | {s['load_file']:.3f} of it load_file |",
            f"| read and check | {s['read']:.3f} | {s['read'] / s['unproven']:.2f} × that |",
            f"| a SHA-256 of the base's weights | {s['base']:.3f} | |",
            f"| load | {s['load']:.3f} | {s['load'] / bound:.2f} × (2 × load_file and SHA-256, and the base's) |",
        ]
    )


def _seconds(folder: Path, threads: int, rounds: int) -> dict:
    import torch
    from safetensors.torch import load_file

    import addenda as ad
    from addenda.core.file.header import read
    from bench.arms import build

    torch.set_num_threads(threads)
    model = build("smollm2").float()
    adapter = ad.attach(model, ad.LoRA(rank=RANK))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape) * 0.01)
    file = adapter.save(folder / "x.safetensors")
    weights = [model.get_submodule(path).weight for path in adapter.methods]
    ad.detach(model)

    def unproven() -> None:
        load_file(file)
        with file.open("rb") as f:
            hashlib.file_digest(f, "sha256")

    def base() -> None:
        for weight in weights:
            hashlib.sha256(weight.detach().numpy().data)

    def load() -> float:
        for weight in weights:
            weight.data.mul_(1)  # another version, so that no hash is remembered
        started = time.perf_counter()
        ad.load(model, file)
        seconds = time.perf_counter() - started
        ad.detach(model)
        return seconds

    def timed(work) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {what: [] for what in ("unproven", "load_file", "read", "base", "load")}
    for i in range(rounds + 1):
        taken = {
            "unproven": timed(unproven), "load_file": timed(lambda: load_file(file)), "read": timed(lambda: read(file)),
            "base": timed(base), "load": load(),
        }  # fmt: skip
        for what in seconds if i else ():  # the first round warms up
            seconds[what].append(taken[what])
    size = sum(w.numel() * w.element_size() for w in weights)
    return {"bytes": file.stat().st_size, "tensors": 2 * len(weights), "base_bytes": size, "seconds": seconds}
