"""What is measured: a model, and the arms that train it. An arm's text form is `kind/what`:

floor                       the frozen base: forward and the gradient of the embedding's output, no optimizer
full                        every weight trained
ours/lora:rank=16           a method of addenda
lean/lora:rank=16           the same, and the base's norms and gated MLPs are computed again in backward
dense/svft                  the same method as plain autograd has it: W + ΔW made for every product, and kept
ours/lora:rank=16*4         four adapters that all act and train; +4: four more that only lie there
peft/lora                   the peer's, at the same number of trained parameters
ours/lora:rank=8@lora-pro   trained by one of addenda's optimizers, not by AdamW (`measure.step` takes that off)
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.modules.borrow import gradient_from

MODELS = {  # hidden, MLP, layers, heads; 12,000 tokens, tied
    "llama24m": (384, 1024, 8, 6),
    "llama94m": (768, 2048, 12, 12),
    "llama210m": (1024, 2816, 16, 16),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A LLaMA-shaped model with random weights, or "smollm2": the embedded pretrained one."""
    import transformers

    torch.manual_seed(0)
    if name == "smollm2":
        from addenda.models.embedded import model_folder
        from addenda.models.pretrained import pretrained

        model = pretrained("AutoModelForCausalLM", model_folder(), dtype=dtype)
    else:
        torch.set_default_dtype(dtype)
        hidden, mlp, layers, heads = MODELS[name]
        config = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            vocab_size=12000, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    return model.train()


def prepare(arm: str, model: nn.Module) -> tuple[nn.Module, int]:
    """Make the model train as the arm does: (what is called, number of trained parameters)."""
    kind, _, what = arm.partition("/")
    kinds: dict[str, Callable[..., nn.Module]] = {
        "floor": _floor, "full": _full, "ours": _ours, "lean": _lean, "dense": _dense, "peft": _peft
    }  # fmt: skip
    model = kinds[kind](model, what)
    return model, sum(p.numel() for p in model.parameters() if p.requires_grad)


def _floor(model: Any, what: str) -> nn.Module:
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, ids, y: y.requires_grad_())
    return model


def warm(model: Any) -> None:
    """A short step of the frozen base, so that the kernels' code counts with the loaded model."""
    model.requires_grad_(False)
    ids = torch.zeros(1, 8, dtype=torch.long, device=model.device)
    with gradient_from(model.get_input_embeddings()):
        model(input_ids=ids, labels=ids).loss.backward()


def _full(model: nn.Module, what: str) -> nn.Module:
    return model.requires_grad_(True)


def _ours(model: nn.Module, what: str) -> nn.Module:
    """`spec*4`: four adapters that all act; `spec+4`: four more that do not."""
    import addenda

    spec, sign, count = what.partition("*") if "*" in what else what.partition("+")
    names = [f"a{i}" for i in range(int(count or 1) if sign != "+" else 1 + int(count))]
    for name in names:
        addenda.attach(model, spec, name=name)
    addenda.switch(model, names if sign == "*" else names[-1])
    for adapter in addenda.adapters(model).values():
        adapter.requires_grad_(sign == "*" or adapter.name == names[-1])
    return model


def _lean(model: nn.Module, what: str) -> nn.Module:
    import addenda

    addenda.lean(model)
    return _ours(model, what)


def _dense(model: nn.Module, what: str) -> nn.Module:
    """Every product with W + ΔW as autograd keeps it: what a paper's own code mostly does."""
    import addenda.core.forward.adapted as adapted
    from addenda.core.method.contract import to_float

    def execute(module, original, kind, live, x: Tensor, *rest, **options) -> Tensor:
        (t,) = live
        return F.linear(x, t.method.effective(module._parameters["weight"].float(), to_float(t.tensors())).to(x.dtype))

    adapted.execute = execute
    return _ours(model, what)


def _peft(model: Any, what: str) -> nn.Module:
    import peft

    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR),
        "rslora": lambda: peft.LoraConfig(r=16, lora_alpha=16, use_rslora=True, target_modules=LINEAR),
        "pissa": lambda: peft.LoraConfig(r=16, lora_alpha=16, init_lora_weights="pissa_niter_4", target_modules=LINEAR),
        "olora": lambda: peft.LoraConfig(r=16, lora_alpha=16, init_lora_weights="olora", target_modules=LINEAR),
        "dora": lambda: peft.LoraConfig(r=16, lora_alpha=16, use_dora=True, target_modules=LINEAR),
        "miss": lambda: peft.MissConfig(r=64, target_modules=LINEAR),
        "vera": lambda: peft.VeraConfig(r=256, target_modules=LINEAR, save_projection=False),
        "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules=LINEAR),
        "shira": lambda: peft.ShiraConfig(r=16, target_modules=LINEAR),
        "loha": lambda: peft.LoHaConfig(r=16, alpha=16, target_modules=LINEAR),
        "lokr": lambda: peft.LoKrConfig(r=16, alpha=16, target_modules=LINEAR),
        "hra": lambda: peft.HRAConfig(r=8, target_modules=LINEAR),
        "boft": lambda: peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=LINEAR),
        "randlora": lambda: peft.RandLoraConfig(r=32, save_projection=False, target_modules=LINEAR),
        "road": lambda: peft.RoadConfig(target_modules=LINEAR),
        "adalora": lambda: peft.AdaLoraConfig(r=16, target_modules=LINEAR, total_step=1000),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=1000, target_modules=LINEAR),
        "c3a": lambda: peft.C3AConfig(block_size=64, target_modules=LINEAR),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, configs[what]())
