"""Images as examples: class folders, idx files, `datasets` sets and files with a column of images.

| source                                   | class                                                              |
| ---------------------------------------- | ------------------------------------------------------------------ |
| FOLDER/[train/]CLASS/*.jpg, *.png, …     | the folder's name                                                  |
| FOLDER/train-images-idx3-ubyte[.gz], …   | of the labels' file (MNIST's form; "fashion-mnist": Debian's copy) |
| datasets.save_to_disk, a Dataset         | a column of labels beside one of images                            |
| Parquet, JSON Lines, CSV, a list of rows | the same; images as bytes, {"bytes", "path"}, or paths             |

Nothing is decoded here, only read once to be hashed: an example's place in any split depends on its bytes alone.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.disk.access import sha256_of
from addenda.data import idx
from addenda.data.columns import collect, first_of, label_column, present, scale_in, table
from addenda.data.examples import Data, Picture, Stored
from addenda.data.labels import WHOLE, LabelKind, checked, scale_of, short
from addenda.data.prepare import plain
from addenda.data.rows import SUFFIXES as ROWS

if TYPE_CHECKING:
    pass

IMAGES = ("image", "img", "picture", "photo", "file_name", "path")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",), "ood": ("ood",)}
LITTER = ("thumbs.db", "desktop.ini")


@cache
def pool() -> ThreadPoolExecutor:
    """Return the threads that read and decode: both leave Python's lock for most of their time."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="addenda-images")


if hasattr(os, "register_at_fork"):  # threads are not forked: a child that waited for these would wait for ever
    os.register_at_fork(after_in_child=pool.cache_clear)


def read_images(
    source: Any,
    *,
    split: str = "train",
    image: str | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    outputs: int | None = None,
    label_kind: LabelKind | None = None,
) -> Data:
    """Return the pictures of one split. image, label: columns. labels: the classes, in the order of the outputs.

    outputs: how many there are, where a head does not name them. label_kind: "class" is all that images have.

    Class folders are given in the order of a hash, so that the first n are of all classes; others in their own order.
    Raises AddendaError for what is missing, unreadable or of no known class, by file or row.
    """
    if label_kind == "number":
        raise AddendaError("label_kind='number' is for texts; what is learned of images is their class.")
    labels = checked(labels)
    if isinstance(source, str | Path):
        path = idx.located(source)
        if path.is_dir() and (files := idx.parts(path)):
            return _idx(path, files, split, labels, outputs)
        if path.is_dir() and (tree := _tree(path)):
            return _folders(path, tree, split, labels, outputs)
        source = path
    return _columns(source, split, image, label, labels, outputs, label_kind)


def parts(source: Any) -> list[str]:
    """Return the splits of a folder of idx files or class folders; nothing for any other source."""
    if not isinstance(source, str | Path):
        return []
    path = idx.located(source)
    return (list(idx.parts(path)) or [s for s in _tree(path) if s]) if path.is_dir() else []


# -- idx ---------------------------------------------------------------------------------------------------------------


def _idx(path: Path, found: dict, split: str, labels: Sequence[str] | None, outputs: int | None) -> Data:
    if split not in found:
        raise AddendaError(f"{path} has no split {split!r} as idx files; it has {', '.join(found)}.")
    images, classes = idx.load(*found[split])
    source, names = f"{path}[{split}]", idx.names(path)
    scale = scale_of(
        classes.tolist(), found[split][1].name, names=labels, own=names, outputs=outputs, kind="class", source=source
    )
    try:
        places = {k: int(scale.of(k)) for k in set(classes.tolist())}
    except ValueError as error:
        raise AddendaError(f"{source}: {error} Give labels= in the order of the numbers.") from None
    pairs = enumerate(zip(images, classes.tolist(), strict=True))
    examples = (Picture(_key(p), places[c], f"{found[split][0].name}, image {i}", p) for i, (p, c) in pairs)
    return Data(tuple(examples), "image", scale.names, source, scale.said)


# -- class folders -----------------------------------------------------------------------------------------------------


def _tree(path: Path) -> dict[str, list[Path]]:
    """Return class folders by split; {} where the folder is not made of them. An unnamed split is "train".

    Raises AddendaError for images without a class folder: here, or in folders of splits that stand alone.
    """
    folders = _inside(path, folders=True)
    rows = any(p.suffix.lower() in ROWS for p in _inside(path, folders=False))
    if rows:  # a file of them, or what datasets.save_to_disk wrote
        return {}
    by_split = {s: p for s, names in SPLITS.items() for p in folders if p.name in names and _inside(p, folders=True)}
    if by_split:
        return {split: _inside(p, folders=True) for split, p in by_split.items()}
    split_names = {name for names in SPLITS.values() for name in names}
    if all(p.name in split_names for p in folders):  # beside other classes, "train" may be one too
        _refuse_flat(folders or [path])
    return {"train": folders} if folders else {}


def _refuse_flat(splits: list[Path]) -> None:
    for p in splits:
        if _images(p) and not _inside(p, folders=True):
            raise AddendaError(
                f"{p} holds images but no class folder, so that nothing says of what class they are; expected "
                f"{p.name}/CLASS/IMAGE. Sort them into one folder for each class."
            )


def _inside(path: Path, folders: bool) -> list[Path]:
    paths = (p for p in sorted(path.iterdir()) if not p.name.startswith(".") and p.name.lower() not in LITTER)
    return [p for p in paths if p.is_dir() == folders]


