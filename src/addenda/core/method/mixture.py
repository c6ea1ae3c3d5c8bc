"""What mixtures of sparse modules share: matrices whose entries are dealt into N parts, one of which acts a step.

    W = W0 + M_b ∘ V      in training: b from 1 … N, drawn anew every step, at every site and for every matrix
    W = W0 + V / N        otherwise: the mean over b (merge="concat": W0 + V)

    V (rows × columns) trained, from 0     M_1 … M_N  0 or 1, disjoint, their sum is 1     W0  the start, or nothing

A mixture is N copies of one start, each of which learns its own entries alone, so that one tensor V holds all of them:
a step multiplies by one mask, and the gradient is masked by that. The masks are a random permutation of the entries cut
into N stretches, found again from the seed: no file holds them, nor W0. b is a tensor, so that nothing recompiles.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from addenda.core.base.random import Stream
from addenda.core.method.contract import Method, Params


@dataclass(frozen=True)
class Parted(Method):
    """A class mixed in before a method of two thin matrices, whose entries it deals out into parts that train in turn.

    parts: N. share: the matrix that all modules train together, whole; the other one is dealt out, or both ("none").
    merge: what acts outside training: the mean over the modules, or all of them at once.
    """

    drawn_apart: ClassVar[bool] = True
    helpers: ClassVar[tuple[str, ...]] = ("thin", "shapes", "split", "acting")
    thin: ClassVar[tuple[str, str]] = ("down", "up")
    parts: int = 4
    share: Literal["down", "up", "none"] = "down"
    merge: Literal["mean", "concat"] = "mean"

    def shapes(self, site: Any) -> dict[str, tuple[int, int]]:
        """Return the shape of each thin matrix at a site."""
        raise NotImplementedError

    def validate(self):
        yield from super().validate()
        rank = getattr(self, "rank")  # noqa: B009
        if not 1 <= self.parts <= max(rank, 1):
            yield f"parts must be from 1 to rank={rank}, so that each has an entry a row, got {self.parts}"
        if self.bits is not None and self.split:
            yield "a part's zeros leave no spread to round by: train without bits, export the plain adapter, pack that"

    @property
    def split(self) -> tuple[str, ...]:
        """The names of the matrices that are dealt out: none with one part, which is the plain method."""
        down, up = self.thin
        return () if self.parts == 1 else {"down": (up,), "up": (down,), "none": (down, up)}[self.share]

    def derive(self, site: Any, rng: Stream) -> Params:
        tensors = super().derive(site, rng)
        for name in self.split:
            stream, (rows, columns) = rng.fork(name), self.shapes(site)[name]
            tensors[f"{name}_part"] = stream.deal(rows * columns, self.parts).view(rows, columns) + 1
            tensors[f"{name}_drawn"] = torch.tensor(0)  # all of them
            if name == self.thin[0]:
                tensors[f"{name}_start"] = stream.kaiming_uniform(rows, columns)
        return tensors

    def init(self, site: Any, rng: Stream, p: Params) -> Params:
        tensors = super().init(site, rng, p)
        return {k: nn.Parameter(torch.zeros_like(t)) if k in self.split else t for k, t in tensors.items()}

    def on_step(self, step: int, rng: Stream) -> Params:
        return {f"{name}_drawn": torch.tensor(rng.integer(1, self.parts)) for name in self.split}

    def acting(self, name: str, p: Params) -> Tensor:
        """Return the thin matrix W of this name as it acts now."""
        matrix = p[name]
        if name not in self.split:
            return matrix
        b = p[f"{name}_drawn"][..., None, None]  # one for each matrix of a stack
        matrix = torch.where((p[f"{name}_part"] == b) | (b == 0), matrix, 0.0)
        if self.merge == "mean":
            matrix = matrix * torch.where(b == 0, 1 / self.parts, matrix.new_ones(()))
        start = p.get(f"{name}_start")
        return matrix if start is None else matrix + start.to(matrix.dtype)

    def dealt(self, p: Params) -> Params:
        return {name: p[f"{name}_part"] for name in self.split}

    @property
    def trained_by(self) -> str:
        return "partwise-adamw" if self.split else "adamw"
