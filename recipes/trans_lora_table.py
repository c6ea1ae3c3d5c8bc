"""The table of `recipes.trans_lora`, at 80 columns: every arm by task, acceptance by stage, costs, then the claims."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from addenda.statistics.intervals import quantile
from addenda.transferring.measures import gap_recovered
from recipes.trans_lora_claims import SEEDS, Claim, Records, verdicts

WIDTH = 80
WORDS = {
    "source": "source, with its adapter", "base": "target, without any", "real": "target, real labels",
    "real_inputs": "target, real inputs, teacher's", "filtered": "transferred (filtered)",
    "unfiltered": "transferred, unfiltered", "seeds": "the five seeds alone", "random": "random text",
    "words": "words of all kinds",
    "bare_teacher": "teacher without its adapter", "copied": "factors copied, no training",
    "projected": "projected, no training", "dora": "LoRA to DoRA", "svft": "SVFT to LoRA", "chain": "a chain of two",
    "from_copy": "distilled from the copy",
}  # fmt: skip


def table(margin: float, claims: Sequence[Claim], root: Path) -> list[str]:
    """Return the lines of what is on record below a folder."""
    from recipes.trans_lora import records_in

    lines: list[str] = []
    parts = {"toy": root / "toy"} | {f.name: f for f in sorted((root / "real").glob("*")) if (f / "runs").is_dir()}
    for name, folder in parts.items():
        records, part = records_in(folder), "toy" if name == "toy" else "real"
        if not records:
            continue
        lines += ["", f"**{name}**, {len(records)} of {SEEDS[part]} seeds", "", "```", *_arms(records)]
        lines += [*_stages(records), *_costs(records), "```", ""]
        for told in verdicts(part, margin, claims, records):
            lines += textwrap.wrap(f"- {told}", WIDTH, subsequent_indent="  ")
    return lines[1:] if lines else ["Nothing is on record yet."]


def _arms(records: Records) -> list[str]:
    arms = list(dict.fromkeys(a for r in records.values() for a in r["accuracies"]))
    arms.sort(key=lambda a: list(WORDS).index(a) if a in WORDS else len(WORDS))
    lines, means = [f"{'':<34}{'accuracy':>9}{'95 % over seeds':>22}{'g':>7}"], {}
    for arm in arms:
        values = [r["accuracies"][arm] for r in records.values() if arm in r["accuracies"]]
        means[arm] = fmean(values)
        low, high = (min(max(bound, 0.0), 1.0) for bound in _interval(values))  # an accuracy ends there
        bounds = f"{100 * low:.1f} to {100 * high:.1f}" if len(values) > 1 else "one seed"
        gap = None
        if {"base", "real"} <= means.keys() and arm not in ("base", "real", "source"):
            gap = gap_recovered(means[arm], means["base"], means["real"])
        lines.append(
            f"{WORDS.get(arm, arm):<34}{100 * means[arm]:>8.1f}%{bounds:>22}{'' if gap is None else f'{gap:.2f}':>7}"
        )
    return [line.rstrip() for line in lines]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    n = len(values)
    mean = fmean(values)
    if n < 2:
        return mean, mean
    half = quantile(0.975, n - 1) * (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
    return mean - half, mean + half


def _stages(records: Records) -> list[str]:
    """Return what was accepted, and what leaked."""
    known = [r for r in records.values() if "counts" in r]
    if not known:
        return []
    c = {k: sum(r["counts"][k] for r in known) for k in ("lines", "malformed", "repeats", "copies", "near_copies")}
    formed = c["lines"] - c["malformed"]
    new = formed - c["repeats"] - c["copies"] - c["near_copies"]
    passed = sum(r["passed"] for r in known)
    judged = sum(r["made"] for r in known)
    lines = [
        "",
        f"accepted: format {formed / c['lines']:.0%}, new {new / max(formed, 1):.0%}, discriminator "
        f"{passed / max(judged, 1):.0%}; it was right on {fmean(r['judge'] for r in known):.0%} held out",
    ]
    if all("support" in r for r in known):
        share = {k: fmean(r["support"][k] for r in known) for k in ("made", "passed")}
        lines.append(
            f"could be of the task: {share['made']:.1%} of what was made, {share['passed']:.1%} of what passed"
        )
    leaked = [sum(r[k][n] for r in known) for k in ("leaked", "leaked_inputs") for n in ("exact", "near")]
    of = sum(r["leaked"]["of"] for r in known)
    lines.append(
        f"leaked into {of:,} learned: of the seeds {leaked[0]} exactly, {leaked[1]} nearly; of training inputs "
        f"{leaked[2]}, {leaked[3]}"
    )
    return [w for line in lines for w in (textwrap.wrap(line, WIDTH) or [""])]


def _costs(records: Records) -> list[str]:
    stages: dict[str, float] = {}
    for record in records.values():
        for stage, seconds in record.get("seconds", {}).items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    told = ", ".join(f"{stage} {seconds / len(records):,.0f} s" for stage, seconds in stages.items())
    whole = f"a seed takes {sum(stages.values()) / len(records):,.0f} s: {told}; in all {_hours(stages)}"
    return textwrap.wrap(whole, WIDTH)


def _hours(stages: Mapping[str, Any]) -> str:
    total = sum(stages.values())
    return f"{total / 60:,.0f} min" if total < 2 * 3600 else f"{total / 3600:,.1f} h"
