"""Hidden methods: what happens to the activations that a module returns; and how the core runs them.

    v' = change(x, v)        v: the value that is changed, what the module returns;  x: what the change reads

Where x comes from is a property of the site (`core.site.site.Point`) and written into its path, so that one method
serves in all places of the literature:

| path       | x                   | what is changed                | for example                                     |
| ---------- | ------------------- | ------------------------------ | ----------------------------------------------- |
| `A@output` | A's output itself   | A's output                     | a serial adapter after attention                |
| `A@input`  | A's input           | A's output                     | a parallel adapter beside A                     |
| `A@B`      | B's input           | A's output                     | parallel: the MLP's last layer, its first's x   |
| `A@again`  | A(v)                | A's input v, then A runs again | before a residual sum is normalised once more   |

Several live changes at one module act one after another, in the order of activation. All of `A@again` come first.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from addenda.core.base.random import Stream
from addenda.core.method.contract import Method, Params

Reads = Literal["output", "input", "residual", "sum", "stream"]


@dataclass(frozen=True)
class HiddenMethod(Method, kind=True):
    """Base class of every method that changes activations of some width d: (…, d) to (…, d).

    targets: parts of a transformer's blocks ("attention", "mlp", "block"; see `core.site.structure`), or modules.
    reads: what x is, for a part that runs from a first layer to a last one whose output is changed:

        "output"     what is changed itself (a serial adapter)
        "input"      what the part's first layer reads (a parallel one)
        "residual"   the same before the norm in front of the part, where there is one
        "stream"     the sum of the part's output and the residual, nothing normalised: x is the residual, y is added
        "sum"        the sum of the part's output and the residual: normalised where the model normalises after the
                     sum, which then happens again after the change; the block's output where it normalises before
    """

    targets: ClassVar[str | tuple[str, ...]] = "mlp"
    reads: ClassVar[Reads] = "output"  # or a field, where it is an option
    follows: ClassVar[bool] = False  # whether `change` is told how much of the sequence a cache has (past=)
    masked: ClassVar[bool] = False  # whether it is told which tokens are padding too (mask=)
    one_side: ClassVar[bool] = False  # of an encoder and a decoder the parts of one, see `core.site.structure`

    def init(self, width: int, rng: Stream, p: Params) -> Params:
        """Return the trainable (`nn.Parameter`) and frozen (plain) tensors for activations of this width."""
        raise NotImplementedError

    def change(self, x: Tensor, y: Tensor, p: Params, training: bool = False) -> Tensor:
        """Return y' (…, d) from y (…, d) and x (…, d), pure and differentiable. x is y in a serial place.

        x has the dtype of the products, y may have another; y' has y's. Tensors in p keep their own. Neither x nor y
        is written to. training: whether dropout acts. Methods that follow a cache take past= too: how many tokens of
        every sequence are in it already, an int, a tensor () or, of each sequence, a tensor (batch, 1); None where that
        is not known. With `masked` they take mask= too: (batch, tokens), false where a token is padding, which `past`
        does not count either; None where all count. See `core.state.cache_length`.
        """
        raise NotImplementedError

    def fuse(self, x: Tensor, y: Tensor, changes: list[Tensor], p: Params) -> Tensor:
        """Return y' from y and what each other adapter would add to it (…, d). Optional: to weigh others."""
        raise NotImplementedError

    def undo(self, y: Tensor, p: Params) -> Tensor:
        """Return v from v' = change(v, v). Optional, for changes that are taken back before a model's head."""
        raise NotImplementedError

    def trainable(self, width: int) -> int:
        """Return how many numbers are trained at one place of this width: a formula, tested against real tensors."""
        raise NotImplementedError

    def check(self, width: int) -> str | None:
        """Return why activations of this width cannot be changed with these options, or None."""
        return None
