"""The parts of a model's transformer blocks, found by structure: the places of hidden methods.

A *block* is an element of a list (`core.site.targets.stacks`) that holds linear layers under something called attention
and others beside it, and no smaller one that does (`core.site.targets` tells attention from the rest). Its parts are

    "attention"   from its attention's first layer to the projection back to the model's width
    "mlp"         the same of what is beside the attention; a mixture of experts is one module and one part
    "block"       the whole block
    "key"         the layer of the attention that makes the keys, told by its name; "value" likewise

"embedding" is what the model's input embeddings return, "embeddings" the same with what stands around them outside of
the blocks: positions, a norm. Where several modules have the same weight (T5, BART) those that are called are meant.
Anything else names modules: a glob over paths, "re:…", or a predicate (path, module) -> bool. Cross-attention is named
like that too; only a block's first attention is found.

A block with a second attention belongs to a *decoder* where the model has a list of blocks without one: the *encoder*.
A method may want the parts of one of them only (`HiddenMethod.one_side`): the encoder, or the decoder where only that
embeds ids. Towers for images or sound, which ids never reach, are not meant by it either. What is undone
before the head is undone in a decoder, never in an encoder.

What registration order cannot say, where the residual is read, what is normalised after the sum, and which of several
embeddings is called, is seen in one forward (`core.adapter.dry_forward`).
"""

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.method.hidden import HiddenMethod
from addenda.core.modules.ours import is_ours
from addenda.core.site.kinds import CONV1D, kind_of
from addenda.core.site.parts import DryForward, OnDemand, Part
from addenda.core.site.site import Point, is_norm, point_at, refusal
from addenda.core.site.targets import Target, grouped, is_stack, listed, matching, stacks

_MADE = re.compile(
    r"((to|in|add|added)_)?(q|k|v|qk|kv|qkv|query|keys?|values?|query_key_value|c_attn|receptance)(_?(proj|lin|linear))?"
)
_ASIDE = re.compile(r"(^|_)(add|added|context)(_|$)")  # diffusers' second stream, of the text, through the same block
PARTS = ("attention", "mlp", "block", "key", "value", "embedding", "embeddings")


def points(
    model: nn.Module,
    method: HiddenMethod,
    targets: Target | Iterable[Target],
    exclude: Iterable[Target],
    dry_forward: Callable[[nn.Module], DryForward],
) -> list[Point]:
    """Return the places that targets name for a method, in the model's order, each once.

    Raises AddendaError when a target matches nothing, or no block is recognised (with what was looked for), or a place
    cannot be changed (with all reasons).
    """
    included, omitted = listed(targets), listed(exclude)
    dry = OnDemand(lambda: dry_forward(model))

    sides = _sides(model) if method.one_side or method.has("undo") else _Sides()
    side = sides.ids if method.one_side else ""
    block_parts = _reached(model, sides, dry) if method.one_side else blocks(model)

    def resolved(target: Target) -> list[str]:
        back = f"~{head}" if method.has("undo") and (head := head_path(model)) else ""
        return [
            _path(model, part, method.reads, dry) + (back if sides.of(part.last) != "encoder" else "")
            for part in _parts(model, target, dry, block_parts)
            if not (side and part.role and sides.of(part.last) not in (side, ""))
        ]

    paths = dict.fromkeys(path for target in included for path in resolved(target))
    for target in omitted:
        excluded = {part.last for part in _parts(model, target, dry, block_parts)} | set(
            resolved(target) if isinstance(target, str) and target in PARTS else ()
        )
        paths = {path: None for path in paths if path not in excluded and path.partition("@")[0] not in excluded}
    if not paths:
        raise AddendaError(f"Nothing is left: exclude={omitted!r} takes away all that targets={included!r} name.")
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    sites = [point_at(model, path) for path in sorted(paths, key=lambda p: order.get(p.partition("@")[0], 0))]
    problems = [f"{site.path}: {reason}" for site in sites if (reason := refusal(model, site))]
    if dry.known is not None:
        idle = [path for site in sites if (path := site.path.partition("@")[0]) not in dry.known.order]
        problems += [f"{path}: it did not run in a trial forward, so a change there would do nothing" for path in idle]
    if problems:
        raise AddendaError(f"{len(problems)} of {len(sites)} places cannot be changed: {'; '.join(problems[:8])}.")
    return sites


