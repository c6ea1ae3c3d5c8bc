"""The record as one page for people: `report.html`, self-contained; and as a table for the terminal.

The page asks for nothing but itself: CSS and plots (SVG from matplotlib, no pyplot state) are inline, no scripts.
Blue says "not beaten by any other method", vermilion says "diverged", everything else is ink; each is also said
in words. Accuracies are shown in percent, differences in points. Plots are in `figures.py`.
"""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from addenda.comparing.record import FULL, HEAD, Record
from addenda.comparing.stats import Comparison, analyse
from addenda.comparing.words import count, duration, listed, lower, percent, points, rate, size, whole
from addenda.core.base.visible import visible
from addenda.core.disk.access import path_of
from addenda.core.disk.atomic import write_atomically
from addenda.core.disk.place import check_free

SIGN = '<meta name="generator" content="addenda compare">'
_OLD = '<meta charset="utf-8">', "Written by addenda compare."  # of versions without the sign


def write_report(record_dir: str | Path) -> Path:
    """Write `report.html` into the record directory, whole or not at all; returns its path.

    Raises AddendaError where such a file is there that this library has not written.
    """
    record = Record.read(path_of(record_dir, "the record"))
    check_free(record.path, {"report.html": is_report})
    file = record.path / "report.html"
    write_atomically(file, page(record).encode())
    return file


def is_report(file: Path) -> bool:
    """Whether a file is a report of ours."""
    if not file.is_file():
        return False
    text = file.read_bytes()[: 64 << 20].decode("utf-8", errors="replace")
    return SIGN in text[:4096] or all(sign in text for sign in _OLD)


def page(record: Record) -> str:
    """The report as HTML."""
    import jinja2

    from addenda.comparing.figures import axis, curves, scatters

    record = _printable(record)
    found = analyse(record)
    rows = _rows(record, found)
    source = files("addenda.comparing").joinpath("report.html.j2").read_text(encoding="utf-8")
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters.update(percent=percent, points=points, count=count, size=size, duration=duration)
    return env.from_string(source).render(
        record=record,
        config=record.config,
        found=found,
        rows=rows,
        titles=_titles(record),
        answer=answer(record, found),
        warnings=_warnings(record, found),
        search=_search(record),
        budget=budget(record),
        spent=sum(t.get("seconds") or 0 for t in record.trials),
        axis=axis(found),
        scatters=scatters(rows, found, _titles(record)),
        curves=curves(record, rows),
    )


