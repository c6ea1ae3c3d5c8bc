"""The claims of `recipes.order` (order_claims.toml), and what its records say of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.claims import Claim, Measured, judge
from recipes.claims_file import claims_of
from recipes.order_measured import Known, arms_of, contrast, pool_of, tested
from recipes.order_setting import ADAPTERS, ARMS, GROUPS, OTHER, QUERIES, RIDGES, Setting

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
    """Return the margin, of a correlation, and the claims. Raises AddendaError as `claims_of` does."""
    allowed = {
        "a": ARMS, "b": (*ARMS, OTHER), "queries": GROUPS, "images": Setting().images, "direction": DIRECTIONS,
    }  # fmt: skip
    return claims_of(file, OrderClaim, "orders", allowed)


def measured(claim: OrderClaim, known: Known, setting: Setting) -> Measured | None:
    """Return the contrast of a claim; None where one of its arms lacks a seed."""
    of = arms_of(known, claim.subject, claim.images, claim.queries, setting.seeds)
    a, b = (of.get(arm, {}) for arm in (claim.a, claim.b))
    if min(len(a), len(b)) < len(setting.seeds):
        return None
    return contrast(a, b, pool_of(of), (claim.a, claim.b), tested(known, claim.subject, setting))


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
            low, high = m.interval()
            line += (
                f": {claim.a} − {claim.b} is {m.difference:+.3f} ({low:+.3f} to {high:+.3f}), {claim.queries}, "
                f"{claim.images} images"
            )
        lines.append(line + (f"; {verdict.why}" if verdict.why else ""))
    return [*lines, *worth(claims, known, setting)]


def worth(claims: Sequence[OrderClaim], known: Known, setting: Setting) -> list[str]:
    """Return whether the adapter is worth its training where there are the most images: above every ridge, or not."""
    asked = [c for c in claims if (c.a, c.images) == ("dual", max(setting.images)) and c.b in RIDGES]
    found = {c.b: m for c in asked if (m := measured(c, known, setting)) is not None}
    if not asked or len(found) < len(asked):
        return []
    below = [b for b, m in found.items() if m.interval()[0] <= 0]
    if not below:
        return ["The adapter is above every ridge here: it is worth its training."]
    return [f"The adapter is not above the ridge on {', '.join(below)}: it is not worth it here."]


def _void(claim: OrderClaim, known: Known, setting: Setting) -> str:
    """Return why two forms of the adapter may be alike because neither has learned anything; empty where not so."""
    if claim.direction == "higher" or claim.b not in ADAPTERS:
        return ""
    gate = OrderClaim("gate", "", "dual", "blind", "classes", claim.images, "higher", "")
    found = measured(gate, known, setting)
    if found is None or found.interval()[0] > 0:
        return ""
    return f"with {claim.images} images the dual head is not above the query-blind score, so it has learned no query"
