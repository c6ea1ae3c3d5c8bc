"""Adapter files: one safetensors file with tensors, schema and the base's fingerprint. A load takes whole or raises.

The header's `addenda` entry is JSON: schema number, seed, step, the methods with all their options (older files: those
that differ from the defaults; what such a default was then stands in `Method.formerly`), and every
site with path, kind, stored shape and dtype, the SHA-256 of the base's unmodified bytes, sixteen of its values, and
the names and kinds of its tensors. Tensors are stored as "path/name", those that all sites of a method train together
as ".0/name" (of the next such method ".1/name"); the adapter's own name is in no key. Nothing that can be computed
again is stored, only a checksum of it. No pickle, no code and no import path is ever read. "labels", where they are
known, are the names of a classifier's outputs, in their order.

A matrix in few bits is two tensors, "path/name" its codes and "path/name.moments" its mean and standard deviation; its
shape stands under "packed" at the site, its bits among the options of the method ("head", for heads).
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from addenda.core.adapter.attach import install, ready, unfit
from addenda.core.adapter.build import Assigned, build_tensors, numbers
from addenda.core.adapter.handle import Adapter, fitting
from addenda.core.adapter.template import pool_template, template
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.random import Stream
from addenda.core.base.sharded import is_sharded, wait, whole, writes
from addenda.core.base.visible import label
from addenda.core.disk.access import file_of
from addenda.core.file.header import FLOATING, SCHEMA, bits_of, count_of, packed_as, read, write
from addenda.core.forward.adapted import SiteTensors
from addenda.core.method.catalogue import info
from addenda.core.method.contract import Method, Params, Replace, Shape
from addenda.core.modules.borrow import in_its_mode
from addenda.core.packed.few_bits import FewBits, encoded, said
from addenda.core.packed.tensor import Packed, bits_sum, parts_of
from addenda.core.site.site import Site, owners_of, refusal, site_at, with_neighbours
from addenda.core.site.targets import grouped
from addenda.core.state.state import State, record_of
from addenda.core.state.undo import undone

_SAMPLE = 16


def fingerprint(state: State, site: Site) -> str:
    """SHA-256 of the base's own stored bytes at a site (before any merge), remembered until the tensor changes."""
    parts = parts_of(state.base(site))
    if any(is_sharded(own) for own in parts):  # every process must gather, whatever it remembers
        return _hash(parts)
    identity = tuple(_identity(own) for own in parts)
    known = state.fingerprints.get(site.path)
    if known is None or known[0] != identity:
        state.fingerprints[site.path] = known = (identity, _hash(parts))
    return known[1]