def _images(path: Path) -> list[Path]:
    return [p for p in _inside(path, folders=False) if p.suffix.lower() in SUFFIXES]


def _folders(
    path: Path, tree: dict[str, list[Path]], split: str, labels: Sequence[str] | None, outputs: int | None
) -> Data:
    if split not in tree:
        _refuse_flat([p for p in _inside(path, folders=True) if p.name in SPLITS.get(split, ())])
        raise AddendaError(f"{path} has no split {split!r}; it has {', '.join(tree)}.")
    classes = tuple(p.name for p in tree[split])
    if not classes:
        raise AddendaError(f"{path} has no class folder for the split {split!r}; expected {split}/CLASS/IMAGE.")
    counted = labels is None and outputs is not None and all(map(WHOLE.fullmatch, classes))
    if labels is None and outputs not in (None, len(classes)) and not counted:
        raise AddendaError(
            f"{path}[{split}] has {len(classes)} class folders, and the model's head has {outputs} outputs without "
            "names. Give labels= in the order of the model's outputs."
        )
    names = tuple(labels or (map(str, range(outputs)) if counted and outputs else classes))
    places = dict.fromkeys((path, *(folder.parent for folder in tree[split])))
    files, problems = [], [f"{p} is an image beside the class folders" for place in places for p in _images(place)]
    for folder in tree[split]:
        members = _inside(folder, folders=False)
        if folder.name not in names:
            problems.append(
                f"{folder} is of no known class{nearest(folder.name, names)} (known: {', '.join(names[:8])})"
            )
        elif not members and not _inside(folder, folders=True):
            problems.append(f"{folder} holds no image")
        problems += [f"{p} is a folder inside a class" for p in _inside(folder, folders=True)]
        problems += [f"{p} is no image by its ending" for p in members if p.suffix.lower() not in SUFFIXES]
        files += [(p, folder.name) for p in members if p.suffix.lower() in SUFFIXES]
    if problems:
        rest = f"; … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise AddendaError(
            f"{len(problems)} things in {path} do not belong there: {'; '.join(problems[:5])}{rest}. Images "
            f"({', '.join(SUFFIXES)}) lie in one folder for each class; remove or rename the rest."
        )
    index = {n: i for i, n in enumerate(names)}
    keys = pool().map(sha256_of, [p for p, _ in files])
    pictures = [Picture(k, index[c], str(p.relative_to(path)), p) for k, (p, c) in zip(keys, files, strict=True)]
    note = f"{len(names):,} classes by folder: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
    return Data(tuple(sorted(pictures, key=lambda p: p.key)), "image", names, f"{path}[{split}]", note)


# -- columns -----------------------------------------------------------------------------------------------------------


def _columns(
    source: Any,
    split: str,
    image: str | None,
    label: str | None,
    labels: Sequence[str] | None,
    outputs: int | None,
    label_kind: LabelKind | None,
) -> Data:
    rows, columns = table(source, split)
    name = rows.name
    label_name = label or label_column(columns, name)
    roles = present(columns, name, image=image or first_of(columns, IMAGES), label=label_name)
    scale = scale_in(rows, roles["label"], labels, outputs, label_kind)
    if scale.names is None:
        raise AddendaError(f"{name}: column {roles['label']!r} holds numbers with fractions, classes were expected.")
    place = Path(source).expanduser() if isinstance(source, str | Path) else Path()
    folder = place.parent if place.is_file() else place

    def make(row: dict) -> Picture:
        stored, file_name = _stored(row.get(roles["image"]), roles["image"], folder)
        return Picture(_key(stored), int(scale.of(row.get(roles["label"]))), file_name, stored)

    pictures = collect(rows, make)
    names = (p.name or f"{name}, {rows.place(i)}" for i, p in enumerate(pictures))
    examples = tuple(Picture(p.key, p.label, n, p.stored) for p, n in zip(pictures, names, strict=True))
    return Data(examples, "image", scale.names, name, scale.said)


def _stored(value: Any, column: str, beside: Path) -> tuple[Stored, str]:
    """Return (what `Picture` keeps, a name if it has one). Raises ValueError."""
    name = ""
    if isinstance(value, dict) and {"bytes", "path"} & set(value):
        name, value = value.get("path") or "", value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value, name
    if isinstance(value, str | Path) and str(value):
        path = beside / value
        try:
            there = path.is_file()
        except OSError:  # longer than a name can be, as an image in base64 is
            there = False
        if not there:
            name = str(path) if len(str(value)) <= 255 else f"{short(value)}; decode base64 to bytes first"
            raise ValueError(f"column {column!r}: there is no file {name}")
        return path, str(value)
    if hasattr(value, "convert") and hasattr(value, "mode"):  # an image of Pillow's
        value = _held(value, column)
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
        return value, name
    raise ValueError(f"column {column!r} holds {type(value).__name__}, an image, its bytes or its path were expected")


def _held(picture: Any, column: str) -> np.ndarray:
    """Return the pixels of an image of Pillow's, as the same image in a file would have them. Raises ValueError."""
    try:
        return np.asarray(plain(picture))
    except (ValueError, OSError) as error:
        raise ValueError(f"column {column!r} holds an image that cannot be taken: {error}") from None


def _key(stored: Stored) -> str:
    if isinstance(stored, Path):
        return sha256_of(stored)
    digest = hashlib.sha256(stored if isinstance(stored, bytes) else b"")
    if isinstance(stored, np.ndarray):
        digest.update(repr(stored.shape).encode() + np.ascontiguousarray(stored).tobytes())
    return digest.hexdigest()
