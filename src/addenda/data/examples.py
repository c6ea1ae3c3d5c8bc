"""Data as examples: files, folders and lists of dicts become pairs, chats or labelled texts.

| form  | columns, by name                                              | learned by            |
| ----- | ------------------------------------------------------------- | --------------------- |
| chat  | messages: [{"role", "content"}, …], the assistant's turns learned | a causal LM       |
| pair  | question/answer, prompt/completion, instruction(+input)/output    | a causal LM       |
| label | text/label, sentence/label, premise+hypothesis/label              | a classifier      |
| text  | text, or the lines of a .txt file (see `plain`)                   | a masked LM       |

Columns with other names are named by the caller. A file is JSON Lines, a JSON list, CSV (with a header) or Parquet; a
folder is one of `datasets.save_to_disk`, or holds `train.jsonl`, `test.csv` and the like. Nothing is downloaded.
Images, which a vision model classifies, are a fourth form: see `images`.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from addenda.core.base.errors import AddendaError
from addenda.data.unpacked import check_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

TaskKind = Literal["causal", "label", "image", "masked"]
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")  # never EPS, which is a program


@dataclass(frozen=True)
class Pair:
    """A prompt and the one answer to learn."""

    question: str
    answer: str
    place: str = field(default="", repr=False, compare=False)  # in the source, for messages

    @property
    def key(self) -> str:
        return self.question


@dataclass(frozen=True)
class Chat:
    """(role, content) turns, the last one the assistant's.

    more: what there is besides, as JSON: "turns", by position, what each holds (tool_calls, weight, …), and what
    belongs to the whole chat (tools, documents, chat_template_kwargs).
    """

    messages: tuple[tuple[str, str], ...]
    more: str = field(default="", repr=False)
    place: str = field(default="", repr=False, compare=False)  # in the source, for messages

    @property
    def key(self) -> str:
        text = "\x1e".join(f"{role}\x1f{content}" for role, content in self.messages[:-1])
        if not self.more:
            return text
        extras = json.loads(self.more)
        turns = {k: v for k, v in extras.pop("turns", {}).items() if int(k) < len(self.messages) - 1}
        return f"{text}\x1e{json.dumps([extras, turns])}"


@dataclass(frozen=True)
class Labelled:
    """A text, or a pair of texts, and its class (an index into the data's `labels`) or its value."""

    text: str
    label: int | float
    pair: str | None = None
    place: str = field(default="", repr=False, compare=False)  # in the source, for messages

    @property
    def key(self) -> str:
        return self.text if self.pair is None else f"{self.text}\x1e{self.pair}"


@dataclass(frozen=True)
class Text:
    """A text without anything said of it."""

    text: str
    place: str = field(default="", repr=False, compare=False)  # in the source, for messages

    @property
    def key(self) -> str:
        return self.text


@dataclass(frozen=True)
class Data:
    """Examples of one form, in the order of the source. labels: the names of the classes; None for values.

    said: what was understood of the labels, in words.
    """

    examples: "tuple[Pair | Chat | Labelled | Text | Picture, ...]"
    form: Literal["pair", "chat", "label", "text", "image"]
    labels: tuple[str, ...] | None = None
    source: str = "memory"
    said: str = field(default="", repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.examples)

    def place(self, i: int) -> str:
        """Return where example i is in the source, for messages."""
        return getattr(self.examples[i], "place", "") or f"row {i}"

    @property
    def digest(self) -> str:
        """SHA-256 of the examples and label names: equal data, equal digest, wherever it was stored."""
        digest = hashlib.sha256(repr((self.form, self.labels)).encode())
        for example in self.examples:
            digest.update(repr(example).encode() + getattr(example, "more", "").encode())
        return digest.hexdigest()

    def split(self, fraction: float, seed: int = 0) -> tuple["Data", "Data"]:
        """Return (rest, held out), by a hash of the prompt or image: the same one is never in both, on any machine.

        fraction: expected share held out, in (0, 1). Raises AddendaError when either part would be empty.
        """
        if not 0 < fraction < 1:
            raise AddendaError(f"The share to hold out must be between 0 and 1, got {fraction}.")
        flags = [share(e.key, seed) < fraction for e in self.examples]
        parts = [tuple(e for e, h in zip(self.examples, flags, strict=True) if h == side) for side in (False, True)]
        if not all(parts):
            raise AddendaError(
                f"Holding out {fraction:g} of the {len(self)} examples of {self.source} leaves one part empty (equal "
                "ones are held out together). Give more data, another share, or a file for evaluation."
            )
        return replace(self, examples=parts[0]), replace(self, examples=parts[1])


def share(key: str, seed: int) -> float:
    """Return where in [0, 1) an example falls, by a hash of what it asks."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{key}".encode()).digest()[:7], "big") / 2**56


Stored = Path | bytes | np.ndarray


@dataclass(frozen=True)
class Picture:
    """An image, not decoded, and its class. key: SHA-256 of what is stored: equal images have equal keys.

    name: the file, or the row of a file. stored: a path, the bytes of a file, or pixels (height × width [× 3], uint8).
    """

    key: str
    label: int
    name: str = field(repr=False, compare=False)
    stored: Stored = field(repr=False, compare=False)

    def open(self) -> "Image":
        """Return the image, decoded. Raises whatever the decoder does for a file that is none, or of a giant image."""
        from PIL import Image

        if isinstance(self.stored, np.ndarray):
            return Image.fromarray(self.stored)
        path, data = (self.stored, b"") if isinstance(self.stored, Path) else (None, self.stored)
        with Image.open(BytesIO(data) if path is None else path) as image:  # only its head is read
            if image.format not in FORMATS:
                raise ValueError(f"its format is {image.format}, expected one of {', '.join(FORMATS)}")
            check_pixels(*image.size, len(data) if path is None else path.stat().st_size)
            image.load()
        return image
