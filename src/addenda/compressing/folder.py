"""Model folders with low-rank layers that transformers reads itself: no remote code, and the model's own class.

The folder is an ordinary one. Its config.json says under `quantization_config` which layers are low rank, and of what
rank; transformers hands such an entry to whoever registered its `quant_method`, before it loads the weights. Nothing is
quantised: the factors are plain parameters in the model's dtype, train as such, and save again with `save_pretrained`.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from addenda.compressing.layers import FORMS
from addenda.core.base.errors import AddendaError
from addenda.core.modules.put import put
from addenda.core.site.kinds import CONV1D, LINEAR, kind_of

METHOD = "addenda-low-rank"


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """The entry of config.json for low-rank layers. layers: {path: its fields}; made: how, in words.

    Fields: "rank": r, "bias": whether it has one, "form": "factors" or "pivot"."""

    def __init__(self, layers: dict[str, dict] | None = None, made: str = "", **_):
        self.quant_method: Any = METHOD
        self.layers = layers or {}
        self.made = made


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):
    """A transformers quantizer that puts empty low-rank layers where the configuration says, before they are filled."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model, **kwargs):
        with torch.device("meta"):
            put_layers(model, self.quantization_config.layers)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs):
        model.is_quantized = False  # set for every model that comes this way; trainers refuse a quantised one
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def put_layers(model: nn.Module, layers: dict[str, dict]) -> None:
    """Replace the linear layers at these paths by empty low-rank ones.

    A bare model may have been saved with a head, and the other way round: as transformers does with names of weights,
    the name of the bare model within the other is put before a path or taken off it, and the head's layers are let be.
    Raises AddendaError, and replaces nothing, where an entry does not fit the model.
    """
    replacements, problems = {}, []
    for path, entry in _own_paths(model, layers).items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            problems.append(f"{path}: the model has no such layer")
            continue
        shape = shape_of(module)
        rank, form = entry.get("rank"), entry.get("form", "factors")
        if shape is None:
            problems.append(f"{path}: a {type(module).__name__} is no linear layer")
        elif form not in FORMS:
            problems.append(f"{path}: form {form!r}; this version knows {', '.join(FORMS)}")
        elif not isinstance(rank, int) or not 1 <= rank <= min(shape) - (form == "pivot"):
            problems.append(f"{path}: a layer of {shape[0]} × {shape[1]} cannot have the rank {rank!r}")
        else:
            replacements[path] = FORMS[form](shape[1], shape[0], rank, bool(entry.get("bias")))
    if problems:
        raise AddendaError(
            f"The configuration's low-rank layers do not fit this {type(model).__name__}: {'; '.join(problems[:8])}"
            f"{f' … and {len(problems) - 8} more' if len(problems) > 8 else ''}. Weights and config.json do not belong "
            "together, or were written by another version of addenda."
        )
    for path, layer in replacements.items():
        put(model, path, layer)


def _own_paths(model: nn.Module, layers: dict[str, dict]) -> dict[str, dict]:
    """Return the layers under the paths that they have in this model, whatever class of its family wrote them."""
    paths, prefix = {p for p, _ in model.named_modules()}, f"{getattr(model, 'base_model_prefix', '')}."
    with_head = prefix != "." and prefix[:-1] not in paths and any(p.startswith(prefix) for p in layers)
    entries = {}
    for path, entry in layers.items():
        if path not in paths and with_head:
            if not path.startswith(prefix):
                continue
            path = path.removeprefix(prefix)
        elif path not in paths and prefix + path in paths:
            path = prefix + path
        entries[path] = entry
    return entries


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """Return (m, n) = (out, in) of a linear layer, or None."""
    kind, weight = kind_of(module), module._parameters.get("weight")
    if kind not in (LINEAR, CONV1D) or weight is None:
        return None
    m, n = weight.shape
    return (n, m) if kind == CONV1D else (m, n)
