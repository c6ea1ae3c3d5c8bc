"""Budgets: one number of steps for all, the same seconds for all, or the same trainable parameters for all."""

import dataclasses
from dataclasses import dataclass

from torch import nn

from addenda.core.ask.plan import plan
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method

MOST = 1e12  # of anything that can be spent
KINDS = ("steps", "seconds", "parameters")


@dataclass(frozen=True)
class Budget:
    """What every arm may spend: `steps`, or `seconds` of training, or `parameters` trained (then `steps` too)."""

    kind: str
    value: float
    steps: int  # for seconds: filled in once the steps are measured, per arm

    @classmethod
    def parse(cls, text: str, steps: int = 40) -> "Budget":
        """Parse "steps=40", "seconds=120" or "parameters=500000". Raises AddendaError for anything else."""
        kind, equals, number = text.partition("=")
        try:
            value = float(number.replace("_", "").replace(",", ""))
        except ValueError:
            value = 0
        whole = kind == "seconds" or value % 1 == 0
        if kind not in KINDS or not equals or not 0 < value <= MOST or not whole:
            raise AddendaError(f"Expected a budget such as steps=40, seconds=120 or parameters=500000, got {text!r}.")
        return cls(kind, value, int(value) if kind == "steps" else steps)


def fitted(model: nn.Module, method: Method, targets, most: int) -> Method:
    """Return the largest form of a method that trains at most `most` numbers, by its size option (rank, density …).

    Raises AddendaError when the method has no such option or already its smallest form is too large.
    """
    field = method.sized_by
    if field is None:
        raise AddendaError(f"{method.name} has no option for its size; leave it out of a budget of parameters.")
    default = getattr(method, field)

    def count(value) -> int | None:
        try:
            return plan(model, dataclasses.replace(method, **{field: value}), targets=targets).trainable
        except AddendaError:
            return None  # a size that these shapes cannot take

    if isinstance(default, float):
        value = default
        for _ in range(8):  # the count is proportional to a density, up to rounding
            n = count(value)
            if n is None:
                break
            if n <= most and n >= 0.99 * most:
                return dataclasses.replace(method, **{field: value})
            value = min(1.0, value * most / n * (0.999 if n > most else 1.0))
        sizes = [value, value * 0.99, value * 0.9]
    else:
        sides, value = {2**k for k in range(13)}, 1  # the sides of blocks are mostly powers of two
        while value <= 4096:
            sides.add(value)
            value = value + 1 if value < 16 else value + value // 16
        sizes = sorted(sides)
    best = None
    for value in sizes:
        n = count(value)
        if n is not None and n <= most and (best is None or n > best[0]):
            best = (n, value)
        if n is not None and n > most and not isinstance(default, float) and best is not None:
            break
    if best is None:
        raise AddendaError(f"{method.name} trains more than {most:,} numbers here even in its smallest form.")
    return dataclasses.replace(method, **{field: best[1]})