def _hash(parts: list[Tensor]) -> str:
    made = hashlib.sha256()
    for own in parts:
        made.update(whole(own).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def _identity(own: Tensor) -> tuple:
    version = 0 if own.is_inference() else own._version
    return own.data_ptr(), version, own.dtype, tuple(own.shape), bits_sum(own)


def sample(state: State, site: Site) -> list[float]:
    """Some values of the base at seeded positions: what another dtype of the same weights must agree with."""
    own = whole(state.base(site)).flatten()
    positions = Stream(0, "sample", site.path).choice(own.numel(), min(_SAMPLE, own.numel()))
    return own[positions.to(own.device)].double().tolist()


def checksum(name: str, tensor: Tensor) -> list[float] | str:
    """What tells a recomputed tensor from another: ±1 projections in float64, or a hash for integers."""
    if not tensor.is_floating_point():
        return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    values = tensor.detach().cpu().double().flatten().numpy()
    words = Stream(0, "checksum", name).raw((values.size + 63) // 64)
    signs = np.unpackbits(words.view(np.uint8))[: values.size] * 2.0 - 1.0
    with np.errstate(invalid="ignore", over="ignore"):  # a NaN agrees with nothing, and the load says so
        return [float(values @ signs), float(np.sqrt(values @ values))]


@in_its_mode
def save(adapter: Adapter, path: str | Path, *, basis: bool = False, latent: bool = False) -> Path:
    """Write the adapter to one file, atomically: a reader sees the old file or the new one, never a part.

    basis: store the tensors derived from W as well (singular vectors), for machines whose factorisations differ.
    latent: of matrices in few bits store what training moves, in float32, so that it can go on; else their codes.
    Of a sharded model (FSDP2) every process must call it: tensors are gathered, the first process writes, and all
    return when the file is there.
    Raises AddendaError for tensors that are empty or not finite; then nothing is written.
    """
    path = file_of(path)
    root, state, record = record_of(adapter.model, adapter.name)
    methods = list(dict.fromkeys(m for p, m in record.methods.items() if p not in record.also_train))
    tensors: dict[str, Tensor] = {}
    sites, problems, owners, copy = [], [], owners_of(root), Replace()
    gathered = adapter.sharded
    for site_path, held in adapter.sites():
        site = site_at(root, site_path, owners)
        head = site_path in record.also_train
        copy = held.method if head else copy
        entry = {
            "path": site_path,
            "kind": site.kind.name,
            "shape": site.stored,
            "dtype": str(site.weight.dtype).removeprefix("torch."),
            "method": -1 if head else methods.index(held.method),
            "trainable": list(held._parameters),
            "frozen": list(held.frozen),
        }
        if isinstance(base := state.base(site), Packed):
            entry["form"] = base.form  # what a plain base must be put into, to be this one
        if not head:
            entry |= {"hash": fingerprint(state, site), "sample": sample(state, site)}
        derived = _derived(held)
        entry["checks"] = {k: checksum(k, t) for k, t in derived.items()}
        for key, tensor in (held.stored() | (derived if basis else {})).items():
            tensor = whole(tensor)
            problems += _unsaved(f"{site_path}/{key}", tensor)
            packed = None if key in derived else _packed(held, key, tensor, latent)
            if packed is not None:
                entry.setdefault("packed", {})[key] = list(packed.shape)
                tensors |= packed_as(f"{site_path}/{key}", packed)
                continue
            own = tensor.detach().cpu().contiguous()
            tensors[f"{site_path}/{key}"] = own.clone() if key in derived else own  # shared ones once for every site
        sites.append(entry)
    pools = dict(adapter.pools())
    for pool_name, pool in pools.items():
        for key, tensor in pool.stored().items():
            tensor = whole(tensor)
            problems += _unsaved(f"{pool_name}/{key}", tensor)
            tensors[f"{pool_name}/{key}"] = tensor.cpu().contiguous()
    if problems:
        raise AddendaError(
            f"{adapter.name!r} was not saved to {path}: {'; '.join(problems[:8])}"
            f"{f' … and {len(problems) - 8} more' if len(problems) > 8 else ''}."
        )
    header = {
        "schema": SCHEMA,
        "seed": record.seed,
        "step": record.step,
        "methods": described(methods),
        "basis": basis,
        "sites": sites,
        "pools": [list(pool._parameters) for pool in pools.values()],
    }
    if record.also_train:
        header["head"] = copy.options(defaults=True)
    header["labels"] = list(record.labels)
    if writes(gathered):
        write(path, header, tensors)
    wait(gathered)
    return path


def _packed(held: SiteTensors, key: str, tensor: Tensor, latent: bool) -> FewBits | None:
    """The codes of a matrix, as held or made now, once; None for what stays as it is."""
    if isinstance(tensor, FewBits):
        return tensor
    bits = held.method.bits
    if bits is None or latent or key in held.frozen or key not in held.matrices or _unsaved(key, tensor):
        return None
    return encoded(tensor, bits, held.stacked)


def _unsaved(key: str, tensor: Tensor) -> list[str]:
    """Why a tensor cannot be saved; nothing where it can."""
    if tensor.numel() == 0:
        return [f"{key} is empty (shape {tuple(tensor.shape)})"]
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        return [f"{key} holds values that are not finite"]
    return []


@in_its_mode
@checked()
def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    base: Literal["exact", "compatible"] = "exact",
    activate: bool = True,
) -> Adapter:
    """Attach the adapter of a file: whole, or not at all.

    base="compatible" admits another floating dtype of the same weights, checked on stored samples within rounding.
    A file in few bits stays in codes, which act as they did in training and cannot be trained on.
    Raises AddendaError listing everything that does not fit (paths with the nearest names, kinds, shapes, tensors), for
    base values that differ, for factors that this machine computes differently, and for a taken name.
    """
    started = time.perf_counter()
    if base not in ("exact", "compatible"):
        raise AddendaError(f"base must be 'exact' or 'compatible', got {base!r}.")
    root, state = ready(model, name)
    header, tensors = read(path)
    if trainable and any(s["packed"] for s in header["sites"]):
        raise AddendaError(
            f"{path} holds codes: what training moved is not in it, and codes cannot be moved a little. Go on from a "
            "checkpoint of its run, or from a file that was saved with latent=True."
        )
    labels = fitting(root, header["labels"])
    plan = _match(root, header, *methods_of(header, path), path)
    _same_base(state, header, plan, base, path)
    stored = {s["path"]: _stored(s, bits_of(header, s), tensors) for s in header["sites"]}
    pools = _pools(plan, header, tensors, path)
    _same_tensors(plan, stored, path)
    built = build_tensors(plan, header["seed"], stored=stored, pools=pools)
    _same_factors(header, {site.path: site.weight.numel() for site, _ in plan}, built, tensors, path)
    heads = tuple(s["path"] for s in header["sites"] if s["method"] == -1)
    with undone(root):
        adapter = install(root, state, name, plan, built, heads, header["seed"], not state.records, started, activate)
        record_of(root, name)[2].labels = labels
        adapter.draw(header["step"])
        return adapter.requires_grad_(trainable)


def _known(entry: dict) -> dict:
    """The options of a stored method; an option that this version does not know may not be dropped.

    One that the file does not store has the default of the version that wrote it.
    """
    cls = info(entry["name"]).cls
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(entry["options"]) - fields)
    if unknown:
        raise AddendaError(
            f"The file uses options of {entry['name']} that this version does not know: {', '.join(unknown)}. "
            "It was written by another version of addenda; upgrade."
        )
    return {**cls.formerly, **entry["options"]}


