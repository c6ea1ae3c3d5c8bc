"""One forward of a model, to see what only that can say: what ran, and whose output is whose input.

It runs on a copy without data: a norm whose output *is* what a part reads stands before it; a norm whose output *is*
what the block returns stands after the sum.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from addenda.core.base.errors import AddendaError
from addenda.core.modules.borrow import training_mode
from addenda.core.modules.ours import is_ours
from addenda.core.site.parts import DryForward
from addenda.core.site.site import is_norm
from addenda.core.state.twin import without_data


@torch.no_grad()
def dry_forward(model: nn.Module) -> DryForward:
    """One forward in evaluation mode: on tensors without data, or on real ones where the model looks at values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    problems: list[str] = []
    twin = without_data(model, mode).eval()
    done = _followed(twin, mode, problems)
    if done is None:
        with training_mode(model, False):
            done = _followed(model, None, problems)
    if done is None:
        raise AddendaError(
            f"What this method reads is seen in a trial forward, and this {type(model).__name__} could not be run "
            f"({'; '.join(problems)}). Name the modules whose output is changed with targets=, e.g. targets='*.mlp', "
            "and choose reads='input' or 'output' where the method has that option."
        )
    return done


def _followed(model: nn.Module, mode: FakeTensorMode | None, problems: list[str]) -> DryForward | None:
    """The first of the likely inputs that the model takes; what it said of the others goes to problems."""
    done, hooks = DryForward(), []
    for path, module in model.named_modules():
        if path and not is_ours(path):
            hooks.append(module.register_forward_hook(_watch(done, path), with_kwargs=True))
            if is_norm(module):
                done.norms.add(path)
    try:
        for args, kwargs in _inputs(model):
            for record in (done.ins, done.outs, done.order, done.alive):
                record.clear()
            try:
                if mode is None:
                    model(*args, **kwargs)
                else:
                    with mode:
                        model(*map(mode.from_tensor, args), **{
                            k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()
                        })  # fmt: skip
                return done
            except Exception as error:  # whatever a model does with inputs that it was not made for
                said = next(iter(str(error).splitlines()), "")[:200]
                problems.append(f"on {', '.join(kwargs) or 'ids'}: {type(error).__name__}: {said}")
        return None
    finally:
        for hook in hooks:
            hook.remove()


def _watch(done: DryForward, path: str):
    def note(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        made = out[0] if isinstance(out, tuple) and out else out
        for record, value in ((done.ins, given), (done.outs, made)):
            if isinstance(value, Tensor):
                record[path] = id(value.untyped_storage())
                done.alive.append(value)
        done.order.append(path)

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
