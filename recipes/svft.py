"""SVFT (Lingam et al. 2024, arXiv:2405.19597): does W's own singular basis buy accuracy for few numbers?

Claims. (1) A sparse M in W's singular basis does better than LoRA with as many numbers. (2) Its diagonal alone does
better than VeRA with more of them. (3), not tested in the paper: it is W's own basis that does it, since another
orthonormal basis, drawn at random, does worse with the same pattern.

Arms, on every linear layer: SVFT plain (k numbers a site), banded and random at the count of LoRA r = 1 and of r = 8,
LoRA, VeRA, the same band in a random basis, and the base, whose head was fitted to frozen features. Rates are searched
for every arm on the validation loss; the test set is looked at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from addenda.core.base.random import Stream
from addenda.core.method.catalogue import register
from addenda.core.method.contract import Params
from addenda.methods.svft import SVFT
from recipes.common import Finding, all_of, compared, conclude, gap, options
from recipes.controls import means

PLAIN, BAND_1, RANDOM_1, BAND_12 = (
    "svft",
    "svft:pattern=banded,band=1",
    "svft:pattern=random,band=1",
    "svft:pattern=banded,band=12",
)
LORA_1, LORA_8, VERA = "lora:rank=1", "lora:rank=8", "vera:rank=256"
ELSEWHERE = "random-basis:pattern=banded,band=1"


@register(
    "random-basis",
    title="SVFT in a random basis",
    paper="a control of ours",
    equation="ΔW = U M Vᵀ, U and V random and orthonormal",
    hypothesis="Any orthonormal basis will do, W's own no better than another.",
    family="spectral",
    rate=3e-2,
)
@dataclass(frozen=True)
class RandomBasis(SVFT):
    """SVFT's pattern and start between two orthonormal bases that do not depend on W."""

    def derive(self, W: Tensor, rng: Stream) -> Params:
        found, k = super().derive(W, rng), min(W.shape)
        for name, size in (("U", len(W)), ("Vt", W.shape[1])):
            basis = torch.linalg.qr(rng.normal(size, k).double())[0].to(W.dtype)
            found[name] = basis if name == "U" else basis.T.contiguous()
        return found


def main() -> None:
    given = options(__doc__, "svft")
    arms = [PLAIN, BAND_1, RANDOM_1, BAND_12, LORA_1, LORA_8, VERA, ELSEWHERE]
    record, found = compared(given, arms, "SVFT: accuracy against the number of trained numbers")
    pareto = [gap(found, BAND_1, LORA_1), gap(found, RANDOM_1, LORA_1), gap(found, BAND_12, LORA_8)]
    count = {k: m.trainable for k, m in record.config.methods.items()}
    numbers = f"{count[BAND_1]:,} and {count[LORA_1]:,} numbers"
    findings = [
        Finding(
            "better than LoRA at the same count (paper: Gemma-2B, 50.0 against 43.1 on GSM8K with 4 times fewer)",
            f"banded − LoRA r = 1: {pareto[0].points()}; random − LoRA r = 1: {pareto[1].points()} ({numbers}); "
            f"banded − LoRA r = 8: {pareto[2].points()}",
            all_of(p.above() for p in pareto),
        ),
        Finding(
            "plain SVFT is better than VeRA with more numbers (paper: Gemma-2B, 40.3 against 36.8)",
            f"plain − VeRA: {gap(found, PLAIN, VERA).points()} ({count[PLAIN]:,} and {count[VERA]:,} numbers)",
            gap(found, PLAIN, VERA).above(),
        ),
        Finding(
            "W's own basis is what does it (not tested in the paper)",
            f"own − random basis, banded: {gap(found, BAND_1, ELSEWHERE).points()}",
            gap(found, BAND_1, ELSEWHERE).above(),
        ),
    ]
    conclude(given, "SVFT, arXiv:2405.19597", findings, means(record, found))


if __name__ == "__main__":
    main()
