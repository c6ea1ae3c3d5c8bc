"""What vLLM 0.32 asks of an adapter's folder, looked at without vLLM.

Two kinds of fault are told alike, as a user has the same to do about them: what vLLM refuses, and what it serves
otherwise than PEFT does, or not at all, and says nothing. Of the second kind, tried on vLLM 0.32.0: a path that its
model has not (the base answers), a pair with one factor only, a factor narrower than its layer (the rest stays zero), a
rank that is not the config's (another scale), numbers that are not finite.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.disk.access import path_of
from addenda.core.modules.wrappers import unwrap
from addenda.core.site.targets import grouped
from addenda.exporting.peft.folder import read_folder
from addenda.exporting.peft.lora import ranks
from addenda.exporting.vllm.architectures import CLASSIFIERS, outer_modules
from addenda.exporting.vllm.contents import Contents, contents_of
from addenda.exporting.vllm.places import FUSED_STACKS, Place, architecture_of, places

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what max_lora_rank may be (`config/lora.py`)
_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # of init_lora_weights: the base stays as it is
_FEATURES = {
    "use_dora": "DoRA is not computed there. Export it as 'merged', or as a LoRA of a rank",
    "lora_bias": "biases of a LoRA are not added there. Train without, or export it as 'merged'",
    "alora_invocation_tokens": "activated LoRA (aLoRA) would act on all tokens there. Serve it with PEFT",
    "layer_replication": "layers are not repeated there. Save the repeated model and train on that",
    "use_bdlora": "block-diagonal LoRA is not read there. Export it as a plain LoRA",
    "use_qalora": "QA-LoRA is not read there. Export it as 'merged'",
    "trainable_token_indices": "rows of tokens are not put in there. Export it as 'merged'",
}
_FUSED = ("qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "qkv", "Wqkv", "W_pack")


def check(folder: str | Path, *, max_lora_rank: int | None = None, config: object = None) -> list[str]:
    """Return what keeps vLLM from serving a PEFT folder as PEFT would, one sentence each; [] where nothing does.

    max_lora_rank: what the engine is started with; None: its highest, 512 (vLLM's own default is 16). config: the
    base, without which names and shapes cannot be checked: a model, a config of transformers, or a model's folder.

    Raises AddendaError for a max_lora_rank that vLLM does not take, and for a config that is none of these. It is
    stricter than vLLM with a folder whose weights are a pickle, whose peft_type is not LORA, or whose keys have not
    PEFT's prefix: vLLM would serve them.
    """
    if max_lora_rank is not None and max_lora_rank not in RANKS:
        raise AddendaError(f"max_lora_rank is one of {', '.join(map(str, RANKS))} in vLLM, got {max_lora_rank}.")
    model = None if config is None else _model(config)
    try:
        found = read_folder(folder)
    except AddendaError as error:
        return [str(error)]
    if found.type != "LORA":
        return [f"its peft_type is {found.type[:60]}, and vLLM reads LORA only. Export it as a LoRA, or as 'merged'"]
    contents = contents_of(found)
    problems = [*_config(found.config, max_lora_rank or RANKS[-1]), *_heads(found.config, contents)]
    problems += [*contents.problems, *_pairs(found.config, contents)]
    problems += _names(contents) if model is None else _fit(contents, model)
    return list(dict.fromkeys(problems))


def _config(config: Mapping[str, Any], most: int) -> Iterator[str]:
    """Yield what is wrong with the options (`lora/peft_helper.py`)."""
    if missing := [k for k in ("r", "lora_alpha", "target_modules") if config.get(k) is None]:
        yield f"its config has no {', '.join(missing)}, which vLLM must have. Save it with PEFT"
        return
    patterns = config.get("rank_pattern") or {}
    wanted = {"r": config["r"], **(patterns if isinstance(patterns, dict) else {"rank_pattern": patterns})}
    whole = {k: r for k, r in wanted.items() if isinstance(r, int) and not isinstance(r, bool)}
    for key, rank in wanted.items():
        if key not in whole or rank < 1:
            yield f"the rank of {key} is {str(rank)[:40]}, and it is a whole number of at least 1"
    if whole and (largest := max(whole.values())) > most:
        yield f"its rank is {largest}, above max_lora_rank={most}. {_way_out(largest, most)}"
    for key, why in _FEATURES.items():
        if config.get(key):
            yield f"{key} is set: {why}"
    if config.get("bias", "none") != "none":
        yield f"bias={config['bias']!r}: biases of the base are not changed there. Export it as 'merged'"
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _STARTS:
        yield (
            f"init_lora_weights={start!r}: PEFT changes the base for it, and vLLM does not. Write a plain LoRA of "
            "twice the rank (addenda's 'peft' and 'vllm' do; PEFT by path_initial_model_for_weight_conversion)"
        )


def _way_out(rank: int, most: int) -> str:
    larger = next((r for r in RANKS if r >= rank), None)
    start = f"Start vLLM with --max-lora-rank {larger}, or export" if larger else "Export"
    return f"{start} with rank={most}, which reports its error"


def _pairs(config: Mapping[str, Any], contents: Contents) -> Iterator[str]:
    """Yield which pairs of factors are not whole, or of another rank than vLLM scales them by."""
    if not contents.pairs and not contents.problems:
        yield "it changes no layer, so that vLLM's base would answer (or its loader fail)"
    for path, pair in contents.pairs.items():
        if missing := [f"lora_{k}" for k in "AB" if k not in pair]:
            yield f"{path} has no {missing[0]}, which vLLM does not notice at every layer. Save the adapter again"
            continue
        if any(t.dim() != 2 for t in pair.values()):
            yield f"{path} has factors of {', '.join(f'{k} {list(t.shape)}' for k, t in pair.items())}, no matrices"
            continue
        try:
            rank, _ = ranks(dict(config), path)
        except AddendaError as error:
            yield str(error)
            continue
        if path.endswith((".experts", ".experts.base_layer")):
            continue  # whole stacks; their ranks stand side by side
        if not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            yield (
                f"{path} has factors of rank {pair['A'].shape[0]} (A) and {pair['B'].shape[1]} (B), and the config "
                f"says {rank}, by which vLLM scales them. Save the adapter again with ranks in rank_pattern"
            )


def _heads(config: Mapping[str, Any], contents: Contents) -> Iterator[str]:
    """Yield what is wrong with modules that were trained whole."""
    named = config.get("modules_to_save") or []
    listed = named if isinstance(named, list) else [named]
    for name in listed:
        if name not in CLASSIFIERS:
            yield (
                f"modules_to_save has {str(name)[:60]!r}, and vLLM takes no module as a whole but a classifier's score "
                "or classifier. Export it as 'merged'"
            )
        elif "weight" not in contents.heads.get(name, {}):
            yield f"modules_to_save has {name}, and the folder no {name}.weight: vLLM would answer with the base's"
    for name in contents.heads:
        if name not in listed:
            yield f"{name} is saved whole, and the config's modules_to_save does not name it. Save it again with PEFT"
    if len(contents.heads) > 1:
        yield f"vLLM takes one head with an adapter, and here are {', '.join(contents.heads)}"


def _names(contents: Contents) -> Iterator[str]:
    """Yield which names vLLM has for what it made of several layers, where the model is not known."""
    fused = [path for path in contents.pairs if path.rpartition(".")[2] in _FUSED]
    for pattern, paths in grouped(fused).items():
        yield (
            f"{pattern} ({len(paths)} layers) looks like several layers in one. vLLM joins them itself and wants them "
            "apart, except for models that are built so (Phi-3): give config=, the base, to have it decided"
        )
    if stacks := [path for path in contents.pairs if path.endswith((".experts", ".experts.base_layer"))]:
        yield f"{stacks[0]} is a stack of experts, which few models read: give config=, the base, to have it decided"


def _fit(contents: Contents, model: nn.Module) -> Iterator[str]:
    """Yield which names and shapes are not the model's."""
    architecture, known = architecture_of(model), places(model)
    if outer_modules(architecture) is None:
        yield f"a {architecture} is not known to be served with LoRA. Export it as 'merged'"
        return
    fused = architecture in FUSED_STACKS
    stacks = {path for path in contents.pairs if path.endswith((".experts", ".experts.base_layer"))} if fused else set()
    absent = [path for path in contents.pairs if path not in known and path not in stacks]
    for pattern, paths in grouped(absent).items():
        yield (
            f"{pattern} ({len(paths)} modules) is none that a {architecture} takes a LoRA at in vLLM: it refuses the "
            f"name, or the base answers without a word.{nearest(paths[0], known, 1)} Export the rest, or 'merged'"
        )
    for path, pair in contents.pairs.items():
        if path in known:
            yield from _shapes(path, pair, known[path], path in contents.embedded)
    for name, t in contents.bases.items():
        weight = _weight(model, name)
        if weight is not None and list(weight.shape) != list(t.shape):
            yield (
                f"{name} comes with a base of {list(t.shape)}, and the model has {list(weight.shape)}: rows were "
                "added, which vLLM passes over. Serve it on the model that was saved with them"
            )
    for name, tensors in contents.heads.items():
        place = next((p for path, p in known.items() if path.rpartition(".")[2] == name), None)
        if place is None:
            yield f"{name} is saved whole, and a {architecture} has no such classifier in vLLM"
        elif "weight" in tensors and list(tensors["weight"].shape) != list(place.shape):
            yield f"{name}.weight is {list(tensors['weight'].shape)}, and the model has {list(place.shape)}"
    if absent and any(p.expert is not None for p in known.values()):
        return
    yield from _lacking(contents, known)


def _shapes(path: str, pair: Mapping[str, Tensor], place: Place, embedded: bool) -> Iterator[str]:
    if embedded != place.embedding:
        kind = "an embedding" if place.embedding else "a linear layer"
        yield f"{path} is {kind} in the model, and the folder has the keys of the other"
        return
    m, n = place.shape[::-1] if place.embedding else place.shape
    for key, at, size in (("A", 1, n), ("B", 0, m)):
        t = pair.get(key)
        if t is not None and t.dim() == 2 and t.shape[at] != size:
            yield f"{path}: lora_{key} is {list(t.shape)}, and the layer is {m} × {n} (out × in)"


def _lacking(contents: Contents, known: Mapping[str, Place]) -> Iterator[str]:
    """Yield whether experts are there in part: vLLM wants all of a layer (`lora/lora_weights.py`, pack_moe)."""
    expected: dict[str, set[str]] = {}
    for name, place in known.items():
        if place.expert is not None:
            expected.setdefault(name.rpartition(".experts.")[0], set()).add(name)
    for layer, names in expected.items():
        missing = sorted(names - set(contents.pairs))
        if 0 < len(missing) < len(names):
            yield f"{layer} lacks {len(missing)} of its {len(names)} experts' layers, e.g. {missing[0]}: vLLM wants all"


def _weight(model: nn.Module, path: str) -> Tensor | None:
    try:
        return model.get_submodule(path)._parameters.get("weight")
    except AttributeError:
        return None


def _model(config: object) -> nn.Module:
    """Return the base without its numbers, to be asked for names and shapes."""
    if isinstance(config, nn.Module):
        return unwrap(config)
    import transformers

    from addenda.models.load import config_of

    if isinstance(config, (str, Path)):
        config = config_of(path_of(config, "config"))
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 and isinstance(names[0], str) else None
    if not isinstance(config, transformers.PretrainedConfig) or not isinstance(kind, type):
        raise AddendaError(
            "config is the base that is served: a model, its folder, or a config of transformers that names its "
            f"architecture; got a {type(config).__name__}."
        )
    with torch.device("meta"):
        return kind(config)
