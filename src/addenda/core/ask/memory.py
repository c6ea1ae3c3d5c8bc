"""Predicting one training step before it is run: memory at its peak and FLOPs, also of the floor.

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

from addenda.core.adapter.attach import detach, install
from addenda.core.adapter.build import Assigned, kept_as, pool_of, tensors_of
from addenda.core.adapter.calibration import stand_in
from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.forward.tensors import Pool, SiteTensors
from addenda.core.method.contract import Method, Params, Shape
from addenda.core.modules.borrow import entrance, frozen, gradient_from
from addenda.core.modules.wrappers import unwrap
from addenda.core.packed.tensor import parts_of
from addenda.core.site.site import Point, Site, owners_of, site_at, with_neighbours
from addenda.core.state.state import State, find_state
from addenda.core.state.twin import without_data

Optimizer = Callable[[Adapter], torch.optim.Optimizer]


@dataclass(frozen=True)
class Step:
    """The peak in bytes and the FLOPs of a step of batch × length tokens, or images of length × length pixels.

    activations: what the forward made and is alive at the peak; gradients: those of the adapter's tensors that are
    there by then; temporaries: what backward made and drops again. optimizer: its state, as after the first step;
    AdamW's two moments if none was given.
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
    images: bool = False

    @property
    def example(self) -> str:
        """The batch in words: "2 × 16 tokens", "8 images of 224 × 224 pixels"."""
        n, of = self.batch, self.length
        return f"{n} images of {of} × {of} pixels" if self.images else f"{n} × {of} tokens"

    @property
    def above(self) -> int:
        """The bytes at the peak above the loaded model."""
        return self.adapter + self.optimizer + self.gradients + self.activations + self.temporaries

    @property
    def flop_ratio(self) -> float:
        return self.flops / self.floor_flops


def predict(
    root: nn.Module,
    assigned: Assigned,
    heads: tuple[str, ...],
    batch: int,
    length: int,
    labelled: float = 1.0,
    optimizer: Optimizer | None = None,
) -> Step:
    """Predict one step of the assigned methods, each token id or pixel 0. labelled: the positions' share with a label.

    optimizer: what makes the optimizer of an adapter; its state is that after a step on fake tensors.

    Raises AddendaError when the model runs neither on token ids nor on images, or looks at values that a fake tensor
    has not.
    """
    if batch < 1 or length < 1 or not 0 < labelled <= 1:
        raise AddendaError(
            f"A step has batch ≥ 1, length ≥ 1 and a labelled share in (0, 1], got {batch}, {length}, {labelled}."
        )
    try:
        return _predict(root, assigned, heads, batch, length, labelled, optimizer)
    except Exception as error:
        if isinstance(error, AddendaError):
            raise
        raise AddendaError(
            f"A step of this {type(root).__name__} on {batch} inputs of length {length} could not be followed on fake "
            f"tensors: {type(error).__name__}: {next(iter(str(error).splitlines()), '')} Plan without batch and length."
        ) from error


def _predict(
    root: nn.Module,
    assigned: Assigned,
    heads: tuple[str, ...],
    batch: int,
    length: int,
    labelled: float,
    optimizer: Optimizer | None,
) -> Step:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = without_data(root, mode)
    if find_state(twin):
        detach(twin)
    twin.train()
    weights = _bytes(_tensors(twin))
    tables = [m for m in twin.modules() if isinstance(m, nn.Embedding)]
    with frozen(twin), gradient_from(*(tables or entrance(twin))):
        floor = _follow(twin, batch, length, labelled)
    owners = owners_of(twin)
    twins = [
        (with_neighbours(twin, site_at(twin, site.path, owners), tuple(site.beside), owners), m) for site, m in assigned
    ]
    built = _fake_tensors(assigned, twins, mode)
    adapter = install(twin, State(), "default", twins, built, heads, 0, True, time.perf_counter())
    adapter_tensors = [t for tensors in built.values() for t in _tensors(tensors)]
    live = [p for tensors in built.values() for p in tensors.parameters()]
    instance = optimizer and optimizer(adapter)  # before the step: it may stop what it does not train
    step = _follow(twin, batch, length, labelled)
    gradients, activations, temporaries = step.at_peak(p.grad for p in live if p.grad is not None)
    return Step(
        batch=batch,
        length=length,
        weights=weights,
        adapter=_bytes(adapter_tensors),
        optimizer=2 * _bytes(live) if instance is None else _state(instance, mode),
        gradients=gradients,
        activations=activations,
        temporaries=temporaries,
        flops=step.flops,
        floor=sum(floor.at_peak(())),
        floor_flops=floor.flops,
        images=_sees(twin),
    )


def _state(optimizer: torch.optim.Optimizer, mode: FakeTensorMode) -> int:
    """Return the bytes of an optimizer's state after its first step."""
    with mode:
        optimizer.step()
    return _bytes(t for state in optimizer.state.values() for t in tree_leaves(state) if isinstance(t, Tensor))


# -- fake copies -------------------------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = (part.untyped_storage() for t in tensors for part in parts_of(t))
    return sum({id(s): s.nbytes() for s in storages}.values())


