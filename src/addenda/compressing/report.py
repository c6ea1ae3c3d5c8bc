"""What a compression did, as compress.json and README.md in its folder: ranks, parameters kept, errors, speed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from addenda.compressing.measure import compared
from addenda.core.base.errors import AddendaError
from addenda.core.base.markdown import code, fenced
from addenda.core.disk.access import path_of, read_json, shown
from addenda.core.disk.atomic import write_atomically
from addenda.core.site.targets import grouped
from addenda.reducing.ranks import Layer, Ranks


@dataclass(frozen=True)
class Report:
    """What a compression did. layers: one entry for each candidate (rank None: stays dense); dense: why others do.

    alone: by type of layer, the harm (`measure.harm`) where only that type is compressed. speeds: tokens a second.
    memory: bytes at the peak above the loaded model, or None where it cannot be seen.
    """

    source: str
    settings: dict[str, Any]
    dtype: str
    calibration: str
    tokens: int
    judged: int
    before: dict[str, Any]
    after: dict[str, Any]
    sizes: dict[str, dict[str, int]]
    alone: dict[str, float]
    speeds: dict[str, dict[str, float]]
    layers: list[dict[str, Any]]
    dense: dict[str, str]
    notes: list[str]
    versions: dict[str, Any]
    hardware: dict[str, Any]
    seconds: float
    stages: dict[str, float]
    memory: int | None

    @property
    def kept(self) -> float:
        """The share of the chosen layers' parameters that is left."""
        return sum(x["parameters"] for x in self.layers) / sum(x["m"] * x["n"] for x in self.layers)

    @property
    def kept_of_model(self) -> float:
        return self.sizes["compressed"]["parameters"] / self.sizes["dense"]["parameters"]

    def __str__(self) -> str:
        s = self.settings
        lines = [
            f"{s['how']}, ranks by {s['allocate']}: parameters kept {self.kept:.1%} of the layers, "
            f"{self.kept_of_model:.1%} of the model ({self.sizes['dense']['parameters']:,} to "
            f"{self.sizes['compressed']['parameters']:,}; {_mib(self.sizes['dense'])} to "
            f"{_mib(self.sizes['compressed'])} MiB)",
            f"{compared(self.before, self.after)} on {self.judged:,} tokens apart",
        ]
        if verdicts := self.before.get("passed"):
            passes = [sum(why == "passed" for why in x["passed"].values()) for x in (self.before, self.after)]
            lines.append(f"HumanEval, passed at once: {passes[0]} of {len(verdicts)} dense, {passes[1]} compressed")
        for phase in self.speeds.get("dense", ()):
            a, b = self.speeds["dense"][phase], self.speeds["compressed"][phase]
            lines.append(f"{phase}: {a:,.0f} tokens/s dense, {b:,.0f} compressed ({b / a:.2f} ×)")
        after, before = (sum(x[k] for x in self.layers) for k in ("multiplications", "dense_multiplications"))
        lines.append(
            f"multiplications a token in these layers: {before / 1e6:,.1f} M dense, {after / 1e6:,.1f} M compressed"
        )
        lines += ["", *_table(self.layers, self.alone, "perplexity" in self.before), ""]
        lines += [f"dense: {pattern}: {why}" for pattern, why in self._left()]
        lines += self.notes
        stages = ", ".join(f"{k} {v:.0f} s" for k, v in self.stages.items())
        memory = "" if self.memory is None else f", {self.memory / 2**20:,.0f} MiB above the model"
        lines.append(f"{self.tokens:,} tokens of {self.calibration}; {self.seconds:.0f} s ({stages}){memory}")
        return "\n".join(lines)

    def _left(self) -> list[tuple[str, str]]:
        lines = []
        for why in dict.fromkeys(self.dense.values()):
            paths = grouped(p for p, w in self.dense.items() if w == why)
            lines.append((", ".join(f"{g} ({len(p)})" if len(p) > 1 else g for g, p in paths.items()), why))
        dense = grouped(x["path"] for x in self.layers if x["rank"] is None)
        why = "chosen, but dense is the best use of the budget"
        return lines + [(f"{g} ({len(p)})", why) for g, p in dense.items()]