def blocks(model: nn.Module) -> dict[str, dict[str, Part]]:
    """Return the transformer blocks by path, each with its parts by role. Empty where none is recognised."""
    attention, mlps = matching(model, "attention"), matching(model, "mlp")
    elements = [f"{path}.{name}" for path, m in stacks(model).items() for name in m._modules if not is_ours(name)]
    candidates = [e for e in elements if _under(e, attention) and (_under(e, mlps) or _beside(model, e, attention))]
    block_parts = {}
    for path in candidates:
        if not _under(path, candidates):
            attention_part = _attention_of(model, path, _under(path, attention))
            mlp = None if attention_part is None else _mlp_of(model, path, _under(path, mlps), attention_part.last)
            if attention_part is not None and mlp is not None and not _apart(model, attention_part, mlp):
                block_parts[path] = {"attention": attention_part, "mlp": mlp, "block": Part(path, path, path, "block")}
                block_parts[path] |= _keys_and_values(model, attention_part, _under(path, attention))
    return block_parts


def _under(path: str, paths: Iterable[str]) -> list[str]:
    return [p for p in paths if p.startswith(f"{path}.")]


def _child(model: nn.Module, block: str, path: str) -> str:
    """Return the part of a block that a layer belongs to: the block's child, or an element of a list that is one."""
    parts, depth = path.split("."), block.count(".") + 2
    while depth < len(parts) and is_stack(model.get_submodule(".".join(parts[:depth]))):
        depth += 1
    return ".".join(parts[:depth])


def _beside(model: nn.Module, block: str, attention: list[str]) -> list[str]:
    """Return a block's children that hold matrices and no attention, however kept: mixtures of experts."""
    attention_children = {_child(model, block, path) for path in _under(block, attention)}
    return [
        f"{block}.{name}"
        for name, child in model.get_submodule(block).named_children()
        if not is_ours(name) and f"{block}.{name}" not in attention_children and not is_norm(child) and _matrices(child)
    ]


def _matrices(module: nn.Module, dims: int = 2) -> bool:
    """Return whether the base has parameters of so many dimensions, or more, in this module."""
    return any(p.dim() >= dims for n, p in module.named_parameters() if not is_ours(n))


def _attention_of(model: nn.Module, block: str, paths: list[str]) -> Part | None:
    """Return a block's attention; None where no layer leads back to the width that its first layer reads."""
    first = _child(model, block, paths[0])
    layers = [p for p in paths if _child(model, block, p) == first]
    width = _widths(model.get_submodule(next((p for p in layers if _MADE.fullmatch(_leaf(p))), layers[0])))[1]
    layers = layers[next(i for i, p in enumerate(layers) if _widths(model.get_submodule(p))[1] == width) :]
    outputs = [p for p in layers if _widths(model.get_submodule(p))[0] == width and not _MADE.fullmatch(_leaf(p))]
    outputs = [p for p in outputs if not _ASIDE.search(_leaf(p))] or outputs
    return Part(block, layers[0], outputs[-1], "attention") if outputs else None


def _leaf(path: str) -> str:
    """Return the name of a layer; that of its list, where the layer has only a number."""
    return next((name for name in reversed(path.split(".")) if not name.isdigit()), path)


def _apart(model: nn.Module, attention: Part, mlp: Part) -> bool:
    """Return whether attention and MLP are in two lists of their own, so that this is no block but a level."""
    lists = [_child(model, attention.block, part.last).rpartition(".")[0] for part in (attention, mlp)]
    return lists[0] != lists[1] and attention.block not in lists


