"""transformers' check of quantised bases before training, in the words of our adapters.

`transformers.Trainer` asks `validate_quantization_for_training(model)`, which lets a quantised base through only where
it finds PEFT's adapter. That is a function of its module and no method, so inside `own_check` the module has ours under
that name; what it asks is what training needs: a backward through the layers, and something that learns.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError

_NAME, _LOCK = "validate_quantization_for_training", threading.RLock()


@contextmanager
def own_check(adapter: Adapter) -> Iterator[None]:
    """Let a Trainer that is made in a `with` block ask `check` of its model."""
    import transformers.trainer as theirs

    with _LOCK:
        before = getattr(theirs, _NAME)
        setattr(theirs, _NAME, lambda model: check(model, adapter))
        try:
            yield
        finally:
            setattr(theirs, _NAME, before)


def check(model: Any, adapter: Adapter) -> None:
    """Raise AddendaError where a quantised base has no backward, or no tensor of the adapter learns."""
    if not getattr(model, "is_quantized", False):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        how = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
        raise AddendaError(
            f"The base is quantised with {getattr(how, 'value', how)}, whose layers have no backward, so nothing on it "
            "can be trained. Load the model plain and quantise it with addenda.quantize."
        )
    if not any(p.requires_grad for p in adapter.parameters()):
        raise AddendaError(
            f"The base is quantised, and no tensor of {adapter.name!r} learns. Attach an adapter, or load it with "
            "trainable=True."
        )