def rows_of(
    layers: Sequence[Layer], given: Ranks, errors: dict[str, float], uses: dict[str, float]
) -> list[dict[str, Any]]:
    """Return one entry for each candidate, as a report holds it. multiplications, and as many additions: a token.

    uses: rows that each layer sees for a token, whatever the budget has counted.
    """
    rows = []
    for x in layers:
        rank = given[x.path]
        stored, calls = x.cost(rank) / x.uses, uses[x.path]
        rows.append({
            "path": x.path, "m": x.m, "n": x.n, "rank": rank, "parameters": round(stored),
            "kept": stored / (x.m * x.n), "multiplications": calls * stored,
            "dense_multiplications": calls * x.m * x.n, "error": 0.0 if rank is None else errors[x.path],
        })  # fmt: skip
    return rows


def _table(layers: list[dict[str, Any]], alone: dict[str, float], causal: bool, bar: str = "  ") -> list[str]:
    """Return lines by type of layer. rank: lowest, median and highest of those that are low rank."""
    harm = "perplexity, alone" if causal else "outputs moved, alone"
    head = ("layers", "of", "full rank", "rank", "parameters kept", "multiplications kept", "output error", harm)
    rows: list[tuple[str, ...]] = [head]
    by_path = {x["path"]: x for x in layers}
    for pattern, paths in grouped(by_path).items():
        entries = [by_path[p] for p in paths]
        low = sorted(x["rank"] for x in entries if x["rank"] is not None)
        spread = f"{low[0]}-{median(low):.0f}-{low[-1]}" if len(set(low)) > 1 else str(low[0]) if low else "dense"
        share = sum(x["parameters"] for x in entries) / sum(x["m"] * x["n"] for x in entries)
        products = sum(x["multiplications"] for x in entries) / sum(x["dense_multiplications"] for x in entries)
        fraction = f"{len(low)} of {len(entries)}"
        full = str(min(entries[0]["m"], entries[0]["n"]))
        shape = f"{entries[0]['m']} × {entries[0]['n']}"
        error = mean(x["error"] for x in entries)
        worse = f"{alone[pattern]:+.2%}" if pattern in alone else ""
        rows.append(
            (f"{pattern} ({shape})", fraction, full, spread, f"{share:.1%}", f"{products:.1%}", f"{error:.4f}", worse)
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return [bar.join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def write_report(folder: Path, report: Report) -> None:
    """Write compress.json and README.md into a folder."""
    text = json.dumps(asdict(report), indent=1, ensure_ascii=False, default=str)
    write_atomically(folder / "compress.json", text.encode("utf-8", "replace"))
    name = code(Path(report.source).name)
    lines = [
        f"# {name}, with low-rank layers",
        "",
        f"Made of {name} by `addenda compress`. transformers reads it without remote code where addenda is imported:",
        "",
        "```python",
        "import addenda",
        "from transformers import AutoModelForCausalLM",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "```",
        "",
        "`addenda compress --model FOLDER --how dense --out OTHER` multiplies the factors out: no addenda needed then.",
        "",
        *fenced(report),
        "",
        "The licence is that of the model it was made of.",
    ]
    write_atomically(folder / "README.md", "\n".join(lines).encode())


def read_report(folder: str | Path) -> Report:
    """Read the report in a folder that `compress` has written. Raises AddendaError where it is none, or damaged."""
    file = path_of(folder) / "compress.json"
    content = read_json(file)
    try:
        report = Report(**content)
        _ = str(report), report.kept, report.kept_of_model  # every field of it is looked at
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise AddendaError(f"{shown(file)} is no report of a compression: {str(error)[:200]}.") from None
    return report


def _mib(size: dict[str, int]) -> str:
    return f"{size['bytes'] / 2**20:,.0f}"
