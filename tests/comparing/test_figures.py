"""The plots: names stand where they can be read, and ticks say different things."""

import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from tests.comparing.test_report import build

from addenda.comparing import figures
from addenda.comparing.entries import Validation
from addenda.comparing.rows import rows_of
from addenda.comparing.stats import Estimate, analyse


def scatter(marks, base=(), size=(345, 290)):
    """The axes of one plot with these marks (title, x, mean, half of the interval) and base lines (title, mean)."""
    figure = Figure(figsize=[s * figures.PIXEL for s in size])
    ax = figure.add_axes((0.115, 0.085, 0.83, 0.905))
    xs = [x for _, x, _, _ in marks]
    ax.set_xlim(min(xs) - 0.35 * (np.ptp(xs) or 1), max(xs) + 0.35 * (np.ptp(xs) or 1))
    ax.set_ylim(-0.01, 1.0)
    lines = figures._base_lines(ax, list(base))
    named = [(title, x, Estimate(mean, mean - half, mean + half, (), 1), "k") for title, x, mean, half in marks]
    figures._labels(ax, named, lines)
    return ax


def boxes(ax):
    """Where matplotlib itself draws each text, lines to marks left out."""
    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    ax.figure.draw(renderer)
    return {t.get_text(): Text.get_window_extent(t, renderer) for t in ax.texts}


CROWDS = {
    "two beside each other": [("LoRA", 1.0, 0.5, 0.1), ("MiSS (Bone)", 1.02, 0.49, 0.1)],
    "all at one place": [(f"method {i}", 1.0, 0.5, 0.1) for i in range(8)],
    "a row": [(f"LoRA rank {2**i}", 1 + 0.05 * i, 0.5, 0.2) for i in range(6)],
    "a column": [(f"SVFT band {i}", 1.0, 0.3 + 0.02 * i, 0.05) for i in range(10)],
    "at the edges": [("left of all others", 0.0, 0.99, 0.01), ("right of all others", 9.0, 0.0, 0.01)],
    "of one": [("$x_1$ and a % sign", 3.0, 0.5, 0.0)],
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("base", [(), [("Base, zero-shot", 0.02), ("Base, 8-shot", 0.03), ("Base, 4-shot", 0.031)]])
def test_no_name_covers_another_name_or_a_mark(crowd, base):
    ax = scatter(CROWDS[crowd], base)
    placed = boxes(ax)
    assert len(placed) == len(CROWDS[crowd]) + len(base)
    names = list(placed)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            one, two = placed[a], placed[b]
            wide = min(one.x1, two.x1) - max(one.x0, two.x0)
            high = min(one.y1, two.y1) - max(one.y0, two.y0)
            assert min(wide, high) < 2.0, f"{a} and {b} are printed over each other"  # pixels: gaps between glyphs
        for title, x, mean, _ in CROWDS[crowd]:
            px, py = ax.transData.transform((x, mean))
            assert not placed[a].padded(-1).contains(px, py), f"{a} is printed over the mark of {title}"
        frame = ax.get_window_extent()
        assert placed[a].x0 > frame.x0 - 3
        assert placed[a].x1 < frame.x1 + 12


@pytest.mark.parametrize("steps", [2, 3, 5, 7, 40, 1000])
def test_steps_are_whole_numbers(steps):
    figure = Figure()
    ax = figure.subplots()
    ax.plot([1, steps], [0, 1])
    figures._bare(ax, steps=True)
    assert all(t == round(t) for t in ax.get_xticks())


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [0.0, 0.002], [0.994, 1.0], [0.31, 0.36], [0, 1]]
)
def test_ticks_of_an_accuracy_read_differently_and_are_no_less_than_zero(values):
    figure = Figure(figsize=(250 * figures.PIXEL, 110 * figures.PIXEL))
    ax = figure.subplots()
    low, high = figures._limits(np.array(values), accuracy=True)  # pyright: ignore[reportGeneralTypeIssues]
    assert low <= min(values)
    assert max(values) <= high
    ax.set_ylim(low, high)
    figures._bare(ax)
    ticks = [figures._percent(t) for t in ax.get_yticks() if low <= t <= high]
    assert len(set(ticks)) == len(ticks) >= 2
    assert not any(t.startswith(("-", "−")) for t in ticks)


def test_curves_of_a_run_that_learns_nothing_have_a_readable_axis(tmp_path):
    record, flat = build(tmp_path), Validation(loss=1.0, accuracy=0.0)
    trials = [replace(t, validation=tuple((step, flat) for step, _ in t.validation or ())) for t in record.trials]
    record = replace(record, trials=tuple(trials))
    rows = [row for row in rows_of(record, analyse(record)) if row.arm == "lora"]
    (curve,) = figures.curves(record, rows)
    percents = re.findall(r">(\S+) %<", curve.svg)
    assert len(set(percents)) == len(percents) >= 2
    assert "-0" not in percents
