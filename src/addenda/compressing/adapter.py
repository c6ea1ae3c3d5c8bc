"""A finished adapter in few bits: every trained matrix of a file becomes codes of 1 to 8 bits (`core.packed.few_bits`).

This rounds what was trained without rounding; an adapter that was trained with `bits=` set knows of its codes, and at
1 or 2 bits loses much less. No model is needed, except to judge by.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.core.disk.place import file_for
from addenda.core.file.header import Header, SiteEntry, packed_as, read, write
from addenda.core.file.methods import described, methods_of
from addenda.core.method.contract import WeightMethod
from addenda.core.method.options import said
from addenda.core.packed.few_bits import encoded


@dataclass(frozen=True)
class AdapterReport:
    """What few bits cost. errors: ‖W − Ŵ‖ / ‖W‖ of every matrix, by "path/tensor"; bytes: of all tensors.

    quality: what a judge said of the adapter before and after, where one was asked.
    """

    path: Path
    bits: int
    before: int
    after: int
    errors: dict[str, float]
    quality: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        worst = sorted(self.errors.items(), key=lambda item: -item[1])[:3]
        lines = [
            f"{len(self.errors)} matrices in {said(self.bits)}: {self.before:,} bytes of tensors "
            f"become {self.after:,} ({self.before / self.after:.1f} times fewer)",
            f"relative error of a matrix {sum(self.errors.values()) / len(self.errors):.3f} on average (worst: "
            f"{', '.join(f'{k} {e:.3f}' for k, e in worst)})",
        ]
        return "\n".join([*lines, *(f"{when}: {quality}" for when, quality in self.quality.items())])


@checked()
def compress_adapter(
    file: str | Path,
    bits: int,
    out: str | Path | None = None,
    *,
    head_bits: int | None = None,
    judge: Callable[[Path], Any] | None = None,
) -> AdapterReport:
    """Write an adapter file whose trained matrices are codes, and say what that costs.

    out: by default "NAME-1bit.safetensors" beside the file. Heads that are trained copies stay as they are without
    head_bits. judge: what a file of the adapter is worth; asked before and after.

    Raises AddendaError for a file that is none, has codes already, was trained in other bits, or trains no matrix, and
    for bits outside 1 to 8; then nothing is written.
    """
    file = path_of(file)
    path = path_of(out, "out") if out is not None else file.with_name(f"{file.stem}-{bits}bit{file.suffix}")
    file_for(path, Path.is_file, what="out")  # whose it is, is seen below: it may be the same codes
    header, tensors = read(file)
    old_methods, copy = methods_of(header, file)
    for m in old_methods:
        if m.bits not in (None, bits):
            raise AddendaError(f"{file} was trained in {said(m.bits)}; {said(bits)} would round what never acted.")
    methods = [dataclasses.replace(m, bits=bits) for m in old_methods]  # raises where bits make no sense
    copy = copy if head_bits is None else dataclasses.replace(copy, bits=head_bits)
    if header.has_codes:
        raise AddendaError(f"{file} holds codes of {_all_bits(header)} already; rounding twice would lose more.")
    size, errors = _size(tensors), {}
    sites: list[SiteEntry] = []
    for s in header.sites:
        method = copy if s.is_head else methods[s.method]
        if method.bits is None:
            sites.append(s)
            continue
        shapes: dict[str, tuple[int, ...]] = {}
        stacked = isinstance(method, WeightMethod) and not method.any_shape and len(s.shape) == 3
        stacked = stacked and s.kind == "parameter"
        for name in s.trainable:
            W = tensors[key := f"{s.path}/{name}"]
            if W.dim() - stacked < 2:
                continue
            codes = encoded(W, method.bits, stacked)
            shapes[name] = tuple(W.shape)
            tensors |= packed_as(key, codes)
            errors[key] = float((codes.dense().double() - W.double()).norm() / W.double().norm().clamp_min(1e-300))
        sites.append(dataclasses.replace(s, packed=shapes))
    if not errors:
        names = ", ".join(m.name for m in header.methods)
        raise AddendaError(f"{file} holds no trained matrix ({names}), so there is nothing to put into {said(bits)}.")
    head = copy.options(defaults=True) if header.heads else header.head
    header = dataclasses.replace(header, methods=described(methods), sites=tuple(sites), head=head)
    if path.resolve() == file.resolve():
        raise AddendaError(f"{path} is the file itself, whose values the codes do not hold. Give another --out.")
    file_for(path, lambda there: _same(there, header, tensors), what="out")
    quality = {} if judge is None else {"before": judge(file)}
    write(path, header, tensors)
    if judge is not None:
        quality["after"] = judge(path)
    return AdapterReport(path, bits, size, _size(tensors), errors, quality)


def _same(there: Path, header: Header, tensors: dict[str, Tensor]) -> bool:
    """Return whether a file is what this very call wrote before."""
    try:
        old_header, old_tensors = read(there)
    except AddendaError:
        return False
    equal = old_tensors.keys() == tensors.keys() and all(torch.equal(old_tensors[k], t) for k, t in tensors.items())
    return equal and [s.path for s in old_header.sites] == [s.path for s in header.sites]


def _all_bits(header: Header) -> str:
    return " and ".join(sorted({said(header.bits(s) or 0) for s in header.sites if s.packed}))


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())
