"""Loading an adapter file: it takes whole, or it raises and the model is as it was."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from addenda.core.adapter.assign import unfit
from addenda.core.adapter.attach import install, ready
from addenda.core.adapter.build import Assigned, build_tensors, pool_template
from addenda.core.adapter.fit import fitting_tensors, form_of, form_text, not_sane
from addenda.core.adapter.grow import grown_as
from addenda.core.adapter.handle import Adapter, fitting
from addenda.core.adapter.moved import advice
from addenda.core.adapter.part import without
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.visible import label
from addenda.core.file import trained_on
from addenda.core.file.fingerprint import checksum, fingerprint, fingerprints, hash_of, sample
from addenda.core.file.header import Checksum, Header, SiteEntry, read
from addenda.core.file.methods import methods_of
from addenda.core.file.rename import check_map, renamed
from addenda.core.file.save import derived_of
from addenda.core.file.tokenizer import difference
from addenda.core.file.vocabulary import rows_in
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.contract import Method, Params, Replace, Shape
from addenda.core.modules.borrow import in_its_mode
from addenda.core.packed.few_bits import FewBits
from addenda.core.site.site import Site, owners_of, refusal, site_at, with_neighbours
from addenda.core.site.structure import head_path
from addenda.core.site.targets import grouped
from addenda.core.state.state import State, record_of
from addenda.core.state.undo import undone
from addenda.core.state.vocabulary import table_at

_ABSENT = "the model has no module and no parameter of this path"
_LISTED = 20  # problems that an error tells of


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
    rename: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    allow_partial: bool = False,
) -> Adapter:
    """Attach the adapter of a file: whole, or not at all.

    base="compatible" admits another floating dtype of the same weights, checked on stored samples within rounding.
    rename: {path in the file: path in this model}, where modules have other names than in training; see
    `core.file.rename`. Where paths are missing, the error has that map. tokenizer: the one to use, which must be that
    of training where the file names it, or has new tokens (`core.adapter.grow`); their rows stand behind the base's
    until `detach`.
    A file in few bits stays in codes, which act as they did in training and cannot be trained on.

    allow_partial: attach the sites that are here and alike, with the base's bytes of training, and leave out the rest:
    `adapter.left_out` has each with the reason, a warning counts them, and `save` refuses what is a part, unless told.
    A file that is damaged is refused all the same, and one of which nothing fits.

    Raises AddendaError listing everything that does not fit (paths with the nearest names, kinds, shapes, tensors), for
    base values that differ, for factors that this machine computes differently, and for a taken name.
    """
    started = time.perf_counter()
    if base not in ("exact", "compatible"):
        raise AddendaError(f"base must be 'exact' or 'compatible', got {base!r}.")
    check_map(rename)
    ready(model, name)
    header, tensors = renamed(*read(path), rename, path)
    check_tokenizer(header, tokenizer, path)
    return place(
        model, path, header, tensors, name=name, trainable=trainable, base=base, activate=activate, started=started,
        allow_partial=allow_partial,
    )  # fmt: skip


@in_its_mode
def place(
    model: nn.Module,
    path: str | Path,
    header: Header,
    tensors: dict[str, Tensor],
    *,
    name: str,
    trainable: bool = False,
    base: Literal["exact", "compatible"] = "exact",
    activate: bool = True,
    started: float | None = None,
    allow_partial: bool = False,
) -> Adapter:
    """Attach what was read of a file, as `load` does, which says more. started: when the reading was, for its seconds.

    The tensors become the adapter's own.
    """
    started = time.perf_counter() if started is None else started
    root, state = ready(model, name)
    header, tensors = _headless(root, header, tensors, path)
    if trainable and header.has_codes:
        raise AddendaError(
            f"{path} holds codes: what training moved is not in it, and codes cannot be moved a little. Go on from a "
            "checkpoint of its run, or from a file that was saved with latent=True."
        )
    rows = rows_in(header.vocabulary, tensors)
    if any(table_at(root, t) is None for t in rows):
        match(root, header, *methods_of(header, path), path)  # whose error has the map of paths
    with grown_as(root, state, header.vocabulary, rows, path):
        return _place(root, state, path, header, tensors, name, trainable, base, activate, started, allow_partial)


def _headless(
    root: nn.Module, header: Header, tensors: dict[str, Tensor], path: str | Path
) -> tuple[Header, dict[str, Tensor]]:
    """Return a file without what it undoes before a language model's head, where this model has no such head.

    A classifier under a language's adapter has the change of the embeddings and nothing to undo it for, as in MAD-X.
    """
    modules = dict(root.named_modules())
    gone = {s.path: s.path.partition("~")[0] for s in header.sites if "~" in s.path}
    gone = {old: new for old, new in gone.items() if old.partition("~")[2] not in modules}
    return renamed(header, tensors, gone, path) if gone and head_path(root) is None else (header, tensors)


def _place(root, state, path, header, tensors, name, trainable, base, activate, started, allow_partial) -> Adapter:
    left_out: dict[str, str] | None = {} if allow_partial else None
    if left_out is None:
        fitting(root, header.labels)  # first: it says more than the shape of a head
    methods, copy = methods_of(header, path)
    plan = match(root, header, methods, copy, path, left_out)
    plan = check_base(state, header, plan, base, path, left_out)
    told = ""
    if left_out:
        told = (
            f"{len(left_out)} of {len(header.sites)} sites of {path} were left out: {_reasons(left_out, root, header)}"
        )
        if not plan:
            raise AddendaError(f"Nothing of {path} fits this {type(root).__name__}, and nothing was loaded. {told}")
        header, tensors = without(header, tensors, methods, left_out, path)
    labels = fitting(root, header.labels)
    stored = {s.path: stored_params(s, header.bits(s), tensors) for s in header.sites}
    pools = stored_pools(plan, header, tensors, path)
    fitting_tensors(plan, stored, path)
    built = build_tensors(plan, header.seed, stored=stored, pools=pools)
    check_factors(header, {site.path: site.weight.numel() for site, _ in plan}, built, tensors, path)
    heads = tuple(s.path for s in header.heads)
    if told:  # before anything is attached: where warnings are errors, nothing is
        warnings.warn(f"{told} The adapter's left_out has them all.", stacklevel=2)
    with undone(root):
        adapter = install(root, state, name, plan, built, heads, header.seed, not state.records, started, activate)
        record = record_of(root, name).record
        record.labels, record.note, record.left_out = labels, header.note, left_out or {}
        record.trained_on = header.trained_on
        adapter.draw(header.step)
        record.start = header.step, record.start[1]
        return adapter.requires_grad_(trainable)


def check_tokenizer(header: Header, tokenizer: Any, path: str | Path) -> None:
    """Raise AddendaError where a tokenizer is not the one of training, as far as a file tells of it."""
    if tokenizer is None:
        return
    told = difference(tokenizer, header.vocabulary) if header.vocabulary is not None else None
    if told is None and header.trained_on is not None:
        told = trained_on.difference(header.trained_on, tokenizer)
    if told:
        raise AddendaError(
            f"{path} was trained with another tokenizer: {told}. Load the one that was saved with it "
            "(tokenizer.save_pretrained; a run of tune keeps it in 'tokenizer' beside its adapter). Nothing was loaded."
        )


def _reasons(left_out: dict[str, str], root: nn.Module, header: Header) -> str:
    """Return the first of the sites that were left out, with the reasons, and where the others may have gone."""
    first = "; ".join(f"{path}: {why}" for path, why in list(left_out.items())[:4])
    found = advice(root, header, [p for p, why in left_out.items() if why == _ABSENT], "the file")
    return f"{first}{'; …' if len(left_out) > 4 else ''}. {found}".rstrip()


def match(
    root: nn.Module,
    header: Header,
    methods: list[Method],
    copy: Replace,
    path: str | Path,
    left_out: dict[str, str] | None = None,
) -> Assigned:
    """Return a file's sites on a model, each with its method. Raises AddendaError listing all that does not fit.

    left_out: a dict that gets what does not fit, with the reasons, instead.
    """
    plan, problems = [], {}
    missing, owners, changed = [], owners_of(root), set()
    for s in header.sites:
        try:
            site = site_at(root, s.path, owners)
        except AddendaError:
            missing.append(s.path)
            continue
        if site.changed in changed or (site.path != s.path and site.kind.name == s.kind):
            problems[s.path] = f"in this model it is {site.path} (tied or repeated)"
            continue
        changed.add(site.changed)
        method = copy if s.is_head else methods[s.method]
        site = with_neighbours(root, replace(site, origin=s.origin or ""), method.beside(site.path), owners)
        if site.kind.name != s.kind or tuple(site.stored) != s.shape:
            actual = f"{site.kind.name} {site.stored}"
            problems[s.path] = f"the file has {label(s.kind, 40)} {str(list(s.shape))[:80]}, the model {actual}"
        elif reason := refusal(root, site, owners) or unfit(site, method):
            problems[s.path] = reason
        else:
            plan.append((site, method))
    if left_out is not None:
        left_out |= dict.fromkeys(missing, _ABSENT) | problems
        return plan
    if missing or problems:
        found = advice(root, header, missing, path)
        names = [] if found else [n for n, _ in root.named_modules()]  # the map says it better than a near name
        listed = [f"{where}: {why}" for where, why in problems.items()]
        for pattern, paths in grouped(missing).items():
            near = nearest(paths[0], names, 1) if len(listed) < _LISTED else ""
            listed.append(f"the model has no {pattern[:200]} ({len(paths)} sites).{near}")
        if plan and not found:
            found = (
                f"{len(plan)} of {len(header.sites)} sites are there and alike; with allow_partial=True load takes "
                "those whose weights are those of training, and lists the others."
            )
        raise AddendaError(
            f"{path} does not fit this {type(root).__name__}, and nothing was loaded. {len(listed)} problems: "
            f"{'; '.join(listed[:_LISTED])}{' …' if len(listed) > _LISTED else ''} {found}".rstrip()
        )
    return plan


def check_base(
    state: State,
    header: Header,
    plan: Assigned,
    base: str,
    path: str | Path,
    left_out: dict[str, str] | None = None,
) -> Assigned:
    """Return the plan where the base's values at the sites are those that the adapter was trained on.

    Raises AddendaError where they are others; left_out: a dict that gets those sites instead, which leave the plan.
    """
    entries = {s.path: s for s in header.sites}
    hashed = [site for site, _ in plan if entries[site.path].hash is not None] if base == "exact" else []
    known = dict(zip([site.path for site in hashed], fingerprints(state, hashed), strict=True))
    told = {site.path: mismatch(state, entries[site.path], site, base, known.get(site.path)) for site, _ in plan}
    mismatches = {at: text for at, text in told.items() if text}
    if mismatches and left_out is None:
        raise AddendaError(f"{other_base(path, base, [*mismatches.values()], len(plan))} Nothing was loaded.")
    if left_out is not None:
        left_out |= dict.fromkeys(mismatches, "the model has other weights there than in training")
    return [(site, m) for site, m in plan if site.path not in mismatches]


def mismatch(state: State | None, entry: SiteEntry, site: Site, base: str, known: str | None = None) -> str | None:
    """Return the site's name for an error where the base's values there are not those of training; else None.

    state: what remembers the base's hashes; None where its weights are there for a moment only. known: the hash of the
    site, where that was taken already.
    """
    if entry.hash is None or entry.sample is None:
        return None
    dtype = str(site.weight.dtype).removeprefix("torch.")
    if base == "exact" and entry.dtype != dtype:
        return f"{site.path} (file {entry.dtype}, model {dtype})"
    if base == "exact":
        actual = known or (hash_of(site.weight) if state is None else fingerprint(state, site))
        return None if entry.hash == actual else site.path
    return None if _within_rounding(entry.sample, sample(state or State(), site)) else site.path


def other_base(path: str | Path, base: str, mismatches: list[str], count: int) -> str:
    """Return what to say of an adapter whose base is another: that, where, and what to do."""
    advice = (
        "If this is the same base in another dtype, load it with base='compatible'."
        if base == "exact"
        else "Their values differ by more than rounding, so this is another model."
    )
    return (
        f"{path} was trained on other base weights: {len(mismatches)} of {count} sites differ, "
        f"e.g. {', '.join(mismatches[:3])}. {advice}"
    )


def _within_rounding(expected: Sequence[float], actual: Sequence[float]) -> bool:
    a, b = np.asarray(expected), np.asarray(actual)
    return a.shape == b.shape and bool((np.abs(a - b) <= 2.0**-7 * np.maximum(np.abs(a), np.abs(b)) + 1e-7).all())


def stored_params(entry: SiteEntry, bits: int | None, tensors: dict[str, Tensor]) -> Params:
    """Return the tensors that a file stores of a site: trainable ones as parameters, in codes where they are."""
    params: Params = {}
    for k in entry.trainable:
        tensor = tensors[key := f"{entry.path}/{k}"]
        if k in entry.packed:
            assert bits is not None
            tensor = FewBits.of(tensor, tensors[f"{key}.moments"], bits, entry.packed[k], torch.float32)
        params[k] = nn.Parameter(tensor)
    return params | {k: tensors[f"{entry.path}/{k}"] for k in entry.frozen}


def stored_pools(plan: Assigned, header: Header, tensors: dict[str, Tensor], path: str | Path) -> dict[Method, Params]:
    """Return the stored pools by method, checked to have the names, kinds and shapes of fresh ones and sane values."""
    methods = [m for m in dict.fromkeys(m for _, m in plan) if m.has("pool")]
    pools, problems = {}, []
    if len(methods) != (sets := len(header.pools)):
        problems.append(f"expected {len(methods)} sets of tensors that all sites train, the file has {sets}")
    for i, (m, names) in enumerate(zip(methods, header.pools, strict=False)):
        actual: Params = {k: nn.Parameter(tensors[f".{i}/{k}"]) for k in names}
        shapes: list[Shape] = [site.shape for site, method in plan if method == m]
        required, count = m.pooled(shapes), sum(t.numel() for t in actual.values())
        if required != count:
            problems.append(f".{i}: expected {required:,} trained numbers, the file has {count:,}")
            continue
        form, expected = ({k: form_of(t, True) for k, t in p.items()} for p in (actual, pool_template(m, shapes)))
        if form != expected:
            problems.append(f".{i}: expected {form_text(expected)}, the file has {form_text(form)}")
        problems += [f".{i}/{k} {reason}" for k, t in actual.items() if (reason := not_sane(t, 0))]
        pools[m] = actual
    if problems:
        raise AddendaError(f"{path} holds tensors that do not fit, and nothing was loaded: {'; '.join(problems[:8])}.")
    return pools


def check_factors(
    header: Header, sizes: dict[str, int], built: dict[str, SiteTensors], tensors: dict[str, Tensor], path: str | Path
) -> None:
    """Raise AddendaError where recomputed tensors are not those of training; a stored basis takes their place."""
    wrong = []
    for s in header.sites:
        site_tensors = built[s.path]
        derived = derived_of(site_tensors)
        if unproven := sorted(derived.keys() - s.checks.keys()):
            raise AddendaError(f"{path}: {s.path} has no checksum of {unproven[0]!r}; nothing was loaded.")
        for key, mark in s.checks.items():
            if key not in derived:
                raise AddendaError(f"{path}: {s.path} has no derived tensor {key!r} in this version of addenda.")
            if header.basis:
                stored = tensors[f"{s.path}/{key}"]
                if form_of(stored, False) != form_of(derived[key], False) or not _same_checksum(
                    mark, checksum(key, stored)
                ):
                    wrong.append(f"{s.path}/{key}")
                elif reason := not_sane(stored, sizes[s.path]):
                    raise AddendaError(f"{path}: {s.path}/{key} {reason}; nothing was loaded.")
                else:
                    site_tensors._buffers[key] = stored.to(derived[key])
            elif not _same_checksum(mark, checksum(key, derived[key])):
                wrong.append(f"{s.path}/{key}")
    if wrong:
        raise AddendaError(
            f"{path}: {len(wrong)} tensors that are computed from the base come out differently on this machine or for "
            f"this dtype, e.g. {', '.join(wrong[:3])}. Save the adapter with save(path, basis=True) where it trained."
        )


def _same_checksum(expected: Checksum, actual: Checksum) -> bool:
    if isinstance(expected, str) or isinstance(actual, str):
        return expected == actual
    limit = 4e-3 * max(actual[1], 1e-30)  # above what rounding to bfloat16 does to ±1 sums
    return abs(expected[0] - actual[0]) <= limit and abs(expected[1] - actual[1]) <= limit