def described(methods: Iterable[Method]) -> list[dict]:
    """The methods as a header stores them: all options, so that no later default changes what a file means."""
    return [{"name": m.name, "options": m.options(defaults=True)} for m in methods]


def methods_of(header: dict, path: str | Path) -> tuple[list[Method], Replace]:
    """The methods of a file in the order of its header, and how its heads are trained."""
    try:
        return [info(m["name"]).cls(**_known(m)) for m in header["methods"]], Replace(**header["head"])
    except TypeError:
        raise AddendaError(
            f"{path}: this version of addenda does not know these options of heads: {str(header['head'])[:200]}."
        ) from None


def _match(root: nn.Module, header: dict, methods: list[Method], copy: Replace, path: str | Path) -> Assigned:
    plan, problems = [], []
    missing, owners, taken = [], owners_of(root), set()
    for s in header["sites"]:
        try:
            site = site_at(root, s["path"], owners)
        except AddendaError:
            missing.append(s["path"])
            continue
        if site.changed in taken or (site.path != s["path"] and site.kind.name == s["kind"]):
            problems.append(f"{s['path']}: in this model it is {site.path} (tied or repeated)")
            continue
        taken.add(site.changed)
        method = copy if s["method"] == -1 else methods[s["method"]]
        site = with_neighbours(root, site, method.beside(site.path), owners)
        if site.kind.name != s["kind"] or site.stored != s["shape"]:
            found = f"{site.kind.name} {site.stored}"
            problems.append(f"{s['path']}: the file has {s['kind']} {s['shape']}, the model {found}")
        elif why := refusal(root, site, owners) or unfit(site, method):
            problems.append(f"{s['path']}: {why}")
        plan.append((site, method))
    known = [n for n, _ in root.named_modules()]
    for pattern, paths in grouped(missing).items():
        problems.append(f"the model has no {pattern[:200]} ({len(paths)} sites).{nearest(paths[0], known, 1)}")
    if problems:
        raise AddendaError(
            f"{path} does not fit this {type(root).__name__}, and nothing was loaded. {len(problems)} problems: "
            f"{'; '.join(problems[:20])}{' …' if len(problems) > 20 else ''}"
        )
    return plan


def _same_base(state: State, header: dict, plan: Assigned, base: str, path: str | Path) -> None:
    entries = {s["path"]: s for s in header["sites"]}
    other = []
    for site, _ in plan:
        entry = entries[site.path]
        if "hash" not in entry:
            continue
        dtype = str(site.weight.dtype).removeprefix("torch.")
        if base == "exact" and (entry["dtype"] != dtype or entry["hash"] != fingerprint(state, site)):
            other.append(
                f"{site.path} (file {entry['dtype']}, model {dtype})" if entry["dtype"] != dtype else site.path
            )
        if base == "compatible" and not _within_rounding(entry["sample"], sample(state, site)):
            other.append(site.path)
    if other:
        way = (
            "If this is the same base in another dtype, load it with base='compatible'."
            if base == "exact"
            else "Their values differ by more than rounding, so this is another model."
        )
        raise AddendaError(
            f"{path} was trained on other base weights: {len(other)} of {len(plan)} sites differ, "
            f"e.g. {', '.join(other[:3])}. {way} Nothing was loaded."
        )


