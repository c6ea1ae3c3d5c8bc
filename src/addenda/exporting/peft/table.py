"""Which conversion reads which type of PEFT, which writes which method, and why some have none.

A method is written by the first conversion that takes it. LORA stands last, as it takes everything that is a product of
thin matrices and that no other type says in its own form.
"""

from addenda.core.method.contract import Method
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.site import Site
from addenda.exporting.peft import layout
from addenda.exporting.peft.adalora import AdaLoraConversion
from addenda.exporting.peft.boft import BoftConversion
from addenda.exporting.peft.c3a import C3aConversion
from addenda.exporting.peft.conversion import Conversion
from addenda.exporting.peft.copies import NormConversion
from addenda.exporting.peft.delora import DeloraConversion
from addenda.exporting.peft.hra import HraConversion
from addenda.exporting.peft.ia3 import Ia3Conversion
from addenda.exporting.peft.loha import LohaConversion
from addenda.exporting.peft.lokr import LokrConversion
from addenda.exporting.peft.lora import LoraConversion
from addenda.exporting.peft.miss import MissConversion
from addenda.exporting.peft.oft import OftConversion
from addenda.exporting.peft.road import RoadConversion
from addenda.exporting.peft.shira import ShiraConversion
from addenda.exporting.peft.tokens import TokensConversion
from addenda.exporting.peft.vb_lora import VbLoraConversion
from addenda.exporting.peft.vera import VeraConversion
from addenda.exporting.routes import Route

CONVERSIONS: dict[str, Conversion] = {
    c.type: c
    for c in (
        NormConversion(),
        TokensConversion(),
        AdaLoraConversion(),
        DeloraConversion(),
        VeraConversion(),
        ShiraConversion(),
        LohaConversion(),
        LokrConversion(),
        Ia3Conversion(),
        MissConversion(),
        OftConversion(),
        BoftConversion(),
        HraConversion(),
        C3aConversion(),
        VbLoraConversion(),
        RoadConversion(),
        LoraConversion(),
    )
}

_PROMPTS = (
    "it lengthens the sequence, which a model here is not called with. Train addenda's prompt or prefix method instead"
)
_OUT = (
    "Merge it in PEFT (merge_and_unload, then save_pretrained) and take the change out of the two checkpoints: "
    "addenda extract --base … --tuned … --to lora"
)
_DENSE = f"addenda has no such method. {_OUT}"
_DEPENDS = (
    "what it adds depends on the input in a way that no change of a weight does, and no method of addenda. Keep it in "
    "PEFT, or train one of addenda's hidden methods (addenda methods)"
)
REFUSED = {
    **dict.fromkeys(("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"), _PROMPTS),
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE"), _PROMPTS),
    **dict.fromkeys(("LILY", "POLY", "XLORA", "SHADOW"), _DEPENDS),
    "RANDLORA": f"it pairs its bases in an order of its own and draws them by a generator of its own. {_OUT}",
    "FOURIERFT": f"the positions of its frequencies, which torch draws anew from a seed, are in no tensor. {_OUT}",
    "PSOFT": f"it turns singular vectors of W that are in no tensor, whose signs differ by machine. {_OUT}",
}


def why_not(kind: str) -> str:
    """Return why a type of PEFT cannot be read, and what to do."""
    return REFUSED.get(kind, _DENSE)


def conversion_for(method: Method, site: Site, config: object = None) -> tuple[Conversion | None, Route]:
    """Return the conversion that writes a method at a site, and how; None where it goes as a LoRA with an error.

    config: of a transformers model, some of which PEFT gives no LORA at some layers.
    """
    barred = layout.barred(layout.wrapped(site), config)
    for conversion in CONVERSIONS.values():
        route = conversion.route(method, site)
        if route is not None and barred and route.kind == "exact" and conversion.type in layout.BARRED:
            return None, Route("refused", barred)
        if route is not None:
            return (conversion if route.kind == "exact" else None), route
    if isinstance(method, HiddenMethod):
        return None, Route(
            "refused", "it changes activations, and no type of PEFT does that as it does; keep it attached"
        )
    if reason := layout.obstacle(site) or barred:
        return None, Route("refused", reason)
    return None, Route("approximate", "LORA of the rank or energy asked for")
