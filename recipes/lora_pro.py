"""LoRA-Pro (Wang et al. 2024, arXiv:2407.18242): do adjusted factor gradients close the gap to full fine-tuning?

Claims. (1) The direction in which the adjusted factors move W is closer to the full gradient than LoRA's own, at every
step. (2) At equal steps, each with a rate found for it, the training loss is ordered LoRA > LoRA-Pro ≥ full
fine-tuning. (3) The model is better than LoRA's in the end. And what it costs: two moments of W.

Arms, rank 8 on every linear layer of the encoder: LoRA with AdamW, with LoRA-Pro in its full and efficient modes and in
the full one with the step of A held to a tenth of its length (`trust=0.1`), and full fine-tuning. The first claim is
measured on six layers during 40 steps of LoRA, where one more backward gives the full gradient G; the direction of
LoRA-Pro is taken here from its definition in float64, P_B G + G P_A − P_B G P_A.
"""

import functools
import math
import statistics

import torch
from torch import Tensor

from addenda.comparing.arm import parse_arm
from addenda.comparing.record import Record
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings, attached
from addenda.data.batches import Collator, batches
from addenda.train.loss import score
from recipes.common import Finding, Interval, compared, conclude, gap, options, over_seeds, subject
from recipes.controls import means
from recipes.kept import Runs

LORA = "lora:rank=8"
FULL_MODE, EFFICIENT, HELD = (f"{LORA}@lora-pro:mode={m}" for m in ("full", "efficient", "full,trust=0.1"))
WATCHED = 6  # layers whose full gradient is taken
STEPS = 40
TAIL = 10  # last steps whose training loss counts


def main() -> None:
    given = options(__doc__, "lora_pro")
    arms = [LORA, FULL_MODE, EFFICIENT, HELD]
    around = {FULL_MODE: 5e-4, HELD: 5e-4, "full": 3e-4}
    record, found = compared(given, arms, "LoRA-Pro: nearer to full fine-tuning?", full=True, around=around)
    angles, on = [], functools.cache(lambda: subject(given.model))
    with Runs(given, dict(record.config.identity or {})) as runs:
        for seed in range(given.seeds):
            angles.append(runs.once(f"angles-{seed}", lambda s=seed: cosines(on(), s, min(STEPS, given.steps))))
    lower = [sum(p < o - 1e-6 for o, p in zip(a["lora"], a["pro"], strict=True)) for a in angles]
    nearer = over_seeds(statistics.mean(a["pro"]) - statistics.mean(a["lora"]) for a in angles)
    lora, pro = (statistics.mean(statistics.mean(a[k]) for a in angles) for k in ("lora", "pro"))
    loss = {arm: tail(record, arm) for arm in (*arms, "full")}
    down = {arm: over_seeds(x - y for x, y in zip(loss[LORA], loss[arm], strict=True)) for arm in loss}
    under = over_seeds(p - f for p, f in zip(loss[FULL_MODE], loss["full"], strict=True))
    cost = {arm: statistics.median(t.step_seconds or 0 for t in record.trials_of(arm, "final")) for arm in loss}
    findings = [
        Finding(
            "closer to the full gradient than LoRA's own direction, at every step",
            f"cosine with G, mean over {len(angles)} seeds of {len(angles[0]['pro'])} looks: LoRA {lora:.3f}, LoRA-Pro "
            f"{pro:.3f}; {nearer.mean:+.3f} ({nearer.low:+.3f} to {nearer.high:+.3f}); below in {sum(lower)} looks",
            nearer.above() if not sum(lower) else "does not hold",
        ),
        Finding(
            "training loss at equal steps: LoRA > LoRA-Pro ≥ full fine-tuning",
            f"last {TAIL} steps: " + ", ".join(f"{short(a)} {statistics.mean(v):.3f}" for a, v in loss.items())
            + f"; LoRA − LoRA-Pro (full mode) {plain(down[FULL_MODE])}, LoRA-Pro − full {plain(under)}",
            both(down[FULL_MODE], under),
        ),
        Finding(
            "better than LoRA in the end",
            f"full mode − LoRA: {gap(found, FULL_MODE, LORA).points()}; efficient − LoRA: "
            f"{gap(found, EFFICIENT, LORA).points()}; full fine-tuning − LoRA: {gap(found, 'full', LORA).points()}",
            gap(found, FULL_MODE, LORA).above(),
        ),
        Finding(
            "the first steps of A should be held (a question of ours, for the default of `trust`)",
            f"trust 0.1 − trust 1: {gap(found, HELD, FULL_MODE).points()} in accuracy; seconds a step: "
            + ", ".join(f"{short(a)} {s:.3f}" for a, s in cost.items()),
            gap(found, HELD, FULL_MODE).above(),
        ),
    ]  # fmt: skip
    conclude(given, "LoRA-Pro, arXiv:2407.18242", findings, means(record, found))


