"""Copies of a model that share what need not be copied."""

import copy
from typing import Any

from torch import nn
from torch._subclasses import FakeTensorMode

from addenda.core.state import find_state


def aside(root: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy`: what a merge keeps beside the model is shared with a copy that nothing is merged into."""
    found = find_state(root)
    kept = [*(found[1].merged or {}).values(), *found[1].cast.values()] if found else []
    return {id(k): k for k in kept}


def without_data(root: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers are fake."""
    fakes: dict[int, Any] = {id(t): mode.from_tensor(t) for t in [*root.parameters(), *root.buffers()]}
    return copy.deepcopy(root, fakes | aside(root))
