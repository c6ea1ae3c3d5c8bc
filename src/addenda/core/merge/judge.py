"""Whether a changed model still returns what it returned: every floating number of it, against what rounding moves.

The same batch runs before and after. An output may move by twice the larger of two: the noise, which is how far the
same model in the next wider dtype is away, and some ε of the output's size.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from addenda.core.base.errors import AddendaError
from addenda.core.merge.outputs import Outputs, run
from addenda.core.modules.classes import Adapted
from addenda.core.state.bypass import unhook
from addenda.core.state.twin import aside

_ROUNDINGS = 64  # ε of an output's size that are no difference, in float32 and wider
_HALF_ROUNDINGS = 1  # the same in half precision, where the noise is what counts


@dataclass(frozen=True)
class Verdict:
    """How far outputs have moved: the one nearest to its limit, or furthest above it. before and after: what moved."""

    compared: int
    worst: str
    moved: float
    limit: float
    noise: float
    within: bool
    output: float  # relative L2 distance of the main output; and what the dtype costs anyway, where it was measured
    noise_output: float | None
    kl: float | None = None
    noise_kl: float | None = None
    top1: float | None = None


@dataclass
class Proof:
    """The outputs to be kept. wide: those of the model in a wider dtype; base: those without the change."""

    before: Outputs
    wide: Outputs | None
    working: torch.dtype
    logits: bool  # whether the main output holds logits
    base: Outputs | None = None
    noise: dict[str, float] = field(default_factory=dict)  # by output, the largest that was measured
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, root: nn.Module, batch: object, before: Outputs) -> "Proof":
        """before: what `run(root, batch)` gave. Raises AddendaError where that proves nothing."""
        made = cls(before, None, _working(root), _is_logits(root, before.main))
        if any(bool(t.isnan().any()) for t in before.values.values()):
            raise AddendaError(_not_finite(before))
        try:
            made.wide = _wide(root, batch, made.working)
        except Exception as error:  # whatever a model does in a dtype that it was not made for
            made.notes.append(f"noise not measured: in a wider dtype {error}")
        if made.wide is not None and made.wide.drawn:
            made.wide = None
            made.notes.append("noise not measured: the model draws random numbers, each time the same ones here")
        if made.wide is not None and not _alike(before, made.wide):
            made.wide = None
            made.notes.append("noise not measured: in a wider dtype the model returns other outputs")
        for path, t in before.values.items():
            wide = None if made.wide is None else made.wide.values[path]
            if bool(t.isinf().any()) and (wide is None or not torch.equal(t.isinf(), wide.isinf())):
                raise AddendaError(_not_finite(before))  # ∞ that is meant is there in every dtype
        made.noise = _noise(before, made.wide)
        return made

    def look_again(self, root: nn.Module, batch: object, after: Outputs) -> None:
        """Measure the noise once more, of the changed model: in half precision one measurement is small by chance."""
        if self.wide is None or torch.finfo(self.working).bits >= 32:
            return
        try:
            again = _wide(root, batch, self.working)
        except Exception:  # as the first time
            return
        if _alike(after, again):
            self.noise = {k: max(n, _noise(after, again).get(k, 0.0)) for k, n in self.noise.items()}

    def judge(self, after: Outputs, excused: float = 0.0) -> Verdict:
        """excused: the share of what the change itself moves that may be lost. Outputs of other shapes move by ∞."""
        found = []
        for path, t in self.before.values.items():
            other = after.values.get(path)
            size, moved = _size(t), _away(t, other)
            noise = self.noise.get(path, 0.0)
            limit = 2 * max(noise, self._rounding(t.dtype) * size)
            if excused and self.base is not None:
                limit += excused * _away(t, self.base.values.get(path), unlike=False)
            found.append((moved / limit if limit else (0.0 if moved == 0 else float("inf")), path, moved, limit, noise))
        for path in after.values.keys() - self.before.values.keys():
            found.append((float("inf"), path, float("inf"), 0.0, 0.0))
        _, worst, moved, limit, noise = max(found, key=lambda item: item[0])
        main = self.before.main
        now = after.values.get("logits", next(iter(after.values.values())))
        wide = None if self.wide is None else self.wide.main
        told: dict[str, Any] = {}
        if self.logits and now.shape == main.shape:
            told["kl"], told["top1"] = divergence(main, now)
            told["noise_kl"] = None if wide is None else divergence(wide, main)[0]
        return Verdict(
            len(self.before.values), worst, moved, limit, noise, moved <= limit, distance(now, main),
            None if wide is None else distance(main, wide), **told,
        )  # fmt: skip

    def _rounding(self, dtype: torch.dtype) -> float:
        coarse = max((dtype, self.working), key=lambda d: torch.finfo(d).eps)
        eps = torch.finfo(coarse).eps
        return eps * (_ROUNDINGS if torch.finfo(coarse).bits >= 32 else _HALF_ROUNDINGS)


def _noise(narrow: Outputs, wide: Outputs | None) -> dict[str, float]:
    if wide is None:
        return {}
    return {path: _away(t, wide.values[path], unlike=False) for path, t in narrow.values.items()}


def _not_finite(outputs: Outputs) -> str:
    wrong, every = outputs.broken()
    dtypes = ", ".join(dict.fromkeys(str(t.dtype) for t in outputs.values.values()))
    return (
        f"The verify batch has outputs that are not finite before anything is merged: {wrong:,} of {every:,}, in "
        f"{dtypes}, so they prove nothing. Give another batch, a wider dtype=, or an adapter that has not diverged."
    )


def _beyond(t: Tensor) -> Tensor:
    """Where a number stands for none: NaN, ∞, and the largest ones of a dtype, which masks are made of."""
    return ~(t.abs() < torch.finfo(t.dtype).max / 4)


def _size(t: Tensor) -> float:
    kept = t[~_beyond(t)]
    return float(kept.abs().max()) if kept.numel() else 0.0


def _away(t: Tensor, other: Tensor | None, unlike: bool = True) -> float:
    """The largest difference of numbers; ∞ where shapes, or the places of what is none, are unlike."""
    if other is None or other.shape != t.shape:
        return float("inf") if unlike else 0.0
    beyond, others = _beyond(t), _beyond(other)
    if unlike and not bool(((beyond == others) & (~beyond | (t == other))).all()):
        return float("inf")
    kept = ~(beyond | others)
    gap = (t.double() - other.double())[kept]
    return float(gap.abs().max()) if gap.numel() else 0.0


def _alike(a: Outputs, b: Outputs) -> bool:
    return a.values.keys() == b.values.keys() and all(t.shape == b.values[k].shape for k, t in a.values.items())


def _is_logits(root: nn.Module, output: Tensor) -> bool:
    return output.dim() >= 2 and output.shape[-1] > 1 and hasattr(root, "config") and not hasattr(root, "pooler")


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖; ∞ where shapes are unlike."""
    if a.shape != b.shape:
        return float("inf")
    beyond = _beyond(a) | _beyond(b)
    a, b = a.double().masked_fill(beyond, 0), b.double().masked_fill(beyond, 0)
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30))


