"""addenda: small changes to large models. Public names, nothing else.

Every name is imported on first use, so that `addenda --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from addenda.compressing.announce import announce

if TYPE_CHECKING:
    from addenda import methods as methods
    from addenda import optim as optim
    from addenda.combining.bank import AdapterBank as AdapterBank
    from addenda.combining.combine import combine as combine
    from addenda.combining.report import CombineReport as CombineReport
    from addenda.combining.retention import retention as retention
    from addenda.comparing.choose import choose as choose
    from addenda.comparing.run import compare as compare
    from addenda.compose.composition import composed as composed
    from addenda.compose.split import BatchSplit as BatchSplit
    from addenda.compose.split import Parallel as Parallel
    from addenda.compose.split import Split as Split
    from addenda.compose.stack import Average as Average
    from addenda.compose.stack import Composition as Composition
    from addenda.compose.stack import Fuse as Fuse
    from addenda.compose.stack import Stack as Stack
    from addenda.compressing.factorise import Factorised as Factorised
    from addenda.compressing.factorise import factorise as factorise
    from addenda.compressing.macs import macs as macs
    from addenda.compressing.recalibrate import recalibrate as recalibrate
    from addenda.compressing.run import compress as compress
    from addenda.compressing.settings import CompressionSettings as CompressionSettings
    from addenda.compressing.trp import TrainedRankPruning as TrainedRankPruning
    from addenda.core.adapter.attach import attach as attach
    from addenda.core.adapter.attach import detach as detach
    from addenda.core.adapter.blocks import disabled as disabled
    from addenda.core.adapter.blocks import per_example as per_example
    from addenda.core.adapter.grow import grow as grow
    from addenda.core.adapter.grow import shrink as shrink
    from addenda.core.adapter.handle import Adapter as Adapter
    from addenda.core.adapter.handle import adapters as adapters
    from addenda.core.adapter.load import load as load
    from addenda.core.adapter.switch import status as status
    from addenda.core.adapter.switch import switch as switch
    from addenda.core.ask.perturb import perturbation_curve as perturbation_curve
    from addenda.core.ask.plan import Plan as Plan
    from addenda.core.ask.plan import plan as plan
    from addenda.core.base.errors import AddendaError as AddendaError
    from addenda.core.file.save import save as save
    from addenda.core.forward.lean import lean as lean
    from addenda.core.forward.lean import unlean as unlean
    from addenda.core.merge.merge import MergeReport as MergeReport
    from addenda.core.merge.merge import merge as merge
    from addenda.core.merge.merge import unmerge as unmerge
    from addenda.core.method.catalogue import Info as Info
    from addenda.core.method.catalogue import catalogue as catalogue
    from addenda.core.method.catalogue import register as register
    from addenda.core.method.contract import WeightMethod as WeightMethod
    from addenda.core.method.hidden import HiddenMethod as HiddenMethod
    from addenda.exporting.doors import passage as passage
    from addenda.exporting.export import export as export
    from addenda.exporting.extract import ExtractReport as ExtractReport
    from addenda.exporting.extract import extract as extract
    from addenda.exporting.import_adapter import import_adapter as import_adapter
    from addenda.exporting.inspect import inspect as inspect
    from addenda.exporting.merged import DiskMergeReport as DiskMergeReport
    from addenda.exporting.merged import merge_on_disk as merge_on_disk
    from addenda.exporting.reduce import reduce as reduce
    from addenda.exporting.reduce_report import ReduceReport as ReduceReport
    from addenda.quantizing.bridges import adopt as adopt
    from addenda.quantizing.bridges import release as release
    from addenda.quantizing.quantize import dequantize as dequantize
    from addenda.quantizing.quantize import quantize as quantize
    from addenda.ranking.reranker import Reranker as Reranker
    from addenda.train.accelerate_states import register_for_checkpointing as register_for_checkpointing
    from addenda.train.callback import TrainerCallback as TrainerCallback
    from addenda.train.evaluate import evaluate as evaluate
    from addenda.train.generate import generate as generate
    from addenda.train.lottery import LotteryResult as LotteryResult
    from addenda.train.lottery import lottery as lottery
    from addenda.train.tune import tune as tune
    from addenda.transferring.bundle import read_bundle as read_bundle
    from addenda.transferring.discriminator import fit_discriminator as fit_discriminator
    from addenda.transferring.distil import distil as distil
    from addenda.transferring.label import label as label
    from addenda.transferring.make_bundle import make_bundle as make_bundle
    from addenda.transferring.synthesise import synthesise as synthesise
    from addenda.transferring.transfer import transfer as transfer

__version__ = "0.1.0"

_NAMES = {
    "combining.bank": "AdapterBank",
    "combining.combine": "combine",
    "combining.report": "CombineReport",
    "combining.retention": "retention",
    "comparing.choose": "choose",
    "comparing.run": "compare",
    "compose.composition": "composed",
    "compose.split": "BatchSplit Parallel Split",
    "compose.stack": "Average Composition Fuse Stack",
    "compressing.factorise": "Factorised factorise",
    "compressing.macs": "macs",
    "compressing.recalibrate": "recalibrate",
    "compressing.run": "compress",
    "compressing.settings": "CompressionSettings",
    "compressing.trp": "TrainedRankPruning",
    "core.adapter.attach": "attach detach",
    "core.adapter.blocks": "disabled per_example",
    "core.adapter.grow": "grow shrink",
    "core.adapter.handle": "Adapter adapters",
    "core.adapter.load": "load",
    "core.adapter.switch": "status switch",
    "core.ask.perturb": "perturbation_curve",
    "core.ask.plan": "Plan plan",
    "core.base.errors": "AddendaError",
    "core.file.save": "save",
    "core.forward.lean": "lean unlean",
    "core.merge.merge": "MergeReport merge unmerge",
    "core.method.catalogue": "Info catalogue register",
    "core.method.contract": "WeightMethod",
    "core.method.hidden": "HiddenMethod",
    "exporting.doors": "passage",
    "exporting.export": "export",
    "exporting.extract": "ExtractReport extract",
    "exporting.import_adapter": "import_adapter",
    "exporting.inspect": "inspect",
    "exporting.merged": "DiskMergeReport merge_on_disk",
    "exporting.reduce": "reduce",
    "exporting.reduce_report": "ReduceReport",
    "quantizing.bridges": "adopt release",
    "quantizing.quantize": "dequantize quantize",
    "ranking.reranker": "Reranker",
    "train.accelerate_states": "register_for_checkpointing",
    "train.callback": "TrainerCallback",
    "train.evaluate": "evaluate",
    "train.generate": "generate",
    "train.lottery": "LotteryResult lottery",
    "train.tune": "tune",
    "transferring.bundle": "read_bundle",
    "transferring.discriminator": "fit_discriminator",
    "transferring.distil": "distil",
    "transferring.label": "label",
    "transferring.make_bundle": "make_bundle",
    "transferring.synthesise": "synthesise",
    "transferring.transfer": "transfer",
}
announce()
_PACKAGES = ("methods", "optim")
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """The public names, and the methods by class name (addenda.SVFT)."""
    if name.startswith("__"):
        raise AttributeError(f"addenda has no {name!r}")
    if name in _PACKAGES:
        value = import_module(f"addenda.{name}")
    elif name in _WHERE:
        value = getattr(import_module(f"addenda.{_WHERE[name]}"), name)
    else:
        methods = import_module("addenda.methods")
        if not hasattr(methods, name):
            raise AttributeError(f"addenda has no {name!r}")
        value = getattr(methods, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    methods = import_module("addenda.methods")
    return sorted({*_WHERE, *_PACKAGES, "__version__", *getattr(methods, "__all__", ())})
