"""GGUF as a door: how a method passes it, writing, reading and describing."""

from pathlib import Path

from addenda.core.adapter.handle import Adapter
from addenda.exporting.gguf.describe import describe as describe
from addenda.exporting.gguf.read import read as read
from addenda.exporting.gguf.write import route as route
from addenda.exporting.gguf.write import write_adapter
from addenda.exporting.pairs import Pair


def write(adapter: Adapter, place: Path, pairs: dict[str, Pair], *, dtype: str = "f32") -> None:
    """Write every change as B A to a new GGUF file."""
    write_adapter(adapter, place, pairs, dtype=dtype)
