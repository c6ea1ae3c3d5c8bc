"""Prefix tuning: trained keys and values in front of every example, in every layer (Li & Liang 2021, arXiv 2101.00190).

    k'_j = k_j + P_j,   v'_j = v_j + P'_j   for the first `places` tokens, at every key and value projection

A hidden method does not lengthen sequences: the places are tokens of the batch (`core.method.first_tokens` says how to
make one). In a causal model these come first and see only each other, so their k_j and v_j do not depend on the
example, and k_j + P_j is as free as a prefix of its own: the same functions as the paper's, at the cost of carrying the
places through the layers. Where tokens see both ways the k_j depend on the example, and this is not quite the paper's.
Keys are changed before a rotation of positions. What holds behind a cache is in `core.method.first_tokens`. The paper's
two-layer network that makes the prefix while training is left out. With an encoder and a decoder the places are in
front of what the encoder reads, and only its own attention has a prefix; the paper's has another in the decoder.

Cost: 2 places · d numbers a layer, and as many places of the context. Not for models that keep queries, keys and
values in one layer: name the layers that are there, or take "prompt".
"""

from dataclasses import dataclass
from typing import ClassVar

from addenda.core.method.catalogue import register
from addenda.core.method.first_tokens import Leading


@register(
    "prefix",
    title="Prefix tuning",
    paper="Li & Liang 2021, arXiv:2101.00190",
    equation="k'_j = k_j + P_j, v'_j = v_j + P'_j for the first tokens j, in every layer",
    hypothesis="The model can do the task already; every layer only needs a few more things to look at.",
    family="hidden",
    rate=3e-2,
    paper_setting="10 places for tables by its script's default, 5 in its command for WebNLG, 200 for summaries "
    "(here 16), trained through an MLP of width 512, 800 for summaries, that is dropped afterwards (here directly), "
    "rate 5e-5 (release's README and scripts).",
)
@dataclass(frozen=True)
class Prefix(Leading):
    """places: how many tokens the prefix takes."""

    targets: ClassVar[tuple[str, ...]] = ("key", "value")
    one_side: ClassVar[bool] = True