def _within_rounding(stored: list[float], found: list[float]) -> bool:
    a, b = np.asarray(stored), np.asarray(found)
    return a.shape == b.shape and bool((np.abs(a - b) <= 2.0**-7 * np.maximum(np.abs(a), np.abs(b)) + 1e-7).all())


def _stored(entry: dict, bits: int | None, tensors: dict[str, Tensor]) -> Params:
    held: Params = {}
    for k in entry["trainable"]:
        own = tensors[key := f"{entry['path']}/{k}"]
        if k in entry["packed"]:
            assert bits is not None
            own = FewBits.of(own, tensors[f"{key}.moments"], bits, entry["packed"][k], torch.float32)
        held[k] = nn.Parameter(own)
    return held | {k: tensors[f"{entry['path']}/{k}"] for k in entry["frozen"]}


def _pools(plan: Assigned, header: dict, tensors: dict[str, Tensor], path: str | Path) -> dict[Method, Params]:
    """The stored pools by method: as many, with the names, kinds and shapes, as fresh ones would be; sane values."""
    methods = [m for m in dict.fromkeys(m for _, m in plan) if m.has("pool")]
    found, problems = {}, []
    if len(methods) != (there := len(header["pools"])):
        problems.append(f"expected {len(methods)} sets of tensors that all sites train, the file has {there}")
    for i, (m, names) in enumerate(zip(methods, header["pools"], strict=False)):
        have: Params = {k: nn.Parameter(tensors[f".{i}/{k}"]) for k in names}
        shapes: list[Shape] = [site.shape for site, own in plan if own == m]
        want, count = m.pooled(shapes), sum(t.numel() for t in have.values())
        if want != count:
            problems.append(f".{i}: expected {want:,} trained numbers, the file has {count:,}")
            continue
        form, expected = ({k: _of(t, True) for k, t in p.items()} for p in (have, pool_template(m, shapes)))
        if form != expected:
            problems.append(f".{i}: expected {_form(expected)}, the file has {_form(form)}")
        problems += [f".{i}/{k} {why}" for k, t in have.items() if (why := _not_sane(t, 0))]
        found[m] = have
    if problems:
        raise AddendaError(f"{path} holds tensors that do not fit, and nothing was loaded: {'; '.join(problems[:8])}.")
    return found


def _same_tensors(plan: Assigned, stored: dict[str, Params], path: str | Path) -> None:
    """Names, kinds and shapes as a fresh `init` would give them, once for every method and shape; sane values."""
    problems, templates = [], {}
    for site, method in plan:  # a formula, before anything is made
        want = numbers(site, method)
        have = sum(t.numel() for t in stored[site.path].values() if isinstance(t, nn.Parameter))
        if want != have:
            problems.append(f"{site.path}: expected {want:,} trained numbers, the file has {have:,}")
    if problems:
        raise AddendaError(f"{path} holds tensors that do not fit, and nothing was loaded: {'; '.join(problems[:8])}.")
    for site, method in plan:
        key = (method, site.kind, tuple(site.stored))
        if key not in templates:
            fresh = template(site, method)
            templates[key] = {k: _of(t, k in fresh._parameters) for k, t in fresh.stored().items()}, fresh.matrices
        (want, matrices), have = templates[key], stored[site.path]
        form = {k: _of(t, isinstance(t, nn.Parameter)) for k, t in have.items()}
        if form != want:
            problems.append(f"{site.path}: expected {_form(want)}, the file has {_form(form)}")
            continue
        problems += [f"{site.path}/{k} is no matrix and cannot be codes" for k, t in have.items()
                     if isinstance(t, Packed) and k not in matrices]  # fmt: skip
        for k, t in have.items():
            if why := _not_sane(t, site.weight.numel()):
                problems.append(f"{site.path}/{k} {why}")
    if problems:
        raise AddendaError(f"{path} holds tensors that do not fit, and nothing was loaded: {'; '.join(problems[:8])}.")


def _not_sane(t: Tensor, size: int) -> str | None:
    if t.is_floating_point():
        return None if bool(torch.isfinite(t).all()) else "holds values that are not finite"
    inside = t.dtype not in (torch.int32, torch.int64) or not t.numel() or 0 <= int(t.min()) <= int(t.max()) < size
    return None if inside else "holds positions outside the weight"


def _of(t: Tensor, trained: bool) -> tuple:
    return tuple(t.shape), "float" if t.dtype in FLOATING else str(t.dtype).removeprefix("torch."), trained


