"""Tiles and cloth in the place of Fashion-MNIST's and of conformal-clip-data's, for `recipes.order`."""

import io
import zipfile

import numpy as np
from PIL import Image
from recipes.order_data import SPLITS, TILE

EACH = 40  # tiles of a class in a split


def toy_tiles():
    """Tiles that say what they are: the split, the class and the number stand in their pixels."""
    found = {}
    for s, split in enumerate(SPLITS):
        labels = np.tile(np.arange(10), EACH).astype(np.uint8)
        images = np.zeros((len(labels), TILE, TILE), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = s + 1, labels + 1
        images[:, 0, 2] = np.arange(len(labels)) // 10 + 1
        images[:, 8:20, 8:20] = 80 + 10 * labels[:, None, None]
        found[split] = (images, labels)
    return found


def toy_wheel(file):
    """A file as conformal-clip-data's: 40 images, of which the sound ones are grey."""
    with zipfile.ZipFile(file, "w") as held:
        for shade, (kind, count) in enumerate((("nominal", 80), ("global", 40), ("local", 40))):
            for n in range(1, count + 1):
                made = io.BytesIO()
                Image.new("RGB", (30, 30), (60 * shade, n, 0)).save(made, "JPEG")
                held.writestr(f"x/data/textile_images/simulated/{kind}/textile_{n:04}.jpg", made.getvalue())
    return file
