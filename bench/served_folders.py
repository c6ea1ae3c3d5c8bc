"""Adapter folders that are wrong for vLLM, each in one way, made from a good one; and what vLLM 0.32 does with each."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
AT = "base_model.model.model."
Q, NORM, EMBED = f"{AT}layers.0.self_attn.q_proj.", f"{AT}norm.weight", f"{AT}embed_tokens."
WIDTH, VOCABULARY, RANK, MOST = 64, 76, 4, 8  # of the model that `bench.served` makes; max_lora_rank of its engine


@dataclass(frozen=True)
class Wrong:
    """One way to be wrong. served: "refused", "base" (the base answers), "otherwise" (neither), "alike" (no fault).

    says: a piece of what `exporting.vllm.check` says of it, "" where it finds nothing.
    """

    name: str
    served: str
    says: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Tensors], Tensors] = dict


def _put(key: str, *shape: int, value: float = 0.1) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: torch.full(shape, value)}


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k.replace(old, new): t for k, t in tensors.items()}


def _without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t for k, t in tensors.items() if k != key}


def _wider(tensors: Tensors) -> Tensors:
    return {k: torch.cat([t] * 4, 0 if "lora_A" in k else 1) for k, t in tensors.items()}


def _both(a: tuple[int, int], b: tuple[int, int]) -> Callable[[Tensors], Tensors]:
    return lambda t: _put(f"{Q}lora_B.weight", *b)(_put(f"{Q}lora_A.weight", *a)(t))


def _embedded(rows: int) -> Callable[[Tensors], Tensors]:
    return lambda t: _put(f"{EMBED}lora_embedding_B", WIDTH, RANK)(_put(f"{EMBED}lora_embedding_A", RANK, rows)(t))


FOLDERS = (
    Wrong("good", "alike", ""),
    Wrong("a harmless start", "alike", "", {"init_lora_weights": "gaussian"}),
    Wrong("target_parameters of a matrix", "alike", "", {"target_parameters": ["self_attn.q_proj.weight"]}),
    Wrong("rank above the maximum", "refused", "its rank is 16, above", {"r": 16, "lora_alpha": 32}, _wider),
    Wrong("a pattern's rank above it", "refused", "its rank is 16, above", {"rank_pattern": {"none_such": 16}}),
    Wrong("DoRA", "refused", "use_dora", {"use_dora": True}, _put(f"{Q}lora_magnitude_vector", WIDTH)),
    Wrong("DoRA's magnitude alone", "refused", "magnitude of DoRA", {}, _put(f"{Q}lora_magnitude_vector", WIDTH)),
    Wrong("lora_bias", "refused", "lora_bias", {"lora_bias": True}, _put(f"{Q}lora_B.bias", WIDTH)),
    Wrong("a bias", "refused", "is a bias", {}, _put(f"{Q}lora_B.bias", WIDTH)),
    Wrong("biases of the base", "refused", "bias='all'", {"bias": "all"}),
    Wrong("PiSSA", "refused", "'pissa'", {"init_lora_weights": "pissa"}),
    Wrong("OLoRA", "refused", "'olora'", {"init_lora_weights": "olora"}),
    Wrong("CorDA", "refused", "'corda'", {"init_lora_weights": "corda"}),
    Wrong("LoftQ", "refused", "'loftq'", {"init_lora_weights": "loftq"}),
    Wrong("aLoRA", "refused", "aLoRA", {"alora_invocation_tokens": [1]}),
    Wrong("layer_replication", "refused", "repeated", {"layer_replication": [[0, 2], [0, 2]]}),
    Wrong("QA-LoRA", "refused", "QA-LoRA", {"use_qalora": True}),
    Wrong("a head", "refused", "'lm_head'", {"modules_to_save": ["lm_head"]},
          _put("base_model.model.lm_head.weight", VOCABULARY, WIDTH)),
    Wrong("a norm to save", "refused", "'norm'", {"modules_to_save": ["norm"]}, _put(NORM, WIDTH)),
    Wrong("a norm", "refused", "no tensor of a LoRA", {}, _put(NORM, WIDTH)),
    Wrong("a classifier's head", "refused", "no such classifier", {"modules_to_save": ["score"]},
          _put("base_model.model.score.weight", 3, WIDTH)),
    Wrong("fused names", "refused", "qkv_proj", {}, _renamed("q_proj", "qkv_proj")),
    Wrong("fused gates", "refused", "gate_up_proj", {}, _renamed("up_proj", "gate_up_proj")),
    Wrong("unknown names", "refused", "query", {}, _renamed("q_proj", "query")),
    Wrong("an adapter's name in keys", "refused", "name of an adapter", {}, _renamed(".weight", ".default.weight")),
    Wrong("tokens", "refused", "rows of tokens", {"trainable_token_indices": [3, 5]},
          _put(f"{EMBED}token_adapter.trainable_tokens_delta", 2, WIDTH)),
    Wrong("another method", "refused", "peft_type is LOHA", {"peft_type": "LOHA"},
          lambda t: {f"{Q}hada_w1_a": torch.ones(WIDTH, 4)}),
    Wrong("no rank", "refused", "has no r", {"r": None}),
    Wrong("rank 0", "refused", "at least 1", {"r": 0}),
    Wrong("no layer", "refused", "changes no layer", {},
          lambda t: {f"{EMBED}base_layer.weight": torch.ones(VOCABULARY, WIDTH)}),
    Wrong("B is missing", "refused", "has no lora_B", {"lora_alpha": 2 * RANK}, _without(f"{Q}lora_B.weight")),
    Wrong("B is missing at scale 1", "otherwise", "has no lora_B", {"lora_alpha": RANK}, _without(f"{Q}lora_B.weight")),
    Wrong("A is missing", "otherwise", "has no lora_A", {}, _without(f"{Q}lora_A.weight")),
    Wrong("A too wide", "refused", "lora_A is [4, 96]", {}, _put(f"{Q}lora_A.weight", RANK, 96)),
    Wrong("A too narrow", "otherwise", "lora_A is [4, 32]", {}, _put(f"{Q}lora_A.weight", RANK, 32)),
    Wrong("B too long", "refused", "lora_B is [96, 4]", {}, _put(f"{Q}lora_B.weight", 96, RANK)),
    Wrong("B too short", "otherwise", "lora_B is [32, 4]", {}, _put(f"{Q}lora_B.weight", 32, RANK)),
    Wrong("ranks that differ", "otherwise", "rank 4 (A) and 2 (B)", {}, _put(f"{Q}lora_B.weight", WIDTH, 2)),
    Wrong("another rank than the config's", "otherwise", "config says 4", {}, _both((2, WIDTH), (WIDTH, 2))),
    Wrong("a rank above the slots", "refused", "config says 4", {}, _both((16, WIDTH), (WIDTH, 16))),
    Wrong("rows of another vocabulary", "refused", "lora_A is [4, 80]", {}, _embedded(80)),
    Wrong("not finite", "otherwise", "not finite", {}, _put(f"{Q}lora_A.weight", RANK, WIDTH, value=torch.nan)),
    Wrong("a path one word short", "base", "is none that", {}, _renamed(AT, "base_model.model.")),
    Wrong("layers that are not there", "base", "is none that", {},
          lambda t: _renamed("layers.1", "layers.8")(_renamed("layers.0", "layers.7")(t))),
    Wrong("a layer that is not there", "otherwise", "is none that", {}, _renamed("layers.1", "layers.8")),
)  # fmt: skip
STRICTER = (  # what vLLM serves as it is meant, and `check` does not let pass
    Wrong("keys without PEFT's prefix", "alike", "does not begin with", {}, _renamed("base_model.model.", "")),
    Wrong("a head in the config alone", "alike", "no score.weight", {"modules_to_save": ["score"]}),
    Wrong("another type in the config", "alike", "peft_type is MISS", {"peft_type": "MISS"}),
)


def make(good: Path, wrong: Wrong, folder: Path) -> Path:
    """Write one of these folders, from a good one."""
    folder.mkdir(parents=True)
    config = json.loads((good / "adapter_config.json").read_text()) | wrong.config
    tensors = wrong.tensors(load_file(good / "adapter_model.safetensors"))
    kept = {k: v for k, v in config.items() if k != "r" or v is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder
