"""Which conversion reads which type of PEFT, and why some types have none."""

from addenda.exporting.peft.conversion import Conversion
from addenda.exporting.peft.lora import LoraConversion

CONVERSIONS: dict[str, Conversion] = {c.type: c for c in (LoraConversion(),)}

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
