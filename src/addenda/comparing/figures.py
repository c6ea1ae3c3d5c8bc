"""The plots of the report: SVG text from matplotlib, no pyplot state, labels beside what they name."""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from addenda.comparing.choose import OF, Choice, Cost, in_words
from addenda.comparing.entries import TrialRecord
from addenda.comparing.record import Record
from addenda.comparing.rows import Row
from addenda.comparing.stats import Comparison, Estimate
from addenda.comparing.words import tick

INK, GREY, PALE, BLUE, WARM = "#23272f", "#6b7280", "#d5d8dd", "#0b62a4", "#b3400a"
FONT = FontProperties(family="DejaVu Sans")
AXES: dict[Cost, str] = {
    "memory": "Peak memory above the loaded model", "size": "File of the adapter", "time": "Training time of one run",
}  # fmt: skip
PIXEL = 1 / 96  # inches: a figure of w × h pixels shows its text at the size it was set in
Box = tuple[float, float, float, float]  # left, bottom, right, top, in points


@dataclass(frozen=True)
class Plot:
    """One figure of the page. row: the arm it is about, if it is about one."""

    title: str
    svg: Markup
    row: Row | None = None


def axis(comparison: Comparison) -> tuple[float, float]:
    """Return common limits for the test accuracies on the page; a diverged arm's interval may leave them."""
    sound = [e for arm, e in comparison.test.items() if arm not in comparison.diverged] or list(
        comparison.test.values()
    )
    low, high = min(e.low for e in sound), max(e.high for e in sound)
    low = min([low, *(e.mean for e in comparison.test.values())])
    margin = max(0.04 * (high - low), 0.005)
    return max(low - margin, -0.01), min(high + margin, 1.01)


def frontiers(rows: list[Row], comparison: Comparison, choices: Mapping[Cost, Choice]) -> list[Plot]:
    """Draw accuracy against each cost: the band of the margin below the best, the frontier, a ring round the chosen.

    The frontier is the highest accuracy that a method or a fitted control reaches at a cost or less.
    """
    plots = []
    tested = [(r, r.test) for r in rows if r.test]
    fitted = [(r, test) for r, test in tested if r.arm in comparison.letters and not r.arm.startswith("base")]
    base = [(r.title, test.mean) for r, test in tested if (r, test) not in fitted]
    for cost, label in AXES.items():
        measured = [(r, test, OF[cost](r)) for r, test in fitted]
        shown = [(r, test, value) for r, test, value in measured if value is not None and value > 0]
        if not shown:
            continue
        x, chosen = np.array([value for _, _, value in shown], dtype=float), choices[cost]
        figure = Figure(figsize=(345 * PIXEL, 290 * PIXEL))
        ax = figure.add_axes((0.115, 0.085, 0.83, 0.905))
        log = bool(x.max() > 8 * x.min())
        if log:
            ax.set_xscale("log")
            wide = (x.max() / x.min()) ** 0.3
            ax.set_xlim(x.min() / wide, x.max() * wide)
        else:
            ax.set_xlim(max(0, x.min() - 0.35 * (np.ptp(x) or x.min())), x.max() + 0.35 * (np.ptp(x) or x.max() or 1))
        ax.set_ylim(*axis(comparison))
        _bare(ax, lambda v, cost=cost: in_words(cost, v))
        ax.yaxis.set_major_formatter(_percent)
        if chosen.best is not None:
            top = comparison.test[chosen.best].mean
            ax.axhspan(top - chosen.margin / 100, top, color=BLUE, alpha=0.1, lw=0, zorder=0)
        taken = _base_lines(ax, base)
        taken += _frontier(ax, [(value, test.mean) for r, test, value in shown if not r.diverged])
        for r, test, value in shown:
            color = WARM if r.diverged else BLUE if r.leads else INK
            ax.vlines(value, test.low, test.high, color=color, lw=1, alpha=0.3 if r.diverged else 0.6)
            face = "white" if r.control or r.diverged else color
            ax.plot(value, test.mean, marker="X" if r.diverged else "o", ms=6, mfc=face, mec=color)
            if r.arm == chosen.arm:
                ax.plot(value, test.mean, marker="o", ms=12, mfc="none", mec=BLUE, mew=1.3)
                taken.append(_around(ax, value, test.mean, 8))
        names = [(r.title + " ✓" * (r.arm == chosen.arm), v, e, BLUE if r.leads else INK) for r, e, v in shown]
        _labels(ax, names, taken)
        alt = f"Accuracy against {label[:1].lower()}{label[1:]}" + (f"; chosen: {chosen.title}" if chosen.arm else "")
        plots.append(Plot(label + " (log)" * log, _svg(figure, cost, alt)))
    return plots


