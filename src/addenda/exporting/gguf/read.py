"""Reading a LoRA in GGUF: each pair of tensors finds its module, rows in the model's order; or nothing is attached."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.visible import label
from addenda.core.disk.access import reading, shown
from addenda.core.method.contract import Method, Params
from addenda.core.site.site import Site, owners_of, site_at
from addenda.exporting.gguf.architectures import TIED, Architecture, architecture_of
from addenda.exporting.gguf.head import SIZES, Entry, Head, read_head
from addenda.exporting.install import Forms
from addenda.methods.lora import LoRA

_MARKS = (".lora_a", ".lora_b")
_KEYS = ("adapter.type", "adapter.lora.alpha", "adapter.lora.task_name", "adapter.lora.prompt_prefix")
Two = dict[str, Entry]  # by ".lora_a" and ".lora_b"


def read(path: str | Path, model: nn.Module) -> Forms:
    """Return the adapter of a GGUF file as LoRA at the sites of a model, for `install`.

    Raises AddendaError for a file that is damaged, a model or another adapter, of another architecture than the
    model's, or with tensors that it has no place for; for pairs with one factor missing, other shapes or types, and
    numbers that are not finite. Nothing of the data is read before all shapes are those of the model.
    """
    head = read_head(path)
    alpha = check_adapter(head)
    config = getattr(model, "config", None)
    architecture = architecture_of(config)
    if architecture.name != (name := head.text("general.architecture")):
        raise AddendaError(
            f"{shown(head.path)} is for {label(name, 40) or 'no'} models in GGUF, and this {type(model).__name__} is "
            f"{architecture.name} there. Give the model that it was trained on."
        )
    pairs, problems = paired(head)
    found = _placed(pairs, architecture, model, problems)
    if problems:
        raise AddendaError(
            f"{shown(head.path)} does not fit this {type(model).__name__}, and nothing was attached. {len(problems)} "
            f"problems: {'; '.join(problems[:12])}{' …' if len(problems) > 12 else ''}."
        )
    forms = Forms()
    with reading(head.path):
        for tensor, (site, two) in found.items():
            forms.sites[site.path] = _form(head, tensor, site, two, architecture, config, alpha)
    return forms


def check_adapter(head: Head) -> float:
    """Return the alpha of a LoRA. Raises AddendaError where the file is none, or acts in ways that are not read."""
    kind, adapter = head.text("general.type"), head.text("adapter.type")
    if kind != "adapter" or adapter != "lora":
        what = f"{label(kind, 40) or 'unnamed'} {label(adapter, 40)}".strip()
        raise AddendaError(
            f"{shown(head.path)} is a GGUF file of the type {what!r}, and a LoRA says adapter and lora. "
            + ("That is a base model: give it to llama.cpp as -m." if kind in ("", "model") else "It is not read here.")
        )
    if other := [key for key in head.fields if key.startswith("adapter.") and key not in _KEYS]:
        raise AddendaError(
            f"{shown(head.path)} has {label(other[0], 60)}, by which it acts otherwise than a LoRA (an aLoRA acts only "
            "after some tokens). It is not read here."
        )
    alpha = head.fields.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, float) or not math.isfinite(alpha) or alpha < 0:
        raise AddendaError(f"{shown(head.path)}: adapter.lora.alpha is {label(alpha, 40)}, and a number is wanted.")
    return alpha


def paired(head: Head) -> tuple[dict[str, Two], list[str]]:
    """Return the two factors by name of the weight that they change, and what is no pair of factors."""
    pairs: dict[str, Two] = {}
    problems = []
    for each in head.tensors:
        stem, mark = each.name[:-7], each.name[-7:]
        if mark in _MARKS and each.type in SIZES:
            pairs.setdefault(stem, {})[mark] = each
        elif mark in _MARKS:
            problems.append(
                f"{label(each.name, 80)} is of {each.dtype}, and float32, float16 and bfloat16 are read; convert it "
                "again with --outtype f32"
            )
        elif each.name.endswith("_norm.weight"):
            problems.append(f"{label(each.name, 80)} is a whole norm, which llama.cpp passes over without a word")
        else:
            problems.append(f"{label(each.name, 80)} is no factor of a LoRA")
    for stem, two in pairs.items():
        problems += [f"{label(stem, 80)} has no {mark}" for mark in _MARKS if mark not in two]
    if not head.tensors:
        problems.append("it has no tensor")
    return pairs, problems


def _placed(
    pairs: Mapping[str, Two], architecture: Architecture, model: nn.Module, problems: list[str]
) -> dict[str, tuple[Site, Two]]:
    """Return the site and factors by name of the weight; add to the problems what has no site, or not its shape."""
    owners, modules = owners_of(model), dict(model.named_modules())
    config, found = getattr(model, "config", None), {}
    names = [t for path in modules if (t := architecture.tensor(path))]
    for tensor, two in pairs.items():
        path = architecture.path(tensor) or ""
        path = path if path in modules else path.partition(".")[2]
        if not path or path not in modules:
            problems.append(f"the model has no {label(tensor, 80)}.{nearest(tensor, names, 1)}")
        elif architecture.tied(tensor, config):
            problems.append(f"{tensor}: {TIED}")
        elif len(two) == 2:
            site = site_at(model, path, owners)
            m, n = site.shape
            a, b = (two[mark].shape for mark in _MARKS)
            rank = b[-1]
            expected = ((m, rank), (n, rank)) if tensor == "token_embd.weight" else ((rank, n), (m, rank))
            if (a, b) != expected:
                problems.append(f"{tensor}: factors of {[*a]} and {[*b]} are none of {m} × {n}")
            found[tensor] = site, two
    return found


def _form(
    head: Head, tensor: str, site: Site, two: Two, architecture: Architecture, config: object, alpha: float
) -> tuple[Method, Params]:
    A, B = (_numbers(head, two[mark]) for mark in _MARKS)
    if tensor == "token_embd.weight":
        A, B = B.T.contiguous(), A
    if (order := architecture.order(tensor, len(B), config)) is not None:
        B = torch.empty_like(B).index_copy_(0, order, B)
    if not alpha:  # without one, ranks of zeros change nothing: they were put there, see `write`
        rank = len(A) - int(((A != 0).any(1) | (B != 0).any(0)).flip(0).int().argmax())
        A, B = A[:rank], B[:, :rank]
    if len(A) > (least := min(site.shape)):  # it says no more than the product, which is of the smaller side's rank
        product = ((alpha / len(A) if alpha else 1.0) * (B.double() @ A.double())).float()
        whole = torch.eye(least)
        (B, A), alpha = ((whole, product) if least == site.shape[0] else (product, whole)), 0.0
    return LoRA(rank=len(A), alpha=alpha or None), {"A": A, "B": B}


def _numbers(head: Head, entry: Entry) -> Tensor:
    """Return a tensor's numbers in float32. Raises AddendaError where one is not finite."""
    kind, width = SIZES[entry.type]
    stored = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[kind]
    data = np.fromfile(head.path, stored, entry.numbers, offset=head.start + entry.offset)
    if len(data) != entry.numbers:
        raise AddendaError(f"{shown(head.path)} ends within {label(entry.name, 80)}; copy it again.")
    if kind == "bfloat16":
        data = (data.astype("<u4") << 8 * width).view("<f4")
    tensor = torch.from_numpy(data.astype(np.float32)).reshape(entry.shape)
    if not bool(torch.isfinite(tensor).all()):
        raise AddendaError(f"{shown(head.path)}: {label(entry.name, 80)} has numbers that are not finite.")
    return tensor
