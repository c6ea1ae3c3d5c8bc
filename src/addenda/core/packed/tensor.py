"""Base class of quantised weights, which are kept in another form than their values.

A `Packed` stands in the place of a module's own weight, frozen. Its shape and dtype are those of the values, and who
computes with it sees them; only products know better: their backward keeps the packed form and makes the values anew.
So adapters and their fused paths work on it as on any weight, and nothing dense lives between forward and backward.

A form is a subclass that names its tensors in `parts` and makes values of them in `unpack`; one that can be made of
values has `of`. What it needs besides tensors, such as a size, stands in `extra`.
"""

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from addenda.core.base.errors import AddendaError
from addenda.core.modules.autocast import autocast_dtype
from addenda.core.modules.returned import like

_aten = torch.ops.aten


class Packed(torch.Tensor):
    """Base class of packed weights, made from their parts, by name, and the shape and dtype of the values."""

    parts: ClassVar[tuple[str, ...]] = ()
    extra: tuple

    @staticmethod
    def __new__(cls, held: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype, extra: tuple = ()):
        device = next(iter(held.values())).device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, held: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype, extra: tuple = ()):
        for name in self.parts:
            setattr(self, name, held[name])
        self.extra = extra

    @classmethod
    def of(cls, W: Tensor) -> Self:
        """Pack the weight W in this form. Raises AddendaError where that is impossible."""
        raise AddendaError(
            f"A weight can be read as {cls.__name__}, but not be made one: its own library does that. Merge without "
            "requantize, and quantise the result there."
        )

    def again(self, W: Tensor) -> Self:
        """Pack other values of the same shape in this weight's form and with its options."""
        return self.of(W)

    def unpack(self) -> Tensor:
        """Return the values in float32, in the shape of the weight."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the values as a plain tensor, rounded once."""
        return self.unpack().to(dtype or self.dtype)

    @property
    def form(self) -> str:
        """The name of this form, with its options, as a file says it."""
        return type(self).__name__.removesuffix("Tensor").lower()

    @property
    def bits(self) -> float:
        """The bits for each value, everything counted."""
        return 8 * sum(t.numel() * t.element_size() for t in parts_of(self)) / self.numel()

    def _with(self, function, dtype: torch.dtype | None = None) -> Self:
        tensors = {name: function(getattr(self, name)) for name in self.parts}
        return type(self)(tensors, self.shape, dtype or self.dtype, self.extra)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, {self.bits:.3f} bits)"

    # -- copies --------------------------------------------------------------------------------------------------------

    def __tensor_flatten__(self):
        return list(self.parts), (self.shape, self.dtype, self.extra)

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size=None, outer_stride=None):
        return cls(inner, *meta)

    def __reduce_ex__(self, protocol):
        tensors = {name: getattr(self, name) for name in self.parts}
        return _rebuild, (type(self), tensors, self.shape, self.dtype, self.extra, isinstance(self, nn.Parameter))

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self._with(torch.clone)
            memo[id(self)] = nn.Parameter(copy, requires_grad=False) if isinstance(self, nn.Parameter) else copy
        return memo[id(self)]

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func is torch.Tensor.storage:  # which safetensors asks for, and with it save_pretrained
            raise AddendaError(
                f"A weight that is kept as {cls.__name__} has no storage of its own, so that safetensors and "
                "save_pretrained cannot write it. Save the adapter alone, and pack the weights again in the same way "
                "where it is loaded; or make them plain first: addenda.dequantize(model). In a Trainer, "
                "callbacks=[addenda.TrainerCallback(adapter)] leaves such weights out of its checkpoints."
            )
        if torch.is_inference_mode_enabled():
            return _without_version(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return args[0]._with(lambda t: t)
        if func is _aten.clone.default:
            return args[0]._with(torch.clone)
        if func is _aten._to_copy.default:
            device = kwargs.get("device")
            return args[0]._with(lambda t: t if device is None else t.to(device), kwargs.get("dtype"))
        arguments = func._schema.arguments
        pairs = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
        if any(isinstance(t, Packed) and a.alias_info is not None and a.alias_info.is_write for a, t in pairs):
            raise AddendaError(
                f"{func} would write into a weight that is kept as {cls.__name__}. Train an adapter on it, or put a "
                "plain weight in its place first: module.weight = nn.Parameter(module.weight.dense())."
            )
        return func(*tree_map(values_of, args), **tree_map(values_of, kwargs))


def _without_version(func: Any, args: tuple, kwargs: dict) -> Any:
    """Return func(…) in inference mode, where torch wants a version of each view, and no tensor made there has one."""
    if func is torch.Tensor.detach:
        return args[0]._with(lambda t: t)
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            return func(*tree_map(values_of, args), **tree_map(values_of, kwargs))


def values_of(t: Any) -> Any:
    """Return a packed weight's values as a plain tensor; anything else as it is."""
    return t.dense() if isinstance(t, Packed) else t


def finite(W: Tensor, form: str) -> Tensor:
    """Return the values of W in float32. Raises AddendaError for NaN or ∞, which no form of few bits holds."""
    values = values_of(W.detach()).float()
    if not bool(torch.isfinite(values).all()):
        raise AddendaError(f"A weight of shape {tuple(W.shape)} holds values that are not finite; {form} has none.")
    return values


def bits_sum(t: Tensor) -> int:
    """Return the sum of a plain tensor's bits, which shows what was written behind autograd's back."""
    t = t.detach()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    size = t.numel() * t.element_size()
    if t.is_cpu and type(t) is Tensor and t.is_contiguous() and size and size % 8 == 0 and t.data_ptr() % 8 == 0:
        words: Any = t.view(-1).view(torch.uint8).numpy()
        return int(words.view("int64").sum())  # by numpy: no conversion, and no waiting for torch's other threads
    return int(t.view(bits).sum(dtype=torch.int64))


def bits_mark(t: Tensor) -> int | Tensor:
    """Return what tells, compared with another of the same tensor, whether it has changed; no device is waited for."""
    if t.is_cpu:
        return bits_sum(t)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().view(bits).sum(dtype=torch.int64)


def parts_of(weight: Tensor) -> list[Tensor]:
    """Return the tensors that hold a weight's bytes: itself, or the parts of a packed one."""
    return [getattr(weight, name) for name in weight.parts] if isinstance(weight, Packed) else [weight]


def _rebuild(
    cls: type[Packed], tensors: dict, shape: torch.Size, dtype: torch.dtype, extra: tuple, parameter: bool
) -> Tensor:
    weight = cls(tensors, shape, dtype, extra)
    return nn.Parameter(weight, requires_grad=False) if parameter else weight


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Packed):
        return F.linear(values_of(input), weight, bias)
    dtype = autocast_dtype(input.device.type)
    if dtype is not None and input.is_floating_point():
        input = input.to(dtype)
        bias = None if bias is None else bias.to(input.dtype)
    return like(input, _Product.apply(input, weight, bias))


class _Product(torch.autograd.Function):
    """The rows of y = x Wᵀ + bias, see `core.modules.returned`.

    Backward has the packed weight, and x only where a calibration wants the values' gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.shape = x.shape
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        return F.linear(x.reshape(-1, x.shape[-1]), weight.dense(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        weight, x = ctx.saved_tensors
        gx = (gy @ weight.dense(gy.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        gweight = None if x is None else (gy.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        return gx, gweight, gy.sum(0) if ctx.needs_input_grad[2] else None
