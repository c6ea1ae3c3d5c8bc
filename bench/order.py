"""Ordering images: the relational head against its naive form, a step with both heads, and a folder ordered again.

The heads: forward and backward from patch states to scores of all ordered pairs. The naive form is written out here, as
the paper's code computes it: a softmax over the patches of both images for every pair. The step: forward, backward and
AdamW of the adapter, with both heads and with the regression head alone. Each arm has a process of its own, and they
take turns; memory is the peak of a step above what the process had before it saw a pair.

The folder: coloured noise as JPEG files, an encoder of DINOv2-small's shape and one of texts of e5's, whose numbers are
drawn at random, as time is none of their values. Ordered by a first sentence (every image is decoded and encoded), by
other ones that nobody has trained (patches out of the cache), and by a trained query whose scores are kept. The files
are listed and hashed before. `--quick`: few small images, little in everything. `--arms` chooses between | of "heads",
"step", "224 px", "126 px".
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import alternate, in_process, ratios, spread

FORMS, STEPS = ("naive", "factorised"), ("regression alone", "both heads")
SHAPE = {"images": 64, "patches": 100, "width": 384, "tokens": 16, "heads": 8}
QUICK = {"images": 12, "patches": 36, "width": 64, "tokens": 4, "heads": 4}
SIDES = {224: 4.0, 126: 2.0}  # pixels: what the next sentence is to be faster by
COUNT, FEW, AGAIN = 1000, 48, 100.0  # images; with --quick; what a kept query is to be faster by
MEMORY, TIME, STEP = 25.0, 30.0, 1.15
TRAINED, OTHERS = "how many red shoes", ("a sharp photo", "something blue", "an empty street", "two cats", "much sky")


def run(given) -> tuple[dict, str]:
    parts = given.arms.split("|") if given.arms else ["heads", "step", *(f"{side} px" for side in SIDES)]
    shape = QUICK if given.quick else SHAPE
    found: dict[str, Any] = dict(given.earlier) | {"shape": shape}
    for part, arms, function in (("heads", FORMS, head_step), ("step", STEPS, adapter_step)):
        if part in parts:
            jobs = [(shape, arm, given.threads) for arm in arms]
            found[part] = dict(zip(arms, alternate(jobs, given.rounds, function), strict=True))
    for side in SIDES:
        if f"{side} px" in parts:
            count = FEW if given.quick else COUNT
            found[f"{side} px"] = in_process(folder, side, count, given.rounds, given.threads, given.quick)
    return found, table(found)


def naive(head, states: torch.Tensor) -> torch.Tensor:
    """Return s, N × N, as it is commonly computed: both images' patches of every pair side by side, then a softmax."""
    query, keys = head.projected(states)  # h, M, d and N, h, P, d
    n, h, p, d = keys.shape
    first = keys[:, None].expand(n, n, h, p, d).reshape(n * n, h, p, d)
    second = keys[None].expand(n, n, h, p, d).reshape(n * n, h, p, d)
    weights = (query @ torch.cat([first, second], 2).transpose(-1, -2)).softmax(-1)  # N², h, M, 2P
    differences = weights[..., :p] @ first - weights[..., p:] @ second
    summed = head.out(differences.transpose(1, 2).flatten(2)).sum(1)  # N², D
    scores = head.score(summed).view(n, n)
    return scores - scores.t() if head.antisymmetric else scores


def head_step(shape: dict, form: str, threads: int) -> Iterator[dict]:
    """Steps of the head alone, one each time it is asked: seconds, and bytes at the peak above the start."""
    from addenda.ranking.order.pair_head import PairHead

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head = PairHead(shape["width"], shape["heads"], shape["tokens"])
    states = torch.randn(shape["images"], shape["patches"], shape["width"], generator=generator)

    def one(given: torch.Tensor) -> None:
        given = given.clone().requires_grad_()
        scores = naive(head, given) if form == "naive" else head(given)
        scores.sigmoid().sum().backward()
        head.zero_grad(set_to_none=True)

    yield from _steps(lambda: one(states), lambda: one(states[:2]))