def cosines(on: Subject, seed: int, steps: int) -> dict:
    """Cosines with the full gradient of what LoRA's own and the adjusted gradients do to W, at every watched layer."""
    train, found = on.splits["train"], {"lora": [], "pro": []}
    collate = Collator(train.pad, train.kind)
    with attached(on, parse_arm(LORA), TrialSettings(batch=16), seed) as adapter:
        sites = [(path, t) for path, t in adapter.sites() if "A" in t.tensors()]
        sites = sites[:: max(1, len(sites) // WATCHED)][:WATCHED]
        weights = [on.model.get_submodule(path).weight.requires_grad_(True) for path, _ in sites]
        live = [p for p in adapter.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(live, lr=1e-3, weight_decay=0.0)
        for rows in batches(train.lengths, 16, steps, seed):
            score(on.model, collate([train[i] for i in rows]), train.kind).mean.backward()
            for (_, tensors), weight in zip(sites, weights, strict=True):
                p = tensors._parameters
                found["lora"].append(_cosine(_raw(p["B"], p["A"]), weight.grad))
                found["pro"].append(_cosine(_projected(p["B"], p["A"], weight.grad), weight.grad))
                weight.grad = None
            optimizer.step()
            optimizer.zero_grad()
        for weight in weights:
            weight.requires_grad_(False)
    return found


@torch.no_grad()
def _raw(B: Tensor, A: Tensor) -> Tensor:
    """B gA + gB A: how a step along LoRA's gradients moves W, up to its scale."""
    return B.double() @ A.grad.double() + B.grad.double() @ A.double()


@torch.no_grad()
def _projected(B: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """The nearest to G among all B Y + Z A."""
    G = G.double()
    rows = torch.linalg.qr(A.detach().double().T)[0]
    columns = torch.linalg.qr(B.detach().double())[0] if B.abs().max() > 0 else B.detach().double() * 0
    left = columns @ (columns.T @ G)
    return left + (G - left) @ rows @ rows.T


def _cosine(direction: Tensor, G: Tensor) -> float:
    return float((direction * G.double()).sum() / (direction.norm() * G.double().norm()).clamp_min(1e-30))


def tail(record: Record, arm: str) -> list[float]:
    """Mean training loss of the last steps, by seed."""
    runs = record.trials_of(arm, "final")
    return [statistics.mean(loss for _, loss in t.losses[-TAIL:]) if t.losses else math.inf for t in runs]


def both(down: Interval, under: Interval) -> str:
    """LoRA's loss above LoRA-Pro's, and LoRA-Pro's not below full fine-tuning's."""
    if down.above() == "holds" and under.high >= 0:
        return "holds" if under.low > 0 else "cannot tell of its second half"
    return down.above()


def short(arm: str) -> str:
    return {LORA: "LoRA", FULL_MODE: "LoRA-Pro full", EFFICIENT: "efficient", HELD: "trust 0.1"}.get(arm, arm)


def plain(x: Interval) -> str:
    return f"{x.mean:+.3f} ({x.low:+.3f} to {x.high:+.3f})"


if __name__ == "__main__":
    main()
