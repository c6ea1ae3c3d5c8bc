"""Copies of a model that share tensors which need not be copied."""

import copy
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from addenda.core.state.state import find_state


def aside(root: nn.Module) -> dict[int, Any]:
    """Return a memo for `deepcopy`, so that a copy shares what a merge keeps beside the model."""
    host = find_state(root)
    saved = [*(host.state.merged or {}).values(), *host.state.cast.values()] if host else []
    return {id(k): k for k in saved}


def without_data(root: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return a copy of the model whose parameters and buffers are fake."""
    fakes: dict[int, Any] = {id(t): _fake(t, mode) for t in [*root.parameters(), *root.buffers()]}
    return copy.deepcopy(root, fakes | aside(root))


def _fake(t: Tensor, mode: FakeTensorMode) -> Tensor:
    """Return t as a fake tensor, of an alias, as the mode keeps weak references to what it is given."""
    fake = mode.from_tensor(t.detach())
    return nn.Parameter(fake, t.requires_grad) if isinstance(t, nn.Parameter) else fake
