"""Where a Stack with skip="own" finds the residual of a sum, and which changes it can be used for."""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn

from addenda.compose.stack import Composition, Stack, names_in
from addenda.core.adapter.dry_forward import dry_forward
from addenda.core.base.errors import AddendaError
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.structure import residual_before
from addenda.core.state.state import record_of

_known: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def residuals_of(root: nn.Module, composition: Composition) -> dict[str, nn.Module]:
    """Return by the path of a place the module whose first input is the residual in the sum that is changed there.

    Raises AddendaError where parts of a Stack with skip="own" change one module, but not what they read.
    """
    sums: set[str] = set()
    for stack in composition.within():
        if isinstance(stack, Stack) and stack.skip == "own":
            sums |= _sums(root, stack)
    if not sums:
        return {}
    known = _known.setdefault(root, {})
    missing = sorted(sums - known.keys())
    if missing:
        known |= residual_before(root, missing, dry_forward)
    return {path: root.get_submodule(known[path]) for path in sums}


def _sums(root: nn.Module, stack: Stack) -> set[str]:
    """Return the places at which several parts change the sum with the residual."""
    by_module: dict[str, list[Mapping[str, HiddenMethod]]] = {}
    for part in stack.parts:
        here: dict[str, dict[str, HiddenMethod]] = {}
        for name in names_in(part):
            for path, m in record_of(root, name).record.methods.items():
                if isinstance(m, HiddenMethod):
                    here.setdefault(path.partition("@")[0], {})[path] = m
        for module, found in here.items():
            by_module.setdefault(module, []).append(found)
    sums = set()
    for module, parts in by_module.items():
        if len(parts) < 2:
            continue
        found = {path: m for part in parts for path, m in part.items()}
        path, m = next(iter(found.items()))
        serial = path.partition("@")[2] in ("output", "again")
        if len({m.reads for m in found.values()}) > 1 or len(found) > 1 or not serial or m.has("undo"):
            raise AddendaError(
                f"{stack!r} at {module}: skip='own' is for changes that read what they change, at the same place "
                f"(two of pfeiffer); here are {', '.join(f'{p} ({m.name})' for p, m in list(found.items())[:4])}. "
                "Leave skip= out."
            )
        if m.reads == "sum":
            sums.add(path)
    return sums
