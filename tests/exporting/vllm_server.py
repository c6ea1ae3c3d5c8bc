"""What vLLM makes of adapters: a script for a Python of its own, where vLLM is installed (`vllm_environment.sh`).

    python vllm_server.py job.json        # the answers are written to the job's "out"

A job: {"model": folder, "ids": [[token ids], ...], "adapters": {name: folder}, "rank": max_lora_rank, "out": file}, and
where wanted "pooling": true (a classifier's logits), "top": how many log-probabilities a token (all by default),
"options": of vllm.LLM, "buffers": a safetensors file. The answers have by name, "base" first, "values", by prompt and
token; or "error", where vLLM refused the adapter. With "buffers" nothing is asked: the layers' own LoRA tensors are
written out, as `name/module/attribute/index`. Nothing of addenda is imported.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors are raised here, not in another process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Engine:
    """One vLLM, and what it answers with an adapter or none."""

    def __init__(self, job: dict[str, Any]):
        from vllm import LLM  # type: ignore[import-not-found]

        self.job, self.pooling = job, bool(job.get("pooling"))
        kind = (
            {"runner": "pooling", "pooler_config": {"use_activation": False}} if self.pooling else {"max_logprobs": -1}
        )
        self.llm = LLM(
            model=job["model"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64,
            max_num_seqs=4, enable_lora=True, max_loras=1, max_cpu_loras=1, max_lora_rank=job["rank"],
            enable_prefix_caching=False, **kind, **job.get("options", {}),
        )  # fmt: skip

    def ask(self, adapter: Any = None) -> list:
        """Return by prompt the log-probabilities of every token but the first, by token id; or a classifier's logits.

        One prompt at a time: with more, vLLM 0.32's LoRA of the head has an index a prompt for logits of every token.
        """
        from vllm import SamplingParams  # type: ignore[import-not-found]

        prompts = [{"prompt_token_ids": ids} for ids in self.job["ids"]]
        if self.pooling:
            return [o.outputs.probs for o in self.llm.classify(prompts, lora_request=adapter, use_tqdm=False)]
        top = self.job.get("top", -1)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top, detokenize=False)
        outputs = [self.llm.generate([p], params, lora_request=adapter, use_tqdm=False)[0] for p in prompts]
        return [[{str(k): v.logprob for k, v in at.items()} for at in o.prompt_logprobs[1:]] for o in outputs]

    def with_adapter(self, number: int, name: str, folder: str, buffers: dict[str, Any]) -> dict[str, Any]:
        """Return what an adapter answers, or vLLM's refusal."""
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        request = LoRARequest(name, number, folder)
        try:
            self.llm.llm_engine.add_lora(request)
            if "buffers" not in self.job:
                return {"values": self.ask(request)}
            for found in self.llm.apply_model(stacked):
                buffers |= {f"{name}/{key}": t for key, t in found.items()}
            return {"values": []}
        except Exception as error:  # whatever vLLM raises is its answer
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.llm.llm_engine.remove_lora(number)


def stacked(model: Any) -> dict[str, Any]:
    """Return the tensors of the adapter in the first slot, by module, attribute and index."""
    found = {}
    for path, module in model.lora_manager.modules.items():
        for name in ("lora_a_stacked", "lora_b_stacked", *(f"w{i}_lora_{k}_stacked" for i in (13, 2) for k in "ab")):
            tensors = getattr(module, name, ())
            if isinstance(tensors, tuple) and not (name.startswith("lora_") and hasattr(module, "w2_lora_a_stacked")):
                found |= {f"{path}/{name}/{i}": t[0].clone() for i, t in enumerate(tensors)}
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import torch
    import transformers
    import vllm  # type: ignore[import-not-found]
    from safetensors.torch import save_file

    engine, buffers = Engine(job), {}
    answers = {"base": {"values": [] if "buffers" in job else engine.ask()}}
    for number, (name, folder) in enumerate(job["adapters"].items(), start=1):
        answers[name] = engine.with_adapter(number, name, folder, buffers)
    if buffers:
        save_file(buffers, job["buffers"])
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    Path(job["out"]).write_text(json.dumps({"versions": versions, "answers": answers}))


if __name__ == "__main__":
    main()
