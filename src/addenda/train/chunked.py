"""A causal LM's loss without its logits: hidden states at the labels, then head and loss piece by piece.

The logits of one label and their gradients take half a megabyte at a vocabulary of 49,152; piece by piece only those of
some labels are there at a time. `torch.nn.functional.linear_cross_entropy` does that where it is exact and fast.
Elsewhere each piece is the plain loss, computed again in backward: on a CPU in bfloat16 the function multiplies in
float32, by a float32 copy of the head, and rounds its losses to bfloat16.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from addenda.core.modules.autocast import autocast_dtype
from addenda.core.modules.borrow import training_mode
from addenda.core.modules.wrappers import unwrap
from addenda.data.encoded import IGNORE, Encoded
from addenda.models.machine import device_of, processes

MANY = 128 << 20  # bytes of float32 logits from which on memory counts; pieces of half precision take longer


def rows(h: Tensor) -> int | None:
    """Return the labels in a piece. torch's own choice (None) is for GPUs; on a CPU it is a few, and slow."""
    return None if h.device.type != "cpu" else 256 if h.dtype.itemsize >= 4 else 64


def total(head: nn.Linear, h: Tensor, wanted: Tensor) -> Tensor:
    """Return the summed cross-entropy of N labels, () float32. h (N × d), carries the gradient; wanted (N)."""
    n, wide, kind = rows(h), h.dtype.itemsize >= 4, h.device.type
    alike = h.dtype == head.weight.dtype and autocast_dtype(kind) is None
    if hasattr(F, "linear_cross_entropy") and alike and (wide or kind != "cpu"):
        how = "sum" if wide else "none"  # a sum in half precision would be rounded at every piece
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=n)
        losses = F.linear_cross_entropy(
            h, head.weight, wanted, linear_bias=head.bias, reduction=how, options=options
        )  # fmt: skip
        return losses.float().sum()
    pieces = zip(h.split(n or 1024), wanted.split(n or 1024), strict=True)
    return torch.stack([checkpoint(_plain, head, a, b, use_reentrant=False) for a, b in pieces]).sum()


def _plain(head: nn.Linear, h: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, head.weight, head.bias).float(), wanted, reduction="sum")


def head_of(model: nn.Module) -> Any:
    """Return the output embedding of a transformers model, or None."""
    found = getattr(unwrap(model), "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


@contextmanager
def without(head: nn.Module) -> Iterator[list[Tensor]]:
    """Let the head hand its input through, in a `with` block; yields the list of the inputs that came."""
    seen = []
    head.forward = lambda x: seen.append(x) or x
    try:
        yield seen
    finally:
        del head.forward


@torch.no_grad()
def why_not(model: nn.Module, batch: dict[str, Tensor]) -> str:
    """Return why the logits of this model are not its head's plain product; "" if they are.

    The head must be an unadapted nn.Linear, and the model, run on a batch with a head that hands its input through,
    must return just that: softcaps, scales and added biases show at once, whatever they are called.
    """
    head = head_of(model)
    if head is None:
        return f"{type(model).__name__} has no output embedding"
    if type(head) is not nn.Linear or "forward" in vars(head):
        return f"its head is {type(head).__name__}, not a plain Linear"
    inputs = {k: t.to(device_of(model)) for k, t in batch.items() if k != "labels"}
    try:
        with training_mode(model, False), without(head) as seen:
            out = getattr(model(**inputs), "logits", None)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"it does not run without its head ({str(error).splitlines()[0]})"
    if out is None or len(seen) != 1 or out.shape != seen[0].shape or not torch.equal(out.to(seen[0].dtype), seen[0]):
        return "it changes what its head returns"
    return ""


def choose(asked: str, model: nn.Module, train: Encoded, parts: Sequence[Sequence[int]]) -> dict[str, str]:
    """Return {"name": "logits" or "chunked", "why"} for a run over these micro-batches.

    "auto" is chunked where it can be, in one process, and the float32 logits of a batch would take more than 128 MiB.
    """
    if asked == "logits":
        return {"name": "logits", "why": "as asked"}
    if train.kind != "causal":
        return {"name": "logits", "why": "this is no causal LM"}
    labels = [sum(t != IGNORE for t in row[1:]) for row in train.labels]
    size = max(sum(labels[i] for i in part) for part in parts) * 4 * getattr(head_of(model), "out_features", 0)
    if asked == "auto" and size <= MANY:
        return {"name": "logits", "why": f"they take {size / 2**20:,.0f} MiB at most"}
    if asked == "auto" and processes() > 1:
        return {"name": "logits", "why": "several processes may have split the head"}
    reason = why_not(model, train.batch(parts[0][:2]))
    if reason:
        return {"name": "logits", "why": reason}
    return {"name": "chunked", "why": f"logits would take {size / 2**20:,.0f} MiB"}
