"""What a trained mixture of sparse adapters comes to: the plain adapter of its form, of the plain one's size."""

import dataclasses

import torch

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.method.contract import Method, Params
from addenda.core.method.mixture import Parted
from addenda.core.modules.borrow import training_mode
from addenda.exporting.plain import beside
from addenda.methods.adaptformer import AdaptFormer
from addenda.methods.houlsby import Houlsby
from addenda.methods.lora import LoRA
from addenda.methods.mosa import MoSA, MoSAHoulsby, MoSAPfeiffer
from addenda.methods.mosl import MoSL
from addenda.methods.pfeiffer import Pfeiffer

FORMS: dict[type[Method], type[Method]] = {
    MoSA: AdaptFormer, MoSAPfeiffer: Pfeiffer, MoSAHoulsby: Houlsby, MoSL: LoRA,
}  # fmt: skip


@torch.no_grad()
def export(adapter: Adapter, name: str = "plain") -> Adapter:
    """Attach the plain adapter that acts outside training beside the adapter as `name`: idle, to be saved.

    It computes the same, bit for bit; heads trained with the mixture come along. Raises AddendaError when the adapter
    is no mixture, when other methods have sites in it, when the name is taken, and when a change is merged.
    """
    forms: dict[str, tuple[Method, Params]] = {}
    with training_mode(adapter.model, False):
        for path, t in adapter.sites():
            if isinstance(m := t.method, Parted) and type(m) in FORMS:
                p = t.tensors()
                own = {k: m.acting(k, p) if k in m.thin else w for k, w in t.stored().items()}
                cls = FORMS[type(m)]
                same = {f.name: getattr(m, f.name) for f in dataclasses.fields(cls) if hasattr(m, f.name)}
                forms[path] = cls(**same), own
    if not forms:
        raise AddendaError(f"{adapter.name!r} ({adapter.kinds}) has no site of a mixture; nothing was exported.")
    return beside(adapter, forms, name, "mixture")
