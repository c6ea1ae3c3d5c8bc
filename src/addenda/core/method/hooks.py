"""Which public names a method class may have: hooks, settings, options; anything else is refused when it is defined.

A hook is a public function or property of the base class of a kind of method, and is declared by standing there. A
name that is none of them is a misspelt hook or an option without its annotation, and Python would take either in
silence: `def factor` would be a function that nobody calls, and the method would run on the slow path.
"""

import dataclasses
import inspect
from types import FunctionType, MemberDescriptorType
from typing import Any

from addenda.core.base.errors import AddendaError, nearest

ASKED = ("has", "options")  # functions of the base class that say something of a method; the others are hooks


def hooks_of(kind: type) -> frozenset[str]:
    """Return the names of the functions and properties that methods of this kind may define."""
    members = {n: v for base in reversed(kind.__mro__) for n, v in vars(base).items() if not n.startswith("_")}
    return frozenset(n for n, v in members.items() if isinstance(v, (FunctionType, property)) and n not in ASKED)


def no_hook(kind: type, name: str) -> AddendaError:
    """Return the error for a name that is no hook of this kind of method, with the nearest hooks and all of them."""
    hooks = sorted(hooks_of(kind))
    return AddendaError(
        f"{name!r} is no hook of a {kind.__name__}.{nearest(name, hooks)} Its hooks: {', '.join(hooks)}."
    )


def check_names(cls: Any, kind: type) -> None:
    """Raise AddendaError where a class defines a public name that has no effect, with the nearest one that has.

    Of its own, a class may have options (annotated, as a dataclass has them) and what it lists in `helpers`.
    """
    hooks, annotations = hooks_of(kind), inspect.get_annotations(cls)
    options = {n for n, hint in annotations.items() if not _of_the_class(hint)}
    defined = {n: v for n, v in vars(cls).items() if not n.startswith("_") and not isinstance(v, MemberDescriptorType)}
    defined |= {n: None for n in annotations if n not in defined and not n.startswith("_")}
    helpers = vars(cls).get("helpers", ())
    of_bases = {n for base in cls.__mro__[1:] for n in (*vars(base), *inspect.get_annotations(base))}
    base_names = {n for n in of_bases if not n.startswith("_")}
    inherited = {f.name for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
    problems = []
    for name, value in defined.items():
        if name in options:
            if name in hooks:
                problems.append(f"{name} is a hook, and no option can have its name.")
        elif name in inherited and name not in annotations and not isinstance(value, (FunctionType, property)):
            problems.append(
                f"{name} = {value!r} stands without the annotation of an option, and a dataclass would go on with the "
                f"default of its base class. Write {name}: {type(value).__name__} = {value!r}."
            )
        elif name not in base_names and name not in helpers:
            problems.append(f"{name} is no hook, no option and nothing of its base class.{nearest(name, base_names)}")
    problems += [f"helpers names {n!r}, which the class does not define." for n in helpers if n not in defined]
    if problems:
        raise AddendaError(
            f"{cls.__qualname__}: {' '.join(problems)} The names that a method may define stand in "
            f"{kind.__module__}.{kind.__name__}; an option of its own needs an annotation (rank: int = 8); a helper "
            "begins with an underscore, or, where other modules use it, is listed in the class's "
            'helpers: ClassVar[tuple[str, ...]] = ("name",).'
        )


def _of_the_class(hint: Any) -> bool:
    """Return whether an annotation, which may be text, says ClassVar: a setting, and no option."""
    text = hint if isinstance(hint, str) else repr(hint)
    return text.removeprefix("typing.").startswith("ClassVar")
