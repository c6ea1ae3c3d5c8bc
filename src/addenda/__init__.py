"""addenda: small changes to large models. Public names, nothing else.

Every name is imported on first use, so that `addenda --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from addenda.compress.announce import announce

if TYPE_CHECKING:
    from addenda import methods as methods
    from addenda.compose.composition import Average as Average
    from addenda.compose.composition import BatchSplit as BatchSplit
    from addenda.compose.composition import Composition as Composition
    from addenda.compose.composition import Fuse as Fuse
    from addenda.compose.composition import Parallel as Parallel
    from addenda.compose.composition import Split as Split
    from addenda.compose.composition import Stack as Stack
    from addenda.compose.composition import composed as composed
    from addenda.compress.factorise import Factorised as Factorised
    from addenda.compress.factorise import factorise as factorise
    from addenda.compress.macs import macs as macs
    from addenda.compress.recalibrate import recalibrate as recalibrate
    from addenda.compress.trp import TrainedRankPruning as TrainedRankPruning
    from addenda.core.adapter import Adapter as Adapter
    from addenda.core.adapter import adapters as adapters
    from addenda.core.attach import attach as attach
    from addenda.core.attach import detach as detach
    from addenda.core.attach import disabled as disabled
    from addenda.core.attach import per_example as per_example
    from addenda.core.attach import status as status
    from addenda.core.attach import switch as switch
    from addenda.core.errors import AddendaError as AddendaError
    from addenda.core.files import inspect as inspect
    from addenda.core.files import load as load
    from addenda.core.files import save as save
    from addenda.core.hidden import HiddenMethod as HiddenMethod
    from addenda.core.lean import lean as lean
    from addenda.core.lean import unlean as unlean
    from addenda.core.merge import MergeReport as MergeReport
    from addenda.core.merge import merge as merge
    from addenda.core.merge import unmerge as unmerge
    from addenda.core.method import WeightMethod as WeightMethod
    from addenda.core.perturb import perturbation_curve as perturbation_curve
    from addenda.core.plan import Plan as Plan
    from addenda.core.plan import plan as plan
    from addenda.core.registry import Info as Info
    from addenda.core.registry import catalogue as catalogue
    from addenda.core.registry import register as register
    from addenda.train.callback import TrainerCallback as TrainerCallback
    from addenda.train.evaluate import evaluate as evaluate
    from addenda.train.evaluate import generate as generate
    from addenda.train.tune import tune as tune

__version__ = "0.1.0"

_NAMES = {
    "compose.composition": "Average BatchSplit Composition Fuse Parallel Split Stack composed",
    "compress.factorise": "Factorised factorise",
    "compress.macs": "macs",
    "compress.recalibrate": "recalibrate",
    "compress.trp": "TrainedRankPruning",
    "core.adapter": "Adapter adapters",
    "core.attach": "attach detach disabled per_example status switch",
    "core.errors": "AddendaError",
    "core.files": "inspect load save",
    "core.hidden": "HiddenMethod",
    "core.lean": "lean unlean",
    "core.merge": "MergeReport merge unmerge",
    "core.method": "WeightMethod",
    "core.perturb": "perturbation_curve",
    "core.plan": "Plan plan",
    "core.registry": "Info catalogue register",
    "train.callback": "TrainerCallback",
    "train.evaluate": "evaluate generate",
    "train.tune": "tune",
}
announce()
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str):
    """The public names, and the methods by class name (addenda.SVFT)."""
    if name.startswith("__"):
        raise AttributeError(f"addenda has no {name!r}")
    if name in _WHERE:
        value = getattr(import_module(f"addenda.{_WHERE[name]}"), name)
    else:
        found = import_module("addenda.methods")
        if name != "methods" and not hasattr(found, name):
            raise AttributeError(f"addenda has no {name!r}")
        value = found if name == "methods" else getattr(found, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    found = import_module("addenda.methods")
    return sorted({*_WHERE, "methods", "__version__", *getattr(found, "__all__", ())})
