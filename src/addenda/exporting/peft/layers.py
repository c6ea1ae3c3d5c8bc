"""Which layers PEFT adapts, and where the convolution that it computes is another than the layer's."""

from typing import Any

from torch import nn

from addenda.core.site.site import Site


def is_linear(site: Site) -> bool:
    """Return whether a site is a Linear, which every type of PEFT takes."""
    return site.kind.name == "linear"


def dimensions(site: Site) -> int:
    """Return over how many dimensions a site's convolution runs, 0 where it is none."""
    return site.weight.dim() - 2 if site.kind.name == "conv" else 0


def taps(site: Site) -> int:
    """Return the entries of a convolution's kernel: columns of the matrix that belong to one input."""
    return int(site.weight[0, 0].numel())


def pads_otherwise(site: Site) -> str | None:
    """Return why the change that PEFT convolves beside a layer's own product sees other borders; or None."""
    module: Any = site.module
    if dimensions(site) and module.padding_mode != "zeros":
        return f"PEFT pads the input with zeros, where this layer has padding_mode={module.padding_mode!r}"
    return None


def computes_otherwise(site: Site) -> str | None:
    """Return why the convolution that PEFT computes in a layer's place is not the layer's own; or None.

    BOFT and HRA take the first number of kernel, stride and padding for both sides, and nothing else of the layer.
    """
    module: Any = site.module
    if not isinstance(module, nn.Conv2d):
        return None
    uneven = [n for n in ("kernel_size", "stride", "padding") if len(set(getattr(module, n))) > 1
              or isinstance(getattr(module, n), str)]  # fmt: skip
    if uneven:
        return f"PEFT takes one number for both sides of {', '.join(uneven)}"
    if module.groups > 1 or module.dilation != (1, 1):
        return f"PEFT leaves out groups={module.groups} and dilation={module.dilation}"
    return pads_otherwise(site)