def divergence(p: Tensor, q: Tensor) -> tuple[float, float]:
    """Mean KL(p ‖ q) in nats over positions, and the share of positions with the same most likely output."""
    lp, lq = F.log_softmax(p.double(), -1), F.log_softmax(q.double(), -1)
    kl = (lp.exp() * (lp - lq)).nan_to_num(0.0).sum(-1).mean()
    return max(float(kl), 0.0), float((p.argmax(-1) == q.argmax(-1)).float().mean())


# -- the noise ---------------------------------------------------------------------------------------------------------


def _working(root: nn.Module) -> torch.dtype:
    """The coarsest dtype that the base computes in."""
    own = {id(p) for m in root.modules() if isinstance(m, Adapted) for p in m._modules["addenda"].parameters()}
    dtypes = {p.dtype for p in root.parameters() if p.is_floating_point() and id(p) not in own}
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def _wide(root: nn.Module, batch: object, working: torch.dtype) -> Outputs:
    """The outputs of a copy in the next wider dtype: float32 for half precision, float64 for float32."""
    dtype = torch.float32 if torch.finfo(working).bits < 32 else torch.float64
    wide = nn.Module.to(copy.deepcopy(root, aside(root)), dtype)
    unhook(wide)
    with _Widened(dtype, working):
        return run(wide, batch, dtype)


class _Widened(TorchFunctionMode):
    """Operators that do not take the wider dtype, or that mixed with another, get all of it in one that they take."""

    def __init__(self, wide: torch.dtype, narrow: torch.dtype):
        super().__init__()
        self.wide, self.narrow = wide, narrow

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError) as error:
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__"):  # in place: as what is written into
                first, *rest = args
                return func(first, *_floats(rest, first.dtype), **_floats(kwargs, first.dtype))
            for dtype in (self.wide, torch.float32, self.narrow):
                try:
                    return _floats(func(*_floats(args, dtype), **_floats(kwargs, dtype)), self.wide)
                except (RuntimeError, ValueError, TypeError):
                    continue
            raise error


def _floats(value: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, value)
