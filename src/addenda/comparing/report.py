"""The record as one page for people: `report.html`, self-contained; and as a table for the terminal.

The page asks for nothing but itself: CSS and plots (SVG from matplotlib, no pyplot state) are inline, no scripts.
Blue says "not beaten by any other method", vermilion says "diverged", everything else is ink; each is also said
in words. Accuracies are shown in percent, differences in points. Plots are in `figures.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from addenda.comparing.entries import Config, SearchRecord, TrialRecord, Validation, as_json
from addenda.comparing.forgetting import listing, told
from addenda.comparing.head import Head, head_of
from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.rows import rows_of, titles_of
from addenda.comparing.stats import Comparison, analyse
from addenda.comparing.words import count, duration, known, listed, lower, nats, percent, points, rate, size, whole
from addenda.core.base.visible import visible
from addenda.core.disk.access import path_of
from addenda.core.disk.atomic import write_atomically
from addenda.core.disk.place import check_free

SIGN = '<meta name="generator" content="addenda compare">'
_OLD = '<meta charset="utf-8">', "Written by addenda compare."  # of versions without the sign


def write_report(record_dir: str | Path) -> Path:
    """Write `report.html` into the record directory, whole or not at all; return its path.

    Raises AddendaError where such a file is there that this library has not written.
    """
    record = Record.read(path_of(record_dir, "the record"))
    check_free(record.path, {"report.html": is_report})
    file = record.path / "report.html"
    write_atomically(file, page(record).encode("utf-8", "backslashreplace"))
    return file


def is_report(file: Path) -> bool:
    """Return whether a file is a report of ours."""
    if not file.is_file():
        return False
    text = file.read_bytes()[: 64 << 20].decode("utf-8", errors="replace")
    return SIGN in text[:4096] or all(sign in text for sign in _OLD)


def page(record: Record) -> str:
    """Return the report as HTML."""
    import jinja2

    from addenda.comparing.figures import axis, curves, frontiers

    record = _printable(record)
    comparison = analyse(record)
    rows, head = rows_of(record, comparison), head_of(record, comparison)
    source = files("addenda.comparing").joinpath("report.html.j2").read_text(encoding="utf-8")
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters.update(
        percent=percent, points=points, count=count, nats=nats, size=size, duration=duration, known=known
    )
    return env.from_string(source).render(
        record=record,
        config=record.config,
        comparison=comparison,
        rows=rows,
        titles=titles_of(record),
        head=head,
        answer=answer(record, comparison),
        forgot=told(record, titles_of(record)),
        warnings=_warnings(record, comparison),
        search=_search(record),
        at_once=at_once(record),
        allowed=as_json(record.config.budget),
        spent=sum(t.seconds or 0 for t in record.trials),
        axis=axis(comparison),
        frontiers=frontiers(rows, comparison, head.choices),
        curves=curves(record, rows),
    )


def _printable(record: Record) -> Record:
    """Return the record with every text in it as it may be shown: what nobody can see or encode is spelt out."""

    def fit(value: Any) -> Any:
        if isinstance(value, dict):
            return {fit(k): fit(v) for k, v in value.items()}
        if isinstance(value, list):
            return [fit(v) for v in value]
        return visible(value) if isinstance(value, str) and not value.isprintable() else value

    trials = tuple(TrialRecord.of(fit(as_json(t))) for t in record.trials)
    return replace(record, config=Config.of(fit(as_json(record.config))), trials=trials)


def answer(record: Record, comparison: Comparison | None = None) -> str:
    """Return what the comparison found, in one sentence of plain words."""
    comparison = comparison or analyse(record)
    title, test = titles_of(record), comparison.test
    methods = [a for a in test if a in record.config.methods and a not in (FULL, HEAD)]
    lead = sorted(comparison.leaders, key=lambda a: -test[a].mean)
    names, scores = listed(title[a] for a in lead), listed(whole(test[a].mean) for a in lead)
    name = record.config.data.name
    where = f"On {'this task' if name is None else name}, {budget(record)},"
    if not methods:
        clauses = [f"{where} no method has finished yet"]
    elif not lead:
        clauses = [f"{where} every method that is not beaten by another diverged in some run"]
    elif len(methods) == 1:
        one = test[lead[0]]
        clauses = [f"{where} {names} reaches {whole(one.mean)} ({one.low * 100:.0f} to {whole(one.high)})"]
    elif len(lead) == 1:
        clauses = [f"{where} {names} leads with {scores}"]
    elif len(lead) == len(methods):
        both = "the two methods" if len(lead) == 2 else f"all {len(lead)} methods"
        clauses = [f"{where} {both} {_alike(lead, comparison)} ({names}: {scores})"]
    else:
        clauses = [f"{where} {names} lead and {_alike(lead, comparison)} ({scores})"]
    if comparison.control and methods:
        beat = [m for m in methods if comparison.beats(m, comparison.control)]
        worse = [m for m in methods if comparison.beats(comparison.control, m)]
        what = "the control" if comparison.control == HEAD else "the better base control"
        rival = f"{what} ({lower(title[comparison.control])}, {whole(test[comparison.control].mean)})"
        of = "it" if len(methods) == 1 else f"{len(beat)} of {len(methods)} methods"
        verb = "beats" if len(beat) == 1 or len(methods) == 1 else "beat"
        none = "it does not beat" if len(methods) == 1 else "none of them beats"
        clauses.append(f"{of} {verb} {rival}" if beat else f"{none} {rival}")
        if worse:
            clauses.append(f"{listed(title[m] for m in worse)} {'is' if len(worse) == 1 else 'are'} worse than it")
    if FULL in test and lead:
        best = comparison.pair(FULL, lead[0])
        how = {"full": "better than", None: "not told apart from"}.get(best.better if best else None, "worse than")
        clauses.append(f"full fine-tuning, the other control, gets {whole(test[FULL].mean)}, {how} {title[lead[0]]}")
    failed = [title[m] for m in methods if m in comparison.diverged]
    if failed:
        clauses.append(f"{listed(failed)} diverged in some run")
    return "; ".join(clauses) + "."


def _alike(arms: list[str], comparison: Comparison) -> str:
    """Return what holds of arms none of which beats another."""
    pairs = [comparison.pair(a, b) for a, b in combinations(arms, 2)]
    same = all(pair is not None and pair.verdict == "equivalent" for pair in pairs)
    return f"are equivalent within {comparison.margin * 100:g} points" if same else "cannot be told apart"


def summary(record: Record) -> Group:
    """Return what the terminal shows: the recommendation, the answer, the main table, what was forgotten."""
    record = _printable(record)
    comparison = analyse(record)
    head = head_of(record, comparison)
    forgot = listing(record, titles_of(record))
    below = [Text(), Text(visible(forgot))] if forgot else []
    return Group(*_told(head, answer(record, comparison)), Text(), _table(record, comparison), *below)


def _told(head: Head, found: str) -> Iterator[Text]:
    """Yield the head of a report in lines of a terminal; commands stand alone and are not broken, to be copied."""

    def line(text: str, style: str = "") -> Text:
        return Text(visible(text).replace("\N{NO-BREAK SPACE}", ""), style)

    def command(text: str) -> Text:
        return Text(visible(text), no_wrap=True, overflow="ignore")

    for advice in head.advice:
        yield line(advice.what, "bold")
        yield from map(line, advice.why)
        if advice.command:
            yield command(advice.command)
        yield Text()
    for said in (*head.verdicts, *head.left_out):
        yield line(f"- {said}")
    for power in head.power:
        yield line(f"- {power.sentence}")
        if power.command:
            yield command(f"  {power.command}")
    yield from map(line, head.notes)
    yield Text()
    yield line(found)


def _table(record: Record, comparison: Comparison) -> Table:
    """Return the main table, as narrow as 80 columns: of a name that is longer the lines are broken."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    rows = rows_of(record, comparison)
    ood = any(row.ood for row in rows)
    table.add_column("method", overflow="fold", min_width=12)
    for name in ("test % (95 %)", *["o.o.d. %"] * ood, "memory", "adapter", "time", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        test = row.test
        table.add_row(
            Text(visible(row.title + (" (diverged)" if row.diverged else ""))),
            f"{percent(test.mean)} ({percent(test.low)}–{percent(test.high)})" if test else "–",
            *[percent(row.ood.mean) if row.ood else "–"] * ood,
            *(size(row.peak_bytes), size(row.adapter_bytes), duration(row.train_seconds)),
            Text(visible(row.rate)),
            row.letters,
            style="bold" if row.leads else "dim" if row.control else "",
        )
    return table


def budget(record: Record) -> str:
    """Return the budget as a phrase: "at 40 steps"."""
    spent = record.config.budget
    value = (spent.steps or 0) if spent.value is None else spent.value
    if spent.kind == "seconds":
        return f"in {value:g} seconds of training"
    if spent.kind == "parameters":
        return f"at about {count(value)} trainable parameters"
    return f"at {round(value):,} steps"


def at_once(record: Record) -> list[str]:
    """Return which arms' runs were trained several at once, and why the others' were not, in sentences."""
    titles, grouped = titles_of(record), record.config.grouped
    if grouped is None:
        asked = (record.config.options or {}).get("grouped")
        return ["No: one run after another was asked for."] if asked is False else []
    alone: dict[str | None, list[str]] = {}
    told = []
    for arm, made in grouped.items():
        title = titles.get(arm, arm)
        if made.pays:
            faster = "" if made.ratio is None else f", {made.ratio:.1f} × as fast as one after another"
            told.append(f"{title}: up to {made.most}{faster}.")
        else:
            alone.setdefault(made.why, []).append(title)
    for why, names in alone.items():
        of = "No" if len(names) == len(grouped) else f"{listed(names)}: one after another"
        told.append(f"{of}{f': {why}' if why else ''}.")
    return told


@dataclass(frozen=True)
class _Cell:
    """The longest runs of an arm at one rate, their mean. won: final runs have that rate."""

    rate: str
    won: bool
    failed: bool
    steps: int | None
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class _Searched:
    """The search of one method. edge: the rate that won lies at an edge of those tried; void: why none has won."""

    title: str
    cells: list[_Cell]
    edge: bool
    void: str | None


@dataclass(frozen=True)
class _Search:
    """The searches of all methods. steps: of every cell, where they are alike; most: cells of the longest row."""

    methods: list[_Searched]
    kind: str
    steps: int | None
    most: int


def _search(record: Record) -> _Search:
    """Return what was tried per method: the longest run at each rate, which won, whether it lies at an edge."""
    methods, titles = [], titles_of(record)
    for arm, method in record.config.methods.items():
        tried = _tried(record.trials_of(arm, "search"))
        won = {t.rate for t in record.trials_of(arm, "final") if t.rate is not None}
        if not tried:
            continue
        cells = []
        for tried_rate, runs in sorted(tried.items()):
            looks, failed = [t.last_look or Validation() for t in runs], any(t.status != "ok" for t in runs)
            loss, accuracy = _mean([look.loss for look in looks]), _mean([look.accuracy for look in looks])
            cells.append(_Cell(rate(tried_rate), tried_rate in won, failed, runs[0].steps, loss, accuracy))
        edge = len(tried) == 1 or bool(won & {min(tried), max(tried)})
        methods.append(_Searched(titles[arm], cells, edge, method.void))
    search = record.config.search or SearchRecord()
    steps = {cell.steps for method in methods for cell in method.cells}
    return _Search(
        methods=methods,
        kind="search" if search.kind is None else search.kind,
        steps=steps.pop() if len(steps) == 1 else None,
        most=max((len(method.cells) for method in methods), default=0),
    )


def _tried(runs: list[TrialRecord]) -> dict[float, list[TrialRecord]]:
    """Return the longest runs of a search at each rate, one a seed."""
    tried: dict[float, list[TrialRecord]] = {}
    for t in sorted(runs, key=lambda t: -(t.steps or 0)):
        if t.rate is not None and (t.rate not in tried or tried[t.rate][0].steps == t.steps):
            tried.setdefault(t.rate, []).append(t)
    return tried


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _warnings(record: Record, comparison: Comparison) -> list[str]:
    """Return what a reader must know before believing the table."""
    search, titles, warnings = _search(record), titles_of(record), []
    if not search.methods:
        warnings.append(
            "No learning-rate search was done: one that did not tune per method says so. A method that does badly "
            "here may only have had the wrong rate."
        )
    edge = [method.title for method in search.methods if method.edge]
    if edge:
        warnings.append(
            f"The best rate found lies at the edge of what was tried for {listed(edge)}: one beyond it may be better."
        )
    for arm, method in record.config.methods.items():
        if method.void is not None:
            warnings.append(f"{titles[arm]} has no final runs: {method.void}.")
    for row in rows_of(record, comparison):
        if row.finished < row.wanted:
            warnings.append(f"{row.title}: {row.finished} of {row.wanted} runs have finished.")
    if record.ignored:
        warnings.append(f"Ignored, because half-written: {', '.join(record.ignored)}.")
    named = sorted(titles, key=len, reverse=True)
    for caveat in comparison.caveats:
        arm = next((a for a in named if caveat.startswith(f"{a}: ")), None)
        warnings.append(titles[arm] + caveat[len(arm) :] if arm else caveat)
    return warnings
