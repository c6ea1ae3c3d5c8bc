"""LoLDU (Shi et al. 2024, arXiv:2410.13618): do tens of numbers move a model?

Claims. (1) r numbers between W's triangular factors do nearly as well as LoRA with many times as many. (2) A few of
them already do more than the head alone, and more of them do more. (3), not tested in the paper: the factors of the LDU
decomposition are the right directions, better than W's singular pairs or random ones with as many numbers.

Arms, on every linear layer (the paper: query and value, which move this model little): LoLDU with r = 1, 16, 64 and all
128, LoRA r = 16, and 64 fixed directions from the SVD or at random. The paper starts its headline row from random
numbers with nothing of W left in place; here, as in its ablation, the start is W.
"""

from itertools import pairwise

from recipes.common import Finding, compared, conclude, gap, options
from recipes.controls import means

BASE = "base"  # the encoder as it was, under a head fitted to its features
RANKS = (1, 16, 64, 128)
LORA, SVD, RANDOM = "lora:rank=16", "atoms:rank=64,basis=svd", "atoms:rank=64,basis=random"


def main() -> None:
    given = options(__doc__, "loldu")
    ldu = {r: f"loldu:rank={r}" for r in RANKS}
    arms = [*ldu.values(), LORA, SVD, RANDOM]
    record, found = compared(
        given,
        arms,
        "LoLDU: tens of numbers a layer",
        around={a: 1e-2 for a in ldu.values()} | {SVD: 3e-2, RANDOM: 3e-2},
    )
    most, few = ldu[RANKS[-1]], ldu[16]
    count = {k: m.trainable for k, m in record.config.methods.items()}
    table = means(record, found)
    rising = [gap(found, ldu[b], ldu[a]) for a, b in pairwise(RANKS)]
    findings = [
        Finding(
            "within 2 points of LoRA r = 16 or better (paper: ViT-B, 82.8 with 18 K numbers against 76.2 with 581 K)",
            f"LoLDU r = {RANKS[-1]} − LoRA: {gap(found, most, LORA).points()} ({count[most]:,} and {count[LORA]:,} "
            "numbers)",
            gap(found, most, LORA).above(-0.02),
        ),
        Finding(
            "tens of numbers a layer do more than the head alone",
            f"LoLDU r = 16 − head: {gap(found, few, BASE).points()}; r = 1 − head: "
            f"{gap(found, ldu[1], BASE).points()} ({count[few]:,} and {count[ldu[1]]:,} numbers)",
            gap(found, few, BASE).above(),
        ),
        Finding(
            "more of them do more",
            ", ".join(f"r {a} to {b}: {g.points()}" for (a, b), g in zip(pairwise(RANKS), rising, strict=True)),
            "does not hold" if any(g.above() == "does not hold" for g in rising) else gap(found, most, ldu[1]).above(),
        ),
        Finding(
            "LDU's directions are better than others with as many numbers (not tested in the paper)",
            f"LoLDU r = 64 − SVD pairs: {gap(found, ldu[64], SVD).points()}; − random pairs: "
            f"{gap(found, ldu[64], RANDOM).points()}",
            min((gap(found, ldu[64], SVD).above(), gap(found, ldu[64], RANDOM).above()), key=_order),
        ),
    ]
    conclude(given, "LoLDU, arXiv:2410.13618", findings, table)


def _order(verdict: str) -> int:
    return ["does not hold", "cannot tell", "holds"].index(verdict)


if __name__ == "__main__":
    main()
