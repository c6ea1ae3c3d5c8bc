"""A decorator of public functions that checks their arguments: names are known, kinds fit, numbers are in range.

    @checked(also=("rate", "schedule"))        # names that **options may hold
    def tune(model, *, batch=16, **options): ...

Without it a function that passes `**options` on swallows what nobody reads, and a number is found to be impossible
after the model was loaded or changed. The names are those of the signature, `also` and the fields of a class of
settings; numbers are held against `core.base.ranges`, by name, and other values against their annotations, all of them
before the function begins.
"""

import dataclasses
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from torch import nn

from addenda.core.base import ranges
from addenda.core.base.errors import AddendaError, nearest

P = ParamSpec("P")
R = TypeVar("R")
Translation = Callable[[dict[str, Any], Iterable[str], str], dict[str, Any]]  # (options, own names, whose) -> options
_GIVEN = nn.Module()  # in the place of a model that was not given, which Python says itself
_KEYWORD = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_KINDS: dict[Any, tuple[type, str]] = {  # of an annotation: what fits it, and how it is called
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    dict: (Mapping, "a dict"),
    types.NoneType: (types.NoneType, "None"),
    nn.Module: (nn.Module, "a torch.nn.Module"),
}


def no_model(given: object) -> str:
    """Return what is said of something in the place of a model."""
    way = " Load it first: from_pretrained of transformers reads a folder." if isinstance(given, str | Path) else ""
    way = way or (" Its .model is one." if isinstance(getattr(given, "model", None), nn.Module) else "")
    return f"Expected a torch.nn.Module as the model, got {type(given).__name__}.{way}"


def check_batches(name: str, given: object) -> None:
    """Raise AddendaError for what is no list of batches: of one batch every row, or key, would be taken for a batch."""
    one = isinstance(given, str | bytes | Mapping) or hasattr(given, "shape")
    if one or not isinstance(given, Iterable):
        raise AddendaError(
            f"{name} is a list of batches for the model, or a loader; got a {type(given).__name__}. Give [batch]."
        )


def checked(
    *,
    also: Iterable[str] = (),
    settings: type | None = None,
    translate: Translation | None = None,
    special: Mapping[str, ranges.Range] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to refuse, before it runs, unknown names, numbers out of range and values of another kind.

    also: further names, which the function takes as **options. settings: a dataclass; its documented fields are such
    names too, and stand in the signature. translate: turns other names into these first. special: ranges of this
    function's own. The function then raises AddendaError where it raised TypeError for a name.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        signature, name = _with_fields(function, settings), getattr(function, "__qualname__", "the call")
        name = name.removesuffix(".__init__").rpartition(".")[2]  # a class is called by its name
        hints = {n: p.annotation for n, p in signature.parameters.items() if p.kind in _KEYWORD}
        names = tuple(dict.fromkeys([*hints, *also]))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            options: dict[str, Any] = translate(dict(kwargs), names, name) if translate else dict(kwargs)
            if unknown := [k for k in options if k not in names]:
                raise AddendaError(unknown_names(unknown, names, name))
            arguments = signature.bind_partial(*args, **options).arguments
            if hints.get("model") is nn.Module and not isinstance(arguments.get("model", _GIVEN), nn.Module):
                raise AddendaError(no_model(arguments["model"]))
            extras = {k: v for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD for k, v in
                    arguments.get(p.name, {}).items()}  # fmt: skip
            problems = ranges.problems({**arguments, **extras}, special)
            told = {problem.partition(" ")[0] for problem in problems}
            problems += [
                problem for k, v in arguments.items()
                if k in hints and k not in told and (problem := _misfit(k, v, hints[k]))
            ]  # fmt: skip
            if problems:
                raise AddendaError(f"{name} cannot be called so: {'; '.join(problems)}.")
            return function(*args, **options)  # type: ignore[arg-type]

        vars(call)["__signature__"] = signature
        return call

    return wrap


def _misfit(name: str, value: Any, hint: Any) -> str | None:
    """Return why an argument cannot have this value; None where it can, or where its function says so better.

    What a list must hold, which words are known and what is a path is not looked at here.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    arms = typing.get_args(hint) if union else (hint,)
    words = []
    for arm in arms:
        origin, inner = typing.get_origin(arm), typing.get_args(arm)
        listed, named = (isinstance(origin, type) and issubclass(origin, kind) for kind in (Iterable, Mapping))
        if arm is str or (origin is Literal and all(isinstance(word, str) for word in inner)):
            fits, word = isinstance(value, str) or (not union and isinstance(value, Hashable)), "a text"
        elif origin is Callable:
            fits, word = callable(value), "a function"
        elif listed and (inner[0] in _KINDS or inner[0] is Any):
            fits, word = not isinstance(value, numbers.Number | None), "a list"
            if named:
                fits, word = isinstance(value, Mapping), "a dict"
        elif arm in _KINDS:
            known, word = _KINDS[arm]
            fits = isinstance(value, known) and (arm is bool or not isinstance(value, bool))
        else:
            return None
        if fits:
            return None
        words.append(word)
    plain = isinstance(value, numbers.Number | str | None)
    kind = (value if isinstance(value, type) else type(value)).__name__
    got = repr(value)[:100] if plain else f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
    return f"{name} must be {' or '.join(dict.fromkeys(words))}, got {got}"


def _with_fields(function: Callable, settings: type | None) -> inspect.Signature:
    """Return a function's signature, with a dataclass's documented fields as keywords that it takes as **options."""
    signature = inspect.signature(function)
    if settings is None:
        return signature
    *named, options = signature.parameters.values()
    fields = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(settings)
        if f.metadata and f.name not in signature.parameters
    ]
    return signature.replace(parameters=[*named, *fields, options])


def unknown_names(unknown: Iterable[str], own: Iterable[str], whose: str, known: Iterable[str] = ()) -> str:
    """Return the message for options that nobody reads. known: names to suggest, where not `own`."""
    own = tuple(own)
    listed = "; ".join(f"{k!r}.{nearest(k, tuple(known) or own)}" for k in unknown)
    return f"{whose} has no option {listed} Its options: {', '.join(own)}."


def names_of(function: Callable, without: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names of a function's keyword-only options, except those in `without`."""
    omitted = set(without)
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in omitted)
