"""What few bits cost: error, bits and perplexity of every form on the embedded model, beside bitsandbytes and hqq.

Text is the standard library of Python, by `compressing.texts`: perplexity over 4 windows of 512 tokens, calibration
(for spqr with statistics) over 8 others. The libraries' forms are there where they are installed.
"""

import copy
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn

JUDGE, SAMPLES, LENGTH = 4, 8, 512


def run(given) -> tuple[list[dict], str]:
    from addenda.compressing.measure import loss_of
    from addenda.compressing.texts import windows
    from addenda.models.embedded import model_folder
    from addenda.models.load import load_model
    from addenda.quantizing.quantize import bits_of

    torch.set_num_threads(given.threads)
    loaded = load_model(model_folder(), task="causal", dtype="float32")
    seen, held = windows(loaded.tokenizer, None, SAMPLES, LENGTH, judge=JUDGE)
    batches = held.batches(2)
    found = [{"form": "dense", "bits": 32.0, "error": 0.0, "perplexity": math.exp(loss_of(loaded.model, batches))}]
    print(found[0], flush=True)
    arms = forms(seen.batches(2))
    for form in arms if given.arms is None else given.arms.split("|"):
        make = arms[form]
        model, started = copy.deepcopy(loaded.model), time.perf_counter()
        errors = make(model)
        seconds = time.perf_counter() - started
        told = {"bits": bits_of(model), "error": sum(errors.values()) / len(errors), "layers": len(errors)}
        told |= {"perplexity": math.exp(loss_of(model, batches)), "seconds": seconds}
        found.append({"form": form} | told)
        print(found[-1], flush=True)
        del model
    return found, table(found)


def forms(calibration: list[dict]) -> dict[str, Callable[[nn.Module], dict[str, float]]]:
    """What quantises a model and says the error of each layer, by name."""
    from addenda.quantizing.quantize import quantize

    ours = {how: lambda m, how=how: quantize(m, how) for how in ("nf4", "int8", "spqr", "spqr:bits=4")}
    for how in ("spqr", "spqr:bits=4"):
        ours[f"{how}, with statistics"] = lambda m, how=how: quantize(m, how, calibration=calibration)
    if find_spec("bitsandbytes"):
        name = f"bitsandbytes {version('bitsandbytes')}"
        ours |= {
            f"{name} {kind}": lambda m, kind=kind: replaced(m, _bitsandbytes(kind)) for kind in ("nf4", "fp4", "int8")
        }
    if find_spec("hqq"):
        ours["hqq, 4 bits in groups of 64"] = lambda m: replaced(m, _hqq)
    return ours


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> dict[str, float]:
    """A library's layers in the place of the linear ones, adopted; {path: ‖W − Ŵ‖ / ‖W‖}."""
    from addenda.quantizing.bridges import adopt
    from addenda.reducing.choose import choose

    plain = {path: model.get_submodule(path).weight.detach().clone() for path in choose(model)[0]}
    for path in plain:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(model.get_submodule(path)))
    adopt(model)
    return {p: float((model.get_submodule(p).weight.unpack() - W).norm() / W.norm()) for p, W in plain.items()}


def _bitsandbytes(kind: str) -> Callable[[nn.Linear], nn.Module]:
    import bitsandbytes as bnb

    def make(layer: nn.Linear) -> nn.Module:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*sizes, quant_type=kind)
        made.load_state_dict(layer.state_dict())
        return made.to("cpu")

    return make


def _hqq(layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)


def table(found: list[dict]) -> str:
    dense = found[0]["perplexity"]
    lines = [
        "| form | bits a weight | mean ‖W − Ŵ‖ / ‖W‖ | perplexity on code | |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        p = row["perplexity"]
        change = "" if row is found[0] else f"{p / dense - 1:+.1%}"
        error = "" if row is found[0] else f"{row['error']:.4f}"
        lines.append(f"| {row['form']} | {row['bits']:.3f} | {error} | {p:.3f} | {change} |")
    return "\n".join(lines)
