"""Planning an attach: the sites, methods and costs, before anything changes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from addenda.core.adapter.assign import Spec, allotted, assign, check_bits
from addenda.core.adapter.build import numbers, template
from addenda.core.ask.memory import Optimizer, Step, predict
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.contract import Method
from addenda.core.method.options import said
from addenda.core.modules.ours import is_ours
from addenda.core.modules.wrappers import unwrap
from addenda.core.packed.bits import code_bytes
from addenda.core.site.kinds import OUTPUT, kind_of
from addenda.core.site.site import Site
from addenda.core.site.targets import Target, called, grouped
from addenda.core.state.state import find_state


@dataclass(frozen=True)
class Row:
    """One site of a plan. shape: (m, n), or (width,) of an activation; copies: stacked matrices (experts).

    bytes: of its trained tensors in a file.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    copies: int
    dtype: str
    method: str
    trainable: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """The sites of an attach in the model's order. Printing shows them grouped; nothing on the model has changed."""

    rows: tuple[Row, ...]
    base: int  # parameters of the base
    skipped: dict[str, int]  # where weights change: patterns of layers and stacked experts that no target names
    pooled: int = 0  # numbers that all sites of a method train together, beside those of the rows
    step: Step | None = None  # what a training step takes, where batch and length were given

    @property
    def trainable(self) -> int:
        return sum(row.trainable for row in self.rows) + self.pooled

    @property
    def file_bytes(self) -> int:
        """The bytes of the trained tensors in a file, float32 unless in few bits; frozen positions come on top."""
        return sum(row.bytes for row in self.rows) + 4 * self.pooled

    @property
    def training_bytes(self) -> int:
        """The bytes of trained tensors, their gradients and two Adam moments, all float32; activations not counted."""
        return 16 * self.trainable

    def __str__(self) -> str:
        groups = grouped(row.path for row in self.rows)
        of = {row.path: row for row in self.rows}
        table = [("sites", "×", "kind", "shape", "dtype", "method", "trainable")]
        for pattern, paths in groups.items():
            rows = [of[p] for p in paths]
            sizes = ["×".join(map(str, r.shape)) + (f" ×{r.copies}" if r.copies > 1 else "") for r in rows]
            shapes = list(dict.fromkeys(sizes))
            shape = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"
            first = rows[0]
            count = f"{sum(r.trainable for r in rows):,}"
            table.append((pattern, str(len(rows)), first.kind, shape, first.dtype, first.method, count))
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        right = {1, 6}
        lines = [
            "  ".join(
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        lines.append(
            f"{len(self.rows)} sites, {self.trainable:,} trainable numbers "
            f"({self.trainable / max(self.base, 1):.3%} of {self.base:,}); "
            f"file {_size(self.file_bytes)}, with gradients and Adam {_size(self.training_bytes)}"
        )
        if self.pooled:
            lines.append(f"of them {self.pooled:,} that all sites train together")
        if self.skipped:
            lines.append("left as they are: " + ", ".join(f"{p} ×{n}" for p, n in self.skipped.items()))
        if self.step:
            s, parts = self.step, ("adapter", "optimizer", "gradients", "activations", "temporaries")
            lines += [
                f"a step of {s.example}: {s.flop_ratio:.2f} × the floor's FLOPs ({s.flops:.3g})",
                f"memory at its peak: {_size(s.above)} above the loaded model ({_size(s.weights)}), "
                f"{s.above / s.floor:.2f} × the floor's: "
                + ", ".join(f"{part} {_size(getattr(s, part))}" for part in parts),
            ]
        return "\n".join(line.rstrip() for line in lines)


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def _bytes(site: Site, method: Method, fresh: dict[tuple, SiteTensors]) -> int:
    """Return the bytes of a site's trained tensors in a file. fresh: tensors of sites that are alike, for `bits`."""
    if method.bits is None:
        return 4 * numbers(site, method)
    key = (method, site.kind, tuple(site.stored))
    if key not in fresh:
        fresh[key] = template(site, method)
    t = fresh[key]
    total = 0
    for k, p in t.named_parameters():
        count = len(p) if t.stacked else 1
        total += count * (code_bytes(p.numel() // count, method.bits) + 8) if k in t.matrices else 4 * p.numel()
    return total


@checked()
def plan(
    model: nn.Module,
    method: Spec | Mapping[Target, Spec],
    *,
    targets: Target | Iterable[Target] | None = None,
    exclude: Iterable[Target] = (),
    also_train: Iterable[Target] = (),
    head_bits: int | None = None,
    batch: int | None = None,
    length: int | None = None,
    labelled: float = 1.0,
    optimizer: Optimizer | None = None,
) -> Plan:
    """Plan what `attach` would do: sites, shapes and costs. Raises what attach would; changes nothing.

    batch, length: also predict the memory and the FLOPs of one training step of batch × length token ids, or of batch
    images of length × length pixels, see `core.ask.memory`; labelled: the share of positions that have a label, and so
    logits; optimizer: what makes the optimizer of an adapter, whose state is counted in the place of AdamW's.
    """
    if (batch is None) != (length is None):
        raise AddendaError(f"A step has a batch and a length: give both or neither, got {batch} and {length}.")
    host = find_state(model)
    root = host.root if host else unwrap(model)
    assigned, heads = assign(root, method, targets, exclude, also_train, head_bits)
    assigned = allotted(assigned, {})
    fresh: dict[tuple, SiteTensors] = {}
    rows = tuple(
        Row(
            site.path,
            site.kind.name,
            site.shape,
            site.copies,
            str(site.weight.dtype).removeprefix("torch."),
            ("full copy" if site.path in heads else m.name) + ("" if m.bits is None else f", {said(m.bits)}"),
            numbers(site, m),
            _bytes(site, m, fresh),
        )
        for site, m in assigned
    )
    check_bits((key[0], bool(t.matrices)) for key, t in fresh.items())
    planned = {row.path for row in rows} | {row.path.rpartition(".")[0] for row in rows}
    stacks = [
        f"{path}.{name}"
        for path, module in root.named_modules()
        for name, p in module._parameters.items()
        if p is not None and p.dim() == 3 and kind_of(module) is None and not is_ours(path)
    ]
    weights = any(site.kind != OUTPUT and site.path not in heads for site, _ in assigned)
    layers = [*(path for path, _ in called(root)), *stacks] if weights else []
    untouched = grouped(path for path in layers if path not in planned)
    base = sum(p.numel() for n, p in root.named_parameters() if not is_ours(n))
    step = None
    if batch is not None and length is not None:
        step = predict(root, assigned, heads, batch, length, labelled, optimizer)
    methods = dict.fromkeys(m for _, m in assigned)
    pooled = sum(m.pooled([site.shape for site, chosen in assigned if chosen == m]) for m in methods)
    return Plan(rows, base, {pattern: len(paths) for pattern, paths in untouched.items()}, pooled, step)
