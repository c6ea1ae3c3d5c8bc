"""bitsandbytes: Linear4bit (NF4, FP4, with scales in 8 bits or not) and Linear8bitLt (int8).

On processors with AVX512-BF16 an evaluated Linear4bit repacks its bytes and rounds its scales to bfloat16 for good
(0.50 also leaves scales that it keeps in float32 in the wrong order when it packs back), so such a layer is refused.
There the int8 product also rounds the inputs outside of training; the packed one never does.
"""

from typing import Any

import torch
from bitsandbytes import functional as bf  # pyright: ignore
from bitsandbytes.nn import Linear4bit, Linear8bitLt  # pyright: ignore
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.packed.tensor import Packed
from addenda.quantizing.bridges import table


class Bits4(Packed):
    """A Linear4bit's weight. codes: two in a byte; scales: one for each block, float32 or codes of 8 bits.

    For scales in codes: tops, float32 for each group of these; offset, their mean. levels, steps: the values of the
    codes; bitsandbytes has them once for every layer. extra: (type, block, group)."""

    parts = ("codes", "scales", "tops", "offset", "levels", "steps")
    codes: Tensor
    scales: Tensor
    tops: Tensor
    offset: Tensor
    levels: Tensor
    steps: Tensor

    @property
    def bits(self) -> float:
        """Bits for each value; the two tables, which all layers have alike, left out."""
        tensors = (self.codes, self.scales, self.tops, self.offset)
        return 8 * sum(t.numel() * t.element_size() for t in tensors) / self.numel()

    def unpack(self) -> Tensor:
        kind, block, group = self.extra
        second = None
        if group:
            second = bf.QuantState(absmax=self.tops, code=self.steps, blocksize=group, dtype=torch.float32)
        state = bf.QuantState(
            absmax=self.scales, shape=self.shape, dtype=torch.float32, blocksize=block, quant_type=kind,
            code=self.levels, offset=self.offset if group else None, state2=second,
        )  # fmt: skip
        return bf.dequantize_4bit(self.codes, state)


class Bits8(Packed):
    """A Linear8bitLt's weight. codes: int8 (m × n); scales: float32 (m), the size that 127 stands for."""

    parts = ("codes", "scales")
    codes: Tensor
    scales: Tensor

    def unpack(self) -> Tensor:
        return self.codes * (self.scales[:, None] / 127)


def read(module: nn.Module, dtype: torch.dtype) -> Packed | None:
    """Return the weight of a layer that is quantised by now; None before. dtype: of int8's values, without a bias.

    Raises AddendaError for one that bitsandbytes has repacked for the processor.
    """
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, Linear4bit):
        return _bits4(weight)
    if isinstance(module, Linear8bitLt) and weight.dtype == torch.int8:
        state: Any = weight if weight.SCB is not None else module.state
        codes = weight.data if state.CB is None else state.CB
        bias: Any = module.bias
        return Bits8({"codes": codes, "scales": state.SCB}, codes.shape, dtype if bias is None else bias.dtype)
    return None


def _bits4(weight: Any) -> Packed | None:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return None
    if getattr(state, "packing_format_for_cpu", False):
        raise AddendaError(
            "A Linear4bit was evaluated on this processor, for which bitsandbytes repacks the bytes and rounds the "
            "scales. Load the model again, and adopt it before it is first evaluated."
        )
    tensors = {"codes": weight.data, "scales": state.absmax, "levels": state.code}
    if state.nested:
        tensors |= {"tops": state.state2.absmax, "offset": state.offset, "steps": state.state2.code}
    tensors = {name: table(tensors.get(name)) for name in Bits4.parts}
    group = state.state2.blocksize if state.nested else 0
    return Bits4(tensors, torch.Size(state.shape), state.dtype, (state.quant_type, state.blocksize, group))