def _fake_tensors(assigned: Assigned, twins: Assigned, mode: FakeTensorMode) -> dict[str, SiteTensors]:
    """Return every site's tensors as fakes, made once for every method and shape, and copied."""
    shared, pools, placed, templates, built = {}, {}, {}, {}, {}
    for (site, m), (twin, _) in zip(assigned, twins, strict=True):
        place = (m, site.weight.device, site.weight.dtype)
        if m not in shared:
            sites = [s for s, method in assigned if method == m]
            shapes: list[Shape] = [s.shape for s in sites]
            shared[m] = m.shared(shapes, Stream(0, "shared")) if m.has("shared") else {}
            drawn = pool_of(m, sites, 0)
            pools[m] = drawn and Pool(m, {k: _empty(t, mode) for k, t in drawn.stored().items()})
        if place not in placed:
            placed[place] = {k: _empty(t, mode) for k, t in kept_as(shared[m], site).items()}
        neighbours = tuple((n, neighbour.matrix.shape) for n, neighbour in site.beside.items())
        key = (*place, site.kind.name, tuple(site.stored), neighbours)
        if key not in templates:
            templates[key] = _template(site, twin, m, shared[m], placed[place], pools[m])
        tensors, memo = templates[key], {id(item): item for item in (m, pools[m])}  # not copied
        common = placed[place]
        memo |= {id(t): common[k] if k in common else _empty(t, mode) for k, t in tensors.held().items()}
        built[site.path] = copy.deepcopy(tensors, memo)
    return built


def _template(site: Site, twin: Site, m: Method, shared: Params, fake: Params, pool: Pool | None) -> SiteTensors:
    """Return the tensors of one site, out of a fake weight where the method does not look at its values."""
    try:
        return tensors_of(twin, m, 0, fake, _seen(twin, m), None, pool)
    except Exception:  # whatever a method does with values that are not there
        return tensors_of(site, m, 0, kept_as(shared, site), _seen(site, m), None, pool)


def _seen(site: Site, m: Method) -> Tensor | None:
    if isinstance(site, Point):
        return None
    return stand_in(m, site.matrix.to(torch.promote_types(site.weight.dtype, torch.float32)))


def _empty(like: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        empty = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return nn.Parameter(empty, like.requires_grad) if isinstance(like, nn.Parameter) else empty


# -- one step, followed ------------------------------------------------------------------------------------------------


def _follow(model: nn.Module, batch: int, length: int, labelled: float) -> "_Log":
    """Run forward, cross-entropy over the labelled positions in float32 and backward, and return their log."""
    like = next(model.parameters())
    ids = torch.zeros(batch, length, dtype=torch.long, device=like.device)
    parameters = inspect.signature(type(unwrap(model)).forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if "decoder_input_ids" in parameters:
        options["decoder_input_ids"] = ids
    count = round(labelled * length) if labelled < 1 and "logits_to_keep" in parameters else 0
    if count:
        options["logits_to_keep"] = count
    with _Log(_tensors(model)) as log, torch.enable_grad():
        if _sees(model):
            channels = getattr(getattr(model, "config", None), "num_channels", 3)
            output = model(pixel_values=like.new_zeros(batch, channels, length, length), **options)
        else:
            output = model(input_ids=ids, **options) if "input_ids" in parameters else model(ids, **options)
        logits = output if isinstance(output, Tensor) else output[0]
        del output
        if labelled < 1 and not count and logits.dim() == 3:
            logits = logits[:, : max(1, round(labelled * length))]
        loss = F.cross_entropy(logits.flatten(0, -2).float(), ids.new_zeros(logits.shape[:-1].numel()))
        del logits
        log.backward_from = log.now
        loss.backward()
    return log


def _sees(model: nn.Module) -> bool:
    """Return whether the model reads images and nothing else."""
    takes = inspect.signature(type(unwrap(model)).forward).parameters
    return "pixel_values" in takes and "input_ids" not in takes


@dataclass
class _Life:
    bytes: int
    born: int  # the number of storages born before
    died: int | None = None  # the number of storages born before its death


class _Log(TorchDispatchMode):
    """A mode that logs births and deaths of storages that are not among the known ones, and the FLOPs of products."""

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
        out = _outcome(func, args, kwargs or {})
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
        """Return the bytes, when most was alive, of (gradients, what the forward made, what backward made)."""
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


def _outcome(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator; of grouped products fakes know only bfloat16, kernels other dtypes too, so these are cast."""
    if func._overloadpacket is not _GROUPED or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    dtype, narrow = args[0].dtype, [a.bfloat16() for a in args[:2]]
    return func(*narrow, *args[2:], **kwargs).to(dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, per_q: int, per_v: int) -> int:
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (per_q * q.shape[-1] + per_v * v.shape[-1])


def _grouped(a: Tensor, b: Tensor, *_, **__) -> int:
    """Return the FLOPs of products (M, K) with (K, N) in groups of M, N or K; both in 3 dimensions: one a group."""
    return 2 * a.shape[-2:].numel() * b.shape[-1] * (len(a) if a.dim() == b.dim() == 3 else 1)


_ATEN = torch.ops.aten
_GROUPED = getattr(_ATEN, "_grouped_mm", None)  # torch 2.6 has none
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,  # which leaves these out
    **({_GROUPED: _grouped} if _GROUPED is not None else {}),
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, k, v, 1, 1),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda gy, q, k, v, *_, **__: _attention(q, k, v, 3, 2),
}
