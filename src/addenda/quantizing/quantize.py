"""Linear layers whose weights are kept in few bits, in one of these forms; `core.packed.tensor` says how that computes.

    quantize(model, "nf4")                         4.127 bits a weight
    quantize(model, "int8")                        8 + 32/n
    quantize(model, "spqr:bits=4", calibration=batches)

The modules stay what they are, an adapter attaches to them afterwards, and a model of low-rank layers is quantised like
any other: its factors are linear layers.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.arguments import check_batches, checked
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.merge.write import plain_weight
from addenda.core.method.catalogue import parse_spec
from addenda.core.packed.int8 import Int8Tensor
from addenda.core.packed.nf4 import NF4Tensor
from addenda.core.packed.spqr import SpQRTensor
from addenda.core.packed.tensor import Packed, values_of
from addenda.core.site.targets import ROLES, Target, grouped, listed, matching
from addenda.core.state.state import find_state
from addenda.reducing.choose import choose, raw
from addenda.reducing.inputs import masked
from addenda.reducing.walk import Batch, Walk

FORMS: dict[str, type[Packed]] = {"nf4": NF4Tensor, "int8": Int8Tensor, "spqr": SpQRTensor}
_OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {"spqr": {"bits": int, "outliers": float, "damp": float}}


@dataclass(frozen=True)
class Form:
    """A form of `FORMS` with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Form":
        """Parse "nf4" or "spqr:bits=4,outliers=0.02". Raises AddendaError for an unknown form or option."""
        name, options = parse_spec(text)
        if name not in FORMS:
            raise AddendaError(f"There is no form {name!r}.{nearest(name, FORMS)} Forms: {', '.join(FORMS)}.")
        readers = _OPTIONS.get(name, {})
        if unknown := [k for k in options if k not in readers]:
            raise AddendaError(f"{name} has no option {unknown[0]!r}. Its options: {', '.join(readers) or 'none'}.")
        try:
            return cls(name, {k: readers[k](v) for k, v in options.items()})
        except ValueError as error:
            raise AddendaError(f"An option of {text!r} is no number: {error}.") from None

    @property
    def calibrated(self) -> bool:
        return FORMS[self.name] is SpQRTensor

    def of(self, W: Tensor, C: Tensor | None = None) -> Packed:
        """Return W in this form. C: the second moment of the layer's inputs, for forms that look at it."""
        make: Any = FORMS[self.name].of
        return make(W, **({"C": C} if self.calibrated else {}), **self.options)


