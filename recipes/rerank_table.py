"""The table of `recipes.rerank`, at 80 columns: by language the first stage, then every arm, then the claims."""

import textwrap
from collections.abc import Sequence
from statistics import fmean

from recipes.rerank_claims import Claim, Known, judgements, values, verdicts
from recipes.rerank_cost import KINDS
from recipes.rerank_setting import ARMS, CONTROLS, ENGLISH, FIRST, PART, Setting, part_of, slug

WIDTH = 80


def table(margin: float, claims: Sequence[Claim], known: Known, setting: Setting) -> list[str]:
    """Return the table of what is on record, a block in Markdown."""
    every = (ENGLISH, *setting.languages)
    both = {m: judgements(values(known, every, setting.seeds, m), margin, m) for m in ("AP", "nDCG@10")}
    lines = []
    for language in both["AP"]:
        control = known(f"control-{FIRST}-{language}") or {}
        told = (
            f"{language}: {control['documents']} documents, {len(control['queries'])} queries; {FIRST}'s recall at "
            f"{setting.depth} is {control['recall']:.3f}; {control['texts']:,} texts for a part to learn from"
        )
        lines += textwrap.wrap(told, WIDTH)
        lines.append(f"{'':<16}{'AP, 95 %':>20}{'nDCG@10, 95 %':>20}{'s':>8}{'ms':>7}{'KB':>9}")
        for name in (*CONTROLS, *ARMS):
            cells = [next((r for r in both[m][language].rows if r.arm == name), None) for m in both]
            if cells[0] is None or cells[1] is None:
                continue
            numbers = "".join(f"{r.mean:.3f} {r.low:.3f}–{r.high:.3f}".rjust(20) for r in cells if r)
            lines.append(f"{name:<16}{numbers}{_cost(known, name, language, setting)}"[:WIDTH].rstrip())
        lines.append("")
    for why in dict.fromkeys(f"{r.arm} {r.why}" for f in both["AP"].values() for r in f.rows if r.why):
        lines += [*textwrap.wrap(why + ".", WIDTH), ""]
    lines += _parts(known, every)
    for claim in verdicts(margin, claims, known, setting.languages, setting.seeds):
        lines += textwrap.wrap(claim, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return ["```", *lines, "```"] if lines else []


def _cost(known: Known, arm: str, language: str, setting: Setting) -> str:
    """Return seconds trained, milliseconds a query, and kilobytes; dashes for a control, which has none."""
    if arm in CONTROLS:
        return f"{'–':>8}{'–':>7}{'–':>9}"
    tasks = [t for t in (known(f"task-{slug(arm)}-{s}") for s in setting.seeds) if t]
    runs = [r for r in (known(f"judged-{slug(arm)}-{s}-{language}") for s in setting.seeds) if r]
    size = fmean(t["bytes"] for t in tasks) / 1000 if tasks else 0.0
    part = known(f"part-{part_of(arm)}-{language}") if arm.endswith(PART) else None
    size += part["bytes"] / 1000 if part else 0.0
    seconds = fmean(t["seconds"] for t in tasks) if tasks else 0.0
    return f"{seconds:>8.0f}{fmean(r['ms'] for r in runs):>7.0f}{size:>9.0f}"


def _parts(known: Known, languages: Sequence[str]) -> list[str]:
    lines = []
    for kind in KINDS:
        found = {x: known(f"part-{kind}-{x}") for x in languages}
        told = [f"{x} {p['seconds']:.0f} s" for x, p in found.items() if p]
        if told:
            words = f"A language's part of {kind}, trained once, beside what is above: {', '.join(told)}."
            lines += [*textwrap.wrap(words, WIDTH), ""]
    return lines
