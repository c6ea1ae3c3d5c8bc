"""hqq: HQQLinear, of any number of bits and grouping. https://github.com/mobiusml/hqq"""

from typing import Any

import torch
from hqq.core.quantize import HQQLinear, Quantizer  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.packed.tensor import Packed


class Grouped(Packed):
    """An HQQLinear's weight. codes: packed as hqq does; scales, zeros: of each group. extra: hqq's notes, in pairs."""

    parts = ("codes", "scales", "zeros")
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def unpack(self) -> Tensor:
        meta: dict[str, Any] = dict(self.extra) | {"scale": self.scales, "zero": self.zeros}
        return Quantizer.dequantize(self.codes, meta).float()


def read(module: nn.Module, dtype: torch.dtype) -> Packed | None:
    """Return the weight of a layer that is quantised by now; None before. Its own dtype is the one that it computes in.

    Raises AddendaError where its scales or zeros are quantised too, a form that hqq has deprecated.
    """
    if not isinstance(module, HQQLinear) or not module.ready:
        return None
    meta: Any = module.meta
    compute_dtype: Any = module.compute_dtype
    if not torch.is_tensor(meta.get("scale")) or not torch.is_tensor(meta.get("zero")):
        raise AddendaError(
            "A HQQLinear keeps its scales or zeros quantised. Make it with quant_scale=False and quant_zero=False."
        )
    extra = tuple((k, v) for k, v in meta.items() if k not in ("scale", "zero"))
    tensors = {"codes": module.W_q.data, "scales": meta["scale"], "zeros": meta["zero"]}
    return Grouped(tensors, torch.Size(meta["shape"]), compute_dtype, extra)
