"""Copies of a model that share what need not be copied."""

import copy
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from addenda.core.state.state import find_state


def aside(root: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy`: what a merge keeps beside the model is shared with a copy that nothing is merged into."""
    host = find_state(root)
    kept = [*(host.state.merged or {}).values(), *host.state.cast.values()] if host else []
    return {id(k): k for k in kept}


def without_data(root: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers are fake."""
    fakes: dict[int, Any] = {id(t): _fake(t, mode) for t in [*root.parameters(), *root.buffers()]}
    return copy.deepcopy(root, fakes | aside(root))


def _fake(t: Tensor, mode: FakeTensorMode) -> Tensor:
    """From an alias: the mode keeps weak references to what it is given, and torch moves no packed weight with one."""
    made = mode.from_tensor(t.detach())
    return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made
