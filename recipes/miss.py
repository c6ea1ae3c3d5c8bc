"""Bone and MiSS (Kang et al. 2024, arXiv:2409.15371): faster convergence than LoRA for the same number of numbers?

Claims. (1) At equal counts, with a rate found for each, MiSS reaches a training loss in fewer steps than LoRA. (2) It
takes less memory and less time a step than LoRA, and LoRA less than BAT (the weight-guided form). (3) It ends with the
better model: the paper's tables, which train all methods at one rate that is too low for LoRA.

Arms, on every linear layer of the encoder: LoRA r = 8, MiSS and BAT with r = 16, which is the same count here. The loss
to be reached is the one at which the slowest of the two arrives in the end, so that both reach it.
"""

import statistics

from addenda.comparing.record import Record
from recipes.common import Finding, Interval, compared, conclude, gap, options, over_seeds
from recipes.controls import means

LORA, MISS, BAT = "lora:rank=8", "miss:rank=16", "bat:rank=16"
SMOOTH = 10  # steps of a running mean


def main() -> None:
    given = options(__doc__, "miss")
    record, found = compared(given, [LORA, MISS, BAT], "MiSS: convergence at equal counts")
    level, steps = arrivals(record)
    share = over_seeds(m / lo for m, lo in zip(steps[MISS], steps[LORA], strict=True))
    runs = [record.trials_of(arm, "final") for arm in (MISS, LORA, BAT)]
    time = [statistics.median(t.step_seconds or 0 for t in of_arm) for of_arm in runs]
    memory = [statistics.median(t.peak_bytes or 0 for t in of_arm) for of_arm in runs]
    findings = [
        Finding(
            "reaches a training loss in fewer steps than LoRA",
            f"loss {level:.3f} after {statistics.mean(steps[MISS]):.0f} steps against "
            f"{statistics.mean(steps[LORA]):.0f}: {share.mean:.2f} of LoRA's ({share.low:.2f} to {share.high:.2f})",
            Interval(1 - share.mean, 1 - share.high, 1 - share.low).above(),
        ),
        Finding(
            "time and memory of a step: MiSS < LoRA < BAT",
            f"seconds {time[0]:.3f}, {time[1]:.3f}, {time[2]:.3f}; MB above the model "
            f"{memory[0] / 1e6:.0f}, {memory[1] / 1e6:.0f}, {memory[2] / 1e6:.0f} (not interleaved: "
            "docs/speed.md has the measured ratios)",
            "holds" if time == sorted(time) and memory == sorted(memory) else "cannot tell",
        ),
        Finding(
            "the better model in the end (paper: Llama-2-7B, 48.2 against 40.8 on GSM8K, one rate for all)",
            f"MiSS − LoRA: {gap(found, MISS, LORA).points()}; BAT − LoRA: {gap(found, BAT, LORA).points()}",
            gap(found, MISS, LORA).above(),
        ),
    ]
    conclude(given, "MiSS, arXiv:2409.15371", findings, means(record, found))


def arrivals(record: Record) -> tuple[float, dict[str, list[int]]]:
    """The loss that every run of LoRA and MiSS reaches, and after how many steps each does, by arm and seed."""
    curves = {arm: [_smooth([loss for _, loss in t.losses or ()]) for t in record.trials_of(arm, "final")]
              for arm in (LORA, MISS)}  # fmt: skip
    level = max(min(curve) for found in curves.values() for curve in found)
    first = {arm: [next(i for i, loss in enumerate(c) if loss <= level) + SMOOTH for c in found]
             for arm, found in curves.items()}  # fmt: skip
    return level, first


def _smooth(losses: list[float]) -> list[float]:
    width = min(SMOOTH, len(losses))
    return [statistics.mean(losses[i : i + width]) for i in range(len(losses) - width + 1)]


if __name__ == "__main__":
    main()
