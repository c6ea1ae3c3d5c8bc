"""One trial forward of a model, which shows which modules run, and whose output is whose input.

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
    """Run one forward in evaluation mode, on tensors without data, or on real ones where the model looks at values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    problems: list[str] = []
    twin = without_data(model, mode).eval()
    record = _followed(twin, mode, problems)
    if record is None:
        with training_mode(model, False):
            record = _followed(model, None, problems)
    if record is None:
        raise AddendaError(
            f"What this method reads is seen in a trial forward, and this {type(model).__name__} could not be run "
            f"({'; '.join(problems)}). Name the modules whose output is changed with targets=, e.g. targets='*.mlp', "
            "and choose reads='input' or 'output' where the method has that option."
        )
    return record


def _followed(model: nn.Module, mode: FakeTensorMode | None, problems: list[str]) -> DryForward | None:
    """Record a forward on the first likely inputs that the model takes; errors on the others go to problems."""
    dry, hooks = DryForward(), []
    for path, module in model.named_modules():
        if path and not is_ours(path):
            hooks.append(module.register_forward_hook(_watch(dry, path), with_kwargs=True))
            if is_norm(module):
                dry.norms.add(path)
    try:
        for args, kwargs in _inputs(model):
            for record in (dry.ins, dry.outs, dry.order, dry.alive):
                record.clear()
            try:
                if mode is None:
                    model(*args, **kwargs)
                else:
                    with mode:
                        model(*map(mode.from_tensor, args), **{
                            k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()
                        })  # fmt: skip
                return dry
            except Exception as error:  # whatever a model does with inputs that it was not made for
                message = next(iter(str(error).splitlines()), "")[:200]
                problems.append(f"on {', '.join(kwargs) or 'ids'}: {type(error).__name__}: {message}")
        return None
    finally:
        for hook in hooks:
            hook.remove()


def _watch(dry: DryForward, path: str):
    def note(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        argument = args[0] if args else next(iter(kwargs.values()), None)
        output = out[0] if isinstance(out, tuple) and out else out
        for record, value in ((dry.ins, argument), (dry.outs, output)):
            if isinstance(value, Tensor):
                record[path] = id(value.untyped_storage())
                dry.alive.append(value)
        dry.order.append(path)

    return note


def _inputs(model: nn.Module) -> Iterator[tuple[tuple, dict]]:
    """Yield inputs that the model might take, the likeliest first: ids, an image, both."""
    parameters = inspect.signature(type(model).forward).parameters
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))
    ids = torch.zeros(1, 2, dtype=torch.long, device=like.device)
    config = getattr(model, "config", None)
    last, vocabulary = getattr(config, "eos_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(last, int) and isinstance(vocabulary, int) and 0 <= last < vocabulary:
        ids[:, -1] = last  # BART's classifier looks for it
    extras: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    text = {"input_ids": ids} | ({"decoder_input_ids": ids} if "decoder_input_ids" in parameters else {}) | extras
    image = _image(config)
    image = None if image is None else image.to(like.device, like.dtype)
    if "input_ids" in parameters:
        yield (), text
    if "pixel_values" in parameters and image is not None:
        yield (), {"pixel_values": image} | extras
        if "input_ids" in parameters:
            yield (), text | {"pixel_values": image}
    if "input_ids" not in parameters and "pixel_values" not in parameters:
        yield (ids,), {}


def _image(config: Any) -> Tensor | None:
    """Return one image of the size that the configuration, or its vision part, says; None where neither does."""
    for c in (config, getattr(config, "vision_config", None)):
        size = getattr(c, "image_size", None)
        if size is not None:
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            return torch.zeros(1, getattr(c, "num_channels", 3), height, width)
    return None
