"""Options of methods: converting text to values, and saying why a value does not fit."""

import types
import typing
from typing import Literal

import torch

from addenda.core.base.visible import label


def said(bits: int) -> str:
    """Return a number of bits in words: "1 bit", "2 bits"."""
    return "1 bit" if bits == 1 else f"{bits} bits"


LARGEST = torch.finfo(torch.float32).max  # of an option: what float32 holds


def parse_value(text: str, hint) -> object:
    """Convert an option's text to its annotated type; text that does not fit stays text, to be refused later."""
    for kind in _choices(hint):
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _choices(hint) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def misfit(name: str, value: object, hint) -> str | None:
    """Return why an option of this name cannot have this value under its annotation, or None."""
    expected = []
    for kind in _choices(hint):
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return None
            expected.append("one of " + ", ".join(map(repr, typing.get_args(kind))))
        else:
            fits = isinstance(value, (int, float) if kind is float else kind)
            many = isinstance(value, int) and value.bit_length() > 63  # torch takes no such whole number, as 10**30
            if isinstance(value, (int, float)) and (many or not abs(value) <= LARGEST):
                text = repr(value) if isinstance(value, float) else f"a whole number of {value.bit_length()} bits"
                most = 2**63 - 1 if many else LARGEST
                return f"{name} must be finite and at most {most:.1e}, got {text}"
            if fits and not (isinstance(value, bool) and kind is not bool):
                return None
            expected.append("None" if kind is type(None) else kind.__name__)
    return f"{name} must be {' or '.join(expected)}, got {label(repr(value))}"
