"""One forward of a model, to see what only that can say: what ran, and whose output is whose input.

It runs on a copy without data: a norm whose output *is* what a part reads stands before it; a norm whose output *is*
what the block returns stands after the sum.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import training_mode
from addenda.core.site.site import is_norm
from addenda.core.state.twin import without_data


@dataclass(frozen=True)
class Part:
    """A stretch of the model that starts with one module's input and ends with another's output."""

    block: str  # the path of the block around it, or ""
    first: str
    last: str
    role: str = ""  # its name, see `core.site.structure`, or "" where modules were named


@dataclass
class Trial:
    """What one forward did: of every call of a module, in order, the storages of its first input and its output."""

    ins: dict[str, int] = field(default_factory=dict)
    outs: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)  # of the norms and other modules, as their calls ended
    norms: set[str] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)  # so that no storage's id is used twice

    def norm_before(self, part: Part) -> str | None:
        """The norm that makes what the part reads, unless what it makes is the residual too."""
        if part.first not in self.ins:
            raise AddendaError(f"{part.first} did not run in a trial forward, so what stands before it is not known.")
        makers = [n for n in self.norms if self.outs.get(n) == self.ins[part.first] and self.ins.get(n) is not None]
        before = [n for n in makers if self.order.index(n) < self.order.index(part.first)]
        return None if not before or self._after_the_sum(part) else before[-1]

    def norm_after(self, part: Part) -> str | None:
        """The norm over the sum of the part's output and the residual, in models that normalise after it."""
        if part.last not in self.outs:
            raise AddendaError(f"{part.last} did not run in a trial forward, so what stands behind it is not known.")
        if not self._after_the_sum(part):
            return None
        later = self.order[self.order.index(part.last) + 1 :]
        return next((n for n in later if n in self.norms and n.startswith(f"{part.block}.")), None)

    def _after_the_sum(self, part: Part) -> bool:
        """Whether the block returns what a norm in it made."""
        inside = [n for n in self.norms if n.startswith(f"{part.block}.") and n in self.outs]
        return bool(part.block) and any(self.outs[n] == self.outs.get(part.block) for n in inside)


@torch.no_grad()
def tried(model: nn.Module) -> Trial:
    """One forward in evaluation mode: on tensors without data, or on real ones where the model looks at values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    problems: list[str] = []
    twin = without_data(model, mode).eval()
    trial = _followed(twin, mode, problems)
    if trial is None:
        with training_mode(model, False):
            trial = _followed(model, None, problems)
    if trial is None:
        raise AddendaError(
            f"What this method reads is seen in a trial forward, and this {type(model).__name__} could not be run "
            f"({'; '.join(problems)}). Name the modules whose output is changed with targets=, e.g. targets='*.mlp', "
            "and choose reads='input' or 'output' where the method has that option."
        )
    return trial


def _followed(model: nn.Module, mode: FakeTensorMode | None, problems: list[str]) -> Trial | None:
    """The first of the likely inputs that the model takes; what it said of the others goes to problems."""
    trial, hooks = Trial(), []
    for path, module in model.named_modules():
        if path and "addenda" not in path.split("."):
            hooks.append(module.register_forward_hook(_watch(trial, path), with_kwargs=True))
            if is_norm(module):
                trial.norms.add(path)
    try:
        for args, kwargs in _inputs(model):
            for record in (trial.ins, trial.outs, trial.order, trial.alive):
                record.clear()
            try:
                if mode is None:
                    model(*args, **kwargs)
                else:
                    with mode:
                        model(*map(mode.from_tensor, args), **{
                            k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()
                        })  # fmt: skip
                return trial
            except Exception as error:  # whatever a model does with inputs that it was not made for
                said = next(iter(str(error).splitlines()), "")[:200]
                problems.append(f"on {', '.join(kwargs) or 'ids'}: {type(error).__name__}: {said}")
        return None
    finally:
        for hook in hooks:
            hook.remove()


def _watch(trial: Trial, path: str):
    def note(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        made = out[0] if isinstance(out, tuple) and out else out
        for record, value in ((trial.ins, given), (trial.outs, made)):
            if isinstance(value, Tensor):
                record[path] = id(value.untyped_storage())
                trial.alive.append(value)
        trial.order.append(path)

    return note


def _inputs(model: nn.Module) -> Iterator[tuple[tuple, dict]]:
    """What the model might take, the likeliest first: ids, an image, both."""
    takes = inspect.signature(type(model).forward).parameters
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))
    ids = torch.zeros(1, 2, dtype=torch.long, device=like.device)
    config = getattr(model, "config", None)
    last, many = getattr(config, "eos_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(last, int) and isinstance(many, int) and 0 <= last < many:
        ids[:, -1] = last  # BART's classifier looks for it
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    text = {"input_ids": ids} | ({"decoder_input_ids": ids} if "decoder_input_ids" in takes else {}) | more
    image = _image(config)
    image = None if image is None else image.to(like.device, like.dtype)
    if "input_ids" in takes:
        yield (), text
    if "pixel_values" in takes and image is not None:
        yield (), {"pixel_values": image} | more
        if "input_ids" in takes:
            yield (), text | {"pixel_values": image}
    if "input_ids" not in takes and "pixel_values" not in takes:
        yield (ids,), {}


def _image(config: Any) -> Tensor | None:
    """One image of the size that the configuration, or its vision part, says."""
    for c in (config, getattr(config, "vision_config", None)):
        size = getattr(c, "image_size", None)
        if size is not None:
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            return torch.zeros(1, getattr(c, "num_channels", 3), height, width)
    return None
