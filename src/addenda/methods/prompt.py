"""Prompt tuning: trained embeddings in front of every example (Lester et al. 2021, arXiv 2104.08691).

    e'_j = e_j + P_j   for the first `places` tokens, at the output of the input embeddings

A hidden method does not lengthen sequences: the places are tokens of the batch, and their embeddings are where the
prompt starts (`core.method.first_tokens` says how to make such a batch, and what holds behind a cache). That is the
paper's start from the embeddings of words; its other one, random, is a choice of P_j.

With an encoder and a decoder the prompt is in front of what the encoder reads.

Cost: places · d numbers in all, and as many places of the context. Learns slowly, wants a high learning rate, and
catches up with other methods only on large models, as the paper says. Not for models that embed images.
"""

from dataclasses import dataclass
from typing import ClassVar

from addenda.core.method.catalogue import register
from addenda.core.method.first_tokens import Leading


@register(
    "prompt",
    title="Prompt tuning",
    paper="Lester et al. 2021, arXiv:2104.08691",
    equation="e'_j = e_j + P_j for the first tokens j, which hold the prompt's place",
    hypothesis="The model can do the task already; it only needs to be told, in words that need not exist.",
    family="hidden",
    rate=1e-1,
    paper_setting="T5: 100 places (here 16), Adafactor at rate 0.3; the release starts them uniform in ±0.5 by "
    "default and has files for words of the vocabulary and for class labels (release's configurations).",
)
@dataclass(frozen=True)
class Prompt(Leading):
    """places: how many tokens the prompt takes."""

    targets: ClassVar[str] = "embedding"
    one_side: ClassVar[bool] = True
