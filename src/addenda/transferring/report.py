"""What a transfer did, as transfer.json and README.md: what was accepted, what leaked, what it cost, how good it is.

    report = Report("sort-numbers", "source/", "target/", "lora", count=250, …)
    write_report(folder, report); read_report(folder)
    judged({"source": …, "base": …, "transferred": …, "real": …})     # accuracies, gap recovered, verdict

Five accuracies tell whether knowledge has moved (Trans-LoRA, arXiv:2405.17258, shows three of them): of the source with
its adapter, of the target without one, of the transfer, and of the target trained on the real inputs, with real labels
and with the teacher's. A transfer is held against the better of the first two; a gap that is recovered in part is no
failure, and the report says how much.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.base.errors import AddendaError
from addenda.core.base.markdown import code, fenced
from addenda.core.disk.access import path_of, read_json, shown, strict
from addenda.core.disk.atomic import readable, write_atomically
from addenda.transferring.measures import Leakage, gap_recovered, leakage
from addenda.transferring.mmd import features, median_distance, mmd
from addenda.transferring.verdict import MARGIN, Known, better, deviation, non_inferior

FILE = "transfer.json"
STAGES = ("format", "new", "discriminator")
ARMS = {
    "source": "source with its adapter", "base": "target without an adapter", "transferred": "target, transferred",
    "real_inputs": "target on real inputs, teacher's labels", "real": "target on real inputs, real labels",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a transfer did. count: N; chosen: inputs that were learned; filled: of these below the threshold.

    counts: of lines (`synthesise.Counts`); acceptance: the share that passed each of `STAGES`, None where nothing came
    so far; stopped: the cap that ended the sampling, in words. judge: the discriminator's accuracy on `held` texts.
    seeds, inputs: what leaked of the seeds and, where it was there to look, of the training data. agreement: share of
    equal answers of student and teacher, on the texts named by `on`. distance: MMD² to real inputs of what was made and
    of what was chosen. cost: {stage: {"seconds", "tokens"}}. judged: see `judged`. notes: what a reader must know.
    examples: some of the inputs; settings: of the call; predicted: what its dry run found.
    """

    name: str
    source: str
    target: str
    method: str
    count: int
    chosen: int
    filled: int
    counts: Mapping[str, float]
    acceptance: Mapping[str, float | None]
    judge: float
    held: int
    seeds: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    agreement: float | None = None
    on: str = ""
    distance: Mapping[str, float] | None = None
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    judged: Mapping[str, Any] | None = None
    stopped: str = ""
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    examples: Sequence[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        rates = [f"{s} {_percent(self.acceptance.get(s))}" for s in STAGES]
        lines = [
            f"{self.name}: {self.chosen:,} of {self.count:,} inputs, accepted by stage: {', '.join(rates)}",
            f"the discriminator was right on {self.judge:.1%} of {self.held:,} held-out texts",
        ]
        if self.filled:
            lines.append(f"{self.filled:,} of the inputs did not pass it: the best of those that it refused")
        if self.stopped:
            lines.append(f"sampling ended at {self.stopped}")
        lines.append(f"leaked of the seeds: {_leaked(self.seeds)}")
        if self.inputs is not None:
            lines.append(f"leaked of the training inputs: {_leaked(self.inputs)}")
        if self.agreement is not None:
            lines.append(f"student and teacher agree on {self.agreement:.1%} of {self.on or 'the synthetic inputs'}")
        if self.distance is not None:
            made, chosen = (self.distance[k] for k in ("made", "chosen"))
            lines.append(f"MMD² to real inputs: {made:.4f} of all that was made, {chosen:.4f} of what was learned")
        if self.judged is not None:
            lines += ["", *table(self.judged), ""]
        total = sum(c["seconds"] for c in self.cost.values())
        each = ", ".join(f"{stage} {c['seconds']:,.0f} s" for stage, c in self.cost.items())
        return "\n".join([*lines, f"{total:,.0f} s: {each}" if each else "no cost was taken", *self.notes])


def leaked(made: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Return what a report says of made texts that are known ones; see `measures.leakage`."""
    found: Leakage = leakage(made, known)
    return {
        "of": found.count, "exact": len(found.exact), "near": len(found.near), "widest": found.widest,
        "n": found.n, "share": found.share, "known": len(known),
    }  # fmt: skip


def distances(
    model: nn.Module, tokenizer: Any, made: Sequence[str], chosen: Sequence[str], real: Sequence[str]
) -> dict[str, float]:
    """Return MMD² to real inputs of all that was made and of what was chosen of it, unbiased, under one bandwidth."""
    X, Y, Z = (features(model, tokenizer, texts) for texts in (made, chosen, real))
    sigma = median_distance(X, Z)
    return {
        "made": mmd(X, Z, bandwidth=sigma, unbiased=True), "chosen": mmd(Y, Z, bandwidth=sigma, unbiased=True),
        "bandwidth": sigma,
    }  # fmt: skip


def judged(arms: Mapping[str, Known], *, margin: float = MARGIN, **enough: int) -> dict[str, Any]:
    """Return accuracies by arm and seed, the gap recovered, and the verdict, of answers {arm: {seed: right or wrong}}.

    arms: "source", "base" and "transferred", and as many of "real_inputs" and "real" as there are; others are shown
    too. enough: seeds and items that a verdict wants (`verdict.non_inferior`).
    Raises AddendaError where one of the first three is missing.
    """
    if missing := [a for a in ("source", "base", "transferred") if not arms.get(a)]:
        raise AddendaError(f"A verdict wants answers of source, base and transferred; {', '.join(missing)} missing.")
    means = {a: {s: sum(items) / len(items) for s, items in of.items()} for a, of in arms.items() if of}
    overall = {a: sum(of.values()) / len(of) for a, of in means.items()}
    reference = better({a: arms[a] for a in ("source", "base")})
    found = non_inferior(arms["transferred"], arms[reference], margin=margin, **enough)
    gap = gap_recovered(overall["transferred"], overall["base"], overall["real"]) if "real" in overall else None
    return {
        "accuracies": {a: {str(s): v for s, v in of.items()} for a, of in means.items()},
        "means": overall, "deviations": {a: deviation(arms[a]) for a in means}, "reference": reference, "gap": gap,
        "difference": found.difference, "low": found.low, "high": found.high, "margin": margin, "seeds": found.seeds,
        "items": found.items, "verdict": found.verdict, "words": str(found),
    }  # fmt: skip


def table(said: Mapping[str, Any]) -> list[str]:
    """Return the lines of a verdict: accuracies by arm, with their deviation over seeds, the gap, what may be said."""
    lines = []
    for arm, mean in said["means"].items():
        count, name = len(said["accuracies"][arm]), ARMS.get(arm, arm)
        spread = f" ± {100 * said['deviations'][arm]:.1f} over {count} seeds" if count > 1 else " (one seed)"
        lines.append(f"{name:<42}{100 * mean:>6.1f} %{spread}")
    if said["gap"] is not None:
        lines.append(f"gap recovered: {said['gap']:.2f} of what real labels gain over the base")
    return [*lines, f"transferred against {ARMS[said['reference']]}:", f"  {said['words']}"]


def write_report(folder: Path, report: Report) -> None:
    """Write transfer.json and README.md into a folder."""
    write_atomically(folder / FILE, (readable(strict(asdict(report))) + "\n").encode())
    lines = [
        f"# {code(report.name)} on another base", "",
        f"{report.method}, moved from {code(report.source)} to {code(report.target)} by `addenda transfer`, without "
        "the data of the task: synthetic inputs, the old adapter's answers.", "", *fenced(report), "",
        "What leaked is counted above. The adapter's licence is that of the one that it was moved from.",
    ]  # fmt: skip
    if report.examples:
        lines += ["", "Inputs that were made, the first of them:", "", *fenced("\n".join(report.examples))]
    write_atomically(folder / "README.md", ("\n".join(lines) + "\n").encode())


def read_report(folder: str | Path) -> Report:
    """Read the report in a folder. Raises AddendaError where it is none, or damaged."""
    file = path_of(folder) / FILE
    content = read_json(file)
    try:
        report = Report(**content)
        _ = str(report)  # every field of it is looked at
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise AddendaError(f"{shown(file)} is no report of a transfer: {str(error)[:200]}.") from None
    return report


def _percent(share: float | None) -> str:
    return "none came so far" if share is None else f"{share:.1%}"


def _leaked(said: Mapping[str, Any]) -> str:
    return (
        f"{said['exact']} of {said['of']:,} exactly, {said['near']} by {said['share']:.0%} of the {said['n']}-grams "
        f"that one of {said['known']:,} has alone (the most: {said['widest']:.0%})"
    )
