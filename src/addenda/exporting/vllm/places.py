"""The modules of a model that the keys of an adapter may name in vLLM, with their shapes.

Stacked experts, which transformers keeps as one parameter a projection (experts, out, in):

| model of transformers | its stacks | who reads a LoRA of them, and from which keys | here |
| --- | --- | --- | --- |
| Mixtral | mlp.experts.gate_up_proj, down_proj | vLLM: block_sparse_moe.experts.0.w1, w3 (gate, up), w2 | written |
| Qwen2-MoE, Qwen3-MoE, OLMoE | the same | vLLM: mlp.experts.0.gate_proj, up_proj, down_proj | written |
| gpt-oss | (experts, in, out), gate and up in turns | vLLM and PEFT: experts.base_layer, experts | refused |
| any | gate_up_proj, down_proj | PEFT (target_parameters): experts.base_layer, experts | door "peft" |
| others | | nobody is known to | refused |

vLLM wants all projections of all experts of a layer, so what an adapter does not change is written as zeros; gate and
up share A. That its loader puts them where they belong was seen in its own buffers (`tests/exporting/vllm_server.py`);
the products are Triton's, which needs a GPU, and have not been run.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from addenda.core.modules.classes import original_class
from addenda.core.modules.ours import is_ours
from addenda.core.site.kinds import EMBEDDING as EMBEDDING_KIND
from addenda.core.site.kinds import LINEAR, kind_of
from addenda.core.site.site import Owners, owners_of
from addenda.exporting.vllm.architectures import CLASSIFIERS, HEAD, is_classifier, outer_modules

WITH_EXPERTS = {  # what stands for "mlp" in vLLM's paths, and its names of gate, up and down
    "MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2"),
    **dict.fromkeys(
        ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"), ("mlp", "gate_proj", "up_proj", "down_proj")
    ),
}
FUSED_STACKS = ("GptOssForCausalLM",)  # served from PEFT's keys of whole stacks


@dataclass(frozen=True)
class Place:
    """One matrix that a pair of tensors in an adapter's folder changes."""

    site: str  # the path of the site whose weight it is, or is a part of
    shape: tuple[int, int]  # m × n
    embedding: bool = False
    expert: int | None = None
    rows: tuple[int, int] | None = None  # of the stack's matrix, from and to; None: all


def architecture_of(model: nn.Module) -> str:
    """Return the name of a model's class, by which vLLM chooses its own."""
    return original_class(model).__name__


def places(model: nn.Module) -> dict[str, Place]:
    """Return by module path as vLLM's adapters have it, in the model's order, the matrices that may be changed."""
    architecture, owners = architecture_of(model), owners_of(model)
    outer = outer_modules(architecture) or frozenset()
    found: dict[str, Place] = {}
    for path, module in model.named_modules():
        if is_ours(path) or not path:
            continue
        kind, name = kind_of(module), path.rpartition(".")[2]
        if kind == LINEAR and not _left_out(model, module, name, architecture, outer):
            m, n = module._parameters["weight"].shape
            found[path] = Place(_site(module, path, owners), (m, n))
        elif kind == EMBEDDING_KIND and name in outer:
            m, n = module._parameters["weight"].shape
            found[path] = Place(_site(module, path, owners), (m, n), embedding=True)
        elif name == "experts" and architecture in WITH_EXPERTS:
            found |= dict(_experts(path, module, *WITH_EXPERTS[architecture]))
    return found


def _left_out(model: nn.Module, module: nn.Module, name: str, architecture: str, outer: frozenset[str]) -> bool:
    """Return whether a linear layer is a head that vLLM gives no LoRA."""
    if name in CLASSIFIERS:
        return not is_classifier(architecture)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return (name == HEAD or module is head) and HEAD not in outer


def _site(module: nn.Module, path: str, owners: Owners) -> str:
    """Return the path of a layer's site: of its parameter, where other modules have the same."""
    holders = owners[id(module._parameters["weight"])]
    return path if len(holders) == 1 else f"{holders[0][0]}.{holders[0][2]}"


def _experts(path: str, module: nn.Module, block: str, gate: str, up: str, down: str) -> Iterator[tuple[str, Place]]:
    """Yield the matrices of every expert. path: of transformers' module that holds the stacks."""
    parameters = module._parameters
    if not {"gate_up_proj", "down_proj"} <= set(parameters):
        return
    outside = path.removesuffix("mlp.experts") + f"{block}.experts"
    count, both, hidden = parameters["gate_up_proj"].shape
    _, width, inner = parameters["down_proj"].shape
    for e in range(count):
        at, half = f"{outside}.{e}", both // 2
        yield f"{at}.{gate}", Place(f"{path}.gate_up_proj", (half, hidden), expert=e, rows=(0, half))
        yield f"{at}.{up}", Place(f"{path}.gate_up_proj", (half, hidden), expert=e, rows=(half, both))
        yield f"{at}.{down}", Place(f"{path}.down_proj", (width, inner), expert=e)


def by_site(model: nn.Module) -> dict[str, dict[str, Place]]:
    """Return, by path of the site, its places by name. A layer's own parameter is the same site as the layer.

    A weight that several modules share is a site only where vLLM changes it in every one of them.
    """
    found: dict[str, dict[str, Place]] = {}
    for name, place in places(model).items():
        found.setdefault(place.site, {})[name] = place
    owners = owners_of(model)
    shared = {f"{h[0][0]}.{h[0][2]}": len(h) for h in owners.values() if len(h) > 1}
    found = {site: at for site, at in found.items() if len(at) == shared.get(site, len(at))}
    return found | {f"{site}.weight": at for site, at in found.items() if site in at}
