"""A loaded model that a failing call leaves as it was: no adapter of it stays, and what acted before acts."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from addenda.core.adapter.attach import detach
from addenda.core.base.sharded import is_sharded
from addenda.core.forward.acting import blocks
from addenda.core.state.state import apply_again, find_state
from addenda.core.state.undo import undone


@contextmanager
def left_alone(model: nn.Module | None) -> Iterator[None]:
    """Take off what a `with` block has attached, and let act what did, where it ends with an error or Ctrl-C.

    What was attached to a model that is split over processes stays. None: there is no model yet.
    """
    host = None if model is None else find_state(model)
    names, acted = (set(host.state.records), (host.state.active, blocks())) if host else (set(), None)
    with undone(model):
        try:
            yield
        except BaseException:
            now = None if model is None else find_state(model)
            if now is not None and not any(map(is_sharded, now.root.parameters())):
                for new in [n for n in now.state.records if n not in names]:
                    detach(now.root, new)
            if host and acted:
                apply_again(*host, *acted)
            raise
