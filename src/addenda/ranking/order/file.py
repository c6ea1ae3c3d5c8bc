"""The one file of an adapter that orders images: its tensors, what it was made with, and its own digest.

It names both encoders and the tokenizer by what decides their numbers, so it acts on the very ones that it was trained
on, or is refused. No pickle, no code; one changed bit anywhere is an error.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.disk.access import parse_json, path_of, shown
from addenda.core.disk.place import file_for
from addenda.core.file.container import DIGITS, says, sound, write
from addenda.ranking.order.adapter import OrderAdapter
from addenda.ranking.order.settings import OrderSettings

FORMAT = "addenda order 1"
_ENTRY, _BEFORE = "order", b'{"__metadata__":{"order":"{\\"sha256\\":\\"'


@dataclass(frozen=True)
class Scale:
    """The units of a query: value = score × spread + centre."""

    centre: float = 0.0
    spread: float = 1.0


@dataclass(frozen=True)
class Made:
    """What an adapter was made with. towers: `Towers.identity`; scales: of every trained query, in order.

    training: options, loss and digest of the data, for people and for resuming; versions too.
    """

    settings: OrderSettings
    widths: tuple[int, int]
    towers: Mapping[str, Any]
    scales: Mapping[str, Scale]
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def grid(self) -> int:
        """To how many patches squared those of an image were pooled; the default where a file does not say it."""
        found = self.towers.get("grid")
        return found if type(found) is int and found > 0 else 10

    @property
    def image_size(self) -> int | None:
        """The side of the square that images were made in training; None where they were none, or one of gigabytes."""
        preparation = self.towers.get("preparation")
        match preparation.get("resize") if isinstance(preparation, Mapping) else None:
            case [int(height), int(width)] if height == width and 0 < width <= 1 << 13:
                return width
        return None


def save_order(path: str | Path, adapter: OrderAdapter, made: Made) -> Path:
    """Write the file, whole or not at all; over an older one of the kind only. Returns its path."""
    place = file_for(path, is_order_file, what="out")
    tensors = {name: t.detach() for name, t in adapter.state_dict().items()}
    if bad := [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]:
        raise AddendaError(f"{bad[0]} holds values that are not finite ({len(bad)} tensors do), so nothing is saved.")
    about = {
        "sha256": "0" * DIGITS, "format": FORMAT, "settings": asdict(made.settings), "widths": list(made.widths),
        "towers": dict(made.towers), "training": dict(made.training),
        "scales": {q: [s.centre, s.spread] for q, s in made.scales.items()},
    }  # fmt: skip
    text = json.dumps(about, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    write(place, {_ENTRY: text}, tensors, _BEFORE)
    return place


def load_order(path: str | Path) -> tuple[OrderAdapter, Made]:
    """Read a file that `save_order` wrote; the adapter is in evaluation mode.

    Raises AddendaError for any other file, one that was changed, and tensors that are not those of its settings.
    """
    place = path_of(path)
    if not place.exists():
        raise AddendaError(f"There is no file {shown(place)}. Give the file that `addenda order train` wrote.")
    with sound(place) as file:
        if _ENTRY not in file.metadata:
            raise ValueError("it is of another kind: an adapter that orders images was expected")
        made = _made(parse_json(file.metadata[_ENTRY]))
        with torch.device("meta"):
            expected = {
                n: t.shape for n, t in OrderAdapter(made.settings, *made.widths, begin=False).state_dict().items()
            }
        found = {n: shape for n, (_, shape) in file.forms.items()}
        wrong = [n for n in {*expected, *found} if tuple(expected.get(n, ())) != tuple(found.get(n, (-1,)))]
        wrong += [n for n, (dtype, _) in file.forms.items() if dtype != torch.float32]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are not those of its settings, {label(sorted(wrong)[0])} for one")
        tensors, digest = file.proven(_BEFORE)
        if digest is None:
            raise ValueError("it does not carry its digest where it is expected")
    adapter = OrderAdapter(made.settings, *made.widths, begin=False)
    adapter.load_state_dict(tensors)
    return adapter.eval(), made


def is_order_file(path: Path) -> bool:
    """Return whether a file says that it is of this kind."""
    return says(path, _ENTRY)


def check_towers(made: Made, towers: Mapping[str, Any], path: object) -> None:
    """Raise AddendaError where the encoders are not the ones that a file was trained on; says which."""
    other = [k for k in {*made.towers, *towers} if made.towers.get(k) != towers.get(k)]
    if other:
        words = {"image": "the image encoder", "text": "the text encoder", "tokenizer": "the tokenizer",
                 "preparation": "how images are prepared", "grid": "the grid of patches"}  # fmt: skip
        named = [words.get(k, k) for k in sorted(other)]
        raise AddendaError(
            f"{shown(str(path))} was trained with other encoders than these: {', '.join(named)} differ"
            f"{'s' * (len(named) == 1)}. Give the same folders, and the same image_size (--image-size), as in training."
        )


def _made(about: Any) -> Made:
    """Return what the entry of a file says. Raises ValueError for what `save_order` does not write."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(
            f"its format is {label(about.get('format') if isinstance(about, dict) else about)}, {FORMAT!r} was expected"
        )
    if set(about) != {"sha256", "format", "settings", "widths", "towers", "training", "scales"}:
        raise ValueError(f"its entries are {label(sorted(about))}")
    said, widths, scales = about["settings"], about["widths"], about["scales"]
    if not isinstance(said, dict) or set(said) != {f.name for f in fields(OrderSettings)}:
        raise ValueError("its settings are not those of an adapter that orders images")
    sound_widths = (
        isinstance(widths, list) and len(widths) == 2 and all(type(w) is int and 0 < w <= 1 << 16 for w in widths)
    )
    if not sound_widths or not isinstance(about["towers"], dict) or not isinstance(about["training"], dict):
        raise ValueError("it does not say what encoders it is for")
    if not isinstance(scales, dict) or not scales or not all(_scale(s) for s in scales.values()):
        raise ValueError("its scales are not two finite numbers for each query, of one at least")
    try:
        settings = OrderSettings(**said)
    except AddendaError as error:
        raise ValueError(str(error)) from None
    many = max(settings.layers, settings.after, settings.ratio) > 64
    if max(settings.width, settings.prompts, settings.tokens) > 1 << 14 or many:
        raise ValueError("its settings are of an adapter of many gigabytes")
    made = {q: Scale(float(c), float(s)) for q, (c, s) in scales.items()}
    return Made(settings, (widths[0], widths[1]), about["towers"], made, about["training"])


def _scale(said: Any) -> bool:
    numbers = isinstance(said, list) and len(said) == 2 and all(type(v) in (int, float) for v in said)
    return numbers and all(map(math.isfinite, said)) and said[1] > 0
