"""The claims of `recipes.rerank` (rerank_claims.toml), and what its records say of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from addenda.ranking.judge import Judgement, judge
from addenda.statistics.intervals import quantile
from recipes.claims_file import claims_of
from recipes.rerank_setting import ARMS, ENGLISH, FIRST, MEASURES, PART, part_of, slug

FILE = Path(__file__).with_name("rerank_claims.toml")
OVER = ("languages", "least text")
Known = Callable[[str], dict | None]  # a run's record by name
By = dict[str, dict[int | None, dict[str, float]]]  # {arm: {seed: {query: value}}}


@dataclass(frozen=True)
class Claim:
    """See rerank_claims.toml."""

    name: str
    words: str
    measure: str
    a: str
    b: str
    over: str
    refuted: str


def read_claims(file: Path = FILE) -> tuple[float, tuple[Claim, ...]]:
    """Return the margin, of a measure, and the claims. Raises AddendaError as `claims_of` does."""
    allowed = {"a": ARMS, "b": ARMS, "over": OVER, "measure": ("AP", "seconds", "bytes")}
    return claims_of(file, Claim, "rerankers", allowed)


def values(
    known: Known, languages: Sequence[str], seeds: Sequence[int], measure: str = "AP", arms: Sequence[str] = ARMS
) -> dict[str, By]:
    """Return the values by language, arm, seed and query, of queries that all that is on record was asked there.

    Controls have no seed. A language without a first stage on record is left out; so are arms and seeds that are not.
    """
    found: dict[str, By] = {}
    for language in languages:
        runs = [(name, None, known(f"control-{name}-{language}")) for name in ("BM25", FIRST)]
        runs += [(arm, s, known(f"judged-{slug(arm)}-{s}-{language}")) for arm in arms for s in seeds]
        there = [(arm, seed, record) for arm, seed, record in runs if record is not None]
        if not any(arm == FIRST for arm, _, _ in there):
            continue
        shared = set.intersection(*(set(record["queries"]) for _, _, record in there))
        found[language] = {}
        for arm, seed, record in there:
            assert measure in MEASURES
            pairs = zip(record["queries"], record[measure], strict=True)
            found[language].setdefault(arm, {})[seed] = {q: v for q, v in pairs if q in shared}
    return found


def over_languages(by: Mapping[str, By], arms: Sequence[str]) -> By:
    """Return values with a query of several languages once, by its mean: what is the same query is not independent."""
    found: By = {}
    for arm in arms:
        seeds = [set(of[arm]) for of in by.values()]
        for seed in set.intersection(*seeds) if seeds else ():
            each: dict[str, list[float]] = {}
            for of in by.values():
                for query, value in of[arm][seed].items():
                    each.setdefault(query, []).append(value)
            found.setdefault(arm, {})[seed] = {q: fmean(v) for q, v in each.items()}
    return found


def judgements(by: Mapping[str, By], margin: float, measure: str = "AP") -> dict[str, Judgement]:
    """Return what may be said in each language, where English is on record: who is a reranker is seen there."""
    english = by.get(ENGLISH)
    found = {}
    for language, of in by.items():
        known = {arm: v for arm, v in of.items() if None in v or (english and arm in english)}
        found[language] = judge(known, measure=measure, margin=margin, pairs=(), first=FIRST, english=english)
    return found


def verdicts(
    margin: float, claims: Sequence[Claim], known: Known, languages: Sequence[str], seeds: Sequence[int]
) -> list[str]:
    """Return a line about each claim: holds, does not hold, cannot tell, void, or not measured yet."""
    by = values(known, (ENGLISH, *languages), seeds)
    english, others = by.pop(ENGLISH, {}), by
    pooled = [c for c in claims if c.measure == "AP" and c.over == "languages"]
    ready = [c for c in pooled if _whole(c, others, english, seeds)]
    told: dict[str, str | None] = {}
    if ready:
        arms = list(dict.fromkeys([a for c in ready for a in (c.a, c.b)]))
        found = judge(
            over_languages(others, arms), margin=margin, pairs=[(c.a, c.b) for c in ready], first=FIRST, english=english
        )  # fmt: skip
        for claim, pair in zip(ready, found.pairs, strict=True):
            word = {"better": "holds", "undecided": "cannot tell", "void": "void"}.get(pair.verdict, "does not hold")
            told[claim.name] = f"{word}: {pair.words(unit=found.unit)}"
    for claim in claims:
        if claim.over == "least text" and _whole(claim, others, english, seeds):
            told[claim.name] = _least(claim, margin, known, others, english, seeds)
        elif claim.measure in ("seconds", "bytes"):
            told[claim.name] = _cheaper(claim, known, languages, seeds)
    return [f"{c.words}: {told.get(c.name) or 'not measured yet'}" for c in claims]


def _whole(claim: Claim, others: Mapping[str, By], english: By, seeds: Sequence[int]) -> bool:
    """Whether both arms of a claim are on record in every language that is, with every seed."""
    return bool(others) and all(set(of.get(arm, ())) >= {*seeds} for of in (english, *others.values())
                                for arm in (claim.a, claim.b))  # fmt: skip


def _least(claim: Claim, margin: float, known: Known, by: Mapping[str, By], english: By, seeds: Sequence[int]) -> str:
    """Return whether the gain is larger in the language with the least text than in the others."""
    void = judge({a: english[a] for a in (claim.a, claim.b)}, margin=margin, first=FIRST, english=english)
    if void.pairs[0].verdict == "void":
        return f"void: {void.pairs[0].why}"
    if len(by) < 2:
        return "not measured yet: there is one language only"
    records = {x: known(f"control-{FIRST}-{x}") or {} for x in by}
    least = min(by, key=lambda x: records[x]["texts"])
    here = over_languages({least: by[least]}, (claim.a, claim.b))
    there = over_languages({x: of for x, of in by.items() if x != least}, (claim.a, claim.b))
    gains = [np.array([[of[claim.a][s][q] - of[claim.b][s][q] for q in of[claim.a][s]] for s in seeds])
             for of in (here, there)]  # fmt: skip
    by_seed = gains[0].mean(1) - gains[1].mean(1)  # a seed is one task in all languages
    parts = [g.mean(0).var(ddof=1) / g.shape[1] for g in gains if g.shape[1] > 1]
    parts.append(float(by_seed.var(ddof=1)) / len(seeds) if len(seeds) > 1 else 0.0)
    frees = [*(g.shape[1] - 1 for g in gains if g.shape[1] > 1), max(1, len(seeds) - 1)]
    squares = sum(v**2 / f for v, f in zip(parts, frees, strict=True))
    df = sum(parts) ** 2 / squares if squares > 0 else float(min(frees))
    mean, error = float(by_seed.mean()), sum(parts) ** 0.5
    low, high = (mean + side * quantile(0.975, df) * error for side in (-1, 1))
    low90, high90 = (mean + side * quantile(0.95, df) * error for side in (-1, 1))
    word = "holds" if low > 0 else "does not hold" if high90 < margin else "cannot tell"
    return (
        f"{word}: in {least} ({records[least]['texts']:,} texts) the gain is {mean:+.3f} AP above the others' "
        f"({low:+.3f} to {high:+.3f}; 90 %: {low90:+.3f} to {high90:+.3f})"
    )


def _cheaper(claim: Claim, known: Known, languages: Sequence[str], seeds: Sequence[int]) -> str | None:
    """Return whether a takes less than b: every seed of it, and with the largest part where it has one."""
    a, b = ([known(f"task-{slug(arm)}-{s}") for s in seeds] for arm in (claim.a, claim.b))
    if None in a or None in b:
        return None
    more = 0
    if claim.measure == "bytes" and claim.a.endswith(PART):
        parts = [known(f"part-{part_of(claim.a)}-{x}") for x in languages]
        more = max((p["bytes"] for p in parts if p), default=0)
    left = [r[claim.measure] + more for r in a if r]
    right = [r[claim.measure] for r in b if r]
    word = "holds" if max(left) < min(right) else "does not hold"
    return f"{word}: {fmean(left) / max(fmean(right), 1e-9):.3f} of {claim.b}'s {claim.measure}"