@checked()
@torch.no_grad()
def quantize(
    model: nn.Module,
    how: str = "nf4",
    *,
    targets: Target | Iterable[Target] = "linear",
    exclude: Iterable[Target] = (),
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    """Put packed weights, frozen, in the place of linear layers' own; return {path: relative error ‖W − Ŵ‖ / ‖W‖}.

    how: a form of `FORMS` and its options. Heads, embeddings and tied weights stay as they are, and what is packed
    already is packed again from its values. Experts that are stacked in one parameter stay plain; where such parameters
    are wanted, being named or "linear" or "mlp", and are more than a tenth of what is packed, a warning says so.
    calibration: batches of input_ids and attention_mask (without one, all are tokens), for spqr: the model is gone
    through block by block, each quantised for the inputs that the quantised ones before it give. progress: called with
    (done, total, path).

    Raises AddendaError, with nothing replaced, when no layer is left, one is adapted or is not finite, and for a form
    or an option that is not known.
    """
    form = Form.parse(how)
    if calibration is not None and not form.calibrated:
        raise AddendaError(f"{form.name} looks at weights only; leave calibration= out.")
    batches = None if calibration is None else _batches(model, calibration)
    if find_state(model) is not None:
        raise AddendaError("An adapter is attached, and its start knows the weights as they are. Quantise first.")
    targets, exclude = listed(targets), listed(exclude)
    shapes, dense = choose(model, targets, exclude, "pivot")
    for path in shapes:
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise AddendaError(f"{path} is a {type(module).__name__}; {form.name} takes Linear layers. Exclude it.")
    if plain := _plain(model, targets, exclude, shapes, dense):
        warnings.warn(plain, stacklevel=4)
    weights: dict[str, Packed] = {}
    errors: dict[str, float] = {}

    def pack(path: str, C: Tensor | None = None) -> None:
        if progress:
            progress(len(weights), len(shapes), path)
        W = values_of(model.get_submodule(path)._parameters["weight"].detach())
        try:
            weights[path] = form.of(W, C)
        except AddendaError as error:
            raise AddendaError(f"{path}: {error}") from None
        errors[path] = _distance(W, weights[path])

    if batches is None:
        for path in shapes:
            pack(path)
        _put(model, weights)
    else:
        _in_order(model, batches, list(shapes), weights, pack)
    if progress:
        progress(len(shapes), len(shapes), "")
    return errors


def _batches(model: nn.Module, given: Iterable[Mapping[str, Tensor]]) -> list[Batch]:
    """Return batches with their masks. Raises AddendaError where there is none, or one that is no batch of tokens."""
    check_batches("calibration=", given)
    batches: list[Batch] = []
    for i, batch in enumerate(given):
        known = masked(model, batch)
        if known is None or not bool(known["attention_mask"].any()):
            held = f"a {type(batch).__name__} of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
            raise AddendaError(
                f"Batch {i} of calibration= is {held or f'a {type(batch).__name__}'}, and a dict of input_ids and "
                "attention_mask (rows × length, 1 where a token is) for this model is wanted."
            )
        batches.append(known)
    if not batches:
        raise AddendaError("calibration= holds no batch. Give some that the model takes, or leave it out.")
    return batches


def _plain(model: nn.Module, targets: list, exclude: list, chosen: dict[str, Any], dense: dict[str, str]) -> str | None:
    """Return a message on parameters that were wanted and stay plain, where they weigh; None where they do not."""
    by_role = ("linear" in targets or "mlp" in targets) and not ("linear" in exclude or "mlp" in exclude)
    paths = {path for target in targets if target not in ROLES for path in matching(model, target)}
    plain = {p: w for p, w in raw(model).items() if dense[p] != "excluded" and (by_role or p in paths)}
    numbers, packed = sum(w.numel() for w in plain.values()), sum(m * n for m, n in chosen.values())
    if numbers <= packed / 10:
        return None
    return (
        f"{numbers:,} numbers of this {type(model).__name__} stay plain beside {packed:,} that are packed, as they are "
        f"not in linear layers: {', '.join(grouped(plain))}. Exclude them if that is meant."
    )


def _in_order(model: nn.Module, batches: list[Batch], paths: list[str], made: dict[str, Packed], pack) -> None:
    """Pack block by block, with the second moments of each layer's inputs; the old weights again if that fails."""
    dense = {path: model.get_submodule(path)._parameters["weight"] for path in paths}
    try:
        walk = Walk(model, batches, paths)
        for piece in walk.pieces:
            moments = walk.moments(piece, go_on=False)[0] if piece.paths else {}
            for path in piece.paths:
                pack(path, moments[path].second if path in moments else None)
            _put(model, {path: made[path] for path in piece.paths})
            walk.pass_by(piece)
    except BaseException:
        _put(model, dense)
        raise


def _put(model: nn.Module, weights: Any) -> None:
    for path, weight in weights.items():
        parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        model.get_submodule(path)._parameters["weight"] = parameter


def _distance(W: Tensor, packed: Packed) -> float:
    return float((packed.unpack() - W.float()).norm() / W.float().norm().clamp_min(1e-30))


@checked()
@torch.no_grad()
def dequantize(model: nn.Module, like: nn.Module | None = None) -> dict[str, float]:
    """Put plain weights in the place of packed ones; return {path: relative distance ‖W − Ŵ‖ / ‖W‖}.

    They get the values that an adapter was trained on, or with `like`, the model before it was quantised, those that
    were lost. Where an adapter's change is to be written into the weights besides, `merge` does both.
    Raises AddendaError, with nothing replaced, when nothing is packed, a change is merged, or `like` has other weights.
    """
    host = find_state(model)
    if host and host.state.merged is not None:
        raise AddendaError("A change is merged into the base. Call unmerge(model) first.")
    weights, errors = {}, {}
    for path, module in model.named_modules():
        packed = module._parameters.get("weight")
        if not isinstance(packed, Packed):
            continue
        values = packed.dense()
        if like is not None:
            original = plain_weight(like, path, packed)
            values = original.detach().to(packed.device, packed.dtype, copy=True)
        weights[path] = values
        errors[path] = _distance(values, packed)
    if not weights:
        raise AddendaError(f"No weight of this {type(model).__name__} is packed; there is nothing to unpack.")
    _put(model, weights)
    return errors


def bits_of(model: nn.Module) -> float:
    """Return bits a weight over all packed ones, everything counted. Raises AddendaError when nothing is packed."""
    packed = [w for m in model.modules() if isinstance(w := m._parameters.get("weight"), Packed)]
    if not packed:
        raise AddendaError(f"No weight of this {type(model).__name__} is packed.")
    return sum(w.bits * w.numel() for w in packed) / sum(w.numel() for w in packed)
