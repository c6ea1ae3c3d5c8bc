"""`to_dense`: the factors multiplied out into an ordinary checkpoint, which transformers reads without addenda."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from addenda.compressing.folder import METHOD
from addenda.compressing.layers import FORMS
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, writing
from addenda.core.disk.unfinished import unfinished
from addenda.core.modules.put import put
from addenda.models.load import config_of, load_model
from addenda.models.machine import pick_dtype
from addenda.models.pretrained import quiet
from addenda.train.unfinished import check_apart, check_free, rename


@torch.no_grad()
def to_dense(folder: str | Path, out: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> Path:
    """Write the model of a compressed folder with plain linear layers. It has the old size again, and the new errors.

    dtype: of the result; products are formed in float32 and rounded once. "auto": that of the folder.
    trust_remote_code: run code that the folder brings.
    Raises AddendaError for a dtype that is none, a folder without low-rank layers, a target that is taken or lies in
    it, and a bias that the architecture's own layer does not have (from center=True).
    """
    asked = None if dtype == "auto" else pick_dtype(dtype)[0]  # before the model is read, which takes longer
    source, out = Path(folder).expanduser(), path_of(out, "out").resolve()
    config: Any = config_of(source, trust_remote_code)
    entry = getattr(config, "quantization_config", None) or {}
    if entry.get("quant_method") != METHOD:
        raise AddendaError(f"{source} has no low-rank layers of addenda; there is nothing to multiply out.")
    check_apart(source, out)
    check_free(out)
    own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    loaded = load_model(source, dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
    model, final = cast(Any, loaded.model), asked or getattr(torch, own)
    ordinary = _ordinary(model)
    layers = {p: m for p, m in model.named_modules() if isinstance(m, tuple(FORMS.values()))}
    extra = [
        p for p, m in layers.items() if m.bias is not None and getattr(ordinary.get_submodule(p), "bias", None) is None
    ]
    if extra:
        raise AddendaError(
            f"{len(extra)} layers have a bias that a {type(model).__name__} has no place for, e.g. {extra[0]}: they "
            "were made with center. Compress again without it, or use the folder as it is, with addenda imported."
        )
    for path, layer in cast("dict[str, Any]", layers).items():
        put(model, path, _plain(layer, ordinary.get_submodule(path)))
    del model.config.quantization_config
    model.hf_quantizer = None
    with writing(out), quiet():
        out.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(out, folder=True) as parent:
            staging = parent / out.name
            model.to(final).save_pretrained(staging)
            cast(Any, loaded.tokenizer).save_pretrained(staging)
            rename(staging, out)
    return out


def _ordinary(model: Any) -> nn.Module:
    """Return a model of the architecture's own layers, without data."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    with torch.device("meta"):
        return type(model)(config)


def _plain(layer: Any, like: nn.Module) -> nn.Module:
    """Return a layer of the class and names of `like` with the product as its weight."""
    weight = layer.weight.detach()
    linear: Any = like.to_empty(device="cpu") if weight.device.type == "cpu" else like.to_empty(device=weight.device)
    values = weight if isinstance(like, nn.Linear) else weight.T
    linear.weight = nn.Parameter(values.contiguous(), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return linear