def _keys_and_values(model: nn.Module, attention: Part, paths: list[str]) -> dict[str, Part]:
    """Return the attention's layers called k, key, k_proj and the like; none where one layer makes them all."""
    layers = [p for p in paths if _child(model, attention.block, p) == _child(model, attention.block, attention.first)]
    parts = {}
    for role in ("key", "value"):
        names = re.compile(rf"(to_)?({role}s?|{role[0]})(_?(proj|lin|linear))?", re.I)
        matches = [p for p in layers if names.fullmatch(p.rpartition(".")[2])]
        if len(matches) == 1:
            parts[role] = Part(attention.block, matches[0], matches[0], role)
    return parts


def _mlp_of(model: nn.Module, block: str, paths: list[str], projection: str) -> Part | None:
    """Return the MLP: the first layer taking the model's width to the last giving it; experts are one module."""
    parents = [model.get_submodule(_child(model, block, p)) for p in paths]
    stacked = any(_matrices(parent, 3) for parent in parents)
    experts = any(isinstance(m, nn.ModuleList) for parent in parents for m in parent.modules())
    if not paths or ((stacked or experts) and len({id(m) for m in parents}) == 1):
        modules = [_child(model, block, paths[0])] if paths else _beside(model, block, [projection])
        return Part(block, modules[-1], modules[-1], "mlp") if modules else None
    width, _ = _widths(model.get_submodule(projection))
    firsts = [p for p in paths if _widths(model.get_submodule(p))[1] == width]
    lasts = [p for p in paths if _widths(model.get_submodule(p))[0] == width]
    lasts = [p for p in lasts if not any(_ASIDE.search(name) for name in p.removeprefix(block).split("."))] or lasts
    return Part(block, firsts[0], lasts[-1], "mlp") if firsts and lasts else None


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear layer."""
    m, n = layer._parameters["weight"].shape
    return (n, m) if kind_of(layer) == CONV1D else (m, n)


@dataclass(frozen=True)
class _Sides:
    """The blocks of an encoder and of a decoder, which has a second attention in each; none unless there are both."""

    encoder: frozenset[str] = frozenset()
    decoder: frozenset[str] = frozenset()
    ids: str = ""  # the side that embeds ids: "decoder" where no input embeddings are at the encoder

    def of(self, path: str) -> str:
        """Return "encoder" or "decoder" for a path in one of them, inside its blocks or beside them; else ""."""
        all_blocks = self.encoder | self.decoder
        enclosing = {b for b in all_blocks if f"{path}.".startswith(f"{b}.")}
        while path and not enclosing:
            path = path.rpartition(".")[0]
            enclosing = set(_under(path, all_blocks)) if path else enclosing
        sides = [side for side, blocks in (("encoder", self.encoder), ("decoder", self.decoder)) if enclosing & blocks]
        return sides[0] if len(sides) == 1 else ""


def _sides(model: nn.Module) -> _Sides:
    block_paths, attention = blocks(model), matching(model, "attention")
    decoder = {b for b in block_paths if len({_child(model, b, p) for p in _under(b, attention)}) > 1}
    encoder = set(block_paths) - decoder
    lists = [{b.rpartition(".")[0] for b in group} for group in (encoder, decoder)]
    if not encoder or not decoder or lists[0] & lists[1]:
        return _Sides()
    sides = _Sides(frozenset(encoder), frozenset(decoder))
    id_sides = {sides.of(path) for path in _owners_of_ids(model)}
    return replace(sides, ids="decoder" if "decoder" in id_sides and "encoder" not in id_sides else "encoder")


def _reached(model: nn.Module, sides: _Sides, dry: OnDemand) -> dict[str, dict[str, Part]]:
    """Return the blocks that ids pass through: nearest to an embedding of ids, and of several lists those that run."""
    candidates, embeddings = blocks(model), _tokens(model)
    depth = {(b, e): _shared(b, e) for b in candidates for e in embeddings}
    reached = {b for (b, e), n in depth.items() if n == max(depth[block, e] for block in candidates)} or set(candidates)
    if len({b.rpartition(".")[0] for b in reached}) > 1 and not sides.decoder:
        with suppress(AddendaError):  # a model that cannot be tried is taken as it is
            ran = set(dry().order)
            reached = {b for b in reached if b in ran} or reached
    return {b: parts for b, parts in candidates.items() if b in reached}


def _shared(one: str, other: str) -> int:
    """Return how many modules two paths have in common, from the model down."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _tokens(model: nn.Module) -> list[str]:
    """Return the paths of the embeddings of ids, those of each part where a model has several kinds of input (CLIP)."""
    ids = {id(_said(m, "get_input_embeddings")) for m in model.modules() if hasattr(m, "get_input_embeddings")}
    parts = [path for path, m in model.named_modules() if isinstance(m, nn.Embedding) and id(m) in ids]
    return parts if _said(model, "get_input_embeddings") is None else _owners_of_ids(model)


