"""A summary of an adapter file in a few lines; no model needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.core.base.visible import label
from addenda.core.file.header import MethodEntry, read
from addenda.core.file.methods import known_options
from addenda.core.method.catalogue import info
from addenda.core.method.options import said
from addenda.core.site.targets import grouped

_METHODS = 100  # that are listed


def _unusual(entry: MethodEntry) -> Mapping[str, Any]:
    """Return a stored method's options that differ from its defaults; all of them for a method not known here."""
    try:
        return info(entry.name).cls(**known_options(entry)).options()
    except AddendaError:
        return entry.options


def _some(names: list[str], most: int = 40) -> str:
    """Join names out of a file, only the first of very many."""
    return ", ".join(map(label, names[:most])) + (f", … and {len(names) - most:,} more" if len(names) > most else "")


def inspect(path: str | Path) -> str:
    """Describe what an adapter file holds, in a few lines; no model needed."""
    header, tensors = read(path)
    lines = [f"{path}: adapter file, schema {header.schema}, seed {header.seed}, {header.step} steps"]
    paths: dict[int, list[str]] = {}
    for s in header.sites:
        paths.setdefault(s.method, []).append(s.path)
    for i, m in enumerate(header.methods[:_METHODS]):
        options = _some([f"{k}={v}" for k, v in _unusual(m).items()]) or "defaults"
        groups = grouped(paths[i])
        lines.append(f"  {label(m.name)} ({options}): " + _some([f"{g} × {len(p)}" for g, p in groups.items()]))
    if (more := len(header.methods) - _METHODS) > 0:
        lines.append(f"  … and {more:,} more methods")
    heads = [s.path for s in header.heads]
    if heads:
        lines.append(f"  also trained as whole copies: {_some(heads)}")
    if header.vocabulary is not None:
        v = header.vocabulary
        texts = [label(repr(t[:40])) for t in list(v.tokens)[:12]] + ["…"] * (len(v.tokens) > 12)
        lines.append(f"  {label(str(v)[:300])}{': ' + ', '.join(texts) if texts else ''}")
        if v.tokenizer is not None:
            lines.append(f"  tokenizer: {v.entries:,} tokens, SHA-256 {v.tokenizer}")
    if header.trained_on is not None:
        lines += [f"  trained beside: {b.name}, SHA-256 {b.sha256}" for b in header.trained_on.beside]
        if header.trained_on.tokenizer is not None:
            lines.append(f"  trained with a tokenizer of {header.trained_on.entries:,} tokens, SHA-256 "
                         f"{header.trained_on.tokenizer}")  # fmt: skip
    if header.labels:
        labels = [label(repr(n[:40])) for n in header.labels[:12]] + ["…"] * (len(header.labels) > 12)
        lines.append(f"  {len(header.labels)} labels in order: {', '.join(labels)}")
    trained = sum(s.count(k, tensors) for s in header.sites for k in s.trainable)
    packed = [(s, k) for s in header.sites for k in s.packed]
    shared = sum(tensors[f".{i}/{k}"].numel() for i, names in enumerate(header.pools) for k in names)
    if shared:
        lines.append(f"  trained by all sites together: {shared:,} numbers")
    if packed:
        depths = " and ".join(map(said, sorted({header.bits(s) or 0 for s, _ in packed})))
        lines.append(
            f"  codes: {sum(s.count(k, tensors) for s, k in packed):,} numbers of {len(packed)} matrices in {depths}"
        )
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    lines.append(
        f"  {trained + shared:,} trained numbers, {size:,} bytes of tensors, {Path(path).stat().st_size:,} bytes"
    )
    proof = f"SHA-256 {header.sha256}, as its bytes have" if header.sha256 else "no digest: of schema 1"
    lines.append(f"  {proof}")
    if header.note:
        lines.append(f"  note of its writer: {label(str(dict(header.note)), 400)}")
    return "\n".join(lines)
