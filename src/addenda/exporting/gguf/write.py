"""Writing low-rank changes as a LoRA in GGUF, as llama.cpp loads it with --lora.

llama.cpp computes y = W x + scale · B (A x), with scale = alpha / rank where adapter.lora.alpha is not 0, and 1 where
it is (`llama_adapter_lora_weight::get_scale`). Here it is 0 and the scale stands in B, so ranks may differ by site. Of
the token embedding A holds the rows (vocabulary × r) and B the directions (width × r). Tensors called …_norm are passed
over by its loader without a word, so a change of a norm is refused here.

ik_llama.cpp (as of ik-llama-cpp-python 0.1.5) computes NaN with a LoRA of rank 4, and of no other rank: to those a rank
of zeros is added, which changes nothing. It takes no LoRA of the token embedding and none with flash attention, and it
leaves out those of gate_proj and up_proj unless fused_up_gate is off.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import file_of, shown, writing
from addenda.core.disk.atomic import replacing
from addenda.core.method.contract import Method, Replace, WeightMethod
from addenda.core.site.kinds import CONV, CONV1D, EMBEDDING, LINEAR
from addenda.core.site.site import Site
from addenda.core.state.state import record_of
from addenda.exporting.gguf.architectures import TIED, Architecture, architecture_of
from addenda.exporting.pairs import Pair, balanced, is_low_rank
from addenda.exporting.routes import Route

_DTYPES = {"f32": torch.float32, "f16": torch.float16}
_NAN = 4  # the rank with which ik_llama.cpp computes NaN


def route(method: Method, site: Site, config: Any = None) -> Route:
    """Return how a method's change at a site goes into GGUF. config: the model's; no name is looked up without it."""
    if reason := _refusal(method, site) or (None if config is None else _no_place(site, config)):
        return Route("refused", reason)
    if is_low_rank(method):
        return Route("exact", "LoRA, every scale in B")
    return Route("approximate", "LoRA of the rank or energy asked for")


def _refusal(method: Method, site: Site) -> str | None:
    """Return why no change of this kind has a form in GGUF, whatever the model, or None."""
    if not isinstance(method, WeightMethod):
        return "it changes activations, and a GGUF adapter holds changes of weights. Train a weight method"
    if isinstance(method, Replace):
        return "it is a whole copy of a weight, and a GGUF adapter holds low-rank changes. Export as 'merged'"
    if site.copies > 1:
        return "a stack of matrices (experts) was not tried with llama.cpp. Export as 'merged'"
    if site.kind not in (LINEAR, CONV1D, EMBEDDING):
        what = "a convolution" if site.kind == CONV else "no layer that multiplies by it, such as a norm or a bias"
        return f"{site.path} is {what}, and llama.cpp adds a LoRA to linear layers and embeddings. Export as 'merged'"
    return None


def _no_place(site: Site, config: Any) -> str | None:
    """Return why a model of this config has no tensor for a site in GGUF, or None."""
    try:
        architecture = architecture_of(config)
    except AddendaError as error:
        return str(error)
    tensor = architecture.tensor(site.path)
    if tensor is None:
        return f"{site.path} has no name in a GGUF file of {architecture.name}. Leave it out, or export as 'merged'"
    if architecture.tied(tensor, config):
        return f"{site.path}: {TIED}. Leave it out, or export as 'merged'"
    return None


def write_adapter(adapter: Adapter, path: str | Path, pairs: Mapping[str, Pair], *, dtype: str = "f32") -> Path:
    """Write an adapter's pairs (`exporting.pairs.low_rank`) as a new GGUF file, and return its path.

    Raises AddendaError as `write` does, and where heads were trained as whole copies, which GGUF has no place for.
    """
    root, _, record = record_of(adapter.model, adapter.name)
    if record.also_train:
        raise AddendaError(
            f"{adapter.name!r} has trained {', '.join(record.also_train)} as whole copies, and a GGUF adapter holds "
            "low-rank changes only: without them it would answer as another model. Export it as 'merged'."
        )
    return write(pairs, getattr(root, "config", None), path, dtype=dtype, name=adapter.name)


def write(
    pairs: Mapping[str, Pair],
    config: Any,
    path: str | Path,
    *,
    dtype: str = "f32",
    name: str = "",
) -> Path:
    """Write changes of a model's weights as a new GGUF file, whole or not at all, and return its path.

    config: the transformers config of the base. dtype: "f32", or "f16" for half the bytes, with factors
    that are balanced, so that neither underflows. name: general.name.
    Raises AddendaError before anything is written: for architectures that were not tried, modules that have no name in
    GGUF, norms, tied embeddings and heads, stacks, numbers that are not finite or beyond float16, and a file that is
    there. Needs the package gguf.
    """
    target = file_of(path)
    tensors = tensors_of(pairs, config, dtype=dtype)
    if target.exists() or target.is_symlink():
        raise AddendaError(f"{shown(target)} is there already. Move it, or name another file.")
    architecture = architecture_of(config)
    with writing(target, sum(t.numel() * t.element_size() for t in tensors.values())), replacing(target) as beside:
        _write(beside, architecture, tensors, name)
    return target


def _write(path: Path, architecture: Architecture, tensors: Mapping[str, Tensor], name: str) -> None:
    gguf = _package()
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        if name:
            writer.add_name(name)
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with open(path, "r+b") as file:  # not by the package, whose numpy tells nothing of a disk that fills
        file.seek(0, os.SEEK_END)
        for tensor in tensors.values():
            file.write(bytes(-file.tell() % writer.data_alignment))
            file.write(tensor.numpy().data)
        file.write(bytes(-file.tell() % writer.data_alignment))


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise AddendaError("Writing GGUF needs the package gguf. Install it: pip install 'addenda[gguf]'.") from None
    return gguf


def tensors_of(pairs: Mapping[str, Pair], config: Any, *, dtype: str = "f32") -> dict[str, Tensor]:
    """Return a file's tensors by name: two for each pair, rows in GGUF's order. Raises AddendaError as `write` does."""
    if dtype not in _DTYPES:
        raise AddendaError(f"dtype is {' or '.join(map(repr, _DTYPES))}, got {dtype!r}.")
    architecture = architecture_of(config)
    problems, tensors = [], {}
    for path, pair in pairs.items():
        reason = _unfit(pair) or _no_place(pair.site, config)
        if reason is None:
            made = _two(pair if dtype == "f32" else balanced(pair), architecture, config)
            reason = _beyond(made.values(), _DTYPES[dtype])
        if reason is not None:
            problems.append(reason if path in reason else f"{path}: {reason}")
            continue
        tensors |= {key: t.to(_DTYPES[dtype]).contiguous() for key, t in made.items()}
    if not pairs:
        problems.append("there is no change")
    if problems:
        raise AddendaError(
            f"No GGUF adapter was written: {'; '.join(problems[:12])}{' …' if len(problems) > 12 else ''}."
        )
    return tensors


def _unfit(pair: Pair) -> str | None:
    """Return why a pair's site or matrices cannot be written, or None."""
    site, (m, n) = pair.site, pair.site.shape
    if site.copies > 1 or pair.B.dim() != 2:
        return "a stack of matrices (experts) was not tried with llama.cpp; export as 'merged'"
    if site.kind not in (LINEAR, CONV1D, EMBEDDING):
        return (
            "llama.cpp adds a LoRA to linear layers and embeddings only, and passes over changes of norms without a "
            "word; export as 'merged'"
        )
    if pair.B.shape != (m, pair.rank) or pair.A.shape != (pair.rank, n) or pair.rank < 1:
        return f"B and A are {[*pair.B.shape]} and {[*pair.A.shape]}, and the weight is {m} × {n}"
    return None


