"""LoRD (Kaushal et al. 2023, arXiv:2309.14021): a language model of low-rank layers, calibrated on code.

Claims. (1) Principal components of the outputs (LoRD) and a whitened SVD (SVD-LLM) are one solution, much better than
ASVD, and that than plain SVD. (2) Calibrated on code, a model loses less on code than on English. (3, ours) At 20 %
fewer parameters the best form and allocation lets perplexity rise half as much as uniform SVD-LLM, or less. (4) The
smaller model is faster (the paper: up to 22 %).

The model is SmolLM2-135M; its linear layers give up 10, 20 and 30 % of their parameters. Calibration: 64 × 512 tokens
of Python's standard library. Judged by windows of 256 tokens, each from another text while there are texts: Python
files of other installed packages, and the prose of installed packages' descriptions (English). Perplexities are
compared window by window, and the windows are drawn again for the intervals. Everything runs in the dtype that
`addenda compress` would take here: bfloat16 where the processor multiplies it fast, else float32; statistics and
solutions are float64.

Every method's nested factors are kept in the cache folder (2 GB). At 20 % the model is quantised to NF4 too, healed
with LoRA on its factors, and both: QLoRA over LoRD, on other windows of the standard library. Times mean nothing on a
busy machine, so that they are a step of their own: python -m recipes lord --latency.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from addenda import AddendaError
from addenda.comparing.record import Record
from addenda.compressing import measure
from addenda.core.disk.access import read_json
from addenda.core.file.identity import base_of, versions
from addenda.reducing import ranks
from recipes.claims import Claim, Measured
from recipes.common import Finding, Interval, all_of, conclude
from recipes.kept import Runs, parsed
from recipes.low_rank import BATCH, HEALED, LENGTH, SEEN, SHORT, WINDOW, Arm, Subject
from recipes.store import Busy, Clock, Store

REMOVED = (0.2, 0.1, 0.3)  # the rate of claim 3 first
DRAWS = 4000
WINDOWS = 52  # to judge by: with 24, what is lost at 10 % was known to ±0.21 nats
PAPER = "LoRD, arXiv:2309.14021"
SAME, HALF = 0.01, 0.5  # claim 1: perplexities this close are the same; claim 3


ARMS = {
    "SVD": Arm("svd"),
    "ASVD": Arm("asvd"),
    "SVD-LLM": Arm("svd-llm"),
    "LoRD": Arm(),
    "LoRD, water-filled": Arm(allocate="waterfill"),
    "LoRD, water-filled by loss": Arm(allocate="waterfill", weigh="loss"),
    "LoRD, pivoted": Arm(storage="pivot"),
    "LoRD, pivoted, water-filled by loss": Arm(allocate="waterfill", weigh="loss", storage="pivot"),
}
BEST = tuple(a for a in ARMS if a.startswith("LoRD"))  # what claim 3 may take
MENDED = "LoRD, water-filled by loss"  # the arm that is quantised and healed


# ---- verdicts --------------------------------------------------------------------------------------------------------


class Rises:
    """Perplexities of cells against the dense one's, with all cells' windows drawn again together."""

    def __init__(self, cells: dict[str, dict], seed: int = 0):
        rng = np.random.default_rng(seed)
        self.losses = {k: {d: np.array(v) for d, v in c["losses"].items()} for k, c in cells.items()}
        self.drawn = {d: rng.integers(0, len(v), (DRAWS, len(v))) for d, v in self.losses["dense"].items()}

    def ratio(self, cell: str, domain: str = "code", to: str = "dense") -> np.ndarray:
        """The ratio of two perplexities: as it is, then of every draw."""
        gap = self.losses[cell][domain] - self.losses[to][domain]
        return np.exp(np.concatenate([[gap.mean()], gap[self.drawn[domain]].mean(1)]))

    def rise(self, cell: str, domain: str = "code") -> np.ndarray:
        return self.ratio(cell, domain) - 1


def interval(values: np.ndarray) -> Interval:
    """Return a value with its 95 % interval; values: as measured, then in each draw of the bootstrap."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))


def shown(values: np.ndarray) -> str:
    """A rise as a percentage, or the whole as a multiple where it is a large one."""
    found = interval(values)
    if found.mean > 10:
        return f"{1 + found.mean:,.0f} × ({1 + found.low:,.0f} to {1 + found.high:,.0f})"
    return f"{found.mean:+.1%} ({found.low:+.1%} to {found.high:+.1%})"


