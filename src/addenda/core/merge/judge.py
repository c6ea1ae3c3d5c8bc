"""Judging whether a changed model still returns what it returned, in every floating number, within rounding.

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
    """How far outputs have moved: the figures of the output nearest to its limit, or furthest above it."""

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
    """The outputs that a merge must keep. wide: those of the model in a wider dtype; base: those without the change."""

    before: Outputs
    wide: Outputs | None
    working: torch.dtype
    logits: bool  # whether the main output holds logits
    base: Outputs | None = None
    noise: dict[str, float] = field(default_factory=dict)  # by output, the largest that was measured
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, root: nn.Module, batch: object, before: Outputs) -> "Proof":
        """Build the proof from `before`, what `run(root, batch)` gave. Raises AddendaError where it proves nothing."""
        proof = cls(before, None, working_dtype(root), _is_logits(root, before.main))
        if any(bool(t.isnan().any()) for t in before.values.values()):
            raise AddendaError(_not_finite(before))
        try:
            proof.wide = _wide(root, batch, proof.working)
        except Exception as error:  # whatever a model does in a dtype that it was not made for
            proof.notes.append(f"noise not measured: in a wider dtype {error}")
        if proof.wide is not None and proof.wide.drawn:
            proof.wide = None
            proof.notes.append("noise not measured: the model draws random numbers, each time the same ones here")
        if proof.wide is not None and not _alike(before, proof.wide):
            proof.wide = None
            proof.notes.append("noise not measured: in a wider dtype the model returns other outputs")
        for path, t in before.values.items():
            wide = None if proof.wide is None else proof.wide.values[path]
            if bool(t.isinf().any()) and (wide is None or not torch.equal(t.isinf(), wide.isinf())):
                raise AddendaError(_not_finite(before))  # ∞ that is meant is there in every dtype
        proof.noise = _noise(before, proof.wide)
        return proof

    def look_again(self, root: nn.Module, batch: object, after: Outputs) -> None:
        """Measure the noise again, on the changed model: of many outputs one measurement is small by chance."""
        if self.wide is None:
            return
        try:
            wide = _wide(root, batch, self.working)
        except Exception:  # as the first time
            return
        if _alike(after, wide):
            self.noise = {k: max(n, _noise(after, wide).get(k, 0.0)) for k, n in self.noise.items()}

    def judge(self, after: Outputs, excused: float = 0.0) -> Verdict:
        """Compare outputs with those to be kept. excused: the share of the change's own effect that may be lost."""
        moves = []
        for path, t in self.before.values.items():
            counterpart = after.values.get(path)
            size, moved = _size(t), _away(t, counterpart)
            noise = self.noise.get(path, 0.0)
            limit = 2 * max(noise, self._rounding(t.dtype) * size)
            if excused and self.base is not None:
                limit += excused * _away(t, self.base.values.get(path), unlike=False)
            moves.append((moved / limit if limit else (0.0 if moved == 0 else float("inf")), path, moved, limit, noise))
        for path in after.values.keys() - self.before.values.keys():
            moves.append((float("inf"), path, float("inf"), 0.0, 0.0))
        _, worst, moved, limit, noise = max(moves, key=lambda item: item[0])
        main = self.before.main
        result = after.values.get("logits", next(iter(after.values.values())))
        wide = None if self.wide is None else self.wide.main
        measures: dict[str, Any] = {}
        if self.logits and result.shape == main.shape:
            measures["kl"], measures["top1"] = divergence(main, result)
            measures["noise_kl"] = None if wide is None else divergence(wide, main)[0]
        return Verdict(
            len(self.before.values), worst, moved, limit, noise, moved <= limit, distance(result, main),
            None if wide is None else distance(main, wide), **measures,
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
    wrong, total = outputs.broken()
    dtypes = ", ".join(dict.fromkeys(str(t.dtype) for t in outputs.values.values()))
    return (
        f"The verify batch has outputs that are not finite before anything is merged: {wrong:,} of {total:,}, in "
        f"{dtypes}, so they prove nothing. Give another batch, a wider dtype=, or an adapter that has not diverged."
    )


def _beyond(t: Tensor) -> Tensor:
    """Return where numbers are NaN, ∞, or among the largest of their dtype, which masks are made of."""
    return ~(t.abs() < torch.finfo(t.dtype).max / 4)


def _size(t: Tensor) -> float:
    numbers = t[~_beyond(t)]
    return float(numbers.abs().max()) if numbers.numel() else 0.0


def _away(t: Tensor, other: Tensor | None, unlike: bool = True) -> float:
    """Return the largest difference of numbers; ∞ where shapes, or the places of NaN, ∞ and masks, are unlike."""
    if other is None or other.shape != t.shape:
        return float("inf") if unlike else 0.0
    beyond, other_beyond = _beyond(t), _beyond(other)
    if unlike and not bool(((beyond == other_beyond) & (~beyond | (t == other))).all()):
        return float("inf")
    regular = ~(beyond | other_beyond)
    gap = (t.double() - other.double())[regular]
    return float(gap.abs().max()) if gap.numel() else 0.0


def _alike(a: Outputs, b: Outputs) -> bool:
    return a.values.keys() == b.values.keys() and all(t.shape == b.values[k].shape for k, t in a.values.items())


def _is_logits(root: nn.Module, output: Tensor) -> bool:
    return output.dim() >= 2 and output.shape[-1] > 1 and hasattr(root, "config") and not hasattr(root, "pooler")


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖; ∞ where shapes are unlike."""
    if a.shape != b.shape:
        return float("inf")
    beyond = _beyond(a) | _beyond(b)
    a, b = a.double().masked_fill(beyond, 0), b.double().masked_fill(beyond, 0)
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30))


def divergence(p: Tensor, q: Tensor) -> tuple[float, float]:
    """Return mean KL(p ‖ q) in nats over positions, and the share of positions with the same likeliest output."""
    lp, lq = F.log_softmax(p.double(), -1), F.log_softmax(q.double(), -1)
    kl = (lp.exp() * (lp - lq)).nan_to_num(0.0).sum(-1).mean()
    return max(float(kl), 0.0), float((p.argmax(-1) == q.argmax(-1)).float().mean())


# -- the noise ---------------------------------------------------------------------------------------------------------


def working_dtype(root: nn.Module) -> torch.dtype:
    """Return the coarsest dtype that the base computes in."""
    adapter_ids = {id(p) for m in root.modules() if isinstance(m, Adapted) for p in m._modules["addenda"].parameters()}
    dtypes = {p.dtype for p in root.parameters() if p.is_floating_point() and id(p) not in adapter_ids}
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def _wide(root: nn.Module, batch: object, working: torch.dtype) -> Outputs:
    """Return the outputs of a copy in the next wider dtype: float32 for half precision, float64 for float32."""
    dtype = torch.float32 if torch.finfo(working).bits < 32 else torch.float64
    wide = nn.Module.to(copy.deepcopy(root, aside(root)), dtype)
    unhook(wide)
    with _Widened(dtype, working):
        return run(wide, batch, dtype)


class _Widened(TorchFunctionMode):
    """A mode in which operators that refuse the wider dtype, or a mixture, get all tensors in one that they take."""

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