def rounding(pairs: Mapping[str, Pair], dtype: str) -> Iterator[tuple[str, Pair, float]]:
    """Yield ‖B A − what is written‖ / ‖B A‖ by path, for a dtype in which numbers are rounded; nothing for "f32"."""
    for path, pair in pairs.items() if dtype != "f32" else ():
        product = pair.B.float() @ pair.A.float()
        even = balanced(pair)
        written = even.B.to(_DTYPES[dtype]).float() @ even.A.to(_DTYPES[dtype]).float()
        yield path, pair, float((product - written).norm() / product.norm().clamp_min(1e-30))


def _two(pair: Pair, architecture: Architecture, config: Any) -> dict[str, Tensor]:
    tensor = architecture.tensor(pair.site.path)
    assert tensor is not None
    A, B = pair.A.detach().float().cpu(), pair.B.detach().float().cpu()
    if pair.rank == _NAN:
        A, B = F.pad(A, (0, 0, 0, 1)), F.pad(B, (0, 1))
    if (order := architecture.order(tensor, len(B), config)) is not None:
        B = B[order]
    if tensor == "token_embd.weight":
        A, B = B, A.T
    return {f"{tensor}.lora_a": A, f"{tensor}.lora_b": B}


def _beyond(tensors: Iterable[Tensor], dtype: torch.dtype) -> str | None:
    for t in tensors:
        if not bool(torch.isfinite(t).all()):
            return "its numbers are not finite"
        if not bool(torch.isfinite(t.to(dtype)).all()):
            return f"its numbers go up to {float(t.abs().max()):.3g}, beyond float16; write it with dtype='f32'"
    return None
