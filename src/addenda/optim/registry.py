"""The optimizers that a run can name: each a function or class (adapter, rate, weight_decay, options …).

An optimizer enters itself with `@optimizer("name", paper=…)`. Its text form is that of a method,
"lora-pro:mode=sgd"; options are its keyword arguments after the first three. One that follows a schedule of its own
asks for the length of the run with an argument called `steps`.
"""

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.ranges import Range
from addenda.core.method.catalogue import parse_spec, same_place
from addenda.core.method.options import misfit, parse_value

Optimizers = Callable[[Adapter, float, float], torch.optim.Optimizer]  # (adapter, rate, weight_decay)
_COMMON = ("adapter", "rate", "weight_decay", "steps")


@dataclass(frozen=True)
class Info:
    """An optimizer of the registry: what makes it, and its options with their defaults."""

    name: str
    paper: str
    make: Callable[..., torch.optim.Optimizer]

    @property
    def about(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.make) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, object]:
        found = inspect.signature(self.make).parameters
        return {k: p.default for k, p in found.items() if k not in _COMMON}

    @property
    def scheduled(self) -> bool:
        return "steps" in inspect.signature(self.make).parameters


_known: dict[str, Info] = globals().get("_known", {})  # kept when this module is loaded again


def optimizer(name: str, *, paper: str) -> Callable:
    """Decorator: enter an optimizer under `name`."""

    def enter(make):
        if name in _known and not same_place(_known[name].make, make):
            raise ValueError(f"two optimizers are called {name!r}")
        _known[name] = Info(name, paper, make)
        return make

    return enter


def known() -> dict[str, Info]:
    """Return every optimizer by name."""
    return dict(_known)


def named(given: str | Optimizers, adapter: Adapter, steps: int | None = None) -> tuple[str, Optimizers]:
    """Return (label, function) of a name with options, of "auto", or of a function (adapter, rate, weight_decay).

    "auto" is what the adapter's methods are trained by. steps: the length of the run, for those with a schedule.
    Raises AddendaError for an unknown name or option, and when the methods of "auto" disagree.
    """
    if not isinstance(given, str):
        return getattr(given, "__qualname__", type(given).__name__), given
    spec = _own(adapter) if given == "auto" else given
    info, options = parsed(spec)
    if info.scheduled:
        if steps is None:
            raise AddendaError(f"{info.name!r} follows a schedule and wants the number of steps: give steps=.")
        options["steps"] = steps
    return spec, partial(info.make, **options)


def parsed(spec: str) -> tuple[Info, dict[str, object]]:
    """Return the optimizer of "name:option=value", and its options. Raises AddendaError for an unknown one."""
    name, texts = parse_spec(spec)
    if name not in known():
        raise AddendaError(
            f"optimizer must be 'auto', {', '.join(map(repr, known()))} or a function, got {name!r}."
            f"{nearest(name, known())}"
        )
    info = known()[name]
    return info, {key: _value(info, key, text) for key, text in texts.items()}


@checked(special={"rate": Range(0, 1e6)})  # 0: a schedule may begin there
def build(
    adapter: Adapter, spec: str = "auto", rate: float = 1e-3, weight_decay: float = 0.0, *, steps: int | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of an adapter, for a training loop of your own.

    spec: a name with options, such as "lora-pro:mode=efficient"; "auto" is what the adapter's method is trained by.
    Raises AddendaError as `named` does, when nothing of the adapter may train, and when the optimizer cannot train it.
    """
    if not any(p.requires_grad for p in adapter.parameters()):
        raise AddendaError(
            f"No tensor of adapter {adapter.name!r} may train, so that an optimizer has nothing to do. Call "
            "adapter.requires_grad_() first, or load it with trainable=True."
        )
    return named(spec, adapter, steps)[1](adapter, rate, weight_decay)


def _own(adapter: Adapter) -> str:
    asked = dict.fromkeys(m.trained_by for m in adapter.methods.values() if m.trained_by != "adamw")
    if len(asked) > 1:
        raise AddendaError(
            f"The methods of adapter {adapter.name!r} want different optimizers, {' and '.join(map(repr, asked))}; "
            "give optimizer= one name."
        )
    return next(iter(asked), "adamw")


def _value(info: Info, key: str, text: str) -> object:
    if key not in info.options:
        listed = ", ".join(f"{k}={v!r}" for k, v in info.options.items()) or "none"
        raise AddendaError(f"{info.name} has no option {key!r}.{nearest(key, info.options)} Its options: {listed}.")
    hint = typing.get_type_hints(info.make.__init__ if inspect.isclass(info.make) else info.make)[key]
    value = parse_value(text, hint)
    if problem := misfit(key, value, hint):
        raise AddendaError(f"{info.name}: {problem}.")
    return value
