"""What a model can be given: how many tokens have a position, and which token fills short rows."""

import inspect
from typing import Any

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.modules.wrappers import unwrap
from addenda.data.encoded import Encoded


def positions(model: nn.Module) -> int | None:
    """Return how many tokens have a learned position; None where positions are computed, so that more can be read.

    RoBERTa's table of 514 holds 512: its positions begin behind the padding's; OPT's and BART's have two rows more.
    """
    config = getattr(model, "config", None)
    declared_limit = getattr(config, "max_position_embeddings", None)
    sizes = []
    for path, module in unwrap(model).named_modules():
        leaf = path.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not (leaf == "wpe" or ("position" in leaf and "rel" not in leaf)):
            continue
        offset = getattr(module, "offset", 0)
        if module.num_embeddings in (declared_limit, (declared_limit or 0) + offset):
            reserved = 0 if module.padding_idx is None or offset else module.padding_idx + 1
            sizes.append(module.num_embeddings - offset - reserved)
    return min(sizes) if sizes else None


def within(limit: int | None, model: nn.Module) -> int | None:
    """Return the smaller of a limit and what the model has positions for."""
    limits = [n for n in (limit, positions(model)) if n is not None]
    return min(limits) if limits else None


def padded(examples: Any, model: nn.Module, batch: int) -> Any:
    """Return labelled texts with short rows filled as the model expects: a decoder finds a row's last token by it.

    Raises AddendaError where it has to be found and the model's configuration does not say what fills.
    """
    config = getattr(model, "config", None)
    own = getattr(examples, "pad", None)
    if not isinstance(examples, Encoded) or own is None or examples.kind in ("causal", "masked"):
        return examples
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        return examples if pad == own else examples.filled(pad)
    code = getattr(inspect.unwrap(type(unwrap(model)).forward), "__code__", None)
    if config is not None and batch > 1 and code is not None and "pad_token_id" in code.co_names:
        raise AddendaError(
            f"A {type(unwrap(model)).__name__} finds the last token of every text by config.pad_token_id, and it has "
            f"none. Set model.config.pad_token_id = {own}, which fills the rows."
        )
    return examples