def within(found: Interval, limit: float) -> str:
    """Return the verdict on whether a difference is smaller than the limit, either way."""
    if found.low > limit or found.high < -limit:
        return "does not hold"
    return "holds" if found.low > -limit and found.high < limit else "cannot tell"


def rates_of(cells: dict[str, dict]) -> list[float]:
    """The rates that every arm has been through."""
    return [rate for rate in REMOVED if all(f"{a}, {rate:.0%}" in cells for a in ARMS)]


def findings(cells: dict[str, dict], latency: dict | None) -> list[Finding]:
    """Return what the cells say of each claim; latency: what was measured of speed, if it was."""
    rises, rates = Rises(cells), sorted(rates_of(cells))
    parts, said = [], []
    for rate in rates:
        plain, asvd, llm, lord = (rises.rise(f"{a}, {rate:.0%}") for a in ("SVD", "ASVD", "SVD-LLM", "LoRD"))
        apart = interval(np.log(rises.ratio(f"LoRD, {rate:.0%}", to=f"SVD-LLM, {rate:.0%}")))
        parts += [within(apart, SAME)]
        parts += [interval(asvd - 2 * lord).above(), interval(plain - 2 * asvd).above()]
        said.append(f"−{rate:.0%}: SVD {shown(plain)}, ASVD {shown(asvd)}, SVD-LLM {shown(llm)}, LoRD {shown(lord)}")
    found = [
        Finding(
            f"LoRD is SVD-LLM (within {SAME:.0%}), at most half of ASVD's rise in perplexity, and that of SVD's",
            f"on Python, parameters of the layers {'; '.join(said)}",
            all_of(parts),
        )
    ]
    parts, said = [], []
    for rate in rates:
        code, english = (rises.rise(f"LoRD, {rate:.0%}", d) for d in ("code", "english"))
        parts.append(interval(english - code).above())
        said.append(f"−{rate:.0%}: Python {shown(code)}, English {shown(english)}")
    found.append(Finding("calibrated on code, it loses less on code than on English", "; ".join(said), all_of(parts)))
    tried = {a: rises.rise(f"{a}, 20%") for a in BEST}
    best = np.minimum.reduce(list(tried.values()))  # chosen anew in every draw
    share = best / rises.rise("SVD-LLM, 20%")
    of, said = interval(share), "; ".join(f"{a} {shown(r)}" for a, r in tried.items())
    found.append(
        Finding(
            f"at 20 % fewer parameters, the best form and allocation rises by at most {HALF} of uniform SVD-LLM (ours)",
            f"{of.mean:.2f} ({of.low:.2f} to {of.high:.2f}) of its rise; {said}",
            interval(HALF - share).above(),
        )
    )
    return [*found, _faster(latency)]


def _faster(latency: dict | None) -> Finding:
    claim = "it is faster in prefill and decode at 20 % fewer parameters (paper: up to 22 % at StarCoder's 16 B)"
    if latency is None:
        return Finding(claim, "not measured yet: python -m recipes lord --latency, on a quiet machine", "cannot tell")
    took, said, parts = latency["model"], [], []
    for form in took:
        if form != "dense":
            ratio = {w: np.array(took["dense"][w]) / np.array(took[form][w]) for w in ("prefill", "decode")}
            middle = {w: float(np.median(r)) for w, r in ratio.items()}
            said.append(f"{form}: prefill {middle['prefill']:.2f} ×, decode {middle['decode']:.2f} ×")
            if form == "LoRD, 20%":
                ends = [np.quantile(r, [0.25, 0.75]) for r in ratio.values()]
                parts = ["holds" if a > 1 else "does not hold" if b < 1 else "cannot tell" for a, b in ends]
    alone = []
    for x in latency["layers"]:
        dense = x["seconds"]["0"]
        wins = [int(r) for r, s in x["seconds"].items() if r != "0" and s < dense]
        most = max(wins, default=0)
        kept = ranks.cost(x["m"], x["n"], most) / (x["m"] * x["n"])
        until = f"rank {most} ({kept:.0%} of the parameters)" if wins else "no rank tried"
        alone.append(f"{x['m']} × {x['n']}, {x['rows']} row{'s' * (x['rows'] > 1)}: {until}")
    return Finding(claim, f"{'; '.join(said)}. A layer alone is faster up to: {'; '.join(alone)}", all_of(parts))


