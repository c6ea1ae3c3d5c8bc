"""Writing a file of kohya: every change as lora_up · lora_down, with alpha the rank, so that all scales are in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.disk.atomic import write_atomically
from addenda.exporting.kohya.names import PARTS, flat_names, original_names, part_of, text_prefix
from addenda.exporting.pairs import Pair, balanced

LABELS = {  # diffusers 0.42 loses these two under its own names, and finds them under the original ones
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@torch.no_grad()
def write(
    adapter: Adapter,
    place: Path,
    pairs: Mapping[str, Pair],
    *,
    part: str | None = None,
    layout: Literal["diffusers", "original"] = "diffusers",
    dtype: str = "float32",
) -> dict[str, float]:
    """Write an adapter to a file that is not there; return ‖ΔW − written‖ / ‖ΔW‖ by path where rounding added to it.

    part: what the model is in the file, by default what its class says: "lora_unet", "lora_te1", …. layout:
    "original" names a UNet's modules as its first code did (input_blocks_…), which sd-scripts has for SDXL. dtype:
    "float16" is what is commonly shared, half the size; factors are then balanced, so that neither underflows.

    Raises AddendaError, with nothing written, for a part or layout that the model has not, for modules whose names are
    the same when flattened, and for numbers above what the dtype holds.
    """
    model = adapter.model
    if dtype not in DTYPES:
        raise AddendaError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    chosen = part or part_of(model)
    if chosen not in PARTS:
        raise AddendaError(f"part is what the model is in the file, one of {', '.join(PARTS)}; got {part!r}.")
    names = _names(model, chosen, layout, [*pairs])
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for path, pair in pairs.items():
        B, A = pair.B, pair.A
        if dtype != "float32":
            even = balanced(pair)
            B, A = even.B.to(DTYPES[dtype]), even.A.to(DTYPES[dtype])
            if not bool(torch.isfinite(B).all() and torch.isfinite(A).all()):
                raise AddendaError(f"{path}: its factors do not fit into {dtype}. Write dtype='float32'.")
            errors[path] = _distance(pair, B, A)
        kernel = pair.site.weight.shape[1:]
        key = f"{chosen}_{names[path]}"
        tensors[f"{key}.lora_down.weight"] = A.reshape(-1, *kernel).contiguous()
        tensors[f"{key}.lora_up.weight"] = B.reshape(*B.shape, *[1] * (len(kernel) - 1)).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(pair.rank))  # float32: bfloat16 would make 256 of 257
    # one entry only: safetensors writes several in random order, and equal adapters should be equal files
    write_atomically(place, to_bytes(tensors, {"ss_network_module": "networks.lora"}))
    return errors


def _names(model: nn.Module, part: str, layout: str, paths: list[str]) -> dict[str, str]:
    """Return the flat name of each path. Raises AddendaError where it has none, or shares it with another module."""
    if layout not in ("diffusers", "original"):
        raise AddendaError(f"layout must be 'diffusers' or 'original', got {layout!r}.")
    if layout == "original":
        original = {path: name for name, path in original_names(model).items()} if part == "lora_unet" else {}
        lacking = [p for p in paths if p not in original]
        if lacking:
            raise AddendaError(
                f"{len(lacking)} of {len(paths)} sites have no name in the original layout, e.g. {lacking[0]}: it is "
                "known for UNets as SD's and SDXL's, with part 'lora_unet'. Write layout='diffusers'."
            )
        named = {p: original[p] for p in paths}
    else:
        own = LABELS if part == "lora_unet" else {}
        named = {p: own.get(p, text_prefix(model, part) + p) for p in paths}
    flat, known = {p: name.replace(".", "_") for p, name in named.items()}, flat_names(model, part)
    shared = [f"{' and '.join(known[flat[p]])}" for p in paths if known[flat[p]] != [p]]
    if shared:
        raise AddendaError(f"Flattened, the names of these modules are the same: {'; '.join(shared[:4])}.")
    return flat


def _distance(pair: Pair, B: Tensor, A: Tensor) -> float:
    """Return ‖ΔW − written‖ / ‖ΔW‖, what the pair itself has lost included."""
    exact = pair.B.double() @ pair.A.double()
    rounded = float((exact - B.double() @ A.double()).norm() / exact.norm().clamp_min(1e-300))
    return (pair.error**2 + rounded**2) ** 0.5
