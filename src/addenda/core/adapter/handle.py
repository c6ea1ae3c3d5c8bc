"""The handle of one adapter on one model: its tensors, saving, and checks of its training steps."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.base.sharded import fill, give_back, is_sharded
from addenda.core.file.save import save
from addenda.core.forward.tensors import Pool, SiteTensors
from addenda.core.method.contract import Method
from addenda.core.modules.statistics import gathered
from addenda.core.packed.tensor import Packed, bits_mark, bits_sum
from addenda.core.state.copies import unconverted
from addenda.core.state.state import HostRecord, intact, record_of, state_of, tensors_at
from addenda.core.state.vocabulary import Vocabulary, grown_of


class Adapter:
    """A named set of per-site tensors of one method on one base. All state lives on the model; this is a view."""

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name

    def _record(self) -> HostRecord:
        """Return the record of this adapter, without a walk over the model's modules where it stands on the model."""
        state = self.model.__dict__.get("_addenda")
        if state is not None and self.name in state.records:
            return HostRecord(self.model, state, state.records[self.name])
        return record_of(self.model, self.name)

    @property
    def methods(self) -> dict[str, Method]:
        """The method at each site, by path."""
        return self._record().record.methods

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of a classifier's outputs, in their order, which its file carries. Empty where nobody gave any."""
        return self._record().record.labels

    @labels.setter
    def labels(self, names: Iterable[str]) -> None:
        root, _, record = self._record()
        record.labels = fitting(root, names)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The new tokens and rows that its file holds, where the model's vocabulary has grown."""
        root, _, record = self._record()
        grown = grown_of(root) if record.grown else None
        return None if grown is None else grown.vocabulary

    @property
    def left_out(self) -> Mapping[str, str]:
        """The sites of its file that are not on this model, and why; empty but for `load(allow_partial=True)`."""
        return dict(self._record().record.left_out)

    @property
    def kinds(self) -> str:
        """The names of its methods, for people."""
        return ", ".join(dict.fromkeys(m.name or "full copy" for m in self.methods.values()))

    @property
    def seconds(self) -> float:
        """The time in seconds that attaching took."""
        return self._record().record.seconds

    def sites(self) -> Iterator[tuple[str, SiteTensors]]:
        """Yield (path, tensors) of every site."""
        root, _, record = self._record()
        for path in record.methods:
            yield path, tensors_at(root, self.name, path)

    def _holders(self) -> Iterator[tuple[str, SiteTensors | Pool]]:
        """Yield the sites, then each pool of tensors that sites train together, as ".0", ".1", …: no path is that."""
        pools: dict[int, Pool] = {}
        for path, tensors in self.sites():
            yield path, tensors
            if isinstance(pool := tensors._modules.get("pool"), Pool):
                pools[id(pool)] = pool
        for i, pool in enumerate(pools.values()):
            yield f".{i}", pool

    def pools(self) -> Iterator[tuple[str, Pool]]:
        """Yield (name, tensors) of every pool, the tensors that all sites of a method train together."""
        for name, holder in self._holders():
            if isinstance(holder, Pool):
                yield name, holder

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield trainable tensors by "path/tensor", the adapter's name not in it; those of pools last."""
        for path, tensors in self._holders():
            for key, p in tensors._parameters.items():
                assert p is not None
                yield f"{path}/{key}", p

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    @property
    def trainable(self) -> int:
        """The number of numbers that the adapter trains."""
        return sum(p.numel() for p in self.parameters())

    @checked()
    def requires_grad_(self, flag: bool = True) -> "Adapter":
        """Start or stop training; independent of whether the adapter is active.

        Raises AddendaError where training is to start and matrices are held as codes.
        """
        coded = [n for n, p in self.named_parameters() if isinstance(p, Packed)]
        if flag and coded:
            raise AddendaError(
                f"{self.name!r} holds codes ({len(coded)} matrices, e.g. {coded[0]}): what training moved is not in "
                "its file, and codes cannot be moved a little. Go on from a checkpoint of its run, or from a file that "
                "was saved with latent=True."
            )
        for p in self.parameters():
            p.requires_grad_(flag)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return trainable and frozen tensors by "path/tensor", those of pools last, matrices in full precision.

        They are the adapter's own, not copies: training and `load_state_dict` write into them. While a merge has
        converted the model they are those that `unmerge` gives back.
        """
        give_back(self.model)
        root, state, _ = self._record()
        with unconverted(root, state.cast) if state.cast else nullcontext():
            return {f"{path}/{key}": t for path, tensors in self._holders() for key, t in tensors.stored().items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy values in, strictly: every tensor, none more, shapes equal.

        Raises AddendaError listing all misfits, and while a merge has converted the model, which `unmerge` takes back.
        """
        if self._record().state.cast:
            raise AddendaError(
                f"A merge has converted this model (dtype=), and unmerge gives {self.name!r} back the values that it "
                "had before: what is written now would be lost. Call unmerge(model) first."
            )
        targets = self.state_dict()
        if not isinstance(tensors, Mapping):
            raise AddendaError(f"Expected tensors by name, as state_dict() gives them, got {type(tensors).__name__}.")
        problems = [f"missing {k}" for k in targets if k not in tensors] + [
            f"unexpected {k}" for k in tensors if k not in targets
        ]
        problems += [f"{k}{why}" for k, t in targets.items() if k in tensors and (why := _no_fit(t, tensors[k]))]
        if problems:
            raise AddendaError(f"The tensors do not fit adapter {self.name!r}: {'; '.join(problems[:20])}.")
        for key, tensor in targets.items():
            fill(tensor, tensors[key])

    @property
    def sharded(self) -> bool:
        """Whether the model's tensors are spread over processes: then every process must call `save`."""
        return any(is_sharded(p) for p in self.model.parameters())

    def save(
        self,
        path: str | Path,
        *,
        basis: bool = False,
        latent: bool = False,
        partial: bool = False,
        without_base: bool = False,
        heads: bool = True,
    ) -> Path:
        """Write one safetensors file; see `core.file.save.save`.

        Warns where steps were made, and every tensor is still what it was before the first.
        """
        record = self._record().record
        if record.step > record.start[0] and self._is_at_its_start():
            warnings.warn(
                f"{self.name!r} has made {record.step - record.start[0]} steps, and none of its tensors has moved: the "
                "file holds what it began with. Was the optimizer made of adapter.parameters(), was its rate 0 so "
                "far, or was every step left out (a scaler leaves out those with infinite gradients)?",
                stacklevel=2,
            )
        return save(self, path, basis=basis, latent=latent, partial=partial, without_base=without_base, heads=heads)

    def begin(self) -> None:
        """Remember the step and the bits that the adapter has now, for `save` to see whether anything has moved."""
        plain = {n: p for n, p in self.named_parameters() if type(p.detach()) is Tensor and not p.is_meta}
        record = self._record().record
        record.start = record.step, {n: bits_mark(p) for n, p in plain.items()}

    def _is_at_its_start(self) -> bool:
        """Return whether all tensors have the bits of the start; most often the first two tell that they have not."""
        marks, live = self._record().record.start[1], dict(self.named_parameters())
        if self.sharded or not marks:
            return False
        return all(n in live and int(mark) == int(bits_mark(live[n])) for n, mark in marks.items())

    @property
    def step_count(self) -> int:
        return self._record().record.step

    def step(self, dead: Literal["raise", "warn"] = "raise") -> None:
        """Tell the adapter that an optimizer step is done; call it before `zero_grad`.

        Advances the schedules of methods that have one (a rank drawn anew) and looks for dead tensors: after the
        first step a trainable tensor without a gradient raises AddendaError; one that was zero for three steps warns
        with its site, and if all were, raises. It raises too where an optimizer has moved nothing in three steps that
        all had gradients: one that was made before `attach` knows none of these tensors; and at any step where a
        module that the adapter is on has been replaced or resized since.

        dead: "warn" where tensors may be without a gradient in the first step for a good reason: layers that are
        dropped at random (LayerDrop), or a batch without the images that a vision tower waits for.
        """
        if dead not in ("raise", "warn"):
            raise AddendaError(f"dead must be 'raise' or 'warn', got {dead!r}.")
        root, state, record = self._record()
        intact(root, self.name, record)
        record.step += 1
        if record.step <= 3 and not record.start[0] and self.name in state.active:  # a file's steps were not seen here
            self._look_for_the_unmoved(record.step)
            self._look_for_the_dead(record.step, dead)
            self._look_at_buffers(record.step)
        self.draw()

    def _look_at_buffers(self, step: int) -> None:
        """Warn where buffers of a frozen base have changed between the first steps."""
        root, state, _ = self._record()
        marks = {n: _mark(b) for n, b in gathered(root).items() if not b.is_inference()}
        moved = [n for n, mark in marks.items() if state.gathered.get(n, mark) != mark] if step > 1 else []
        state.gathered = marks if state.frozen and step < 3 else {}
        if moved:
            warnings.warn(
                f"{len(moved)} buffers of the frozen base have changed since the last step: {', '.join(moved[:6])}. No "
                f"adapter's file holds them, so that {self.name!r} will act otherwise on the base as it was. Put the "
                "modules that own them into evaluation mode after model.train().",
                stacklevel=3,
            )

    def draw(self, step: int | None = None, again: int = 0) -> None:
        """Set the values that schedules give to the current (or another) step.

        again: other values for the same step, of its second, third, … forward; 0: its own.
        """
        record = self._record().record
        if step is not None:
            record.step = step
        scheduled = [m for m in dict.fromkeys(record.methods.values()) if m.has("on_step")]
        if not scheduled:
            return
        keys = ("step", str(record.step), *([f"again {again}"] if again else []))
        rng = {m: Stream(record.seed, *keys) for m in scheduled if not m.drawn_apart}
        values = {m: m.on_step(record.step, stream) for m, stream in rng.items()}
        for path, tensors in self.sites():
            m = tensors.method
            if m in values or m not in scheduled:
                tensors.draw(values.get(m, {}))
            else:
                key = record.origins.get(path, path)
                tensors.draw(m.on_step(record.step, Stream(record.seed, *keys, key)))

    def _look_for_the_unmoved(self, step: int) -> None:
        """Raise AddendaError where three steps have moved no tensor, by versions and by bits."""
        record = self._record().record
        live = [p for p in self.parameters() if p.requires_grad]
        grads = [p.grad for p in live if p.grad is not None]
        tells = not self.sharded and all(bool(g.isfinite().all()) for g in grads) and any(bool(g.any()) for g in grads)
        marks = tuple((id(p), p._version, bits_sum(p)) for p in live) if tells else None  # a scaler skips what is ∞
        if step == 1 or record.moved != marks:
            record.moved = marks if step == 1 else None
        elif step == 3 and marks is not None:
            raise AddendaError(
                f"The tensors of {self.name!r} have gradients, and in three steps no optimizer has moved one of them. "
                "An optimizer that was made before attach does not know them: make it now, of adapter.parameters(), "
                "and call adapter.step() behind optimizer.step()."
            )

    def _look_for_the_dead(self, step: int, how: str) -> None:
        live = {n: p for n, p in self.named_parameters() if p.requires_grad}
        none = [n for n, p in live.items() if p.grad is None]
        if none and step == 1:
            message = (
                f"{len(none)} of {len(live)} trainable tensors of {self.name!r} got no gradient in the first step: "
                f"{', '.join(none[:6])}{' …' if len(none) > 6 else ''}. Either the forward does not use these modules, "
                "or zero_grad ran before adapter.step(), or gradient checkpointing cut the graph at frozen embeddings "
                "(use use_reentrant=False). Leave unused sites out with exclude=. Where this batch alone did not reach "
                "them (layers dropped at random, a first batch without images), dead='warn' goes on."
            )
            if how == "raise":
                raise AddendaError(message)
            warnings.warn(message, stacklevel=3)
        for _, tensors in self._holders():  # what is zero by design at the first step lives a step later
            for key, p in tensors._parameters.items():
                if p.grad is not None and bool((p.grad != 0).any()):
                    tensors.__dict__.setdefault("_alive", set()).add(key)
        if step == 3:
            alive = set()
            for path, t in self._holders():
                keys = t.__dict__.pop("_alive", set())
                if keys and t.method.has("on_step"):  # a schedule may keep the others waiting
                    keys = set(t._parameters)
                alive |= {f"{path}/{k}" for k in keys}
            dead = [n for n in live if n not in alive]
            if dead and len(dead) == len(live):
                raise AddendaError(
                    f"All {len(dead)} trainable tensors of {self.name!r} had zero gradients for 3 steps."
                )
            if dead:
                warnings.warn(
                    f"{len(dead)} trainable tensors of {self.name!r} had zero gradients for 3 steps: "
                    f"{', '.join(dead[:6])}. Their sites may not influence the loss.",
                    stacklevel=3,
                )

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}: {self.kinds}, {len(self.methods)} sites, {self.trainable:,} trainable)"


