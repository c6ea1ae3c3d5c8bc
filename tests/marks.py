"""What a call could have changed on a model: everything but its outputs, in plain data that can be compared."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_DICTS = ("_parameters", "_buffers", "_modules")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Classes, keys, bits, flags, gradients, hooks, modes, configuration and plain attributes, by path."""
    found: dict[str, Any] = {"parameters": [n for n, _ in model.named_parameters(remove_duplicate=False)]}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}: class"] = type(module)
        found[f"{path}: attributes"] = sorted(vars(module))
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = _plain(value)
        for name in _DICTS:
            found[f"{path}.{name}"] = {k: _tensor(v) if isinstance(v, Tensor) else type(v) for k, v in
                                       vars(module)[name].items()}  # fmt: skip
    return found


def _tensor(t: Tensor) -> tuple:
    grad = None if t.grad is None else _bits(t.grad)
    return type(t), id(t), tuple(t.shape), t.dtype, t.requires_grad, grad, _bits(t)


def _bits(t: Tensor) -> str:
    plain = t.detach().cpu().contiguous()
    if type(plain) is not Tensor and type(plain) is not nn.Parameter:
        return f"{type(plain).__name__} {plain.data_ptr() if plain.numel() else 0}"
    return hashlib.sha256(plain.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest() if plain.numel() else ""


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        own = {k: v for k, v in vars(value).items() if isinstance(v, str | int | float | bool | type(None))}
        return type(value), own
    if type(value).__name__ == "State":
        records = {k: (list(r.methods), r.also_train, r.seed, r.step) for k, r in value.records.items()}
        return records, value.active, len(value.blocks), dict(value.frozen), value.merged is None, sorted(value.cast)
    if type(value).__name__ == "Acting":
        return {k: _plain(v) for k, v in vars(value).items()}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | set | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else id(value)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is other than before, in a form that a failing test can show."""
    return [f"{k}: {before.get(k, 'nothing')} -> {after.get(k, 'nothing')}" for k in {**before, **after}
            if before.get(k, ...) != after.get(k, ...)]  # fmt: skip
