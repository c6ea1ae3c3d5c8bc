"""The model inside torch.compile, DataParallel and DDP wrappers."""

from torch import nn

_WRAPPERS = ("_orig_mod", "module")  # torch.compile; DataParallel, DDP


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel and DDP wrappers."""
    while True:
        inner = next((model._modules[w] for w in _WRAPPERS if w in model._modules and len(model._modules) == 1), None)
        if inner is None:
            return model
        model = inner
