"""Claims as they were written down before the runs (claims.toml), and what measurements say of them.

    known = read_claims()
    verdicts = judge(known.of("SVFT, arXiv:2405.19597"), {"svft-vera": Measured(−0.4, 0.3, 9.0, 8, 5783)})

A claim has one primary contrast, metric of a minus metric of b, a direction and a margin delta. For it speaks a test
that the direction is so, against it one that it is not:

    direction    for it                    against it
    higher       a − b ≠ 0, and above      a − b < delta
    lower        a − b ≠ 0, and below      a − b > −delta
    not lower    a − b > −delta            a − b < −delta
    not higher   a − b < delta             a − b > delta
    equal        −delta < a − b < delta    a − b beyond delta on either side

Either family of tests, over all measured claims of a paper, is corrected after Holm; one-sided tests are at 5 %. What
neither decides is "on the margin" where the 95 % interval is at most delta wide (half of it on each side), else
"undecided". Every p is that of a look among several (`addenda.statistics.spending`), unless nothing is drawn by seed.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scipy import special

from addenda import AddendaError
from addenda.statistics import spending
from addenda.statistics.verdicts import holm

FILE = Path(__file__).with_name("claims.toml")
DIRECTIONS = ("higher", "lower", "not lower", "not higher", "equal")
KINDS = ("measured", "theorem", "arithmetic", "timing")
RECIPES = ("svft", "loldu", "miss", "lora-pro", "dylora", "shira", "one-bit", "mosa", "lord", "trp")  # an id begins so
PRIMARY = ("subject", "a", "b", "metric", "direction", "refuted_by")  # what a measured claim has to say beforehand
LEVEL = 0.05

Side = str | tuple[str, str]  # an arm, or the first of two minus the second


def names_of_sides(*sides: Side) -> tuple[str, ...]:
    """Return the arms that contrasts name, each once."""
    return tuple(dict.fromkeys(name for side in sides for name in ((side,) if isinstance(side, str) else side)))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim. See claims.toml for what each field holds; delta is the claim's own or else that of its subject."""

    id: str
    paper: str
    words: str
    kind: str
    subject: str = ""
    a: Side = ""
    b: Side = ""
    metric: str = ""
    direction: str = ""
    delta: float = math.nan
    refuted_by: str = ""
    effect: float | None = None
    share: float | None = None
    also: tuple[tuple[Side, Side], ...] = ()
    batches: int | None = None
    where: str = ""
    was: tuple[str, int] | None = None
    mended: str = ""

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that the claim names, those of the primary contrast first."""
        return names_of_sides(self.a, self.b, *(side for pair in self.also for side in pair))

    @property
    def primary(self) -> tuple[str, ...]:
        """The arms of the primary contrast, which decides."""
        return names_of_sides(self.a, self.b)

    @property
    def recipe(self) -> str:
        """The recipe that the claim is of: what its id begins with."""
        return next(name for name in RECIPES if self.id.startswith(f"{name}-"))

    @property
    def unit(self) -> str:
        """What its metric is measured in."""
        return {"accuracy": "points", "share of the rise less a half": ""}.get(self.metric, "nats")


@dataclass(frozen=True)
class Mended:
    """What of a subject failed at its gate, and what was changed of it, both on validation data alone."""

    failed: str
    changed: str

    def words(self) -> str:
        return f"mended once, on validation data: {self.failed}; {self.changed}"


@dataclass(frozen=True)
class Where:
    """A subject's margin and its gate: two arms, of which the first must gain three margins over the second.

    mended: where the gate failed before; a subject is mended once.
    """

    delta: float
    gate: tuple[str, ...]
    why_delta: str
    mended: Mended | None = None


@dataclass(frozen=True)
class Claims:
    """All of claims.toml."""

    claims: tuple[Claim, ...]
    subjects: Mapping[str, Where]

    def of(self, paper: str) -> list[Claim]:
        """Return the claims of a paper."""
        return [c for c in self.claims if c.paper == paper]

    @property
    def papers(self) -> list[str]:
        """All papers, in the order of the file."""
        return list(dict.fromkeys(c.paper for c in self.claims))


def read_claims(file: Path = FILE) -> Claims:
    """Read and check claims. Raises AddendaError that names every claim without a primary contrast, and what else."""
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AddendaError(f"{file} cannot be read as TOML: {error}.") from error
    subjects, problems = {}, []
    for name, value in given.get("subjects", {}).items():
        if found := _wrong(value):
            problems += [f"subject {name}: {p}" for p in found]
            value = {k: v for k, v in value.items() if k != "mended"}
        mended = Mended(**value["mended"]) if "mended" in value else None
        gate = tuple(value.get("gate", ()))
        subjects[name] = Where(value.get("delta", math.nan), gate, value.get("why_delta", ""), mended)
    claims = []
    for number, value in enumerate(given.get("claims", [])):
        name = value.get("id", f"number {number}")
        found = _problems(value, subjects)
        problems += [f"claim {name}: {p}" for p in found]
        if not found:
            claims.append(_claim(value, subjects))
    ids = [c.id for c in claims]
    problems += [f"claim {i}: there are two of this id" for i in sorted({i for i in ids if ids.count(i) > 1})]
    if problems:
        raise AddendaError(f"{file} does not say what is claimed: {'; '.join(problems)}.")
    return Claims(tuple(claims), subjects)


def _wrong(value: dict[str, Any]) -> list[str]:
    """Return what is wrong with one subject."""
    known = {f.name for f in fields(Where)}
    found = [f"{k!r} is not known" for k in value if k not in known]
    if not value.get("delta", math.nan) > 0 or len(value.get("gate", ())) not in (0, 2):
        found.append("a delta above 0 and a gate of two arms, or none, are wanted")
    if "mended" not in value:
        return found
    mended, wanted = value["mended"], [f.name for f in fields(Mended)]
    if isinstance(mended, list):
        return [*found, "a subject whose gate failed is mended once: one `mended` is allowed"]
    texts = isinstance(mended, dict) and all(isinstance(v, str) and v.strip() for v in mended.values())
    if not texts or sorted(mended) != sorted(wanted):
        found.append(f"`mended` says what {' and what was '.join(wanted)}, in words, and nothing else")
    if not value.get("gate"):
        found.append("it has no gate that could have failed, and is `mended`")
    return found


def _problems(value: dict[str, Any], subjects: Mapping[str, Where]) -> list[str]:
    """Return what is wrong with one claim."""
    known = {f.name for f in fields(Claim)}
    found = [f"{k!r} is not known" for k in value if k not in known]
    found += [f"it has no {k}" for k in ("id", "paper", "words", "kind") if not value.get(k)]
    if not any(str(value.get("id", "")).startswith(f"{name}-") for name in RECIPES):
        found.append(f"its id begins with none of {', '.join(f'{name}-' for name in RECIPES)}")
    if value.get("kind") not in KINDS:
        return [*found, f"kind is {value.get('kind')!r}, one of {', '.join(KINDS)} is wanted"]
    if value["kind"] != "measured":
        return found if value.get("where") else [*found, "`where` must say what stands in the place of a measurement"]
    if missing := [k for k in PRIMARY if not value.get(k)]:
        return [*found, f"it has no primary contrast: {', '.join(missing)} missing"]
    if value["subject"] not in subjects:
        found.append(f"subject {value['subject']!r} is none of {', '.join(subjects)}")
    if value["direction"] not in DIRECTIONS:
        found.append(f"direction is {value['direction']!r}, one of {', '.join(DIRECTIONS)} is wanted")
    if not value.get("delta", 1.0) > 0:
        found.append(f"delta is {value['delta']}, a number above 0 is wanted")
    if value["metric"] == "loss" and not value.get("batches"):
        found.append("metric is loss, without the number of `batches` that it is averaged over")
    for pair in ([value["a"], value["b"]], *value.get("also", ())):
        if len(pair) != 2 or not all(isinstance(s, str) or len(s) == 2 for s in pair):
            found.append(f"a contrast is of two arms, or of two pairs of arms, not {pair!r}")
    return found


def _claim(value: dict[str, Any], subjects: Mapping[str, Where]) -> Claim:
    def side(given: Any) -> Side:
        return given if isinstance(given, str) else (given[0], given[1])

    made = dict(value)
    if value["kind"] == "measured":
        made |= {"a": side(value["a"]), "b": side(value["b"])}
        made["also"] = tuple((side(a), side(b)) for a, b in value.get("also", ()))
        made["delta"] = value.get("delta", subjects[value["subject"]].delta)
    if "was" in value:
        made["was"] = (value["was"][0], value["was"][1])
    return Claim(**made)


# ---- verdicts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """a − b in the metric's unit, its standard error with degrees of freedom, and from how many seeds and items.

    looks: whether it is looked at again and again as seeds come.
    """

    difference: float
    error: float
    df: float
    seeds: int
    items: int
    looks: bool = True

    def interval(self, alpha: float = LEVEL) -> tuple[float, float]:
        """Return the two-sided interval, at the level of this look."""
        at = spending.level(self.seeds, alpha) if self.looks else alpha
        half = -float(special.stdtrit(min(self.df, 1e9), at / 2)) * self.error
        return self.difference - half, self.difference + half

    def above(self, limit: float) -> float:
        """Return the one-sided p of a true difference of `limit` or less, over all looks."""
        if not self.error:
            return float(self.difference <= limit)
        p = float(special.stdtr(min(self.df, 1e9), -(self.difference - limit) / self.error))
        return float(spending.overall(self.seeds, 2 * p)) / 2 if self.looks and p < 0.5 else p

    def below(self, limit: float) -> float:
        """Return the one-sided p of a true difference of `limit` or more, over all looks."""
        return Measured(-self.difference, self.error, self.df, self.seeds, self.items, self.looks).above(-limit)


@dataclass(frozen=True)
class Verdict:
    """What is said of a claim: holds, does not hold, on the margin, undecided, void, or the kind of an unmeasured one.

    p: Holm's, of the tests for it and against it.
    """

    claim: Claim
    word: str
    why: str = ""
    measured: Measured | None = None
    p: tuple[float, float] = (1.0, 1.0)


def p_values(claim: Claim, found: Measured) -> tuple[float, float]:
    """Return the p of the test for a claim, and of that against it."""
    delta = claim.delta
    match claim.direction:
        case "higher":
            return min(1.0, 2 * found.above(0)), found.below(delta)
        case "lower":
            return min(1.0, 2 * found.below(0)), found.above(-delta)
        case "not lower":
            return found.above(-delta), found.below(-delta)
        case "not higher":
            return found.below(delta), found.above(delta)
    return max(found.above(-delta), found.below(delta)), min(1.0, 2 * min(found.above(delta), found.below(-delta)))


def judge(
    claims: Iterable[Claim], measured: Mapping[str, Measured], void: Mapping[str, str] | None = None
) -> dict[str, Verdict]:
    """Return a verdict for each claim of one paper, by id. void: why there is nothing to judge by, by id.

    All measured claims count in Holm's correction, those too that have not been run, or turned out to be void.
    """
    claims, void = list(claims), void or {}
    papers = {c.paper for c in claims}
    if len(papers) > 1:
        raise AddendaError(f"Holm's correction is over the claims of one paper; these are of {', '.join(papers)}.")
    tested = [c for c in claims if c.kind == "measured"]
    p = {c.id: p_values(c, measured[c.id]) for c in tested if c.id in measured and c.id not in void}
    corrected = [holm({i: both[side] for i, both in p.items()}, len(tested)) for side in (0, 1)]
    return {c.id: _verdict(c, measured.get(c.id), void.get(c.id), corrected) for c in claims}


def _verdict(claim: Claim, found: Measured | None, void: str | None, corrected: list[dict[str, float]]) -> Verdict:
    if claim.kind != "measured":
        return Verdict(claim, claim.kind, claim.where)
    if void is not None:
        return Verdict(claim, "void", void, found)
    if found is None:
        return Verdict(claim, "not run")
    p = corrected[0][claim.id], corrected[1][claim.id]
    small = "by less than the margin" if p[1] < LEVEL else ""
    if p[0] < LEVEL:
        return Verdict(claim, "holds", small, found, p)
    if p[1] < LEVEL:
        return Verdict(claim, "does not hold", claim.refuted_by, found, p)
    low, high = found.interval()
    if (high - low) / 2 <= claim.delta / 2:
        return Verdict(claim, "on the margin", "the interval is narrow enough, and holds the limit", found, p)
    return Verdict(claim, "undecided", "", found, p)
