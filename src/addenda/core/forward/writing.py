"""Whether a model is being written by a function that writes models whole, and what is said where a change is lost."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def whole_model(method: Callable, args: tuple, options: dict[str, Any]) -> Any:
    """Call a method that writes a model whole, whatever its name: `in_save_pretrained` knows this function's frame."""
    return method(*args, **options)


def in_save_pretrained() -> bool:
    """Return whether the running code is called by a `save_pretrained`, and by no Trainer for a checkpoint of its own.

    Costs a walk up the stack, some microseconds.
    """
    names = _callers()
    return bool(names & {"save_pretrained", whole_model.__name__}) and "_save_checkpoint" not in names


def in_a_checkpoint() -> bool:
    """Return whether a Trainer (transformers' or one that is derived from it) is writing a checkpoint of its own."""
    return "_save_checkpoint" in _callers()


def _callers() -> set[str]:
    names: set[str] = set()
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names


def loss(acting: str, name: str) -> str:
    """Return the message about a change that a file of the base would not hold, with the ways out."""
    return (
        f"{acting} acts on this model without being merged, and {name} writes weights by the base's names: what it "
        "writes would come back as the base. No weight was written. Ways: adapter.save(file), which "
        "addenda.load(model, file) brings back; addenda.merge(model), then the same call again, which writes the "
        "merged weights; or, for the base as it is, addenda.switch(model, None) first. In a Trainer's run "
        "addenda.TrainerCallback(adapter) puts the adapter's file into every checkpoint."
    )
