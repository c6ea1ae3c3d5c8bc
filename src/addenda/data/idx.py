"""The idx format of MNIST and its relatives, and where Debian puts Fashion-MNIST.

A file is: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as four bytes, most
significant first, and then the values; usually gzipped. A folder holds `train-images-idx3-ubyte`,
`train-labels-idx1-ubyte` and the same with `t10k` for the test split, each with or without `.gz`.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from addenda.core.base.errors import AddendaError
from addenda.data.unpacked import check_unpacked

FASHION = "fashion-mnist"
PLACE = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
LARGEST = 1 << 32  # bytes of one file


def located(path: str | Path) -> Path:
    """Return the folder itself; for the name fashion-mnist, where no such folder is, the one of Debian's package.

    Raises AddendaError, with the command that installs it, when the package is not there.
    """
    path = Path(path).expanduser()
    if str(path) != FASHION or path.exists():
        return path
    if not PLACE.is_dir():
        raise AddendaError(
            f"Fashion-MNIST is not at {PLACE}, where Debian's package puts it. Run `apt-get install {PACKAGE}` (31 MB),"
            " or name a folder that holds its four files."
        )
    return PLACE


def parts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return (images, labels) of each split that the folder holds in this format."""
    files = {}
    for split, prefixes in PREFIXES.items():
        for prefix in prefixes:
            pair = [_file(folder, f"{prefix}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
            if pair[0] is not None and pair[1] is not None:
                files[split] = (pair[0], pair[1])
    return files


def _file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def load(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels as uint8. Raises AddendaError for files that are cut, too long, or not of one set.

    Shapes: (n × height × width, n).
    """
    pictures, classes = _read(images, 3), _read(labels, 1)
    if len(pictures) != len(classes):
        raise AddendaError(
            f"{images} holds {len(pictures):,} images and {labels} {len(classes):,} labels. They are not of one set."
        )
    return pictures, classes


def _read(path: Path, dimensions: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            head = f.read(4 + 4 * dimensions)
            if len(head) < 4 + 4 * dimensions or head[:4] != bytes((0, 0, 8, dimensions)):
                raise ValueError(
                    f"it begins with {head[:4].hex(' ') or 'nothing'}, expected 00 00 08 0{dimensions}: bytes in "
                    f"{dimensions} dimensions"
                )
            shape = [int(n) for n in np.frombuffer(head, ">u4", offset=4)]
            size = math.prod(shape)
            if size > LARGEST:
                raise ValueError(f"it claims {' × '.join(map(str, shape))} bytes")
            check_unpacked(size, path.stat().st_size, "An array")
            values = f.read(size + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise AddendaError(f"{path} cannot be read as idx: {error}. Fetch it again.") from None
    if len(values) != size:
        size_text = "more" if len(values) > size else f"{len(values):,}"
        raise AddendaError(f"{path} claims {size:,} bytes of values and holds {size_text}. Fetch it again.")
    return np.frombuffer(values, np.uint8).reshape(shape)


def names(folder: Path) -> tuple[str, ...] | None:
    """Return the classes of a folder called after Fashion-MNIST; None for another, whose labels are numbers."""
    return CLOTHES if folder.name == FASHION else None