def adapter_step(shape: dict, arm: str, threads: int) -> Iterator[dict]:
    """Steps of the whole adapter with AdamW, one each time it is asked: seconds and bytes at the peak."""
    from addenda.ranking.order.adapter import OrderAdapter
    from addenda.ranking.order.losses import OrderLoss
    from addenda.ranking.order.settings import OrderSettings

    torch.set_num_threads(threads)
    settings = OrderSettings(width=shape["width"], heads=shape["heads"], tokens=shape["tokens"])
    adapter = OrderAdapter(settings, shape["width"], shape["width"]).train()
    loss = OrderLoss() if arm == "both heads" else OrderLoss(regression=1.0, pairs=0.0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(shape["images"], shape["patches"], shape["width"], generator=generator)
    tokens, values = torch.randn(8, shape["width"], generator=generator), torch.randn(shape["images"])

    def one(n: int) -> None:
        loss.of_values(adapter(patches[:n], tokens, pairs=loss.needs_pairs), values[:n]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    yield from _steps(lambda: one(shape["images"]), lambda: one(2))


def _steps(one: Any, small: Any) -> Iterator[dict]:
    from addenda.models.machine import Peak, resident

    small()  # what is loaded at first use is loaded
    floor = resident() or 0
    one()
    yield {}
    while True:
        started = time.perf_counter()
        with Peak() as peak:
            one()
        yield {"wall": time.perf_counter() - started, "memory": (peak.bytes or 0) - floor}


def folder(side: int, count: int, rounds: int, threads: int, quick: bool) -> dict:
    """Seconds of one order of a folder: by a first sentence, by others, and by a trained query that is kept."""
    from addenda.ranking.order.adapter import OrderAdapter
    from addenda.ranking.order.file import Made, Scale
    from addenda.ranking.order.rank import ImageOrder, images_in
    from addenda.ranking.order.settings import OrderSettings
    from addenda.ranking.order.towers import load_towers

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as place:
        os.environ["ADDENDA_CACHE"] = str(Path(place) / "cache")
        image, text = encoders(Path(place), quick)
        drawn(Path(place) / "photos", count)
        towers = load_towers(image=image, text=text, image_size=side)
        settings = OrderSettings(width=QUICK["width"], heads=QUICK["heads"]) if quick else OrderSettings()
        widths = towers.image_width, towers.text_width
        made = Made(settings, widths, towers.identity, {TRAINED: Scale(), "a quiet room": Scale()})
        order = ImageOrder(towers, OrderAdapter(settings, *widths), made)
        pictures = images_in(Path(place) / "photos")

        def seconds(sentence: str) -> float:
            started = time.perf_counter()
            order.rank(pictures, sentence)
            taken = time.perf_counter() - started
            print(f"{side} px, {sentence!r}: {taken:.3f} s", flush=True)
            return taken

        first = seconds(TRAINED)
        others = [seconds(s) for s in OTHERS[:rounds]]
        again = [seconds(TRAINED) for _ in range(rounds)]
        return {"images": count, "patches": len(dict(order.features.of(pictures[:1]))[0]), "made": order.features.made,
                "first": first, "others": others, "again": again}  # fmt: skip


def encoders(place: Path, quick: bool) -> tuple[Path, Path]:
    """Write encoders of DINOv2-small's and e5's shapes, drawn at random, with few words; small if quick."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast

    from addenda.models.vision import HEADS, LAYERS, PATCH, PREPARED, SIDE, WIDTH

    width, heads, layers = (QUICK["width"], QUICK["heads"], 3) if quick else (WIDTH, HEADS, LAYERS)
    torch.manual_seed(0)
    vision = Dinov2Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, patch_size=PATCH,
                          image_size=SIDE)  # fmt: skip
    Dinov2Model(vision).save_pretrained(place / "image")
    (place / "image" / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    words = dict.fromkeys(" ".join((TRAINED, "a quiet room", *OTHERS)).split())
    known = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *words))}
    text = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=len(known),
                      intermediate_size=4 * width)  # fmt: skip
    BertModel(text).save_pretrained(place / "text")
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(place / "text")
    return place / "image", place / "text"


def drawn(place: Path, count: int) -> None:
    """Write so many JPEG files of 320 × 240 pixels, each of coloured noise of its own."""
    import numpy as np
    from PIL import Image

    place.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        small.resize((320, 240), Image.Resampling.BICUBIC).save(place / f"{i:04d}.jpg", quality=90)


def table(found: dict) -> str:
    s = found["shape"]
    lines = [f"{s['images']} images of {s['patches']} patches, width {s['width']}, {s['tokens']} relational tokens, "
             f"{s['heads']} heads, float32; ratios of one turn.", "",
             "| | seconds | peak, MB | time | memory | bar |", "| --- | ---: | ---: | --- | --- | --- |"]  # fmt: skip
    if "heads" in found:
        before, after = (found["heads"][form] for form in FORMS)
        faster, smaller = (ratios(before, after, key) for key in ("wall", "memory"))
        met = statistics.median(faster) >= TIME and statistics.median(smaller) >= MEMORY
        lines += [_row("pair head, naive", before), _row("pair head, factorised: naive to it", after, faster, smaller,
                  f"{TIME:.0f}, {MEMORY:.0f}: {_met(met)}")]  # fmt: skip
    if "step" in found:
        alone, both = (found["step"][arm] for arm in STEPS)
        slower, larger = (ratios(both, alone, key) for key in ("wall", "memory"))
        lines += [_row("step, regression head alone", alone), _row("step, both heads: to that", both, slower, larger,
                  f"{STEP:.2f}: {_met(statistics.median(slower) <= STEP)}")]  # fmt: skip
    folders = [(side, found[f"{side} px"]) for side in SIDES if f"{side} px" in found]
    if folders:
        lines += ["", "| a folder | first sentence | another one | a kept query | first to another | first to kept |",
                  "| --- | ---: | ---: | ---: | --- | --- |"]  # fmt: skip
    for side, row in folders:
        other, again = (statistics.median(row[key]) for key in ("others", "again"))
        bars = ((row["first"] / other, SIDES[side]), (row["first"] / again, AGAIN))
        said = " | ".join(f"{ratio:.1f} (bar {bar:.0f}: {_met(ratio >= bar)})" for ratio, bar in bars)
        lines.append(f"| {row['images']:,} images, {side} px, {row['patches']} patches each | {row['first']:.1f} s "
                     f"| {other:.2f} s | {again * 1e3:.1f} ms | {said} |")  # fmt: skip
    return "\n".join(lines)


def _row(
    name: str, made: list[dict], times: Sequence[float] = (), memories: Sequence[float] = (), bar: str = ""
) -> str:
    wall, peak = (statistics.median(m[key] for m in made) for key in ("wall", "memory"))
    found = " | ".join(spread(r) if r else "" for r in (times, memories))
    return f"| {name} | {wall:.3f} | {peak / 1e6:,.0f} | {found} | {bar} |"


def _met(reached: bool) -> str:
    return "met" if reached else "not met"
