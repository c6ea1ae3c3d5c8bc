"""The tensors of one adapter at one site, and those that all sites of a method train together."""

from collections.abc import Collection
from typing import Any, Protocol

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method, Params
from addenda.core.packed.few_bits import quantised
from addenda.core.packed.tensor import Packed


class Source(Protocol):
    """A module whose input is read by changes elsewhere: its `Slots`."""

    @property
    def seen(self) -> Tensor | None: ...
    @property
    def here(self) -> Any: ...
    def done(self) -> None: ...


class Pool(nn.Module):
    """The tensors that all sites of a method train together, in one module, so that each tensor has one owner.

    torch sees a shared module once, as it does shared layers: one parameter for optimizers and flags, one in copies.
    """

    def __init__(self, method: Method, tensors: Params):
        super().__init__()
        self.method = method
        self._parameters.update({name: nn.Parameter(tensor) for name, tensor in tensors.items()})

    def _save_to_state_dict(self, destination, place, keep_vars) -> None:
        """Save the tensors once, under the first holder's name: safetensors and the HF Trainer refuse shared memory."""
        written = destination.__dict__.setdefault("_addenda_pools", set())
        if id(self) not in written:
            written.add(id(self))
            super()._save_to_state_dict(destination, place, keep_vars)

    def _load_from_state_dict(self, state_dict, place, metadata, strict, missing, unexpected, errors) -> None:
        """Load the tensors, which are not missing where this call has read them under another holder's name."""
        present = any(f"{place}{k}" in state_dict for k in self._parameters)
        if present or self.__dict__.get("_read_for") is not missing:
            super()._load_from_state_dict(state_dict, place, metadata, strict, missing, unexpected, errors)
        if present:
            self.__dict__["_read_for"] = missing  # the list that stands for this call of load_state_dict

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_read_for"}

    def stored(self) -> Params:
        """Return the tensors that a file stores, detached."""
        return {k: t.detach() for k, t in self._parameters.items() if t is not None}

    def extra_repr(self) -> str:
        return f"{self.method}"


def each_of(p: Params, shared: Collection[str], count: int) -> list[Params]:
    """Return the tensors of every matrix of a stack of `count`: its own of each, those named in `shared` for all."""
    return [{k: t if k in shared else t[e] for k, t in p.items()} for e in range(count)]


class SiteTensors(nn.Module):
    """One adapter's tensors at one site, each registered by its kind (see `core.method.contract`)."""

    def __init__(
        self,
        method: Method,
        own: Params,
        derived: Params,
        shared: Params,
        pool: Pool | None = None,
        stacked: bool = False,
    ):
        super().__init__()
        self.method: Any = method
        self.stacked = stacked  # the first dimension of what is its own counts the matrices of a stack
        self.instead: Params = {}  # what is read in the place of the tensors of these names
        self.path, self.width, self.reads = "", 0, ""  # where an activation is changed: see `core.site.site.Point`
        self.fits: tuple[int, ...] = ()  # the shape of the weight that it was made for
        self.past: Any = None  # where the method follows a cache, its length: a `core.state.cache_length.Past`
        self.source: tuple[Source, ...] = ()  # of the module whose input is read
        self.frozen = tuple(k for k, t in own.items() if not isinstance(t, nn.Parameter))
        self.shared = tuple(shared)  # in a stack of matrices, the same for all of them
        if pool is not None:
            self.shared += tuple(pool._parameters)
            self._modules["pool"] = pool
        for name, tensor in own.items():
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor
            else:
                self._buffers[name] = tensor
        for name, tensor in (shared | derived).items():
            self._buffers[name] = tensor
            self._non_persistent_buffers_set.add(name)
        self.drawn: tuple[str, ...] = ()  # names of frozen tensors that have a value for training only

    def tensors(self) -> Params:
        """Return every tensor by name, as a method's functions take them."""
        p = self.held()
        if self.method.bits is not None:
            p |= {k: self._read(p[k]) for k in self.matrices}
        p |= self.instead
        for name in self.drawn:
            value = p.pop(f"{name} in training")
            if self.training:
                p[name] = value
        return p

    def held(self) -> Params:
        """Return every tensor by name, as it is held."""
        pool = self._modules.get("pool")
        return {**self._parameters, **self._buffers, **({} if pool is None else pool._parameters)}  # type: ignore[dict-item]

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the trainable tensors that are matrices, or stacks of them, which `bits` rounds."""
        return tuple(k for k, t in self._parameters.items() if t is not None and t.dim() - self.stacked >= 2)

    def _read(self, matrix: Tensor) -> Tensor:
        """Return a trainable matrix as the method sees it, in few bits."""
        if isinstance(matrix, Packed):
            return matrix.dense()
        return quantised(matrix, self.method.bits, self.method.ste, self.stacked)

    def stored(self) -> Params:
        """Return the tensors that a file stores: trainable and frozen ones, detached."""
        return {k: t.detach() for k, t in {**self._parameters, **{k: self._buffers[k] for k in self.frozen}}.items()}

    def refuse_absent(self, beside: Tensor) -> None:
        """Raise AddendaError where its tensors have no values beside one that has: they went where the weights did."""
        p = next(iter(self._parameters.values()), None)
        if p is not None and p.is_meta and not beside.is_meta:
            raise AddendaError(
                f"The tensors of this {self.method.name or 'trained copy'} are on the meta device, without values, as "
                "offloading after attach leaves them: accelerate brings back a layer's own weights alone. Take its "
                "hooks off (accelerate.hooks.remove_hook_from_submodules(model)), and keep the model in memory."
            )

    def draw(self, values: Params) -> None:
        """Set this step's values of frozen tensors, in place after the first time."""
        for name, value in values.items():
            key = f"{name} in training"
            if key in self._buffers:
                self._buffers[key].copy_(value)
            else:
                fixed = self._buffers[name]  # one value for every matrix of a stack
                self._buffers[key] = value.to(fixed.device).expand(fixed.shape).clone()
                self._non_persistent_buffers_set.add(key)
        self.drawn = tuple(values)

    def extra_repr(self) -> str:
        return f"{self.method}"
