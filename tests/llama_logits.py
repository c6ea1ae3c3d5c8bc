"""Logits of llama.cpp, run by a Python that has it: PYTHON llama_logits.py BASE OUT TOKENS [ADAPTER ...].

TOKENS: numbers with commas. OUT: a .npy of float32, (1 + adapters) × tokens × vocabulary: of the base alone, then with
each adapter. Without arguments it prints which engine it has and its version: "ik 0.1.5" (ik-llama-cpp-python) or
"mainline 0.3.36" (llama-cpp-python). Every adapter has a context of its own.

What is switched: the cache of keys and values is in float32 (with ik that of values in float16, as it has it so), and
nothing is fused: ik leaves out LoRA in its fused product of gate and up, and refuses it with flash attention. FUSED=1
in the environment leaves that product as it is by default.
"""

import ctypes
import os
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

F32 = 0  # of ggml_type


class Engine:
    """One of both libraries behind the same few calls of llama.cpp's C interface."""

    def __init__(self):
        self.ik = find_spec("ik_llama_cpp") is not None
        self.C: Any = import_module("ik_llama_cpp._ctypes_api" if self.ik else "llama_cpp")
        if self.ik:  # it declares no call of LoRA
            lib = self.C._lib
            lib.llama_lora_adapter_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
            lib.llama_lora_adapter_init.restype = ctypes.c_void_p
            lib.llama_lora_adapter_set.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float]
        self.C.llama_backend_init()

    @property
    def name(self) -> str:
        return f"ik {version('ik-llama-cpp-python')}" if self.ik else f"mainline {self.C.__version__}"

    def model(self, path: str) -> Any:
        params = self.C.llama_model_default_params()
        params.n_gpu_layers = 0
        model = self.C.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise SystemExit(f"{path} was not taken")
        return model

    def adapter(self, model: Any, path: str) -> Any:
        init = self.C._lib.llama_lora_adapter_init if self.ik else self.C.llama_adapter_lora_init
        adapter = init(model, path.encode())
        if not adapter:
            raise SystemExit(f"{path} was not taken")
        return adapter

    def context(self, model: Any, length: int) -> Any:
        params = self.C.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(64, length)
        params.n_threads = params.n_threads_batch = 1
        params.type_k = F32
        if self.ik:
            params.flash_attn = False
            if not os.environ.get("FUSED"):
                params.fused_up_gate = False
        else:
            params.type_v, params.flash_attn_type = F32, 0
        return self.C.llama_init_from_model(model, params)

    def use(self, context: Any, adapter: Any) -> None:
        if self.ik:
            failed = self.C._lib.llama_lora_adapter_set(context, adapter, 1.0)
        else:
            one = (self.C.llama_adapter_lora_p_ctypes * 1)(adapter)
            failed = self.C.llama_set_adapters_lora(context, one, 1, (ctypes.c_float * 1)(1.0))
        if failed:
            raise SystemExit("the adapter was not set")

    def logits(self, model: Any, context: Any, tokens: list[int]) -> np.ndarray:
        batch = self.C.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if self.C.llama_decode(context, batch):
            raise SystemExit("the tokens were not decoded")
        shape = (self.C.llama_vocab_n_tokens(self.C.llama_model_get_vocab(model)),)
        rows = [np.ctypeslib.as_array(self.C.llama_get_logits_ith(context, i), shape) for i in range(len(tokens))]
        found = np.stack(rows)
        self.C.llama_batch_free(batch)
        return found


def run(base: str, tokens: list[int], adapters: list[str]) -> np.ndarray:
    """The logits of the base, then with each adapter."""
    engine = Engine()
    model = engine.model(base)
    found = []
    for adapter in [None, *(engine.adapter(model, path) for path in adapters)]:
        context = engine.context(model, len(tokens))
        if adapter is not None:
            engine.use(context, adapter)
        found.append(engine.logits(model, context, tokens))
        engine.C.llama_free(context)
    return np.stack(found)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(Engine().name)
    else:
        np.save(sys.argv[2], run(sys.argv[1], [int(n) for n in sys.argv[3].split(",")], sys.argv[4:]))
