"""Which linear layers of a model can be made low rank, and why the others cannot."""

from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from addenda.core.base.errors import AddendaError
from addenda.core.modules.ours import is_ours
from addenda.core.site.kinds import CONV1D, LINEAR, PARAMETER, kind_of
from addenda.core.site.site import owners_of, refusal, site_at
from addenda.core.site.targets import Target, called, listed, matching
from addenda.reducing.ranks import Storage, break_even


def choose(
    model: nn.Module, targets: Target | Iterable[Target] = "linear", exclude: Iterable[Target] = (),
    storage: Storage = "factors",
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:  # fmt: skip
    """Return ({path: (m, n)} of the layers to compress, {path: reason} of all other weights of two dimensions or more).

    Raises AddendaError when no layer is left, with the reasons.
    """
    owners, targeted = owners_of(model), _wanted(model, targets)
    left_out = _wanted(model, exclude)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shapes: dict[str, tuple[int, int]] = {}
    dense: dict[str, str] = {}
    for path, module in called(model):
        if kind_of(module) not in (LINEAR, CONV1D):
            dense[path] = f"a {type(module).__name__}: only linear layers are taken"
            if isinstance(module, nn.Embedding):
                dense[path] = "an embedding: its rows are looked up, not multiplied"
            continue
        site = site_at(model, path, owners)
        reason = None
        if module is head:
            reason = "the output head"
        elif path in left_out:
            reason = "excluded"
        elif path not in targeted:
            reason = "not among the targets (heads and routers never are)"
        elif site.kind == PARAMETER:
            reason = "its parent reads the weight without calling the layer"
        elif why := refusal(model, site, owners):
            reason = why.partition(";")[0]
        elif type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
            reason = f"a {type(module).__name__} may do more than its product"
        m, n = site.shape
        if reason is None and break_even(m, n, storage) < 1:
            reason = f"no rank of a {m} × {n} matrix saves parameters"
        if reason is None:
            shapes[path] = (m, n)
        else:
            tied = len(owners[id(module._parameters["weight"])]) > 1
            dense[path] = f"{reason}, tied to the embedding" if reason == "the output head" and tied else reason
    for path, weight in raw(model).items():
        stacked = weight.dim() > 2 and min(weight.shape[-2:]) > 1
        kind = "a stack of matrices" if stacked else "a parameter of its own"
        dense[path] = "excluded" if path in left_out else f"{kind}: only linear layers are taken"
    if not shapes:
        listed = "; ".join(f"{p}: {why}" for p, why in list(dense.items())[:8]) or "it has none"
        raise AddendaError(
            f"No linear layer of this {type(model).__name__} can be compressed: {listed}. Name others with --targets."
        )
    return shapes, dense


def raw(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters of two dimensions or more that are no layer's weight, each once: stacked experts, say."""
    layer_weights = {id(m._parameters.get("weight")) for _, m in called(model)}
    parameters: dict[str, nn.Parameter] = {}
    for path, p in model.named_parameters():
        if not is_ours(path) and not is_lazy(p) and p.dim() > 1 and id(p) not in layer_weights:
            parameters[path] = p
    return parameters


def _wanted(model: nn.Module, targets: Target | Iterable[Target]) -> set[str]:
    targeted: set[str] = set()
    for target in listed(targets):
        paths = matching(model, target)
        if not paths and target != "linear":  # a model without any says so with its reasons
            kinds = sorted({p.rpartition(".")[2] for p, m in called(model) if kind_of(m) in (LINEAR, CONV1D)})
            raise AddendaError(
                f"The target {target!r} matches nothing in this {type(model).__name__}. Its linear layers: "
                f"{', '.join(kinds) or 'none'}."
            )
        targeted.update(paths)
    return targeted
