"""Which models' adapters go into GGUF: the names of their weights there, and whose rows stand in another order.

Only what was run is here: of each architecture a model with an adapter at every name was compared with the logits of
llama.cpp (tests/exporting/gguf). Others are refused, for a wrong name or order can load and answer with something else.

In LLaMA and its kin llama.cpp rotates the numbers 2i and 2i + 1 of a head of q and k together, transformers i and
i + half. Its files hold the rows of each head in pairs (`LlamaModel.permute` of its converter), and so must B's be.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from addenda.core.base.errors import AddendaError

_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_SELF = {f"self_attn.{ours}": theirs for ours, theirs in _ATTENTION.items()}
_GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp, and what the modules of a transformers model are called there."""

    name: str  # general.architecture
    inside: Mapping[str, str] = field(default_factory=lambda: {**_SELF, **_GATED})  # of a block
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    permuted: bool = False  # rows of q and k
    one_weight: bool = False  # it has no output head of its own, whatever a config says

    def tensor(self, path: str) -> str | None:
        """Return the name of a module's weight in GGUF, "blk.0.attn_q.weight", or None where there is none.

        The modules of a bare body, without the head's model around it, are called as inside of that.
        """
        body = self.blocks.partition(".")[0]
        whole = {self.embedding: "token_embd.weight", "lm_head": "output.weight"}
        for full in (path, f"{body}.{path}"):
            if full in whole:
                return whole[full]
            found = re.fullmatch(rf"{re.escape(self.blocks)}\.(0|[1-9]\d*)\.(.+)", full)
            if found and found[2] in self.inside:
                return f"blk.{found[1]}.{self.inside[found[2]]}.weight"
        return None

    def path(self, tensor: str) -> str | None:
        """Return the path of the module whose weight has this name in GGUF, or None."""
        whole = {"token_embd.weight": self.embedding, "output.weight": "lm_head"}
        if tensor in whole:
            return whole[tensor]
        found = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.weight", tensor, re.ASCII)
        inside = {theirs: ours for ours, theirs in self.inside.items()}
        return f"{self.blocks}.{found[1]}.{inside[found[2]]}" if found and found[2] in inside else None

    def tied(self, tensor: str, config: Any) -> bool:
        """Return whether a tensor is embedding or output head of a model in which both are one weight."""
        one = self.one_weight or bool(getattr(config, "tie_word_embeddings", False))
        return one and tensor in ("token_embd.weight", "output.weight")

    def order(self, tensor: str, rows: int, config: Any) -> Tensor | None:
        """Return which of the model's rows stand where in GGUF (rows), or None where they stand as in the model."""
        if not self.permuted or not tensor.endswith((".attn_q.weight", ".attn_k.weight")):
            return None
        queries = getattr(config, "num_attention_heads", None)
        heads = queries if ".attn_q." in tensor else getattr(config, "num_key_value_heads", None) or queries
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise AddendaError(
                f"{tensor}: {rows} rows are not {heads} heads of an even size, as the model's config has it, so the "
                "order of rows in GGUF cannot be told."
            )
        return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


_LLAMA = Architecture("llama", permuted=True)
ARCHITECTURES: dict[str, Architecture] = {  # by model_type of the transformers config
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "smollm3": Architecture("smollm3", permuted=True),
    "granite": Architecture("granite", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", one_weight=True),
    "gemma2": Architecture("gemma2", one_weight=True),
    "gemma3_text": Architecture("gemma3", one_weight=True),
    "olmo2": Architecture("olmo2"),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2", {**_SELF, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
    "phi3": Architecture(
        "phi3",
        {
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        blocks="transformer.h",
        embedding="transformer.wte",
    ),
}


def architecture_of(config: Any) -> Architecture:
    """Return the architecture of a transformers config. Raises AddendaError for one that was not tried."""
    kind = getattr(config, "model_type", None)
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    if kind is None:
        raise AddendaError(
            "GGUF names the architecture of the base, and this model has no transformers config that says it."
        )
    raise AddendaError(
        f"{str(kind)[:60]!r} models were not tried with llama.cpp here, and with a wrong name or order of rows a file "
        f"can load and answer wrongly. Tried: {', '.join(ARCHITECTURES)}. Export the adapter as 'merged', and convert "
        "that folder with llama.cpp's convert_hf_to_gguf.py."
    )


def known(name: str) -> list[str]:
    """Return the model types whose architecture is called so in GGUF."""
    return [kind for kind, a in ARCHITECTURES.items() if a.name == name]


TIED = (
    "embedding and output head of this model are one weight, which llama.cpp keeps as one tensor and multiplies by in "
    "two ways: a LoRA of it stops the program or is left out"
)
