"""LN tuning: only the weights and biases of normalisation layers are trained (Zhao et al. 2023, arXiv 2312.11420).

    y = γ ∘ normalised(x) + β        γ and β are trained copies, everything else is frozen

By default it goes to every module whose class is called …Norm (layer norms and RMS norms, the last one included); the
paper tunes those of attention blocks, for language models that learn to see, and trains connector, embedding and head
beside them (give also_train for these). It starts at the base's own values, so the start is exact.

Traps: decay by an optimizer of your own pulls γ to 0, not to the base (ours leave it out). PEFT lets one such adapter
act at a time; here the changes of several add up.

Cost: one or two numbers for each channel of a norm, a few thousandths of a percent of the model; no more time than the
base. Backward goes through the whole model all the same. Not for tasks that need new features: it weighs those there.
"""

from dataclasses import dataclass
from typing import ClassVar

from addenda.core.method.catalogue import register
from addenda.core.method.contract import Replace


@register(
    "ln-tuning",
    title="LN tuning",
    paper="Zhao et al. 2023, arXiv:2312.11420",
    equation="γ and β of every normalisation = trained copies",
    hypothesis="The features that a task needs are there; it is enough to weigh and shift channels between the layers.",
    family="dense",
    rate=1e-3,
    paper_setting="the norms of a language model that learns to see; the connector to its vision tower, the word "
    "embedding and the head are trained beside them (here norms only; paper, figure 1).",
)
@dataclass(frozen=True)
class LNTuning(Replace):
    """No options."""

    targets: ClassVar[str] = "norm"
