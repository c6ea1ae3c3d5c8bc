"""The claims of `recipes.order` (order_claims.toml), and what its records say of them."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from addenda import AddendaError
from recipes.claims import Claim, Measured, judge
from recipes.order_measured import Known, contrast, interval, pool_of, seeds_of
from recipes.order_setting import ADAPTERS, ARMS, GROUPS, LEARNED, OTHER, QUERIES, Setting

FILE = Path(__file__).with_name("order_claims.toml")
DIRECTIONS = ("higher", "not lower", "equal")


@dataclass(frozen=True)
class OrderClaim:
    """See order_claims.toml."""

    name: str
    words: str
    a: str
    b: str
    queries: str
    images: int
    direction: str
    refuted: str

    @property
    def subject(self) -> str:
        return next(subject for subject, groups in QUERIES.items() if self.queries in groups)

    def plain(self, margin: float) -> Claim:
        """Return it as what `recipes.claims.judge` decides."""
        return Claim(
            id=self.name, paper="order", words=self.words, kind="measured", subject=self.subject, a=self.a, b=self.b,
            metric="spearman", direction=self.direction, delta=margin, refuted_by=self.refuted,
        )  # fmt: skip


def read_claims(file: Path = FILE) -> tuple[float, tuple[OrderClaim, ...]]:
    """Return the margin and the claims. Raises AddendaError for a field that is missing, unknown or out of range."""
    try:
        whole = tomllib.loads(file.read_text(encoding="utf-8"))
        claims = tuple(OrderClaim(**one) for one in whole["claims"])
        margin = float(whole["margin"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise AddendaError(f"{file} holds no claims of orders: {error}. Restore it from the repository.") from None
    if not 0 < margin < 1:
        raise AddendaError(f"{file}: margin is between 0 and 1 of a correlation, got {margin}.")
    names = [c.name for c in claims]
    for claim in claims:
        for field, value, allowed in (
            ("a", claim.a, ARMS), ("b", claim.b, (*ARMS, OTHER)), ("queries", claim.queries, GROUPS),
            ("images", claim.images, Setting().images), ("direction", claim.direction, DIRECTIONS),
        ):  # fmt: skip
            if value not in allowed:
                told = ", ".join(map(str, allowed))
                raise AddendaError(f"{file}: claim {claim.name!r}: {field} is one of {told}, got {value!r}.")
        if names.count(claim.name) > 1 or not claim.refuted.strip():
            what = "has a name that another has" if claim.refuted.strip() else "does not say what refutes it"
            raise AddendaError(f"{file}: claim {claim.name!r} {what}.")
    return margin, claims


def measured(claim: OrderClaim, known: Known, setting: Setting) -> Measured | None:
    """Return the contrast of a claim; None where one of its arms lacks a seed."""
    wanted = (claim.subject, claim.images, claim.queries)
    of = {arm: _seeds(known, *wanted, arm, setting) for arm in (claim.a, claim.b)}
    if any(len(found) < len(setting.seeds) for found in of.values()):
        return None
    arms = {arm: _seeds(known, *wanted, arm, setting) for arm in (*ARMS, OTHER)}
    test = _test(known, claim.subject, setting)
    return contrast(of[claim.a], of[claim.b], pool_of(arms), (claim.a, claim.b), test)


def verdicts(margin: float, claims: Sequence[OrderClaim], known: Known, setting: Setting) -> list[str]:
    """Return a line about each claim: holds, does not hold, on the margin, undecided, void, or not run."""
    found = {c.name: measured(c, known, setting) for c in claims}
    void = {c.name: why for c in claims if (why := _void(c, known, setting))}
    said = judge([c.plain(margin) for c in claims], {k: m for k, m in found.items() if m is not None}, void)
    lines = []
    for claim in claims:
        verdict, m = said[claim.name], found[claim.name]
        line = f"{claim.words}: {verdict.word}"
        if m is not None:
            low, high = interval(m)
            line += (
                f": {claim.a} − {claim.b} is {m.difference:+.3f} ({low:+.3f} to {high:+.3f}), {claim.queries}, "
                f"{claim.images} images"
            )
        lines.append(line + (f"; {verdict.why}" if verdict.why else ""))
    return [*lines, *worth(margin, claims, known, setting)]


def worth(margin: float, claims: Sequence[OrderClaim], known: Known, setting: Setting) -> list[str]:
    """Return whether the adapter is worth its training where there are the most images: above every ridge, or not."""
    asked = [c for c in claims if c.direction == "higher" and c.name.endswith(f"-{max(setting.images)}")]
    found = {c.b: m for c in asked if (m := measured(c, known, setting)) is not None}
    if not asked or len(found) < len(asked):
        return []
    below = [b for b, m in found.items() if interval(m)[0] <= 0]
    if not below:
        return ["The adapter is above every ridge here: it is worth its training."]
    return [f"The adapter is not above the ridge on {', '.join(below)}: it is not worth it here."]


def _seeds(known: Known, subject: str, images: int, group: str, arm: str, setting: Setting) -> dict:
    if arm == OTHER and group != LEARNED[subject]:
        return {}
    return seeds_of(known, subject, arm, images, group, setting.seeds)


def _test(known: Known, subject: str, setting: Setting) -> int:
    record = known(f"{subject}-features-test") or {}
    return int(record.get("images", setting.test))


def _void(claim: OrderClaim, known: Known, setting: Setting) -> str:
    """Return why two forms of the adapter may be alike because neither has learned anything; empty where not so."""
    if claim.direction == "higher" or claim.b not in ADAPTERS:
        return ""
    gate = OrderClaim("gate", "", "dual", "blind", "classes", claim.images, "higher", "")
    found = measured(gate, known, setting)
    if found is None or interval(found)[0] > 0:
        return ""
    return f"with {claim.images} images the dual head is not above the query-blind score, so it has learned no query"
