"""A pretended GPU: tensors that say they are on cuda:0 and hold memory of the CPU. What mixes both raises, as there.

For what runs without gradients, values included, on a machine without one: attaching, files, merging, forwards. torch's
own rules hold: a tensor of no dimensions and one that only counts positions may be on the CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

PLACE = torch.device("cuda:0")
ABOUT = {  # what is said of a tensor without its values
    "shape", "device", "dtype", "is_meta", "is_leaf", "requires_grad", "grad_fn", "layout", "is_sparse", "is_cuda",
    "is_cpu", "ndim", "_version", "is_quantized", "is_nested", "is_floating_point", "numel", "dim", "size", "stride",
    "storage_offset", "element_size", "is_inference", "is_contiguous", "is_complex", "__len__", "untyped_storage",
    "itemsize", "nbytes", "requires_grad_", "_is_view", "_base", "data_ptr", "__hash__",
}  # fmt: skip
READ = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__")
INDEXED = ("__getitem__", "__setitem__", "index_put", "index_put_")
MOVES = ("to", "cpu", "copy_")


class There(Tensor):
    """A tensor on the pretended GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, held: Tensor):
        about: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=PLACE, **about)

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """What autograd's custom functions and modules do below the mode: in place, and detached."""
        args, kwargs = tree_map_only(There, lambda t: t.held, (args, kwargs or {}))
        return tree_map_only(Tensor, There, func(*args, **kwargs))


class Pretended(TorchFunctionMode):
    """Inside, functions of torch know where their tensors are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if name == "__get__":
            name = func.__self__.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = [t for t in tensors if isinstance(t, There)]
        if name in ABOUT or name == "__set__":
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        here = [t for t in tensors if not isinstance(t, There) and t.dim() > 0 and t.device.type == "cpu"]
        if (there and here and name not in (*MOVES, *INDEXED)) or (there and name in ("numpy", "__array__")):
            raise RuntimeError(f"{name}: expected all tensors on one device, got {PLACE} and cpu")
        args, result_there = _placed(name, list(args), kwargs, bool(there))
        held = {id(t.held): t for t in there}
        plain_args, plain = tree_map_only(There, lambda t: t.held, (tuple(args), kwargs))
        found = func(*plain_args, **plain)
        if name in READ:
            return found

        def back(t: Tensor) -> Tensor:
            if not result_there:
                return t.clone() if id(t) in held else t  # moved to the CPU: other memory
            return held.get(id(t)) if id(t) in held else There(t)  # pyright: ignore[reportReturnType]

        return tree_map_only(Tensor, back, found)


def _placed(name: str, args: list, kwargs: dict, there: bool) -> tuple[list, bool]:
    """The arguments with the CPU in the place of the pretended GPU, and whether what comes out is there."""
    if name == "cpu":
        return args, False
    if name in (*INDEXED, "copy_"):
        return args, isinstance(args[0], There)
    named = [kwargs.get("device"), *(a for a in args if isinstance(a, (torch.device, str)) and name == "to")]
    device = next((d for d in named if d is not None), None)
    if device is not None:
        there = torch.device(device).type == "cuda"
        kwargs |= {"device": torch.device("cpu")} if kwargs.get("device") is not None and there else {}
        args = [torch.device("cpu") if a is device and there else a for a in args]
    elif name == "to":
        like = next((a for a in args[1:] if isinstance(a, Tensor)), args[0])
        there = isinstance(like, There)
    return args, there


def moved(model: nn.Module) -> nn.Module:
    """The model on the pretended GPU, frozen."""
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = p if p is None else nn.Parameter(There(p.detach()), requires_grad=False)
        for name, b in module._buffers.items():
            module._buffers[name] = b if b is None else There(b)
    return model
