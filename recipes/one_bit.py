"""1-bit adapters (Jie et al. 2023, arXiv:2307.16867): of the same bytes, many numbers in 1 bit or few in 32?

Claims. (1) A 1-bit adapter of width 8h is more accurate than one of width h/4 in full precision, which takes as many
bytes. (2) It loses less than a point to the adapter of its own width in full precision, at a 32nd of the bytes.
(3) Both hold for LoRA too (Bi-LoRA). (4), of the paper's method: the gradient through mean and deviation is better than
the plain straight-through one.

Arms with h = 4: AdaptFormer beside the MLPs without biases, of width 32 in 1 bit, 1 and 32 in full precision, and 16 in
2 bits and 8 in 4 bits, which are as many bytes again; LoRA on every linear layer likewise (the paper has it on queries
and values alone). s = 1: the paper searches s for every data set, here the learning rate is searched for every arm.
GELU in the place of ReLU in all arms: a width of 1 with ReLU can be dead from the start. The head was fitted to frozen
features beforehand and stays in full precision.
"""

from recipes.common import Finding, all_of, compared, conclude, gap, options
from recipes.controls import means

WIDE, NARROW = 32, 1  # in 1 bit, in 32 bits: the same bytes
FAMILIES = {"AdaptFormer": "adaptformer:scale=1.0,bias=false,activation=gelu,rank={}", "LoRA": "lora:rank={}"}
PAPER = {"AdaptFormer": 77.0, "LoRA": 76.7}
BETWEEN = {2: 16, 4: 8}  # bits: width
LOSS = -0.01  # what 1 bit may lose, as a share of right answers


def arm(family: str, rank: int, bits: int | None = None, **more: str) -> str:
    few = {} if bits is None else {"bits": bits}
    return FAMILIES[family].format(rank) + "".join(f",{k}={v}" for k, v in (few | more).items())


def main() -> None:
    given = options(__doc__ or "", "one_bit", seeds=5)
    plain = arm("AdaptFormer", WIDE, 1, ste="plain")
    between = [arm("AdaptFormer", rank, bits) for bits, rank in BETWEEN.items()]
    arms = [a for f in FAMILIES for a in (arm(f, WIDE, 1), arm(f, NARROW), arm(f, WIDE))] + between + [plain]
    record, found = compared(given, arms, "1-bit adapters: accuracy at equal bytes and at equal width")
    findings = []
    size = {a: record.trials_of(a, "final")[0].adapter_bytes for a in arms}
    for family in FAMILIES:
        one, narrow, wide = arm(family, WIDE, 1), arm(family, NARROW), arm(family, WIDE)
        same_bytes, same_width = gap(found, one, narrow), gap(found, one, wide)
        findings += [
            Finding(
                f"{family}: width {WIDE} in 1 bit is better than width {NARROW} in 32 bits, of as many bytes "
                f"(paper: {PAPER[family]} on VTAB-1K for width {WIDE} in 1 bit)",
                f"1 bit − 32 bits: {same_bytes.points()} (files of {size[one]:,} and {size[narrow]:,} bytes, headers "
                "included)",
                same_bytes.above(),
            ),
            Finding(
                f"{family}: 1 bit loses less than a point to full precision at equal width",
                f"1 bit − 32 bits: {same_width.points()} ({size[one]:,} and {size[wide]:,} bytes)",
                same_width.above(LOSS),
            ),
        ]
    one = arm("AdaptFormer", WIDE, 1)
    said = "; ".join(
        f"1 bit − {bits} bits: {gap(found, one, a).points()}" for bits, a in zip(BETWEEN, between, strict=True)
    )
    findings += [
        Finding(
            "1 bit is at least as good as 2 and 4 bits of as many bytes, within a point",
            said,
            all_of(gap(found, one, a).above(LOSS) for a in between),
        ),
        Finding(
            "the gradient through mean and deviation is better than the plain straight-through one (not in the paper)",
            f"through − plain: {gap(found, one, plain).points()}",
            gap(found, one, plain).above(),
        ),
    ]
    conclude(given, "1-bit adapters, arXiv:2307.16867", findings, means(record, found))


if __name__ == "__main__":
    main()