def _parts(model: nn.Module, target: Target, dry: OnDemand, around: dict[str, dict[str, Part]]) -> list[Part]:
    if isinstance(target, str) and target in ("embedding", "embeddings"):
        embeddings = _embeddings(model, dry)
        embeddings = [path if target == "embedding" else _around(path, blocks(model)) for path in embeddings]
        return [Part("", path, path, target) for path in embeddings]
    if isinstance(target, str) and target in PARTS:
        if not around:
            raise AddendaError(_unrecognised(model))
        if lacking := [path for path, parts in around.items() if target not in parts]:
            raise AddendaError(
                f"{lacking[0]} has no layer for each {target} alone (called {target}, {target[0]}_proj or the like). "
                + _naming(model)
            )
        return [parts[target] for parts in around.values()]
    paths = _modules(model, target)
    if not paths:
        raise AddendaError(f"{target!r} names no module of this {type(model).__name__}. {_naming(model, target)}")
    block_paths = list(blocks(model))
    return [Part(next((b for b in block_paths if p == b or p.startswith(f"{b}.")), ""), p, p) for p in paths]


def _embeddings(model: nn.Module, dry: OnDemand) -> list[str]:
    """Return the paths of the input embeddings: of several modules with that weight, those that run."""
    paths = _owners_of_ids(model)
    if len(paths) > 1 and hasattr(model, "get_input_embeddings"):
        paths = [path for path in paths if path in dry().order]
    elif len(paths) != 1:
        paths = []
    if not paths:
        raise AddendaError(f"This {type(model).__name__} does not say what its embeddings are. {_naming(model)}")
    return paths


def _owners_of_ids(model: nn.Module) -> list[str]:
    """Return the paths of all modules with the input embeddings' weight, or of all embeddings where no getter says."""
    embeddings = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Embedding)]
    if not hasattr(model, "get_input_embeddings"):
        return [path for path, _ in embeddings]
    inputs = _said(model, "get_input_embeddings")
    weight = None if inputs is None else inputs._parameters.get("weight")
    return [
        path for path, m in embeddings if m is inputs or (weight is not None and m._parameters.get("weight") is weight)
    ]


def _said(model: nn.Module, getter: str) -> nn.Module | None:
    """Return the module that one of transformers' getters gives; None where the model has no such getter of its own."""
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None


def _around(path: str, others: Iterable[str]) -> str:
    """Return the outermost module that holds the one at path and none of the others."""
    while (outer := path.rpartition(".")[0]) and not _under(outer, others):
        path = outer
    return path


def head_path(model: nn.Module) -> str | None:
    """Return the path of a language model's output embedding: the last layer of its head, which may have more."""
    head, stem = _said(model, "get_output_embeddings"), _said(model, "get_input_embeddings")
    paths = {id(m): path for path, m in model.named_modules()}
    if head is None or stem is None or id(head) not in paths or id(stem) not in paths:
        return None
    return paths[id(head)]