def _form(form: dict) -> str:
    return ", ".join(f"{k} {kind} {list(shape)}" for k, (shape, kind, _) in form.items()) or "nothing"


def _derived(held: SiteTensors) -> Params:
    names = (k for k in held._non_persistent_buffers_set if not k.endswith(" in training"))
    return {k: t for k in names if (t := held._buffers[k]) is not None}


def _same_factors(
    header: dict, sizes: dict[str, int], built: dict[str, SiteTensors], tensors: dict[str, Tensor], path: str | Path
) -> None:
    """Recomputed tensors must be the ones that were trained with; with a stored basis they are taken from the file."""
    wrong = []
    for s in header["sites"]:
        held = built[s["path"]]
        derived = _derived(held)
        for key, want in s["checks"].items():
            if key not in derived:
                raise AddendaError(f"{path}: {s['path']} has no derived tensor {key!r} in this version of addenda.")
            if header["basis"]:
                given = tensors[f"{s['path']}/{key}"]
                if _of(given, False) != _of(derived[key], False) or not _same_checksum(want, checksum(key, given)):
                    wrong.append(f"{s['path']}/{key}")
                elif why := _not_sane(given, sizes[s["path"]]):
                    raise AddendaError(f"{path}: {s['path']}/{key} {why}; nothing was loaded.")
                else:
                    held._buffers[key] = given.to(derived[key])
            elif not _same_checksum(want, checksum(key, derived[key])):
                wrong.append(f"{s['path']}/{key}")
    if wrong:
        raise AddendaError(
            f"{path}: {len(wrong)} tensors that are computed from the base come out differently on this machine or for "
            f"this dtype, e.g. {', '.join(wrong[:3])}. Save the adapter with save(path, basis=True) where it trained."
        )


def _same_checksum(want, found) -> bool:
    if isinstance(want, str) or isinstance(found, str):
        return want == found
    limit = 4e-3 * max(found[1], 1e-30)  # above what rounding to bfloat16 does to ±1 sums
    return abs(want[0] - found[0]) <= limit and abs(want[1] - found[1]) <= limit


def _unusual(entry: dict) -> dict:
    """The options of a stored method that differ from its defaults; all that are stored, where it is not known here."""
    try:
        return info(entry["name"]).cls(**_known(entry)).options()
    except AddendaError:
        return entry["options"]


def _some(names: list[str], most: int = 40) -> str:
    """Names out of a file, the first of very many."""
    return ", ".join(map(label, names[:most])) + (f", … and {len(names) - most:,} more" if len(names) > most else "")


def inspect(path: str | Path) -> str:
    """What a file holds, in a few lines; no model needed."""
    header, tensors = read(path)
    lines = [f"{path}: adapter file, schema {header['schema']}, seed {header['seed']}, {header['step']} steps"]
    for i, m in enumerate(header["methods"]):
        options = _some([f"{k}={v}" for k, v in _unusual(m).items()]) or "defaults"
        groups = grouped(s["path"] for s in header["sites"] if s["method"] == i)
        lines.append(f"  {label(m['name'])} ({options}): " + _some([f"{g} × {len(p)}" for g, p in groups.items()]))
    heads = [s["path"] for s in header["sites"] if s["method"] == -1]
    if heads:
        lines.append(f"  also trained as whole copies: {_some(heads)}")
    if header["labels"]:
        some = [label(repr(n[:40])) for n in header["labels"][:12]] + ["…"] * (len(header["labels"]) > 12)
        lines.append(f"  {len(header['labels'])} labels in order: {', '.join(some)}")
    trained = sum(count_of(s, k, tensors) for s in header["sites"] for k in s["trainable"])
    packed = [(s, k) for s in header["sites"] for k in s["packed"]]
    shared = sum(tensors[f".{i}/{k}"].numel() for i, names in enumerate(header["pools"]) for k in names)
    if shared:
        lines.append(f"  trained by all sites together: {shared:,} numbers")
    if packed:
        of = " and ".join(map(said, sorted({bits_of(header, s) or 0 for s, _ in packed})))
        lines.append(
            f"  codes: {sum(count_of(s, k, tensors) for s, k in packed):,} numbers of {len(packed)} matrices in {of}"
        )
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    lines.append(
        f"  {trained + shared:,} trained numbers, {held:,} bytes of tensors, {Path(path).stat().st_size:,} bytes"
    )
    return "\n".join(lines)
