"""Serial adapters after attention and after the MLP (Houlsby et al. 2019, arXiv 1902.00751).

    o' = o + U f(D o + b) + c      o: what a block's attention, or its MLP, returns, before the residual is added

    h ── attention ── o ──┬───────────────┬── + h ── LayerNorm …      twice a block
                          └─ D ── f ── U ─┘

o is the output of the last linear layer of either part, before the model's own dropout. f is swish (silu) as in the
`adapters` library's `double_seq_bn`; the paper starts near the identity, here U = 0 makes the start exact.

reads="stream" reads, and so changes, the stream behind each sum: o' = o + U f(D (h + o) + b) + c. So does the release
of MoSA under Houlsby's name.

Cost: 2 (2 d r + r + d) numbers a block, and two adapters in series with everything: the input of the second depends on
the first. Not for merging: a non-linearity has no place in a weight.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from addenda.core.method.bottleneck import Bottleneck
from addenda.core.method.catalogue import register


@register(
    "houlsby",
    title="Bottleneck adapters (Houlsby)",
    paper="Houlsby et al. 2019, arXiv:1902.00751",
    equation="o' = o + U f(D o + b) + c, after attention and after the MLP",
    hypothesis="What a task needs is a small non-linear correction of what each part of a block returns.",
    family="hidden",
    rate=1e-3,
    paper_setting="BERT-large: widths of 8, 64 and 256, by task (here 64; 64 for all is the paper's other row), "
    "starts of N(0, 0.01²), in the release 0.001² (here exact), gelu in the release (here silu, as its successors), "
    "norms trained beside (paper, §3 and table 1).",
)
@dataclass(frozen=True)
class Houlsby(Bottleneck):
    """reads: what the part returns, or its sum with the residual. Others: see `core.method.bottleneck`."""

    targets: ClassVar[tuple[str, ...]] = ("attention", "mlp")
    activation: Literal["relu", "gelu", "silu"] = "silu"
    reads: Literal["output", "stream"] = "output"