def _modules(model: nn.Module, target: Target) -> list[str]:
    modules = [(path, m) for path, m in model.named_modules() if path and not is_ours(path)]
    if callable(target):
        return [path for path, module in modules if target(path, module)]
    if target == "linear":
        return matching(model, target)
    if target.startswith("re:"):
        try:
            pattern = re.compile(target[3:])
        except re.error as error:
            raise AddendaError(f"The target {target!r} is no regular expression: {error}.") from None
        return [path for path, _ in modules if pattern.fullmatch(path)]
    return [p for p, _ in modules if fnmatch.fnmatchcase(p, target) or fnmatch.fnmatchcase(p, f"*.{target}")]


def _unrecognised(model: nn.Module) -> str:
    lists = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    attention = list(grouped(matching(model, "attention")))
    return (
        f"No transformer block is recognised in this {type(model).__name__}. Looked for elements of a ModuleList that "
        "hold linear layers under something called attention, and matrices beside it. ModuleLists here: "
        f"{', '.join(lists[:8]) or 'none'}; linear layers under attention: {', '.join(attention[:8]) or 'none'}. "
        + _naming(model)
    )


def _naming(model: nn.Module, target: Target | None = None) -> str:
    groups = grouped(path for path, m in model.named_modules() if path and not is_ours(path))
    hint = nearest(target, {path.rpartition(".")[2] for path in groups} | set(PARTS)) if isinstance(target, str) else ""
    return (
        f"Name the modules whose output is changed, e.g. targets='*.mlp', or one of {', '.join(PARTS)}.{hint} "
        f"Modules: {', '.join(list(groups)[:40])}."
    )


# -- what is read ------------------------------------------------------------------------------------------------------


def _path(model: nn.Module, part: Part, reads: str, dry: OnDemand) -> str:
    """Return the path of the place where a part is changed: "last@what is read"."""
    if reads == "output":
        return f"{part.last}@output"
    if reads == "input":
        return f"{part.last}@{'input' if part.first == part.last else part.first}"
    if reads == "sum" and is_norm(model.get_submodule(part.last)):
        return f"{part.last}@again"
    if not part.block:  # modules outside of blocks: nothing is known of what is around them
        return f"{part.last}@{'output' if reads == 'sum' else 'input'}"
    forward = dry()
    if reads in ("residual", "stream"):
        norm = forward.norm_before(part)
        if norm is None:
            return f"{part.last}@{'input' if part.first == part.last else part.first}"
        return f"{part.last}@{norm}"
    norm = forward.norm_after(part)
    if norm is not None:
        return f"{norm}@again"
    if part.role == "attention":
        raise AddendaError(
            f"{part.last}: the sum of attention and residual is no module's output in this {type(model).__name__}, "
            "which normalises before its parts. Name 'mlp' or 'block', or take a method that reads the output."
        )
    return f"{part.block or part.last}@output"


def residual_before(
    model: nn.Module, paths: Iterable[str], dry_forward: Callable[[nn.Module], DryForward]
) -> dict[str, str]:
    """Return, by the path of a place where a block's sum is changed, the module whose first input is the residual.

    Raises AddendaError where the place is not known to be such a sum.
    """
    dry, made = OnDemand(lambda: dry_forward(model)), {}
    parts = [p for block in blocks(model).values() for role, p in block.items() if role in ("mlp", "attention")]
    for part in parts:
        with suppress(AddendaError):  # an attention's sum that is no module's output
            made[_path(model, part, "sum", dry)] = dry().norm_before(part) or part.first
    wanted = list(paths)
    if unknown := [path for path in wanted if path not in made]:
        raise AddendaError(
            f"{unknown[0]}: it is not known which residual the sum there has, as it is no block's attention or MLP."
        )
    return {path: made[path] for path in wanted}