def table_of(cells: dict[str, dict]) -> list[dict]:
    rises, rows = Rises(cells), []
    for name, cell in cells.items():
        row: dict[str, Any] = {"cell": name} | {k: v for k, v in cell.items() if k not in ("losses", "training")}
        for domain, losses in cell["losses"].items():
            found = interval(rises.rise(name, domain))
            row[domain] = {"perplexity": float(np.exp(np.mean(losses)))} | {
                k: round(getattr(found, v), 5) for k, v in (("rise", "mean"), ("low", "low"), ("high", "high"))
            }
        rows.append(row)
    return rows


# ---- as a place where claims are tested ------------------------------------------------------------------------------


class Cells:
    """Cells of this recipe as claims name them: "dense", or an arm and a rate, such as "LoRD, 20%". No seeds: a model

    is reduced once, and windows are what differs. model, samples, judged: see `Subject`.
    """

    def __init__(self, root: Path, clock: Clock, model: Path | None = None, samples: int = SEEN, judged: int = WINDOWS):
        self.out, self.clock, self._of = root / "lord", clock, (model, samples, judged)
        self.void: dict[str, str] = {}
        self._store = Store(self.out, {})
        self._on: Subject | None = None
        self._base: dict = {}

    def settle(self) -> None:
        """Nothing is void here: no rate is searched for."""

    def forget(self) -> None:
        """Let the model go."""
        self._on = None

    def ensure(self, arms: Iterable[str], seeds: Sequence[int]) -> None:
        """Run what is missing. Raises Busy where another process is at this recipe."""
        missing = [a for a in ("dense", *arms) if not self._file(a).exists()]
        if not missing:
            return
        with self._store.alone("lord") as mine:
            if not mine:
                raise Busy
            if self._on is None:
                self._on = Subject(*self._of, "float32")
                self._base = base_of(self._on.model)  # as it was read: a cell leaves its layers in the model
            on = self._on
            identity: dict[str, Any] = {"base": self._base, "texts": on.texts, "dtype": on.dtype}
            identity |= {"versions": versions(), "samples": self._of[1], "windows": self._of[2]}
            with Runs(argparse.Namespace(out=self.out, old=False), identity) as runs:
                on.solve()
                for name in dict.fromkeys(missing):
                    self.clock.spare(0)
                    runs.once(_file(name), lambda name=name: self._cell(on, name))

    def record(self, arms: Iterable[str], seeds: Sequence[int]) -> Record:
        raise AddendaError("Cells of LoRD are windows of text, and no record of a comparison.")

    def _cell(self, on: Subject, name: str) -> dict:
        if name == "dense":
            return on.dense()
        arm, _, rate = name.rpartition(", ")
        return on.cell(ARMS[arm], float(rate.rstrip("%")) / 100)

    def _file(self, name: str) -> Path:
        return self.out / "runs" / f"{_file(name)}.json"

    def measured(self, claim: Claim) -> Measured | None:
        """Return a claim's contrast, over windows; None where a cell is missing."""
        if not all(self._file(a).exists() for a in ("dense", *claim.primary)):
            return None
        cells = {a: read_json(self._file(a)) for a in ("dense", *claim.primary)}
        losses = {a: {d: np.array(v) for d, v in c["losses"].items()} for a, c in cells.items()}
        if claim.metric == "python":
            gap = losses[str(claim.a)]["code"] - losses[str(claim.b)]["code"]
            return Measured(float(gap.mean()), _error(gap), len(gap) - 1, 1, len(gap), looks=False)
        if claim.metric == "english against python":
            english, python = (losses[claim.a[0]][d] - losses[claim.a[1]][d] for d in ("english", "code"))
            a, b = _error(english) ** 2, _error(python) ** 2
            df = (a + b) ** 2 / (a**2 / (len(english) - 1) + b**2 / (len(python) - 1))
            gap = float(english.mean() - python.mean())
            return Measured(gap, (a + b) ** 0.5, df, 1, len(english) + len(python), looks=False)
        rises = Rises(cells)
        share = rises.rise(str(claim.a)) / rises.rise(str(claim.b)) - HALF
        n = len(losses["dense"]["code"])
        return Measured(float(share[0]), float(share[1:].std(ddof=1)), n - 1, 1, n, looks=False)


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / len(values) ** 0.5


