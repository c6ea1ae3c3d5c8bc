"""Files as no honest writer makes them: safetensors with any header, adapters with any entries, GGUF, PNG."""

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from addenda.core.file.header import BEFORE_DIGEST


def parts(file: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file as JSON, and the bytes behind it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def safetensors(file: Path, header: dict | bytes, data: bytes = b"") -> Path:
    """A file with any header, and the digest where its beginning asks for one."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    whole = len(text).to_bytes(8, "little") + text + data
    at = 8 + len(BEFORE_DIGEST)
    if text.startswith(BEFORE_DIGEST) and len(whole) >= at + 64:
        zeros = whole[:at] + b"0" * 64 + whole[at + 64 :]
        whole = whole[:at] + hashlib.sha256(zeros).hexdigest().encode() + whole[at + 64 :]
    file.write_bytes(whole)
    return file


def adapter(file: Path, change: Callable[[dict], Any]) -> Path:
    """An adapter file whose own header was changed, with a digest that is right."""
    header, data = parts(file)
    own = json.loads(header["__metadata__"]["addenda"])
    changed = change(own)
    text = changed if isinstance(changed, str) else json.dumps(own)
    return safetensors(file, header | {"__metadata__": {"addenda": text}}, data)


def at_path(sound: Path, file: Path, path: str) -> Path:
    """A copy of an adapter file in which its first site, and the tensors of that, are at another path."""
    header, data = parts(sound)
    own = json.loads(header["__metadata__"]["addenda"])
    old, own["sites"][0]["path"] = own["sites"][0]["path"], path
    renamed = {(f"{path}/{k.rpartition('/')[2]}" if k.startswith(f"{old}/") else k): v for k, v in header.items()}
    return safetensors(file, renamed | {"__metadata__": {"addenda": json.dumps(own)}}, data)


def edited(file: Path, **entries: Any) -> Path:
    """A JSON file with other entries."""
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return file


def copied(sound: Path, name: object) -> Path:
    """A copy of a file beside it."""
    return written(sound.with_name(f"{name}{sound.suffix}"), sound.read_bytes())


def written(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def line_added(sound: Path, name: str, line: bytes, folder: Path) -> Path:
    """A copy of a folder in which a file has one more line."""
    made = folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(sound, made)
    with (made / name).open("ab") as f:
        f.write(line + b"\n")
    return made


def wrong_shapes(sound: Path, folder: Path) -> Iterator[Path]:
    """Copies of a model's folder in which a weight is of a shape without bytes, on another's bytes, or outside."""
    header, data = parts(sound / "model.safetensors")
    one, other = [k for k in header if k != "__metadata__"][:2]
    for i, entry in enumerate(
        (
            {"shape": [2**62]},
            {"shape": [2**31, 2**31, 4]},
            {"data_offsets": header[one]["data_offsets"]},
            {"data_offsets": [2**62, 2**62 + 4]},
            {"dtype": "F7"},
            {"shape": [-1]},
            {"shape": "x"},
            {"data_offsets": [0]},
        )
    ):
        made = folder / str(i)
        shutil.copytree(sound, made)
        safetensors(made / "model.safetensors", header | {other: header[other] | entry}, data)
        yield made


def index(folder: Path, name: str) -> None:
    """Put all weights of a model's folder into one file beside it, and say that they are in another."""
    names = [k for k in parts(folder / "model.safetensors")[0] if k != "__metadata__"]
    (folder / "model.safetensors").rename(folder.parent / "kept.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)})
    )


class Harm:
    """What its pickle does as it is opened."""

    def __reduce__(self):
        return os.system, ("echo a pickle was opened",)


def gguf(*fields: bytes, tensors: bytes = b"", counts: tuple[int, int] = (0, 0), data: bytes = b"") -> bytes:
    """A GGUF file that claims as many tensors and fields as counts say."""
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(fields) + tensors + data


def gguf_text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def png(width: int, height: int) -> bytes:
    """A black image of any size, of which the first rows are there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min((1 + width // 8) * height, 10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
