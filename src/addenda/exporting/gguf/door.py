"""GGUF as a door: how a method passes it, writing, reading and describing."""

from pathlib import Path

from addenda.core.adapter.handle import Adapter
from addenda.exporting.gguf.describe import describe as describe
from addenda.exporting.gguf.read import read as read
from addenda.exporting.gguf.write import rounding, write_adapter
from addenda.exporting.gguf.write import route as route
from addenda.exporting.pairs import Pair


def write(adapter: Adapter, place: Path, pairs: dict[str, Pair], *, dtype: str = "f32") -> dict[str, float]:
    """Write every change as B A to a new GGUF file; return what is lost by rounding, by path, where dtype is "f16"."""
    write_adapter(adapter, place, pairs, dtype=dtype)
    return {path: (pair.error**2 + lost**2) ** 0.5 for path, pair, lost in rounding(pairs, dtype)}
