"""What is learned of a group of rows, such as the documents of one query: losses on one score a row.

| loss | of one group, s the scores, y the labels, t a teacher's scores |
| --- | --- |
| `pointwise` | mean of −[y > 0] log σ(s) − [y ≤ 0] log(1 − σ(s)): every row alone |
| `pairwise` | mean of log(1 + e^(s_j − s_i)) over the pairs with y_i > y_j (RankNet, Burges et al. 2005) |
| `listwise` | −Σ_i (y_i / Σ y) log softmax(s)_i: the relevant share the mass (ListNet, Cao et al. 2007) |
| `distill` | T² KL(softmax(t / T) ‖ softmax(s / T)) (Hinton et al. 2015) |
| `margins` | mean of ((s_i − s_j) − (t_i − t_j))² over the pairs with y_i > y_j (Hofstätter et al. 2020) |

A group is a row of an index (G × M): the positions of its rows in a batch of N, −1 behind the last. All functions are
pure, of any floating dtype, and return the loss of each group, (G). A label below 0 counts as 0. A group without a pair
(`pairwise`, `margins`) or a relevant row (`listwise`) has the loss 0, and no gradient. Nothing is read back from a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from addenda.core.base.errors import AddendaError, nearest

LossName = Literal["pointwise", "pairwise", "listwise", "distill", "margins"]
TAUGHT = ("distill", "margins")  # those that want a teacher's scores


def pointwise(scores: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of each group's rows; ln 2 where all scores are 0."""
    s, there = _laid(scores, group)
    y = _laid(labels, group)[0] > 0
    each = F.binary_cross_entropy_with_logits(s, y.to(s), reduction="none")
    return _mean(each, there, (1,))


def pairwise(scores: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """Return the mean loss of each group's pairs of a better and a worse row; ln 2 where all scores are equal."""
    s, there = _laid(scores, group)
    better = _better(_laid(labels, group)[0], there)
    return _mean(F.softplus(s[:, None, :] - s[:, :, None]), better, (1, 2))


def listwise(scores: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """Return the cross-entropy of each group's scores with its labels as shares of one."""
    s, there = _laid(scores, group)
    y = _laid(labels, group)[0].clamp(min=0).to(s) * there
    share = y / y.sum(1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
    return -(share * _log_softmax(s, there)).sum(1)


def distill(scores: Tensor, teacher: Tensor, group: Tensor, temperature: float = 1.0) -> Tensor:
    """Return how far each group's scores are from a teacher's, as distributions over its rows."""
    s, there = _laid(scores, group)
    t = _laid(teacher, group)[0].to(s)
    p, q = (_log_softmax(x / temperature, there) for x in (t, s))
    return temperature**2 * (p.exp() * there * (p - q)).sum(1)


def margins(scores: Tensor, labels: Tensor, teacher: Tensor, group: Tensor) -> Tensor:
    """Return the mean square by which each group's differences of scores differ from a teacher's."""
    s, there = _laid(scores, group)
    better = _better(_laid(labels, group)[0], there)
    off = s - _laid(teacher, group)[0].to(s)
    return _mean((off[:, :, None] - off[:, None, :]).square(), better, (1, 2))


@dataclass(frozen=True)
class RankingLoss:
    """A loss of this module by name, as the `objective` of groups. temperature: of `distill`.

    Raises AddendaError for an unknown name, and for a temperature that is not positive or that nobody reads.
    """

    name: LossName
    temperature: float = 1.0

    def __post_init__(self):
        names = get_args(LossName)
        if self.name not in names:
            raise AddendaError(f"There is no loss {self.name!r}.{nearest(self.name, names)} Give {' or '.join(names)}.")
        if not 0 < self.temperature < float("inf"):
            raise AddendaError(f"The temperature of a distillation is a positive number, got {self.temperature!r}.")
        if self.temperature != 1.0 and self.name != "distill":
            raise AddendaError(f"temperature= is for the loss 'distill'; {self.name!r} has none. Leave it out.")

    @property
    def taught(self) -> bool:
        """Whether it learns from a teacher's scores."""
        return self.name in TAUGHT

    def __call__(self, scores: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        labels, group = batch["labels"], batch["group"]
        if self.name == "distill":
            return distill(scores, batch["teacher"], group, self.temperature)
        if self.name == "margins":
            return margins(scores, labels, batch["teacher"], group)
        return {"pointwise": pointwise, "pairwise": pairwise, "listwise": listwise}[self.name](scores, labels, group)


def _laid(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the values of every group's rows, 0 where there is none; whether there is one), (G × M) both."""
    there = group >= 0
    return values[group.clamp(min=0)].masked_fill(~there, 0), there


def _better(labels: Tensor, there: Tensor) -> Tensor:
    """Return which row is better than which other of its group, (G × M × M)."""
    y = labels.clamp(min=0)
    return (y[:, :, None] > y[:, None, :]) & there[:, :, None] & there[:, None, :]


def _mean(each: Tensor, counted: Tensor, dims: tuple[int, ...]) -> Tensor:
    return each.masked_fill(~counted, 0).sum(dims) / counted.sum(dims).clamp(min=1)


def _log_softmax(s: Tensor, there: Tensor) -> Tensor:
    """Return the logarithm of each group's softmax, 0 where there is no row."""
    return F.log_softmax(s.masked_fill(~there, -torch.inf), 1).masked_fill(~there, 0)
