"""Which conversion reads which type of PEFT, which writes which method, and why some have none.

A method is written by the first conversion that takes it. LORA stands last, as it takes everything that is a product of
thin matrices and that no other type says in its own form.
"""

from addenda.core.method.contract import Method
from addenda.core.method.hidden import HiddenMethod
from addenda.core.site.site import Site
from addenda.exporting.peft import layout
from addenda.exporting.peft.adalora import AdaLoraConversion
from addenda.exporting.peft.conversion import Conversion
from addenda.exporting.peft.copies import NormConversion
from addenda.exporting.peft.delora import DeloraConversion
from addenda.exporting.peft.lora import LoraConversion
from addenda.exporting.peft.shira import ShiraConversion
from addenda.exporting.peft.tokens import TokensConversion
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
        LoraConversion(),
    )
}

_PROMPTS = (
    "it lengthens the sequence, which a model here is not called with. Train addenda's prompt or prefix method instead"
)
_DENSE = (
    "addenda has no such method. Merge it in PEFT (merge_and_unload, then save_pretrained) and take the change out of "
    "the two checkpoints: addenda extract --base … --tuned … --to lora"
)
REFUSED = {
    **dict.fromkeys(("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"), _PROMPTS),
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE"), _PROMPTS),
    "RANDLORA": "it draws its bases in an order and by a generator of its own. " + _DENSE.partition(". ")[2],
}


def why_not(kind: str) -> str:
    """Return why a type of PEFT cannot be read, and what to do."""
    return REFUSED.get(kind, _DENSE)


def conversion_for(method: Method, site: Site) -> tuple[Conversion | None, Route]:
    """Return the conversion that writes a method at a site, and how; None where it goes as a LoRA with an error."""
    for conversion in CONVERSIONS.values():
        route = conversion.route(method, site)
        if route is not None:
            return (conversion if route.kind == "exact" else None), route
    if isinstance(method, HiddenMethod):
        return None, Route(
            "refused", "it changes activations, and no type of PEFT does that as we do; keep it attached"
        )
    if reason := layout.obstacle(site):
        return None, Route("refused", reason)
    return None, Route("approximate", "LORA of the rank or energy asked for")
