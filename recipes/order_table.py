"""The table of `recipes.order`, at 80 columns: by size, every arm with what it was asked, then the claims."""

import textwrap
from collections.abc import Sequence
from statistics import fmean

from recipes.order_claims import OrderClaim, verdicts
from recipes.order_measured import Known, arms_of, contrast, pool_of, tested
from recipes.order_setting import ARMS, LEARNED, OTHER, QUERIES, SUBJECTS, Setting, run_name

WIDTH = 80
COLUMN = 20


def table(margin: float, claims: Sequence[OrderClaim], known: Known, setting: Setting) -> list[str]:
    """Return the table of what is on record, a block in Markdown."""
    lines: list[str] = []
    for subject in SUBJECTS:
        sizes = setting.images if subject == "mosaics" else (setting.few,)
        for images in sizes:
            lines += _block(known, subject, images, setting)
    for claim in verdicts(margin, claims, known, setting):
        lines += textwrap.wrap(claim, WIDTH, initial_indent="- ", subsequent_indent="  ")
    return ["```", *lines, "```"]


def _block(known: Known, subject: str, images: int, setting: Setting) -> list[str]:
    """Return the rows of a subject with so many rated images: mean Spearman with its interval, and seconds."""
    count = tested(known, subject, setting)
    cells: dict[str, dict[str, str]] = {}
    for group in QUERIES[subject]:
        of = arms_of(known, subject, images, group, setting.seeds)
        pool = pool_of(of)
        for arm, found in of.items():
            told = contrast(found, None, pool, (arm, arm), count)
            if told is None:
                continue
            low, high = told.interval()
            cells.setdefault(arm, {})[group] = f"{told.difference:.2f} {low:.2f} to {high:.2f}"
    if not cells:
        return []
    shown = [g for g in QUERIES[subject] if any(g in row for row in cells.values())]
    head = f"{subject}, {images} rated images a query, {count} test images: mean Spearman, 95 %"
    lines = [*textwrap.wrap(head, WIDTH)]
    for at in range(0, len(shown), 2):
        some = shown[at : at + 2]
        cost = at == 0
        lines.append(f"{'':<18}{''.join(f'{g:>{COLUMN + 2}}' for g in some)}{'s' * cost:>8}".rstrip())
        for arm in (*ARMS, OTHER):
            if not any(g in cells.get(arm, {}) for g in some):
                continue
            row = "".join(f"{cells[arm].get(g, '–'):>{COLUMN + 2}}" for g in some)
            seconds = _seconds(known, subject, arm, images, setting) if cost else ""
            lines.append(f"{arm:<18}{row}{seconds:>8}".rstrip())
    asked = "; ".join(f"{len(of)} {group}" for group, of in QUERIES[subject].items())
    return [*lines, *textwrap.wrap(f"Queries: {asked}; trained: {LEARNED[subject]}.", WIDTH), ""]


def _seconds(known: Known, subject: str, arm: str, images: int, setting: Setting) -> str:
    found = [r for s in setting.seeds if (r := known(run_name(subject, arm, images, s)))]
    return f"{fmean(r['seconds'] for r in found):.0f}" if found else ""
