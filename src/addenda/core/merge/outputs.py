"""A model's outputs on one batch: every floating tensor in them, wherever it stands.

A batch is a tensor, a tuple of arguments, a dict of named ones, or a function that is given the model. Each forward
gets a copy of its own, as it may write into it, and starts from the same state of the random generators.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.modules.classes import original_class

_DEPTH = 16  # of objects in objects that are looked into


@dataclass(frozen=True)
class Outputs:
    """The result of one forward: floating tensors by place, how many other tensors, whether it drew at random."""

    values: dict[str, Tensor]
    others: int
    drawn: bool

    @property
    def main(self) -> Tensor:
        """The logits, or else the first output."""
        return self.values.get("logits", next(iter(self.values.values())))

    def broken(self) -> tuple[int, int]:
        """Return how many numbers are NaN or infinite, and how many there are."""
        wrong = sum(int((~torch.isfinite(t)).sum()) for t in self.values.values())
        return wrong, sum(t.numel() for t in self.values.values())


@torch.no_grad()
def run(model: nn.Module, batch: object, dtype: torch.dtype | None = None, called: str = "verify") -> Outputs:
    """Run one forward of a model and return its outputs; floating tensors of the batch are cast to `dtype`.

    called: the option that the batch was given as, for messages.

    Raises AddendaError where the batch does not fit the model, or nothing comes back that could be compared.
    """
    with _same_draws(model) as drawn:
        try:
            result = _call(model, batch, dtype, called)
        except AddendaError:
            raise
        except Exception as error:
            message = next(iter(str(error).splitlines()), "")[:300]
            raise AddendaError(
                f"The {called} batch does not run through this {original_class(model).__name__}: "
                f"{type(error).__name__}: {message} Give {called}= a tensor for model(tensor), a tuple for "
                "model(*tuple), a dict for model(**dict), or a function that is given the model and returns its "
                "outputs."
            ) from error
    values: dict[str, Tensor] = {}
    other_count = _collect(result, "", values, set())
    if not values:
        raise AddendaError(
            f"The {called} batch gave a {type(result).__name__} without a floating tensor to compare"
            + (f" ({other_count} of whole numbers, which hide what moves)" if other_count else "")
            + f". Give {called}= a function that is given the model and returns such, e.g. its logits."
        )
    return Outputs(values, other_count, drawn())


def _collect(value: Any, path: str, values: dict[str, Tensor], ids: set[int], depth: int = 0) -> int:
    """Copy all floating tensors in a value into `values`, by path. Returns how many other tensors there were."""
    if id(value) in ids or depth > _DEPTH or value is None:
        return 0
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)
    ids.add(id(value))
    if isinstance(value, Tensor):
        if not (value.is_floating_point() or value.is_complex()):
            return 1
        plain = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
        values[path or "output"] = plain.clone()
        return 0
    return sum(_collect(v, f"{path}.{name}" if path else name, values, ids, depth + 1) for name, v in _parts_of(value))


def _parts_of(value: Any) -> Iterable[tuple[str, Any]]:
    """Return the contents of a container or an object, by name."""
    if isinstance(value, Mapping):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [(str(i), v) for i, v in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    if isinstance(value, (nn.Module, type)) or callable(value):
        return []
    slots = {name: getattr(value, name, None) for c in type(value).__mro__ for name in vars(c).get("__slots__", ())}
    return [(k, v) for k, v in (slots | getattr(value, "__dict__", {})).items() if not isinstance(v, float)]


# -- how it is called --------------------------------------------------------------------------------------------------


def _call(model: nn.Module, batch: Any, dtype: torch.dtype | None, called: str) -> Any:
    if isinstance(batch, Mapping):
        if all(isinstance(k, str) for k in batch) and _names_fit(model, batch, called):
            return model(**{k: _own(v, dtype) for k, v in batch.items()})
        return model(_own(batch, dtype))
    if type(batch) is tuple and _binds(model, *batch):
        return model(*_own(batch, dtype))
    if callable(batch) and not isinstance(batch, Tensor):
        return batch(model)
    if isinstance(batch, (str, bytes, int, float)) or hasattr(batch, "__next__") or hasattr(batch, "batch_sampler"):
        raise AddendaError(
            f"{called} is one batch: a tensor, a tuple, a dict, or a function that is given the model; got a "
            f"{type(batch).__name__}. Of a loader take next(iter(loader))."
        )
    return model(_own(batch, dtype))


def _names_fit(model: nn.Module, batch: Mapping, called: str) -> bool:
    """Return whether a forward takes these names; False where it takes the mapping itself."""
    if _binds(model, **batch):
        return True
    names = list(_signature(model).parameters)  # type: ignore[union-attr]
    if not set(names) & set(batch) and _binds(model, batch):
        return False
    unknown = [k for k in batch if k not in names]
    hint = nearest(unknown[0], names) if unknown else ""
    raise AddendaError(
        f"The {called} batch has {', '.join(map(repr, batch))}, and {original_class(model).__name__}.forward takes "
        f"{', '.join(names)}.{hint} Give the names that it takes, or a function that is given the model."
    )


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(vars(model).get("forward") or original_class(model).forward.__get__(model))
    except (TypeError, ValueError):
        return None


def _binds(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    signature = _signature(model)
    try:
        return signature is None or signature.bind(*args, **kwargs) is not None
    except TypeError:
        return False


def _own(value: Any, dtype: torch.dtype | None) -> Any:
    """Return a copy, since a forward may write into its arguments (a cache); floating tensors in `dtype`."""
    if isinstance(value, Tensor):
        tensor = value.detach().clone()
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if type(value) is dict:
        return {k: _own(v, dtype) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_own(v, dtype) for v in value)
    try:
        return copy.deepcopy(value)
    except Exception:  # a batch of one's own, of whatever
        return value


@contextmanager
def _same_draws(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Start random generators alike and restore them afterwards. Yields a function: whether the model drew."""
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)]
    states = [g.get_state() for g in generators]
    for g in generators:
        g.manual_seed(0)
    start = [g.get_state() for g in generators]
    draws: list[bool] = []
    try:
        yield lambda: draws[0]
    finally:
        draws.append(not all(torch.equal(a, g.get_state()) for a, g in zip(start, generators, strict=True)))
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