def _frontier(ax: Axes, points_: Sequence[tuple[float, float]]) -> list[Box]:
    """Draw the highest accuracy that is reached at a cost or less, as steps to the right end; return where they are."""
    best, line = -math.inf, []
    for value, mean in sorted(points_, key=lambda p: (p[0], -p[1])):
        if mean > best:
            best = mean
            line.append((value, mean))
    if not line:
        return []
    line.append((ax.get_xlim()[1], best))
    ax.plot(*zip(*line, strict=True), drawstyle="steps-post", color="#9aa1ab", lw=0.9, zorder=1)
    flat, steep = [], []
    for (x, y), (following, up) in pairwise(line):
        (left, low), (right, high) = _around(ax, x, y, 1)[:2], _around(ax, following, up, 1)[2:]
        flat.append((left, low, right, low + 2))
        steep.append((right - 2, low, right, high))
    return [*flat, *steep]


def _around(ax: Axes, x: float, y: float, radius: float) -> Box:
    """Return the box around a place in the plot, in points."""
    left, bottom = ax.transData.transform((x, y)) * 72 / ax.figure.dpi
    return left - radius, bottom - radius, left + radius, bottom + radius


def _base_lines(ax: Axes, base: list[tuple[str, float]]) -> list[Box]:
    """Draw a dashed line for each control without training, named at its right end; return where the names stand.

    A name stands on its line; where the line above is too near for that, under it.
    """
    scale, boxes = 72 / ax.figure.dpi, []
    for title, mean in sorted(base, key=lambda b: -b[1]):
        ax.axhline(mean, color=GREY, lw=0.8, dashes=(4, 3), zorder=0)
        right, y = ax.transAxes.transform((1, 0))[0] * scale, ax.transData.transform((0, mean))[1] * scale
        width = _width(title, 7)
        places = [(right - width, y + up, right, y + up + 8) for up in (2.5, -10, -18.5, -27)]
        box = next((p for p in places if not _overlap(p, boxes)), places[-1])
        boxes.append(box)
        ax.annotate(
            title,
            (1, mean),
            (0, box[1] - y),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            size=7,
            color=GREY,
            ha="right",
            va="bottom",
            parse_math=False,
        )
    return boxes


def _width(text: str, points: float) -> float:
    """Return the width of a text, in points, in a wide font: the reader's may be narrower."""
    return TextPath((0, 0), text.replace("$", r"\$"), size=points, prop=FONT).get_extents().width if text else 0.0


def _overlap(box: Box, others: list[Box]) -> float:
    """Return the area of a box that others cover."""
    sides = ((min(box[2], o[2]) - max(box[0], o[0]), min(box[3], o[3]) - max(box[1], o[1])) for o in others)
    return sum(max(0.0, w) * max(0.0, h) for w, h in sides)


def _labels(ax: Axes, marks: list[tuple[str, float, Estimate, str]], taken: Sequence[Box] = ()) -> None:
    """Name each mark near it, where the name covers least of the marks, intervals and other names.

    taken: boxes that are written on already.
    """
    scale = 72 / ax.figure.dpi  # everything below is in points
    at = np.array([ax.transData.transform((x, e.mean)) * scale for _, x, e, _ in marks])
    ends = [[ax.transData.transform((x, y))[1] * scale for y in (e.low, e.high)] for _, x, e, _ in marks]
    frame = np.asarray(ax.get_window_extent().extents) * scale
    dots = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    bars = [(x - 1, low, x + 1, high) for (x, _), (low, high) in zip(at, ends, strict=True)]
    names: list[Box] = list(taken)
    for i in np.argsort(-at[:, 1]):
        name, x, estimate, color = marks[i]
        width, places = _width(name, 7.5), []
        for dy in sorted(range(-78, 79, 6), key=abs):
            for far in (7, 14, 24, 40, 60):
                for left in (False, True):
                    start = at[i, 0] + (-far - width if left else far)
                    box = (start, at[i, 1] + dy - 4.5, start + width, at[i, 1] + dy + 4.5)
                    outside = sum(max(0, frame[k] - box[k]) + max(0, box[k + 2] - frame[k + 2]) for k in (0, 1))
                    covered = 15 * _overlap(box, dots + names) + 6 * _overlap(box, bars)
                    cost = abs(dy) + 1.5 * (far - 7) + left + covered + 500 * outside
                    places.append((cost, left, far, dy, box))
        _, left, far, dy, box = min(places)
        names.append(box)
        line = {"arrowstyle": "-", "lw": 0.5, "color": "#a8adb5", "shrinkA": 0, "shrinkB": 3}
        ax.annotate(
            name,
            (x, estimate.mean),
            (-far if left else far, dy),
            textcoords="offset points",
            size=7.5,
            color=color,
            ha="right" if left else "left",
            va="center",
            arrowprops=line if abs(dy) > 7 or far > 7 else None,
            parse_math=False,
        )


