"""The consistency term: two forwards of one batch that draw differently should say the same (R-Drop; MoSA).

    loss = CE(y1) + add · CE(y2) + weight · ½ [KL(p2 ‖ p1) + KL(p1 ‖ p2)]       p = softmax(y), at every label

The second forward has the draws of `Adapter.draw(again=1)` and dropout of its own. In each divergence the first
distribution is a target without a gradient, so that the term's gradient at y1 is weight · ½ (p1 − p2), and at y2 the
opposite: each forward is drawn to the other. Both are as in MoSA's released code (arXiv:2312.02923), which has weight 1
and add 0; R-Drop (Liang et al. 2021, arXiv:2106.14448) has add 1 and differentiates its targets too.

A step costs two forwards and two backwards, and holds the activations and the logits of both.
"""

import inspect
from dataclasses import dataclass
from functools import cache

import torch.nn.functional as F
from torch import Tensor, nn

from addenda.core.adapter.handle import Adapter
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.modules.classes import original_class
from addenda.data.encoded import Kind
from addenda.train.loss import score


@dataclass(frozen=True)
class Consistency:
    """The weights of a consistency term: `weight` of the term, `add` of the second forward's own loss."""

    weight: float
    add: float = 0.0

    def total(self, model: nn.Module, adapter: Adapter, batch: dict[str, Tensor], kind: Kind) -> tuple[Tensor, int]:
        """Return the loss summed over labels, () float32, and their number. The adapter has its own draw afterwards."""
        adapter.draw()
        one = score(model, batch, kind, keep=True)
        adapter.draw(again=1)
        two = score(model, batch, kind, keep=True)
        adapter.draw()
        assert one.logits is not None and two.logits is not None
        loss = one.total + self.weight * divergence(one.logits, two.logits)
        return (loss + self.add * two.total if self.add else loss), one.count


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Return ½ [KL(sg q ‖ p) + KL(sg p ‖ q)] summed over rows, () float32; p, q: distributions of the logits a, b."""
    p, q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    there = F.kl_div(p, q.detach(), reduction="sum", log_target=True)
    back = F.kl_div(q, p.detach(), reduction="sum", log_target=True)
    return 0.5 * (there + back)


def check(adapter: Adapter, kind: Kind, loss: str, checkpointing: bool) -> None:
    """Raise AddendaError where the term makes no sense: for values, without anything drawn, without logits."""
    if kind in ("value", "group"):
        what = "predicts values" if kind == "value" else "orders rows by one score"
        raise AddendaError(
            f"The consistency term compares distributions over classes or tokens, and this task {what}. Leave "
            "consistency out."
        )
    if loss == "chunked":
        raise AddendaError(
            "The consistency term compares logits, which loss='chunked' never holds. Take loss='auto' or 'logits', or "
            "leave consistency out."
        )
    if checkpointing or any(getattr(m, "gradient_checkpointing", False) for m in adapter.model.modules()):
        raise AddendaError(
            "Gradient checkpointing would run the first forward again with the draws of the second. Leave "
            "checkpointing or consistency out; accumulate saves memory too."
        )
    methods = set(adapter.methods.values())
    drawn = any(m.on_step(0, Stream(0)) for m in methods if m.has("on_step"))
    dropped = any(_drops(m) for m in adapter.model.modules())
    if not drawn and not dropped and not any(m.dropout for m in methods):
        from addenda.core.method.catalogue import catalogue

        drawing = [i.name for i in catalogue() if i.build().has("on_step")]
        raise AddendaError(
            f"Nothing is drawn in a forward of {adapter.name!r} ({adapter.kinds}), and nothing drops out, so that two "
            f"forwards would say the same and the consistency term would be 0. Take a method that draws "
            f"({', '.join(drawing)}), give dropout, or leave consistency out."
        )


def _drops(module: nn.Module) -> bool:
    """Return whether a module leaves something out in training: a dropout or drop path, or code that reads a chance.

    Attention calls dropout as a function, with a number of its own or of the model's configuration. A number that no
    code of the module reads, such as that of a head which is not there, says nothing.
    """
    cls = original_class(module)
    chances = [getattr(module, k, 0) for k in ("p", "drop_prob")] if "drop" in cls.__name__.lower() else []
    chances += [getattr(o, k, 0) for k in _read(cls) for o in (module, getattr(module, "config", None))]
    return any(isinstance(c, int | float) and not isinstance(c, bool) and c > 0 for c in chances)


@cache
def _read(cls: type) -> tuple[str, ...]:
    """Return the names with "drop" in them that the code of a class reads, after it was made."""
    functions = [f for c in cls.__mro__ for k, f in vars(c).items() if k != "__init__"]
    found = [getattr(inspect.unwrap(f), "__code__", None) for f in functions if callable(f)]
    return tuple({name for code in found if code for name in code.co_names if "drop" in name})