def refuse_part(adapter: Adapter, what: str) -> None:
    """Raise AddendaError for an adapter of which a load left sites out. what: what cannot be done with it."""
    if left_out := record_of(adapter.model, adapter.name).record.left_out:
        raise AddendaError(
            f"{adapter.name!r} is a part of its file, and {what}: {len(left_out)} sites were left out as it was "
            f"loaded, e.g. {next(iter(left_out))}. Where the part is what you want, save(path, partial=True) makes it "
            "an adapter of its own, which load takes."
        )


def _no_fit(own: Tensor, given: object) -> str | None:
    """Return why a value cannot be written into a tensor of an adapter, or None where it can."""
    if isinstance(own, Packed):
        return " is held as codes, which nothing can be written into"
    if not isinstance(given, Tensor):
        return f": a {type(given).__name__}, expected a tensor"
    if given.shape != own.shape:
        return f": shape {tuple(given.shape)}, expected {tuple(own.shape)}"
    if given.is_floating_point() != own.is_floating_point() or given.is_meta:
        return f": {given.dtype} on {given.device}, expected values of {own.dtype}"
    return None


def fitting(model: nn.Module, labels: Iterable[str]) -> tuple[str, ...]:
    """Return labels as the names of a classifier's outputs. Raises AddendaError for doubles or another number."""
    names = tuple(labels)
    if not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        raise AddendaError(f"Labels are different texts, one for each output in order; got {str(names)[:200]}.")
    outputs = getattr(getattr(model, "config", None), "num_labels", None)
    if names and isinstance(outputs, int) and outputs != len(names):
        raise AddendaError(
            f"There are {len(names)} labels ({', '.join(names[:8])[:200]}), and this {type(model).__name__} has "
            f"{outputs} outputs. Load it with num_labels={len(names)}."
        )
    return names


def _mark(buffer: Tensor) -> tuple:
    """Return a mark that changes when a buffer does: its version, and the bits of a small one.

    torch's batch norm counts no version.
    """
    small = type(buffer) is Tensor and buffer.is_floating_point() and buffer.numel() <= 1 << 16 and not buffer.is_meta
    return id(buffer), buffer._version, bits_sum(buffer) if small else 0


@checked()
def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return every adapter of the model by name."""
    root, state = state_of(model)
    return {name: Adapter(root, name) for name in state.records}
