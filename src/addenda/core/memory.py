"""What one training step takes, before it is run: memory at its peak and FLOPs, also of the floor.

The step is run once on *fake* tensors (`torch._subclasses.FakeTensorMode`): they have shapes and storages, but no data.
Model and adapter are copied as fakes, the adapter by its own `derive` and `init`, which see a fake weight; where they
look at its values, they see one real weight of each shape. So what is kept for backward is decided by the very code
that trains, and every storage's birth and death is known. What the kernels allocate inside themselves is not seen.

The *floor* is the frozen base's forward and the gradient of its input: no adapter, no optimizer.
"""

import copy
import inspect
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from addenda.core.adapted import SiteTensors
from addenda.core.attach import detach, install, kept_as, tensors_of
from addenda.core.borrow import frozen, gradient_from
from addenda.core.calibration import stand_in
from addenda.core.errors import AddendaError
from addenda.core.method import Params, Shape, WeightMethod
from addenda.core.packed import parts_of
from addenda.core.random import Stream
from addenda.core.sites import Site, owners_of, site_at
from addenda.core.state import State, find_state, unwrap

Assigned = list[tuple[Site, WeightMethod]]


@dataclass(frozen=True)
class Step:
    """One training step of batch × length tokens: bytes at its peak, by what holds them, and FLOPs.

    activations: what the forward made and is alive at the peak; gradients: those of the adapter's tensors that are
    there by then; temporaries: what backward made and drops again. optimizer: two Adam moments, as after the first
    step.
    """

    batch: int
    length: int
    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    temporaries: int
    flops: int
    floor: int  # bytes of the floor's step above the loaded model
    floor_flops: int

    @property
    def above(self) -> int:
        """Bytes at the peak above the loaded model."""
        return self.adapter + self.optimizer + self.gradients + self.activations + self.temporaries

    @property
    def flop_ratio(self) -> float:
        return self.flops / self.floor_flops


def predict(
    root: nn.Module, assigned: Assigned, heads: tuple[str, ...], batch: int, length: int, labelled: float = 1.0
) -> Step:
    """Follow one step of the assigned methods, each token id 0. labelled: the share of positions with a label.

    Raises AddendaError when the model cannot be run on token ids, or looks at values that a fake tensor has not.
    """
    if batch < 1 or length < 1 or not 0 < labelled <= 1:
        raise AddendaError(
            f"A step has batch ≥ 1, length ≥ 1 and a labelled share in (0, 1], got {batch}, {length}, {labelled}."
        )
    try:
        return _predict(root, assigned, heads, batch, length, labelled)
    except Exception as error:
        if isinstance(error, AddendaError):
            raise
        raise AddendaError(
            f"A step of this {type(root).__name__} on {batch} × {length} token ids could not be followed on fake "
            f"tensors: {type(error).__name__}: {next(iter(str(error).splitlines()), '')} Plan without batch and length."
        ) from error


def _predict(
    root: nn.Module, assigned: Assigned, heads: tuple[str, ...], batch: int, length: int, labelled: float
) -> Step:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _twin(root, mode)
    if find_state(twin):
        detach(twin)
    twin.train()
    weights = _bytes(_tensors(twin))
    with frozen(twin), gradient_from(*(m for m in twin.modules() if isinstance(m, nn.Embedding))):
        floor = _follow(twin, batch, length, labelled)
    owners = owners_of(twin)
    twins = [(site_at(twin, site.path, owners), m) for site, m in assigned]
    built = _fake_tensors(assigned, twins, mode)
    install(twin, State(), "default", twins, built, heads, 0, True, time.perf_counter())
    held = [t for tensors in built.values() for t in _tensors(tensors)]
    live = [p for tensors in built.values() for p in tensors.parameters()]
    step = _follow(twin, batch, length, labelled)
    gradients, activations, temporaries = step.at_peak(p.grad for p in live if p.grad is not None)
    return Step(
        batch=batch,
        length=length,
        weights=weights,
        adapter=_bytes(held),
        optimizer=2 * _bytes(live),
        gradients=gradients,
        activations=activations,
        temporaries=temporaries,
        flops=step.flops,
        floor=sum(floor.at_peak(())),
        floor_flops=floor.flops,
    )


# -- fake copies -------------------------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = (part.untyped_storage() for t in tensors for part in parts_of(t))
    return sum({id(s): s.nbytes() for s in storages}.values())


