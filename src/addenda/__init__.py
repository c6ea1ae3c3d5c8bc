"""addenda: small changes to large models. Public names, nothing else."""

from addenda import methods
from addenda.core.adapter import Adapter, adapters
from addenda.core.attach import attach, detach, disabled, status, switch
from addenda.core.errors import AddendaError
from addenda.core.files import inspect, load, save
from addenda.core.merge import MergeReport, merge, unmerge
from addenda.core.method import WeightMethod
from addenda.core.plan import Plan, plan
from addenda.core.registry import Info, catalogue, register

__version__ = "0.1.0"


def __getattr__(name: str):
    """The methods by class name (addenda.SVFT), and what needs transformers, imported on first use."""
    import importlib

    lazy = {
        "tune": "train.tune",
        "evaluate": "train.tune",
        "generate": "train.tune",
        "TrainerCallback": "train.trainer",
    }
    if name in lazy:
        return getattr(importlib.import_module(f"addenda.{lazy[name]}"), name)
    try:
        return getattr(methods, name)
    except AttributeError:
        raise AttributeError(f"addenda has no {name!r}") from None
