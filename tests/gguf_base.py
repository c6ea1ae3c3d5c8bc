"""Transformers models as F32 files of llama.cpp, and their logits there: what adapters in GGUF are checked against.

The rules are those of llama.cpp's `conversion/`: names by gguf's own table, q and k of LLaMA permuted, Conv1D turned,
1 added to Gemma's norms. There is no tokenizer in the files, so tokens go in as numbers.

ADDENDA_LLAMA_PYTHON names the Pythons that have llama.cpp, one or several as in PATH. They are made by

    python3 -m venv IK && IK/bin/pip install ik-llama-cpp-python==0.1.5
    python3 -m venv MAINLINE && CMAKE_ARGS=-DLLAVA_BUILD=OFF MAINLINE/bin/pip install llama-cpp-python==0.3.36

The second compiles llama.cpp, which takes some minutes. ADDENDA_LLAMA_PYTHON=IK/bin/python:MAINLINE/bin/python then
runs the tests.
"""

import functools
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from torch import nn

NAMES = {"mistral": "llama", "gemma3_text": "gemma3"}  # model types that are called otherwise in GGUF
PERMUTED = ("llama", "mistral", "smollm3", "granite")
GEMMA = ("gemma", "gemma2", "gemma3_text")
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
_TIED = {"head_dim": 16, "tie_word_embeddings": True}
KINDS: dict[str, dict] = {  # model type -> what its config wants beside
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": _TIED,
    "gemma2": _TIED | {"query_pre_attn_scalar": 16},
    "gemma3_text": _TIED | {"query_pre_attn_scalar": 16},
    "phi3": {"original_max_position_embeddings": 128, "sliding_window": None},
    "gpt2": {"intermediate_size": 256},
    "smollm3": {},
    "olmo2": {},
    "granite": {
        "attention_multiplier": 0.25, "embedding_multiplier": 1.5, "residual_multiplier": 0.8, "logits_scaling": 2.0,
    },
    "starcoder2": {"sliding_window": None},
    "stablelm": {},
}  # fmt: skip
TOKENS = [7 * i % 60 + 1 for i in range(20)]


def make(kind: str, **options) -> nn.Module:
    """A small model of this type, every parameter moved at random, biases and norms too."""
    given = SIZES | {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2} | KINDS[kind] | options
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **given)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.dim() == 1 else 0.1))
    return model


def logits(model: nn.Module, tokens: Sequence[int] = TOKENS) -> np.ndarray:
    """The model's logits, tokens × vocabulary."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].float().numpy()


def pythons() -> list[str]:
    """The Pythons with llama.cpp that ADDENDA_LLAMA_PYTHON names."""
    return [p for p in os.environ.get("ADDENDA_LLAMA_PYTHON", "").split(os.pathsep) if p]


@functools.cache
def engine_and_version(python: str) -> str:
    """Which llama.cpp a Python has: "ik 0.1.5"."""
    return _script(python).strip()


def engine(python: str) -> str:
    """Which llama.cpp a Python has: "ik" or "mainline"."""
    return engine_and_version(python).split()[0]


def run(python: str, base: Path, adapters: Sequence[Path], tokens: Sequence[int] = TOKENS, **environment) -> np.ndarray:
    """llama.cpp's logits of the base, then with each adapter, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/logits.npy"
        _script(python, str(base), out, ",".join(map(str, tokens)), *map(str, adapters), **environment)
        return np.load(out)


def _script(python: str, *arguments: str, **environment: str) -> str:
    command = [python, str(Path(__file__).with_name("llama_logits.py")), *arguments]
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FUSED")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, timeout=300)
    if done.returncode:
        raise RuntimeError(f"llama.cpp stopped with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, of the largest of the other."""
    return float(np.abs(one - other).max() / np.abs(other).max())


def far(one: np.ndarray, other: np.ndarray) -> float:
    """‖one − other‖ / ‖other‖."""
    return float(np.linalg.norm((one - other).astype(np.float64)) / np.linalg.norm(other.astype(np.float64)))


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of each head in pairs, as llama.cpp turns them: its `LlamaModel.permute`."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_base(model: nn.Module, path: Path) -> Path:
    """Write the model's weights in float32 and what of its configuration llama.cpp reads."""
    c = model.config
    kind = c.model_type
    name = NAMES.get(kind, kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], c.num_hidden_layers)
    w = gguf.GGUFWriter(path, name)
    w.add_type(gguf.GGUFType.MODEL)
    for key, value in _parameters(c).items():
        add = w.add_float32 if isinstance(value, float) else w.add_bool if isinstance(value, bool) else w.add_uint32
        add(f"{name}.{key}", value)
    w.add_file_type(gguf.LlamaFileType.ALL_F32)
    w.add_tokenizer_model("none")
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stem, _, leaf = key.rpartition(".")
        t = tensor.detach().float()
        if kind in PERMUTED and stem.endswith("q_proj"):
            t = permute(t, c.num_attention_heads)
        if kind in PERMUTED and stem.endswith("k_proj"):
            t = permute(t, c.num_key_value_heads)
        if kind == "gpt2" and leaf == "weight" and stem.endswith(("c_attn", "c_proj", "c_fc")):
            t = t.T
        if kind in GEMMA and stem.endswith("norm"):
            t = t + 1
        w.add_tensor(f"{names.get_name(stem)}.{leaf}", np.ascontiguousarray(t.numpy()))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _parameters(c) -> dict[str, int | float]:
    """What llama.cpp reads of a configuration, by key without the architecture's name."""
    found: dict[str, int | float] = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
    }
    if c.model_type == "gpt2":
        return found | {"attention.layer_norm_epsilon": float(c.layer_norm_epsilon)}
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    found |= {
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if hasattr(c, "rms_norm_eps"):
        found["attention.layer_norm_rms_epsilon"] = float(c.rms_norm_eps)
    else:
        found["attention.layer_norm_epsilon"] = float(getattr(c, "norm_epsilon", None) or c.layer_norm_eps)
    if c.model_type in ("gemma2", "gemma3_text"):
        found["attention.sliding_window"] = c.sliding_window
    if c.model_type == "gemma2":
        found["attn_logit_softcapping"] = float(c.attn_logit_softcapping)
        found["final_logit_softcapping"] = float(c.final_logit_softcapping)
    if c.model_type == "gemma3_text":
        found["rope.freq_base_swa"] = float(c.rope_parameters["sliding_attention"]["rope_theta"])
    if c.model_type == "granite":
        found |= {"attention.scale": float(c.attention_multiplier), "embedding_scale": float(c.embedding_multiplier)}
        found |= {"residual_scale": float(c.residual_multiplier), "logit_scale": float(c.logits_scaling)}
    if c.model_type == "phi3":
        found |= {"rope.scaling.original_context_length": c.original_max_position_embeddings}
        found |= {"attention.sliding_window": c.sliding_window or 0}
    if c.model_type == "stablelm":
        found["use_parallel_residual"] = bool(c.use_parallel_residual)
    return found
