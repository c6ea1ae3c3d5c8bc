"""Exporting an adapter: written for another program, read back, and shown to act as it does here."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor

from addenda.core.adapter.attach import detach
from addenda.core.adapter.handle import Adapter, refuse_part
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.sharded import refuse_sharded
from addenda.core.disk.whole import free_place, whole
from addenda.core.modules.borrow import in_its_mode
from addenda.core.site.site import owners_of, site_at
from addenda.core.site.targets import grouped
from addenda.core.state.state import HostRecord, intact, record_of
from addenda.exporting.doors import DOORS, Door, Pairs, door_called, rows_refused
from addenda.exporting.held import as_held
from addenda.exporting.install import Forms, install
from addenda.exporting.pairs import EXACT, low_rank
from addenda.exporting.probe import Effect, effect, probe_for
from addenda.exporting.routes import Route


@dataclass(frozen=True)
class ExportReport:
    """What an export has written, and what it was proved by. errors: ‖ΔW − written‖ / ‖ΔW‖ by site, 0 where exact."""

    door: str
    path: Path
    errors: dict[str, float]
    effect: Effect
    bytes: int
    forms: tuple[str, ...]  # in words: "LORA", "modules_to_save"
    notes: tuple[str, ...] = field(default=())

    @property
    def exact(self) -> bool:
        """Whether every site is written as it is, up to rounding."""
        return max(self.errors.values(), default=0.0) <= EXACT

    def __str__(self) -> str:
        lines = wrap(f"{self.door}: {len(self.errors)} sites as {'; '.join(self.forms)}; {self.bytes:,} bytes", 80)
        worst = sorted(((e, p) for p, e in self.errors.items() if e > EXACT), reverse=True)
        if worst:
            mean = sum(self.errors.values()) / len(self.errors)
            lines.append(
                f"an approximation: ‖ΔW − written‖ / ‖ΔW‖ is {_share(mean)} on average; worst:"
                + "".join(f"\n  {_share(e)}  {p}" for e, p in worst[:3])
            )
        lines += [f"read back: {self.effect}", *self.notes]
        return "\n".join(lines)


def _share(error: float) -> str:
    """Return a share of a change for people: 0.123, or 1.2e-04 where that would be 0.000."""
    return f"{error:.3f}" if error >= 1e-3 else f"{error:.1e}"


@checked(also=tuple(dict.fromkeys(option for door in DOORS.values() for option in door.options)))
@in_its_mode
def export(
    adapter: Adapter,
    door: str,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    second: Mapping[str, Tensor] | None = None,
    probe: object | None = None,
    **options: Any,
) -> ExportReport:
    """Write an adapter for another program, and prove that what was written acts as it does here.

    door: "peft", "vllm" and "merged" make a folder, "gguf" and "kohya" a file; `docs/doors.md` has what passes where.
    rank, energy: write changes that a door has no form of as a LoRA of this rank, or of the rank that keeps this share
    of ‖ΔW‖²; second: by path the second moment of a site's inputs, to weigh what is lost by (`addenda.reduce`). probe:
    a batch to compare outputs on; by default a small one by the model's config. options: of the door, such as
    uniform=True for vllm.

    What is written is read back and attached beside the adapter for a moment; its outputs must be the adapter's, up to
    rounding where the form is exact. Only then does `out`, which must not exist, get its name.

    Raises AddendaError, with nothing written and the model as it was, for sites that have no form behind the door (all
    of them, with the reasons), an adapter that is merged or moves nothing, and what acts otherwise when read back.
    """
    chosen = door_called(door)
    if unknown := options.keys() - set(chosen.options):
        known = ", ".join(chosen.options) or "none"
        raise AddendaError(f"The door {door!r} has no option {min(unknown)!r}; it has: {known}.")
    if not isinstance(adapter, Adapter):
        kind = type(adapter).__name__
        raise AddendaError(f"An export is of an adapter, got a {kind}. attach, load and adapters(model) give them.")
    place, host = free_place(out), record_of(adapter.model, adapter.name)
    refuse_sharded(host.root, "nothing can be exported from it")
    if host.state.merged is not None:
        raise AddendaError("A change is merged into the base. Call unmerge(model) first.")
    intact(host.root, adapter.name, host.record)
    refuse_part(adapter, "an export would be one too")
    found = _routes(chosen, host)
    if absent := [path for path in second or () if path not in found]:
        raise AddendaError(f"second= has moments at {absent[0]!r}, where {adapter.name!r} changes nothing.")
    batch = probe_for(adapter) if probe is None else probe
    approximate = any(r.kind == "approximate" for r in found.values())
    pairs = None
    if approximate or not chosen.own or rank is not None or energy is not None:
        pairs = low_rank(adapter, rank=rank, energy=energy, second=second)
    with whole(place, folder=chosen.folder) as beside:
        losses = chosen.write(adapter, beside, pairs, **options)
        rounded = str(options.get("dtype", "f32")) not in ("f32", "float32")
        seen = _proved(adapter, chosen, beside, pairs, batch, rounded)
        files = [beside] if beside.is_file() else [p for p in beside.rglob("*") if p.is_file()]
        size = sum(p.stat().st_size for p in files)
    errors = dict.fromkeys(found, 0.0) | {path: p.error for path, p in (pairs or {}).items()} | losses
    forms = ("LoRA",) if pairs is not None else tuple(dict.fromkeys(r.why for r in found.values()))
    notes = ()
    if adapter.vocabulary is not None:
        notes = (f"no tokenizer is in it: save the one with the new tokens there, save_pretrained({str(place)!r})",)
    return ExportReport(door, place, errors, seen, size, forms, notes)


def _routes(door: Door, host: HostRecord) -> dict[str, Route]:
    """Return how each site passes. Raises AddendaError listing those that do not."""
    owners = owners_of(host.root)
    config = getattr(host.root, "config", None)
    methods = host.record.methods
    found = {path: door.route(m, site_at(host.root, path, owners), config) for path, m in methods.items()}
    rows = rows_refused(host.root, door) if host.record.grown else {}
    refused: dict[tuple[str, str], list[str]] = {}
    for path, r in (*found.items(), *rows.items()):
        if r.kind == "refused":
            called = "new rows" if rows.get(path) is r else methods[path].name or "full copy"
            refused.setdefault((called, r.why.rstrip(".")), []).append(path)
    if refused:
        texts = [f"{_some(paths)} ({name}): {why}" for (name, why), paths in refused.items()]
        raise AddendaError(
            f"{sum(map(len, refused.values()))} of {len(found) + len(rows)} sites have no form for {door.title}: "
            f"{'; '.join(texts[:8])}{' …' if len(texts) > 8 else ''}. Nothing was written."
        )
    return found


def _some(paths: list[str]) -> str:
    """Return paths for a message, layers alike as one."""
    groups = [of[0] if len(of) == 1 else f"{p} × {len(of)}" for p, of in grouped(paths).items()]
    return ", ".join(groups[:4]) + (f" and {len(groups) - 4} more kinds" if len(groups) > 4 else "")


@torch.no_grad()
def _proved(adapter: Adapter, door: Door, written: Path, pairs: Pairs | None, batch: object, rounded: bool) -> Effect:
    """Read back what was written and return its effect beside the adapter's. Raises AddendaError where they differ."""
    exact = not rounded and (pairs is None or all(p.exact for p in pairs.values()))
    if door.model:
        other = partial(door.outputs, written, adapter.model, batch)
        return effect(adapter, other, batch, exact=exact, where=f"The export to {door.title}")
    with _beside(adapter, door.read(written, adapter.model)) as other:
        return effect(adapter, other, batch, exact=exact, where=f"The export for {door.title}")


@contextmanager
def _beside(adapter: Adapter, forms: Forms) -> Iterator[Adapter]:
    """Yield what was read back, attached idle beside the adapter inside a `with` block."""
    forms = as_held(forms, record_of(adapter.model, adapter.name).root)
    records = record_of(adapter.model, adapter.name).state.records
    name = next(n for i in range(len(records) + 1) if (n := f"read-back-{i}") not in records)
    other = install(adapter.model, forms.sites, name=name, heads=forms.heads, pools=forms.pools, what="What was read")
    try:
        yield other
    finally:
        detach(other.model, name)
