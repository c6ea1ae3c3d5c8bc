"""python -m recipes --page FILE: every claim's verdict as it was and as it is, between the page's marks."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from recipes.claims import Claim, Claims, Measured, Verdict
from recipes.pool import Place
from recipes.store import Clock
from recipes.work import beside, gate, places, verdicts

BEFORE = "188f10b"  # the commit of the records that stand in the column "before"
OLD = Path("records/recipes")


def table(claims: Claims, root: Path, old: Path = OLD) -> list[str]:
    """Return the table of all claims, in the order of the file, one line a claim."""
    made = places(claims, root, Clock())
    for place in made.values():
        place.settle()
    lines = [
        f"| paper | claim | before ({BEFORE}) | now | measured | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for paper in claims.papers:
        for verdict in verdicts(claims.of(paper), claims, made).values():
            claim = verdict.claim
            cells = [paper, claim.words, before(claim, old), f"**{verdict.word}**", told(verdict), why(verdict)]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *gates(claims, made), *printed(claims, made)]


def printed(claims: Claims, made: Mapping[str, Place]) -> list[str]:
    """Return the contrasts beside those that decide, a line a claim: with 95 % intervals, and no verdict."""
    lines = []
    for claim in (c for c in claims.claims if c.kind == "measured"):
        found = beside(claim, made[claim.subject])
        if found:
            said = "; ".join(f"{words} {_interval(claim, m)}, {m.seeds} seeds" for words, m in found)
            lines.append(f"- {claim.id}: {said}.")
    return ["", "Printed beside them, not tested, with intervals that nothing corrects:", "", *lines] if lines else []


def gates(claims: Claims, made: Mapping[str, Place]) -> list[str]:
    """Return a line about each gate that was measured, and about each subject that was mended."""
    lines = []
    for name, where in claims.subjects.items():
        gain, failed = gate(name, claims, made)
        told = []
        if where.gate and not math.isnan(gain):
            said = "failed" if failed else "passed"
            wanted = f"{3 * where.delta:g} wanted"
            told.append(f"gate {said}, {where.gate[0]} {gain:+.1f} points over {where.gate[1]}, {wanted}")
        if where.mended:
            told.append(where.mended.words())
        if told:
            lines.append(f"- {name}: {'; '.join(told)}.")
    return lines


def before(claim: Claim, old: Path = OLD) -> str:
    """Return the verdict of the old table, with the first contrast that was measured; a dash where it had no row."""
    if claim.was is None:
        return "–"
    name, number = claim.was
    file = old / name / "verdict.json"
    if not file.exists():
        return "–"
    found = json.loads(file.read_text(encoding="utf-8"))["findings"][number]
    return f"{found['verdict']}: {found['measured'].partition(';')[0]}"


def why(verdict: Verdict) -> str:
    """Return why the verdict is what it is, and what was wrong with the old row, where something was."""
    return "; ".join(filter(None, (verdict.why, verdict.claim.mended and f"mended: {verdict.claim.mended}")))


def told(verdict: Verdict) -> str:
    """Return what was measured: the primary contrast with its 95 % interval, its margin, seeds and items."""
    claim, found = verdict.claim, verdict.measured
    if found is None:
        return ""
    seeds = f"{found.seeds} seeds, " if found.looks else ""
    paper = "" if claim.effect is None else f"; paper {claim.effect:+g}"
    return f"{_interval(claim, found)}, margin {claim.delta:g}; {seeds}{found.items:,} items{paper}"


def _interval(claim: Claim, found: Measured) -> str:
    low, high = found.interval()
    digits = 1 if claim.unit == "points" else 3
    unit = f" {claim.unit}" if claim.unit else ""
    return f"{found.difference:+.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f})"
