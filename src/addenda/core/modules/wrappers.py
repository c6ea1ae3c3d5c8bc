"""The model inside the wrappers of torch.compile, of parallel training, and of averaged weights."""

from torch import nn

from addenda.core.base.arguments import no_model
from addenda.core.base.errors import AddendaError

# The class, or one that it is derived from, and its child: by name, as some are of libraries that need not be there.
# By the child alone a user's own module with a `module` in it would be passed by, its parameters unseen.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "AveragedModel": "module",
}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DataParallel, DDP, DeepSpeed and AveragedModel wrappers."""
    while True:
        children = (_WRAPPERS[c.__name__] for c in type(model).__mro__ if c.__name__ in _WRAPPERS)
        inner = next((model._modules[child] for child in children if child in model._modules), None)
        if inner is None:
            return model
        model = inner


def model_in(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers. Raises AddendaError for what a user gave in the place of a model."""
    if not isinstance(model, nn.Module):
        raise AddendaError(no_model(model))
    return unwrap(model)
