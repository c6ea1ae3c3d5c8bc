"""Losses of ordering: from values, or from comparisons; each a mean over what is known, and nothing else.

    regression   log(1 + SmoothL1(ŷ, y))           of the batch's mean, as released
    pairs        BCE(s_ij, 1[y_i > y_j])           over ordered pairs, the diagonal left out
    zero         BCE(ŷ_i, 1[y_i ≠ 0])              the "absolute zero" term
    ranknet      BCE(ŷ_i − ŷ_j, 1[y_i > y_j])      the regression head alone

Ties, by `ties`: "paper" gives both orders of a tie, and the diagonal, the target 0, as released: an image is then
asked to rank below itself. "skip" leaves them out, "half" gives them ½.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.core.base.errors import AddendaError
from addenda.ranking.order.adapter import Scores

Ties = Literal["skip", "half", "paper"]


@dataclass(frozen=True)
class OrderLoss:
    """The weights of the terms; 0 leaves a term out. ties: see the module. (Released: regression 0.2, pairs 1.)"""

    regression: float = 0.2
    pairs: float = 1.0
    zero: float = 0.0
    ranknet: float = 0.0
    ties: Ties = "skip"

    def __post_init__(self):
        weights = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ties"}
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise AddendaError(f"The weight of {name} must be a number of at least 0, got {weight!r}.")
        if not any(weights.values()):
            raise AddendaError(f"Every weight is 0: give {', '.join(weights)} at least one above 0.")
        if self.ties not in get_args(Ties):
            raise AddendaError(f"ties must be one of {', '.join(get_args(Ties))}, got {self.ties!r}.")

    @property
    def needs_pairs(self) -> bool:
        return self.pairs > 0

    def of_values(self, scores: Scores, values: Tensor, zero: Tensor | None = None) -> Tensor:
        """Return the loss, (), of N images of one query whose values (N) are known.

        zero: which of them are absolute zeros (N), where values are in other units than they were given in.
        """
        zero = values == 0 if zero is None else zero
        total = scores.values.new_zeros(())
        if self.regression:
            total = total + self.regression * torch.log1p(F.smooth_l1_loss(scores.values, values))
        if self.zero:
            total = total + self.zero * F.binary_cross_entropy_with_logits(scores.values, (~zero).float())
        target, known = self._ordered(values)
        first, second = known.nonzero(as_tuple=True)
        return total + self._of_pairs(scores, first, second, target[known])

    def of_comparisons(self, scores: Scores, better: Tensor, worse: Tensor) -> Tensor:
        """Return the loss, (), of comparisons: image better[k] is above worse[k], positions among N, both orders asked.

        The mean is over comparisons: of two that contradict each other the target is ½, and one that was made twice
        counts twice. Raises AddendaError where no term of the loss looks at pairs.
        """
        if not (self.pairs or self.ranknet):
            raise AddendaError("Comparisons want a loss that looks at pairs: give pairs or ranknet a weight above 0.")
        target = torch.arange(2, device=better.device).repeat_interleave(len(better)).eq(0).float()
        return self._of_pairs(scores, torch.cat([better, worse]), torch.cat([worse, better]), target)

    def _ordered(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the targets of all ordered pairs, N × N, and which of them are asked."""
        first, second = values[:, None], values[None]
        target = (first > second).float()
        if self.ties == "paper":
            return target, torch.ones_like(target, dtype=torch.bool)
        tied = first == second
        target = torch.where(tied, 0.5, target)
        diagonal = torch.eye(len(values), dtype=torch.bool, device=values.device)
        return target, ~(tied if self.ties == "skip" else diagonal)

    def _of_pairs(self, scores: Scores, first: Tensor, second: Tensor, target: Tensor) -> Tensor:
        """Return the loss of K ordered pairs. first, second: positions; target: 1 where the first is above."""
        total = scores.values.new_zeros(())
        if not len(target):
            return total
        if self.pairs:
            if scores.pairs is None:
                raise AddendaError(
                    "This loss looks at pairs, and the scores have none: call the adapter with pairs=True."
                )
            total = total + self.pairs * F.binary_cross_entropy_with_logits(scores.pairs[first, second], target)
        if self.ranknet:
            gaps = scores.values[first] - scores.values[second]
            total = total + self.ranknet * F.binary_cross_entropy_with_logits(gaps, target)
        return total
