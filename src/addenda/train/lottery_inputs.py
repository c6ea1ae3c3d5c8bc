"""What a lottery run is given: its data, its heads, the tensors that a mask may take from, options of each phase."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from addenda.core.base.arguments import names_of
from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.ranges import Range
from addenda.core.method.catalogue import info
from addenda.core.modules.wrappers import unwrap
from addenda.core.site.site import is_norm
from addenda.core.site.targets import Target, resolve
from addenda.data.encode import encode
from addenda.data.encoded import Encoded
from addenda.data.limits import padded, within
from addenda.models.load import HEADS
from addenda.train.fit import fit
from addenda.train.inputs import check_loaded, context, read_inputs
from addenda.train.settings import check_options

PHASE = names_of(fit, without=("model", "adapter", "train", "eval", "out", "resume", "memory_floor", "begun_with"))
RANGES = {"k": Range(1, 2**62, whole=True), "iterations": Range(1, 1000, whole=True), "l1": Range(0, 1e6)}


def maskable(
    model: nn.Module, *, norms: bool = True, embeddings: bool = True, exclude: Iterable[Target] = (), heads: Any = ()
) -> list[str]:
    """Return the paths of the tensors of which a mask may take entries: every parameter once, in the model's order.

    heads: modules that are trained whole. Raises AddendaError where nothing is left.
    """
    root = unwrap(model)
    modules = dict(root.named_modules())
    if unknown := [path for path in heads if path not in modules]:
        raise AddendaError(
            f"also_train= of a lottery names modules that are trained whole, and this {type(root).__name__} has none "
            f"called {unknown[0]!r}.{nearest(unknown[0], modules)}"
        )
    whole = {id(p) for path in heads for p in modules[path].parameters()}
    sites = [s for s in resolve(root, "weights", exclude) if id(s.weight) not in whole]
    kept = [s.path for s in sites if (norms or not is_norm(s.module))
            and (embeddings or not any(isinstance(m, nn.Embedding) for m in s.modules))]  # fmt: skip
    if not kept:
        raise AddendaError("Nothing is maskable: heads, exclude=, norms= and embeddings= leave no tensor.")
    return kept


def phases_of(steps: Any, l1: float, seed: int, options: dict, full: Mapping[str, Any] | None) -> dict[str, dict]:
    """Return the options of both phases. Raises AddendaError for some that cannot be."""
    full = dict(full or {})
    known = [n for n in (*PHASE, "l1") if n != "seed"]
    if unknown := [n for n in full if n not in known]:
        raise AddendaError(f"full= has no option {', '.join(map(repr, unknown))}. Its options: {', '.join(known)}.")
    if not isinstance(steps, int | Sequence) or isinstance(steps, str | bool):
        raise AddendaError(f"steps= counts the steps of a phase, or is a list of rows for each of them; got {steps!r}.")
    both = {"rate": info("full").rate, "batch": 16, "l1": l1} | options | {"steps": steps}
    phases = {"full": both | full, "sparse": both}
    for phase, chosen in phases.items():
        if refusal := RANGES["l1"].refusal("l1", chosen["l1"]):
            raise AddendaError(f"{phase}: {refusal}.")
        given: dict[str, Any] = {k: v for k, v in chosen.items() if k not in ("l1", "progress", "tracking")}
        given["seed"] = seed
        given["steps"] = given["steps"] if isinstance(given["steps"], int) else 1  # else the rows of each
        check_options(**given)
    return phases


def read_data(
    model, data, eval_data, tokenizer, columns: dict, reading: dict, loading: dict, also_train, options: dict
) -> tuple[nn.Module, Encoded, Encoded | None, Any, tuple[str, ...], tuple[str, ...]]:
    """Return the model, the encoded data, what judges it, the tokenizer, the heads and the labels."""
    asked = None if also_train == "auto" else (also_train,) if isinstance(also_train, str) else tuple(also_train)
    if isinstance(data, Encoded):
        if not isinstance(model, nn.Module):
            raise AddendaError(f"Encoded data wants a loaded model, got {type(model).__name__}.")
        if eval_data is not None and not isinstance(eval_data, Encoded):
            raise AddendaError(f"With encoded data eval_data= is encoded too, got {type(eval_data).__name__}.")
        own = [n for n, _ in unwrap(model).named_children() if n in HEADS and data.kind != "causal"]
        return model, data, eval_data, tokenizer, tuple(own) if asked is None else asked, data.names or ()
    if isinstance(model, nn.Module):
        check_loaded(model, tokenizer, {"dtype": loading["dtype"], "device": loading["device"]})
    loaded, train, held = read_inputs(model, data, eval_data, tokenizer, columns, None, loading)
    heads = loaded.heads if asked is None else asked
    loaded.check_heads(heads)
    limit = within(reading["max_length"] or context(loaded.model, loaded.tokenizer), loaded.model)
    reading = reading | {"max_length": limit}
    encoded, *more = [encode(d, loaded.tokenizer, **reading) for d in (train, held) if d is not None]
    encoded, *more = [padded(e, loaded.model, options["batch"]) for e in (encoded, *more)]
    return loaded.model, encoded, more[0] if more else None, loaded.tokenizer, heads, train.labels or ()