def _twin(root: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model that holds no data: every parameter and buffer is fake."""
    memo: dict[int, Any] = {id(t): mode.from_tensor(t) for t in _tensors(root)}
    found = find_state(root)
    for kept in ((found[1].merged or {}) if found else {}).values():  # the base's own weights under a merged change
        memo[id(kept)] = kept
    return copy.deepcopy(root, memo)


def _fake_tensors(assigned: Assigned, twins: Assigned, mode: FakeTensorMode) -> dict[str, SiteTensors]:
    """Every site's tensors, fake; made once for every method and shape, and copied."""
    shared, placed, templates, built = {}, {}, {}, {}
    for (site, m), (twin, _) in zip(assigned, twins, strict=True):
        where = (m, site.weight.device, site.weight.dtype)
        if m not in shared:
            shapes: list[Shape] = [s.shape for s, own in assigned if own == m]
            shared[m] = m.shared(shapes, Stream(0, "shared")) if m.has("shared") else {}
        if where not in placed:
            placed[where] = {k: _empty(t, mode) for k, t in kept_as(shared[m], site).items()}
        key = (*where, site.kind.name, site.matrix.shape)
        if key not in templates:
            templates[key] = _template(site, twin, m, shared[m], placed[where])
        made, memo = templates[key], {id(m): m}
        common = placed[where]
        memo |= {id(t): common[k] if k in common else _empty(t, mode) for k, t in made.tensors().items()}
        built[site.path] = copy.deepcopy(made, memo)
    return built


def _template(site: Site, twin: Site, m: WeightMethod, shared: Params, fake: Params) -> SiteTensors:
    """The tensors of one site: out of a fake weight where the method does not look at its values."""
    try:
        return tensors_of(twin, m, 0, fake, _seen(twin, m), None)
    except Exception:  # whatever a method does with values that are not there
        return tensors_of(site, m, 0, kept_as(shared, site), _seen(site, m), None)


def _seen(site: Site, m: WeightMethod) -> Tensor | None:
    return stand_in(m, site.matrix.to(torch.promote_types(site.weight.dtype, torch.float32)))


def _empty(like: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return nn.Parameter(made, like.requires_grad) if isinstance(like, nn.Parameter) else made


# -- one step, followed ------------------------------------------------------------------------------------------------


def _follow(model: nn.Module, batch: int, length: int, labelled: float) -> "_Log":
    """Forward, cross-entropy over the labelled positions in float32, backward."""
    ids = torch.zeros(batch, length, dtype=torch.long, device=next(model.parameters()).device)
    takes = inspect.signature(type(unwrap(model)).forward).parameters
    given: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    if "decoder_input_ids" in takes:
        given["decoder_input_ids"] = ids
    kept = round(labelled * length) if labelled < 1 and "logits_to_keep" in takes else 0
    if kept:
        given["logits_to_keep"] = kept
    with _Log(_tensors(model)) as log, torch.enable_grad():
        output = model(input_ids=ids, **given) if "input_ids" in takes else model(ids, **given)
        logits = output if isinstance(output, Tensor) else output[0]
        del output
        if labelled < 1 and not kept and logits.dim() == 3:
            logits = logits[:, : max(1, round(labelled * length))]
        loss = F.cross_entropy(logits.flatten(0, -2).float(), ids.new_zeros(logits.shape[:-1].numel()))
        del logits
        log.backward_from = log.now
        loss.backward()
    return log


@dataclass
class _Life:
    bytes: int
    born: int  # the number of storages born before
    died: int | None = None  # the number of storages born before its death


class _Log(TorchDispatchMode):
    """Births and deaths of storages that were not known before, and the FLOPs of products."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now, self.flops, self.backward_from = 0, 0, 0
        self.lives: list[_Life] = []
        self.alive: dict[int, tuple[weakref.ref, _Life | None]] = {}  # by id of the storage
        for part in (part for t in known for part in parts_of(t)):
            self._watch(part, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return args[0].device
        out = func(*args, **(kwargs or {}))
        if formula := _FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id(t.untyped_storage()) not in self.alive:
                self.lives.append(_Life(t.untyped_storage().nbytes(), self.now))
                self._watch(t, self.lives[-1])
                self.now += 1
        return out

    def _watch(self, t: Tensor, life: _Life | None) -> None:
        storage = t.untyped_storage()
        key = id(storage)

        def end(_) -> None:
            del self.alive[key]
            if life is not None:
                life.died = self.now

        self.alive[key] = weakref.ref(storage, end), life

    def at_peak(self, gradients: Iterable[Tensor]) -> tuple[int, int, int]:
        """Bytes of (gradients, of what the forward made, of what backward made) when most was alive."""
        if not self.lives:
            return 0, 0, 0
        change = [0] * (self.now + 1)
        for life in self.lives:
            change[life.born] += life.bytes
            change[self.now if life.died is None else life.died] -= life.bytes
        total = list(accumulate(change[: self.now]))
        peak = total.index(max(total))
        last = {id(self.alive[id(g.untyped_storage())][1]) for g in gradients}
        parts = [0, 0, 0]
        for life in self.lives:
            if life.born <= peak and (life.died is None or life.died > peak):
                parts[0 if id(life) in last else 1 if life.born < self.backward_from else 2] += life.bytes
        return parts[0], parts[1], parts[2]


def _attention(q: Tensor, k: Tensor, v: Tensor, per_q: int, per_v: int) -> int:
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (per_q * q.shape[-1] + per_v * v.shape[-1])


_ATEN = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,  # which leaves these out
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, k, v, 1, 1),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda gy, q, k, v, *_, **__: _attention(q, k, v, 3, 2),
}
