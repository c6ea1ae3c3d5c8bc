"""The tensors of an adapter's folder, sorted as vLLM's loader sorts them (`lora/utils.py`, `lora/lora_model.py`)."""

import re
from dataclasses import dataclass, field

from torch import Tensor

from addenda.exporting.peft.folder import PREFIX, PeftFolder
from addenda.exporting.vllm.architectures import CLASSIFIERS, EMBEDDING, HEAD

_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)\.weight")
_EMBEDDED = re.compile(r"(.+)\.(lora_embedding_A|lora_embedding_B)")
_BASE = (f".{EMBEDDING}.base_layer.weight", f"{HEAD}.base_layer.weight")
_WRONG = (
    (
        r"\.lora_magnitude_vector(\.|$)",
        "is a magnitude of DoRA, which vLLM does not compute; export it as 'merged', or as a LoRA of a rank",
    ),
    (
        r"\.lora_(A|B)\.bias$",
        "is a bias, which vLLM's LoRA has not; train with lora_bias=False, or export it as 'merged'",
    ),
    (
        r"\.lora_(embedding_)?(A|B)\.[^.]+(\.weight)?$",
        "has the name of an adapter in it, which PEFT's save_pretrained leaves out; save it with that",
    ),
    (
        r"trainable_tokens_delta$",
        "holds rows of tokens, which vLLM does not put in; merge them into the base (export 'merged')",
    ),
)
_OTHER = "is no tensor of a LoRA, and vLLM refuses the whole adapter for it; export it as 'merged'"


@dataclass
class Contents:
    """What a folder holds. pairs: by module path, "A" (r × n) and "B" (m × r) as far as they are there."""

    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    embedded: set[str] = field(default_factory=set)  # those of `pairs` that have an embedding's keys
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by name: "weight", "bias"
    bases: dict[str, Tensor] = field(default_factory=dict)  # copies of the base, which vLLM passes over
    problems: list[str] = field(default_factory=list)


def contents_of(folder: PeftFolder) -> Contents:
    """Return a folder's tensors by what they are, and what is none of these, with what to do about it."""
    found = Contents()
    for key, tensor in folder.tensors.items():
        name = key.removeprefix(PREFIX)
        parts = name.split(".")
        if match := _FACTOR.fullmatch(name):
            found.pairs.setdefault(match[1], {})[match[2][-1]] = tensor
        elif match := _EMBEDDED.fullmatch(name):
            found.pairs.setdefault(match[1], {})[match[2][-1]] = tensor
            found.embedded.add(match[1])
        elif f".{name}".endswith(_BASE):
            found.bases[name.removesuffix(".base_layer.weight")] = tensor
        elif len(parts) > 1 and parts[-2] in CLASSIFIERS and parts[-1] in ("weight", "bias"):
            found.heads.setdefault(parts[-2], {})[parts[-1]] = tensor
        else:
            reason = next((why for pattern, why in _WRONG if re.search(pattern, name)), _OTHER)
            found.problems.append(f"{name} {reason}")
    return found
