"""How fast images come: out of files, out of what is kept of them, by transformers' own way; and how fast they go.

Pictures of 500 × 375 pixels are made here (coloured noise, smooth and fine), saved as JPEG, and prepared as DINOv2's
folder says: shorter side to 256, cropped to 224 × 224. What takes them is a training step of LoRA on DINOv2-small.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.measure import in_process

COUNT, BATCH, STEPS = 192, 16, 8
SIZE = (500, 375)


def run(given) -> tuple[dict, str]:
    found: dict[str, list[float]] = {}
    for r in range(given.rounds):
        for name, speed in in_process(rates, r, given.threads).items():
            found.setdefault(name, []).append(speed)
            print(name, f"{speed:.0f} images/s", flush=True)
    return found, table(found, given.threads)


def rates(seed: int, threads: int) -> dict[str, float]:
    """Images a second, by what is done."""
    from addenda.data.images import read_images
    from addenda.data.pixels import decode
    from addenda.models.preparation import preparation_of
    from addenda.models.vision import DINOV2

    torch.set_num_threads(threads)
    folder = DINOV2.model_folder()
    how = preparation_of(folder)
    with tempfile.TemporaryDirectory() as place:
        files = drawn(Path(place), seed)
        data = read_images(place)
        started = time.perf_counter()
        kept = decode(data, how)
        first = COUNT / (time.perf_counter() - started)
        anew = decode(data, how, keep=0)
        rows = [list(range(i, i + BATCH)) for i in range(0, COUNT, BATCH)]
        made = {
            "files: every image looked at before training": first,
            "files: batches, nothing kept": speed(lambda: [anew.batch(r) for r in rows]),
            "batches out of kept pixels": speed(lambda: [kept.batch(r) for r in rows]),
            "files: transformers' image processor (Pillow)": speed(lambda: theirs(folder, files)),
        }
        made["taken by a training step of LoRA"] = taken(folder, data)
    return made


def drawn(place: Path, seed: int) -> list[Path]:
    """COUNT JPEG files in two class folders."""
    from PIL import Image

    rng, files = np.random.default_rng(seed), []
    for i in range(COUNT):
        folder = place / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(SIZE, 3)
        fine = np.asarray(rough, np.int16) + rng.integers(-12, 13, (*SIZE[::-1], 3))
        files.append(folder / f"{i}.jpg")
        Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


def speed(work: Callable) -> float:
    started = time.perf_counter()
    work()
    return COUNT / (time.perf_counter() - started)


def theirs(folder: Path, files: list[Path]) -> None:
    from PIL import Image

    from addenda.models.pretrained import pretrained

    processor = pretrained("AutoImageProcessor", folder, backend="pil")
    for i in range(0, COUNT, BATCH):
        processor([Image.open(f) for f in files[i : i + BATCH]], return_tensors="pt")


def taken(folder: Path, data) -> float:
    """Images a second of a training step: LoRA of rank 8 on all linears."""
    import addenda as ad
    from addenda.models.load import load_model

    loaded = load_model(folder, labels=2)
    made = ad.tune(loaded.model, data, "lora", tokenizer=loaded.tokenizer, steps=STEPS, batch=BATCH, progress=False,
                   attention=None)  # fmt: skip
    return BATCH / made.step_seconds


def table(found: dict[str, list[float]], threads: int) -> str:
    rounds = len(next(iter(found.values())))
    about = f"JPEG of {SIZE[0]} × {SIZE[1]} pixels to 224 × 224, batches of {BATCH}, {threads} threads, {rounds} rounds"
    lines = [f"{about}; images a second.", "", "| | median (lowest to highest) |", "| --- | ---: |"]
    lines += [f"| {name} | {statistics.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f}) |" for name, v in found.items()]
    return "\n".join(lines)
