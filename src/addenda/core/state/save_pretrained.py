"""Keeping other libraries' `save_pretrained` from writing a model without the change that acts in it.

    model.save_pretrained(folder)      an adapter acts: refused, before anything is written, with the ways out
                                       a change is merged: the merged weights, under the base's names
                                       nothing acts (switched to None): the base, under its own names

What these functions write is a model file: the base's weights by their names. An adapter's tensors beside them are
names that nothing reads, so that the folder would come back as the base, with a warning at most. Two things see to it:

- while adapters are attached, modules that have a `save_pretrained` (transformers, diffusers, sentence-transformers,
  huggingface_hub's mixin) have a `Guarded` in its place, which `detach` takes away again;
- an adapter's `Slots` say the same when a state dict is collected below a `save_pretrained` of a module around the one
  that was attached to, which no hook can know of.

A Trainer's checkpoints are none of this: they hold everything by name, for the same Trainer to go on from.
"""

import inspect
from typing import Any
from weakref import ref

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward.slots import slots_of
from addenda.core.forward.writing import in_a_checkpoint, loss, whole_model
from addenda.core.modules.ours import is_ours
from addenda.core.state.state import State

NAMES = ("save_pretrained", "save", "push_to_hub")  # of methods; the others count where the first is there


class Guarded:
    """A module's method for saving, in the module's own dictionary, which looks first whether a change would be lost.

    It holds the module weakly, so that no circle keeps a model in memory; copies and pickles are of the copied module.
    """

    def __init__(self, module: nn.Module, state: State, name: str, before: Any = None):
        self.module, self.state, self.name, self.before = ref(module), state, name, before
        self.__signature__ = inspect.signature(self._own(module))  # diffusers' pipelines look at it
        self.__doc__ = inspect.getdoc(self._own(module))

    def __reduce__(self) -> tuple:
        return Guarded, (self.module(), self.state, self.name, self.before)

    def _own(self, module: nn.Module) -> Any:
        return getattr(type(module), self.name).__get__(module) if self.before is None else self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the module's own method does. Raises AddendaError where a change that acts would be lost."""
        module = self.module()
        if module is None:
            raise AddendaError(f"The model whose {self.name} this is no longer exists.")
        if in_a_checkpoint():
            return self._own(module)(*args, **kwargs)
        given = self.__signature__.bind_partial(*args, **kwargs).arguments.get("state_dict")
        if isinstance(given, dict):  # collected before, as accelerate does; one without our names is somebody's choice
            ours = [n for n in given if is_ours(n)]
            if ours:
                refuse_loss(module, self.state, self.name)
                plain = {n: t for n, t in given.items() if not is_ours(n)}
                bound = self.__signature__.bind(*args, **kwargs)
                bound.arguments["state_dict"] = plain
                args, kwargs = bound.args, bound.kwargs
        else:
            refuse_loss(module, self.state, self.name)
        return whole_model(self._own(module), args, kwargs)


def refuse_loss(module: nn.Module, state: State, name: str) -> None:
    """Raise AddendaError where an adapter acts somewhere in this module, which a file of the base would not hold."""
    if any((slots := slots_of(m)) is not None and slots.acts_here() for m in module.modules()):
        acting = state.arrangement.names if state.arrangement else state.active
        raise AddendaError(loss(", ".join(map(repr, acting)) or "An adapter", name))


def guard(root: nn.Module, state: State) -> None:
    """Put guards on all modules with a `save_pretrained`, in the place of those of before; none without an adapter."""
    for module in root.modules():
        for name in NAMES:
            before = module.__dict__.get(name)
            if isinstance(before, Guarded):
                before = before.before
                if before is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = before
            if state.records and hasattr(type(module), NAMES[0]) and callable(getattr(type(module), name, None)):
                module.__dict__[name] = Guarded(module, state, name, before)