def _printable(record: Record) -> Record:
    """The record with every text in it, names too, as it may be shown: what nobody can see or encode is spelt out."""

    def fit(value: Any) -> Any:
        if isinstance(value, dict):
            return {fit(k): fit(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(fit, value))
        return visible(value) if isinstance(value, str) and not value.isprintable() else value

    return replace(record, config=fit(record.config), trials=fit(record.trials))


def answer(record: Record, found: Comparison | None = None) -> str:
    """What the comparison found, in one sentence of plain words."""
    found = found or analyse(record)
    title, test = _titles(record), found.test
    methods = [a for a in test if a in record.config["methods"] and a not in (FULL, HEAD)]
    lead = sorted(found.leaders, key=lambda a: -test[a].mean)
    names, scores = listed(title[a] for a in lead), listed(whole(test[a].mean) for a in lead)
    where = f"On {record.config['data'].get('name', 'this task')}, {budget(record)},"
    if not methods:
        said = [f"{where} no method has finished yet"]
    elif not lead:
        said = [f"{where} every method that is not beaten by another diverged in some run"]
    elif len(methods) == 1:
        one = test[lead[0]]
        said = [f"{where} {names} reaches {whole(one.mean)} ({one.low * 100:.0f} to {whole(one.high)})"]
    elif len(lead) == 1:
        said = [f"{where} {names} leads with {scores}"]
    elif len(lead) == len(methods):
        both = "the two methods" if len(lead) == 2 else f"all {len(lead)} methods"
        said = [f"{where} {both} cannot be told apart ({names}: {scores})"]
    else:
        said = [f"{where} {names} lead and cannot be told apart ({scores})"]
    if found.control and methods:
        beat = [m for m in methods if found.beats(m, found.control)]
        worse = [m for m in methods if found.beats(found.control, m)]
        what = "the control" if found.control == HEAD else "the better base control"
        rival = f"{what} ({lower(title[found.control])}, {whole(test[found.control].mean)})"
        of = "it" if len(methods) == 1 else f"{len(beat)} of {len(methods)} methods"
        verb = "beats" if len(beat) == 1 or len(methods) == 1 else "beat"
        none = "it does not beat" if len(methods) == 1 else "none of them beats"
        said.append(f"{of} {verb} {rival}" if beat else f"{none} {rival}")
        if worse:
            said.append(f"{listed(title[m] for m in worse)} {'is' if len(worse) == 1 else 'are'} worse than it")
    if FULL in test and lead:
        best = found.pair(FULL, lead[0])
        how = {"full": "better than", None: "not told apart from"}.get(best.better if best else None, "worse than")
        said.append(f"full fine-tuning, the other control, gets {whole(test[FULL].mean)}, {how} {title[lead[0]]}")
    failed = [title[m] for m in methods if m in found.diverged]
    if failed:
        said.append(f"{listed(failed)} diverged in some run")
    return "; ".join(said) + "."


def summary(record: Record) -> Table:
    """The main table for the terminal; print `answer(record)` under it."""
    record = _printable(record)
    found = analyse(record)
    table = Table(
        title=Text(visible(record.config["title"])), title_justify="left", box=None, header_style="dim", pad_edge=False
    )
    table.add_column("method")
    for name in ("trainable", "adapter", "step", "memory", "test %", "95 %", "o.o.d. %", "rate", ""):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in _rows(record, found):
        test, ood = row["test"], row["ood"]
        table.add_row(
            Text(visible(row["title"] + (" (diverged)" if row["diverged"] else ""))),
            *(count(row["trainable"]), size(row["adapter_bytes"]), duration(row["step_seconds"])),
            size(row["peak_bytes"]),
            percent(test.mean) if test else "–",
            f"{percent(test.low)}–{percent(test.high)}" if test else "–",
            percent(ood.mean) if ood else "–",
            Text(visible(row["rate"])),
            row["letters"],
            style="bold" if row["leads"] else "dim" if row["control"] else "",
        )
    return table


def budget(record: Record) -> str:
    """ "at 40 steps": the budget as a phrase."""
    b = record.config["budget"]
    value = b.get("value") if b.get("value") is not None else b.get("steps")
    if b.get("kind") == "seconds":
        return f"in {value:g} seconds of training"
    if b.get("kind") == "parameters":
        return f"at about {count(value)} trainable parameters"
    return f"at {round(value):,} steps"


def _titles(record: Record) -> dict[str, str]:
    names = {t["method"]: t["method"] for t in record.trials} | {m: m for m in record.config["methods"]}
    shots = {m: m.removeprefix("base").strip() for m in names if m.startswith("base")}
    base = {m: f"Base, {s or 'zero-shot'}" for m, s in shots.items()}
    return names | base | {m: c.get("title", m) for m, c in record.config["methods"].items()}


def _rows(record: Record, found: Comparison) -> list[dict[str, Any]]:
    """One row per arm, fitted methods by accuracy first, then the controls; unfinished ones are there too."""
    titles, rows = _titles(record), []
    controls = [a for a in dict.fromkeys(t["method"] for t in record.trials) if a not in record.config["methods"]]
    for arm in [*record.config["methods"], *controls]:
        config = record.config["methods"].get(arm, {})
        trials = [t for t in record.trials_of(arm) if t["stage"] != "search"]
        of = {
            name: [t[name] for t in trials if t.get(name) is not None]
            for name in ("trainable", "adapter_bytes", "step_seconds", "peak_bytes", "rate")
        }
        rates = dict.fromkeys(rate(r) for r in sorted(of["rate"]))
        rows.append(
            {
                "arm": arm,
                "title": titles[arm],
                "hypothesis": config.get("hypothesis", ""),
                "options": ", ".join(f"{k} {v}" for k, v in (config.get("options") or {}).items()),
                "control": arm in (FULL, HEAD) or arm not in record.config["methods"],
                "leads": arm in found.leaders,
                "diverged": found.diverged.get(arm, ()),
                "finished": len(trials),
                "wanted": len(record.config["seeds"]) if config else 1,
                "notes": [t["note"] for t in trials if t.get("note")],
                "trainable": config.get("trainable", of["trainable"][0] if of["trainable"] else None),
                "adapter_bytes": max(of["adapter_bytes"], default=None),
                "step_seconds": median(of["step_seconds"]) if of["step_seconds"] else None,
                "peak_bytes": max(of["peak_bytes"], default=None),
                "rate": ", ".join(rates) or "–",
                "test": found.test.get(arm),
                "ood": found.ood.get(arm),
                "letters": found.letters.get(arm, ""),
            }
        )
    return sorted(rows, key=lambda r: (r["control"], -(r["test"].mean if r["test"] else -1)))


def _search(record: Record) -> dict[str, Any]:
    """Per method what was tried: at each rate the longest run, which rate won, whether it lies at an edge."""
    methods, titles = [], _titles(record)
    for arm in record.config["methods"]:
        tried = {t["rate"]: t for t in record.trials_of(arm, "search")}  # the longest run at a rate comes last
        won = {t["rate"] for t in record.trials_of(arm, "final") if t.get("rate") is not None}
        if not tried:
            continue
        cells = []
        for tried_rate, t in tried.items():
            last = t["validation"][-1][1] if t.get("validation") else {}
            cells.append(
                {
                    "rate": rate(tried_rate),
                    "won": tried_rate in won,
                    "failed": t["status"] != "ok",
                    "steps": t.get("steps"),
                    "loss": last.get("loss"),
                    "accuracy": last.get("accuracy"),
                }
            )
        edge = len(tried) == 1 or bool(won & {min(tried), max(tried)})
        methods.append({"title": titles[arm], "cells": cells, "edge": edge})
    kind = (record.config.get("search") or {}).get("kind", "search")
    steps = {c["steps"] for m in methods for c in m["cells"]}
    return {
        "methods": methods,
        "kind": kind,
        "steps": steps.pop() if len(steps) == 1 else None,
        "most": max((len(m["cells"]) for m in methods), default=0),
    }


def _warnings(record: Record, found: Comparison) -> list[str]:
    """What a reader must know before believing the table."""
    search, titles, said = _search(record), _titles(record), []
    if not search["methods"]:
        said.append(
            "No learning-rate search was done: one that did not tune per method says so. A method that does badly "
            "here may only have had the wrong rate."
        )
    edge = [m["title"] for m in search["methods"] if m["edge"]]
    if edge:
        said.append(
            f"The best rate found lies at the edge of what was tried for {listed(edge)}: one beyond it may be better."
        )
    for row in _rows(record, found):
        if row["finished"] < row["wanted"]:
            said.append(f"{row['title']}: {row['finished']} of {row['wanted']} runs have finished.")
    if record.ignored:
        said.append(f"Ignored, because half-written: {', '.join(record.ignored)}.")
    named = sorted(titles, key=len, reverse=True)
    for caveat in found.caveats:
        arm = next((a for a in named if caveat.startswith(f"{a}: ")), None)
        said.append(titles[arm] + caveat[len(arm) :] if arm else caveat)
    return said