# ---- running ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.lord", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("records/recipes/lord"), help="record; an old one goes on")
    parser.add_argument("--model", type=Path, help="folder of a causal LM; default: SmolLM2-135M")
    parser.add_argument("--samples", type=int, default=SEEN, help=f"windows of {LENGTH} tokens to calibrate with")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="windows to judge by, of each of both kinds")
    parser.add_argument("--dtype", default="auto", help="bfloat16 or float32; auto: what the processor is fast at")
    parser.add_argument("--latency", action="store_true", help="measure time, now and alone: the machine must be quiet")
    given = parsed(parser)
    on = None if given.old else Subject(given.model, given.samples, given.windows, given.dtype)
    identity: dict[str, Any] = {}
    if on is not None:
        identity = {"base": base_of(on.model), "texts": on.texts, "dtype": on.dtype, "versions": versions()}
        identity |= {"samples": given.samples, "windows": given.windows}
    with Runs(given, identity) as runs:
        told(given, on, runs)


def told(given: argparse.Namespace, on: Subject | None, runs: Runs) -> None:
    """Run what is missing, and conclude at every rate. on: None where nothing is run."""
    if on is None:
        names = [p.stem for p in runs.folder.glob("*.json")]
        wanted = [f"{a}, {r:.0%}" for r in REMOVED for a in ARMS] + ["dense, NF4"]
        wanted = ["dense", *wanted, *(f"{MENDED}, {REMOVED[0]:.0%}, {name}" for name in _MENDED)]
        cells = {name: runs.once(_file(name), dict) for name in wanted if name == "dense" or _file(name) in names}
        return conclude(given, PAPER, findings(cells, runs.known("latency")), table_of(cells))
    jobs: dict[str, Callable[[], dict]] = {"dense": on.dense}
    for rate in REMOVED:
        jobs |= {f"{a}, {rate:.0%}": lambda a=a, rate=rate: on.cell(ARMS[a], rate) for a in ARMS}
    jobs["dense, NF4"] = lambda: on.mended(None, 0.0, quantised=True, healed=False)
    for name, how in _MENDED.items():
        jobs[f"{MENDED}, {REMOVED[0]:.0%}, {name}"] = lambda how=how: on.mended(ARMS[MENDED], REMOVED[0], **how)
    cells = {name: runs.known(_file(name)) for name in jobs}
    cells = {name: cell for name, cell in cells.items() if cell is not None}
    _say_cost(on, given, [name for name in jobs if name not in cells])
    on.solve()
    if given.latency:
        timed = {f"{a}, {r:.0%}": (ARMS[a], r) for a in ("LoRD", MENDED, "LoRD, pivoted") for r in sorted(REMOVED)}
        runs.once("latency", lambda: on.latency(timed), enough=lambda kept: False)
        jobs = {}
    for name, job in jobs.items():
        rates = rates_of(cells)
        cells[name] = runs.once(_file(name), job)
        if rates_of(cells) != rates:  # so that a run that is cut short has said what it knows
            conclude(given, PAPER, findings(cells, runs.known("latency")), table_of(cells))
    if rates_of(cells):
        conclude(given, PAPER, findings(cells, runs.known("latency")), table_of(cells))


_MENDED: dict[str, dict[str, bool]] = {
    "NF4": {"quantised": True, "healed": False},
    "healed": {"quantised": False, "healed": True},
    "NF4 and healed": {"quantised": True, "healed": True},
}


def _file(name: str) -> str:
    return name.replace(",", "").replace("%", "").replace(" ", "-")


def _say_cost(on: Subject, given: argparse.Namespace, left: list[str]) -> None:
    """Seconds of one window, times what is to be done. Solving takes four times its walk."""
    batch = on.judged["code"].batches(1)[:1]
    measure.loss_of(on.model, batch)
    started = time.perf_counter()
    measure.loss_of(on.model, batch)
    token = (time.perf_counter() - started) / WINDOW
    judging = 2 * given.windows * WINDOW * token
    healing = HEALED * BATCH * SHORT * token * 3.5
    solving = 0 if given.latency else 10 * given.samples * LENGTH * token
    total = solving + len(left) * judging + sum("healed" in name for name in left) * healing
    print(
        f"{len(left)} cells to do, {total / 60:.0f} minutes at this machine's speed now ({1 / token:,.0f} tokens/s, "
        f"{on.dtype}); solving all layers {solving / 60:.0f} of them, unless it is done. A killed run goes on.",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