def _curve(ax, line: np.ndarray, own: Row | None, failed: bool, dotted: bool) -> None:
    """Draw one run (steps × 2): of the row itself, or pale behind it. What has failed is drawn in its own row alone."""
    if own is not None:
        color = WARM if failed else BLUE if own.leads else INK
        ax.plot(*line.T, color=color, lw=1.1, zorder=3, marker="." if dotted else None, ms=4)
    elif not failed:
        ax.plot(*line.T, color=PALE, lw=0.6, zorder=2, marker=None, ms=4)


def curves(record: Record, rows: list[Row]) -> list[Plot]:
    """Draw per method: training loss and validation, a line per seed, before the pale lines of all other runs."""
    runs = {r.arm: record.trials_of(r.arm, "final") for r in rows}
    series = {arm: [(t, thin(t.losses), _validation(t)) for t in ts] for arm, ts in runs.items() if ts}
    every = [s for ss in series.values() for s in ss]
    sound = [s for s in every if s[0].status == "ok"] or every
    limits, measured = [], _validation_name(record)
    for k in (1, 2):
        y = np.concatenate([np.asarray(s[k])[:, 1] for s in sound]) if sound else np.zeros(0)
        limits.append(_limits(y[np.isfinite(y)], accuracy=k == 2 and measured.endswith("accuracy")))
    plots = []
    for r in rows:
        if r.arm not in series or limits == [None, None]:
            continue
        shown = [k for k in (0, 1) if limits[k]]
        figure = Figure(figsize=(250 * PIXEL, (110 * len(shown) + 20) * PIXEL))
        axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        figure.subplots_adjust(0.15, 0.14, 0.97, 0.93, hspace=0.3)
        for ax, k in zip(axes, shown, strict=True):
            for arm, of_arm in series.items():
                own = r if arm == r.arm else None
                for t, *lines in of_arm:
                    _curve(ax, lines[k], own, failed=t.status != "ok", dotted=bool(k) and len(lines[k]) < 12)
            ax.set_ylim(*limits[k])
            _bare(ax, steps=True)
            ax.set_title("training loss" if k == 0 else measured, size=7.5, color=GREY, loc="right", pad=2)
            if k and measured.endswith("accuracy"):
                ax.yaxis.set_major_formatter(_percent)
        axes[-1].set_xlabel("step", size=7.5, color=GREY, labelpad=1)
        alt = f"Learning curves of {r.title}"
        plots.append(Plot(r.title, _svg(figure, f"curve{len(plots)}", alt), r))
    return plots


def _limits(y: np.ndarray, accuracy: bool) -> tuple[float, float] | None:
    """Return the range of an axis that shows these values: never so small that whole ticks would read alike."""
    if not len(y):
        return None
    low, high = float(y.min()), float(y.max())
    least = 0.08 if accuracy else max(0.05, 0.01 * abs(high))
    missing = max(0.0, least - (high - low)) / 2
    low, high = low - missing, high + missing
    if accuracy:  # between 0 and 1, with room for a mark at either end
        shift = max(0.0, -low) - max(0.0, high - 1)
        low, high = low + shift, high + shift
    span = high - low
    return low - 0.06 * span, high + 0.1 * span


@FuncFormatter
def _percent(value: float, _: int | None = None) -> str:
    """Return a share in percent, with decimals where it has some, and no sign at zero."""
    return f"{round(100 * value, 1) + 0.0:g} %"


def _validation_name(record: Record) -> str:
    looks = [look for t in record.trials_of(stage="final") for _, look in t.validation or ()]
    return "validation accuracy" if any(look.accuracy is not None for look in looks) else "validation loss"


def _validation(trial: TrialRecord) -> np.ndarray:
    looks = trial.validation or ()
    counted = any(look.accuracy is not None for _, look in looks)
    return thin([(step, look.accuracy if counted else look.loss) for step, look in looks])


def thin(series: Sequence[Sequence[float | None]] | None, most: int = 200) -> np.ndarray:
    """Return [[step, value], …] as an array of at most `most` rows, neighbours averaged; null becomes nan (a gap)."""
    points_ = np.array([[s, np.nan if v is None else v] for s, v in series or []], dtype=float).reshape(-1, 2)
    if len(points_) <= most:
        return points_
    return np.array([part.mean(0) for part in np.array_split(points_, most)])


def _bare(ax: Axes, unit=None, steps: bool = False) -> None:
    """Draw no box, few ticks, small grey figures. steps: the horizontal axis counts, in whole numbers."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(PALE)
    ax.tick_params(labelsize=7.5, labelcolor=GREY, color=PALE, length=2.5, pad=2)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if ax.get_xscale() == "log":
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=steps))
    if unit:
        ax.xaxis.set_major_formatter(lambda v, _: tick(unit(v)))


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    """Return the figure as inline SVG: text stays text, ids are its own, nothing in it points outside the page."""
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts draw the text, not matplotlib's
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', lambda m: f'<svg role="img" {m[1]}>', svg, count=1)
    return Markup(svg.replace(">", f"><title>{Markup.escape(alt)}</title>", 1))
