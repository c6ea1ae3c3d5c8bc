"""Predicted against measured memory of a training step, each method in a fresh process.

    python bench/memory.py [--models smollm2,llama94m] [--methods floor,lora:rank=16,…] [--lean] [--record FILE.json]

Memory is the highest resident memory of the second and third training step (forward with logits at every position,
backward, AdamW), minus that of the loaded model before attach; a step of one short example has run by then, so that the
kernels' code is counted with the model. "floor" is the frozen base's forward and the gradient of its embeddings.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

METHODS = "floor,lora:rank=16,shira,svft:pattern=banded;band=8,dora:rank=16,full"
MODELS = "smollm2,llama94m"
PARTS = ("adapter", "optimizer", "gradients", "activations", "temporaries")


def load(name: str):
    """A bfloat16 model: the embedded one, a random one of LLaMA's shape, or that of a folder."""
    import torch

    if name == "llama94m":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
        return LlamaForCausalLM(LlamaConfig(vocab_size=12000, tie_word_embeddings=True, **sizes)).bfloat16()
    from addenda.train.embedded import model_folder
    from addenda.train.load import load_model

    return load_model(model_folder(print) if name == "smollm2" else name, dtype="bfloat16", device="cpu").model


def measure(model_name: str, method: str, batch: int, length: int, lean: bool) -> dict:
    """One row, in this process."""
    import torch
    from torch import nn

    import addenda as ad
    from addenda.train.loss import score
    from addenda.train.machine import Peak, resident
    from addenda.train.trainer import adamw

    model = load(model_name).train()
    model.config.use_cache = False
    if lean:
        ad.lean(model)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    step = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def wants_gradient(module, args, output):
        output.requires_grad_(True)

    def run(rows: int, columns: int, optimizer=None) -> None:
        score(model, {k: v[:rows, :columns] for k, v in step.items()}, "causal").mean.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    model.requires_grad_(False)
    hooks = [m.register_forward_hook(wants_gradient) for m in model.modules() if isinstance(m, nn.Embedding)]
    run(1, 8)
    loaded, optimizer = resident(), None
    if method != "floor":
        for hook in hooks:
            hook.remove()
        optimizer = adamw(ad.attach(model, method), 1e-4)
    run(batch, length, optimizer)
    resident()
    with Peak() as peak:
        run(batch, length, optimizer)
        run(batch, length, optimizer)
    if method == "floor":
        for hook in hooks:
            hook.remove()
    else:
        ad.detach(model)
    planned = ad.plan(model, "lora" if method == "floor" else method, batch=batch, length=length).step
    predicted = planned.floor if method == "floor" else planned.above
    parts = {} if method == "floor" else {part: getattr(planned, part) for part in PARTS}
    flops = 1.0 if method == "floor" else planned.flop_ratio
    row = {"model": model_name, "method": method, "lean": lean, "predicted": predicted, "flop_ratio": flops}
    return row | {"measured": peak.bytes - loaded, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help=f"smollm2, llama94m or folders (default: {MODELS})")
    parser.add_argument("--methods", default=METHODS, help=f"';' for ',' in options (default: {METHODS})")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lean", action="store_true", help="lean MLPs and norms")
    parser.add_argument("--record", type=Path, help="write the rows and the machine here, as JSON")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one row, in this process
    given = parser.parse_args()
    methods = [m.replace(";", ",") for m in given.methods.split(",")]
    if given.here:
        print(json.dumps(measure(given.models, methods[0], given.batch, given.length, given.lean)))
        return
    rows = []
    print(f"{'model':10} {'method':28} {'predicted':>10} {'measured':>10} {'ratio':>6} {'FLOPs':>6}", flush=True)
    for name in given.models.split(","):
        for method in methods:
            command = [sys.executable, __file__, "--here", "--models", name, "--methods", method.replace(",", ";")]
            command += ["--batch", str(given.batch), "--length", str(given.length), *(["--lean"] if given.lean else [])]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(r := json.loads(made.splitlines()[-1]))
            sizes = " ".join(f"{r[k] / 2**20:6.0f} MiB" for k in ("predicted", "measured"))
            ratio = r["predicted"] / r["measured"]
            print(f"{name:10} {method:28} {sizes} {ratio:6.2f} {r['flop_ratio']:6.2f}", flush=True)
    if given.record:
        from addenda.train.machine import hardware, versions

        about = {"batch": given.batch, "length": given.length, "hardware": hardware(), "versions": versions()}
        given.record.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
