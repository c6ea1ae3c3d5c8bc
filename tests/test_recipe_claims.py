"""What recipes claim is written down first, and verdicts follow from the numbers."""

import json
from pathlib import Path

import pytest
from recipes import controls as _controls  # noqa: F401 – registers arms of ours
from recipes.claims import Claim, Measured, judge, p_values, read_claims
from recipes.subjects import CHEAPEST, SETTINGS
from recipes.work import folders, order
from scipy import stats

from addenda import AddendaError
from addenda.comparing.arm import parse_arm
from addenda.comparing.record import FULL, HEAD

OLD = Path(__file__).parents[1] / "records" / "recipes"
KNOWN = read_claims()


def test_every_row_of_the_old_table_is_a_claim_once():
    said = {f.parent.name: json.loads(f.read_text())["findings"] for f in OLD.glob("*/verdict.json")}
    rows = [(name, i) for name, findings in said.items() for i in range(len(findings))]
    assert len(rows) == 41
    assert sorted(c.was for c in KNOWN.claims if c.was) == sorted(rows)
    kinds = [c.kind for c in KNOWN.claims if c.was]
    assert {k: kinds.count(k) for k in set(kinds)} == {"measured": 35, "timing": 4, "arithmetic": 1, "theorem": 1}


def test_every_arm_can_be_built_and_every_paper_has_one_subject():
    for claim in KNOWN.claims:
        if claim.subject in SETTINGS or claim.subject == "two-tasks":
            for arm in claim.arms:
                trained, _, cut = arm.partition("|")
                assert trained in ("base", HEAD, FULL) or parse_arm(trained).label == trained
                assert cut == "fused" or cut == "" or cut.split("=")[0] in ("at", "first", "best"), arm
    for paper in KNOWN.papers:
        of = {c.subject for c in KNOWN.of(paper) if c.kind == "measured"}
        assert len(of) == 1 or of == {"few-50", "few-two"}
    assert set(KNOWN.subjects) == {*SETTINGS, "two-tasks", "trp", "lord"} - {"kinds"}


def test_shared_arms_have_one_folder_and_the_others_their_recipe_s():
    where = folders(KNOWN)
    assert where["docstrings"]["lora:rank=8"] == where["docstrings"]["lora:rank=8|first=1"] == "shared"
    assert where["docstrings"]["miss:rank=16"] == "miss" and where["docstrings"]["full"] == "shared"
    assert where["kinds"].keys() == {a for a in where["two-tasks"] if "|" not in a}
    assert {"shira:density=0.01,mask=random", "base"} <= where["docstrings"].keys()


def test_small_subjects_come_first_and_then_three_fairer_ones():
    papers = order(KNOWN)
    assert len(papers) == 13 and papers[0].startswith("SVFT") and papers[9].startswith("Trained Rank")
    assert all(p.endswith("images") for p in papers[10:])
    assert set(CHEAPEST) == {name for name, s in SETTINGS.items() if not s.small}
    assert order(KNOWN, ["docstrings-minilm"]) == [p for p in KNOWN.papers if p.endswith("a larger encoder")]


TEXT = """
[subjects.s]
delta = 1.0
gate = []

[[claims]]
id = "miss-x"
paper = "P"
words = "w"
kind = "measured"
subject = "s"
a = "miss"
b = "lora"
metric = "accuracy"
direction = "higher"
refuted_by = "r"
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('b = "lora"\n', ""), "claim miss-x: it has no primary contrast: b missing"),
        (('metric = "accuracy"\n', ""), "no primary contrast: metric missing"),
        (('direction = "higher"\n', ""), "no primary contrast: direction missing"),
        (('"higher"', '"sideways"'), "direction is 'sideways'"),
        (("delta = 1.0", "delta = 0"), "a delta above 0"),
        (("delta = 1.0", "delta = -1"), "a delta above 0"),
        (("gate = []", 'gate = ["a"]'), "a gate of two arms"),
        (('subject = "s"', 'subject = "t"'), "subject 't' is none of s"),
        (('metric = "accuracy"', 'metric = "loss"'), "without the number of `batches`"),
        (('kind = "measured"', 'kind = "guess"'), "kind is 'guess'"),
        (('kind = "measured"', 'kind = "theorem"'), "`where` must say"),
        (('id = "miss-x"', 'id = "x"'), "its id begins with none of"),
        (('words = "w"', 'wrods = "w"'), "'wrods' is not known; claim miss-x: it has no words"),
        (('direction = "higher"', 'direction = "higher"\ndelta = 0.0'), "delta is 0.0"),
        (('direction = "higher"', 'direction = "higher"\nalso = [["a"]]'), "a contrast is of two arms"),
        (("[subjects.s]", "[subjects.s"), "cannot be read as TOML"),
        (("gate = []", "gates = []"), "subject s: 'gates' is not known"),
        (("gate = []", 'mended = {failed = "f", changed = "c"}'), "subject s: it has no gate that could have failed"),
        (("gate = []", 'gate = ["a", "b"]\nmended = {failed = "f"}'), "`mended` says what failed and what was changed"),
        (("gate = []", 'gate = ["a", "b"]\nmended = "once"'), "`mended` says what failed and what was changed"),
        (("gate = []", 'gate = ["a", "b"]\nmended = {failed = "f", changed = ""}'), "`mended` says what failed"),
        (("gate = []", 'gate = ["a", "b"]\nmended = [{failed = "f", changed = "c"}]'), "is mended once"),
    ],
)
def test_a_claim_that_does_not_say_what_decides_it_is_refused_by_name(tmp_path, change, said):
    file = tmp_path / "claims.toml"
    file.write_text(TEXT)
    assert read_claims(file).claims[0].delta == 1.0
    file.write_text(TEXT.replace(*change))
    with pytest.raises(AddendaError) as caught:
        read_claims(file)
    assert said in str(caught.value)


def test_a_subject_says_what_was_mended(tmp_path):
    file = tmp_path / "claims.toml"
    mended = '[subjects.s.mended]\nfailed = "lora gained 1 point"\nchanged = "twice the steps"\n'
    file.write_text(TEXT.replace("gate = []", 'gate = ["lora", "base"]').replace("[[claims]]", f"{mended}\n[[claims]]"))
    found = read_claims(file).subjects["s"].mended
    assert found is not None
    assert found.words() == "mended once, on validation data: lora gained 1 point; twice the steps"
    assert all(where.mended is None or where.gate for where in KNOWN.subjects.values())


def claim(direction: str, name: str = "miss-x", delta: float = 1.0) -> Claim:
    return Claim(id=name, paper="P", words="w", kind="measured", direction=direction, delta=delta, refuted_by="r")


def word(direction: str, difference: float, error: float) -> str:
    found = Measured(difference, error, 1e9, 1, 100, looks=False)
    return judge([claim(direction)], {"miss-x": found})["miss-x"].word


@pytest.mark.parametrize(
    ("direction", "difference", "error", "said"),
    [
        ("higher", 2.0, 0.5, "holds"), ("higher", 0.1, 0.2, "does not hold"), ("higher", -3.0, 0.5, "does not hold"),
        ("higher", 1.0, 0.6, "undecided"), ("higher", 0.4, 0.1, "holds"),
        ("lower", -2.0, 0.5, "holds"), ("lower", 0.1, 0.2, "does not hold"), ("lower", 3.0, 0.5, "does not hold"),
        ("not lower", -0.2, 0.2, "holds"), ("not lower", 5.0, 0.2, "holds"), ("not lower", -2.0, 0.2, "does not hold"),
        ("not lower", -1.0, 0.2, "on the margin"), ("not lower", -1.0, 0.9, "undecided"),
        ("not higher", 0.2, 0.2, "holds"), ("not higher", 2.0, 0.2, "does not hold"),
        ("equal", 0.2, 0.2, "holds"), ("equal", 0.2, 0.9, "undecided"), ("equal", -2.0, 0.2, "does not hold"),
        ("equal", 1.0, 0.2, "on the margin"),
    ],
)  # fmt: skip
def test_verdicts_follow_the_numbers(direction, difference, error, said):
    assert word(direction, difference, error) == said


def test_the_tests_are_student_s():
    found = Measured(1.2, 0.5, 7.0, 1, 100, looks=False)
    t = stats.t(7.0)
    assert p_values(claim("higher"), found) == pytest.approx((2 * t.sf(2.4), t.cdf(0.4)))
    assert p_values(claim("not lower"), found) == pytest.approx((t.sf(4.4), t.cdf(4.4)))
    assert p_values(claim("equal"), found) == pytest.approx(
        (max(t.sf(4.4), t.cdf(0.4)), 2 * min(t.sf(0.4), t.cdf(4.4)))
    )
    assert found.interval() == pytest.approx(stats.t.interval(0.95, 7.0, loc=1.2, scale=0.5))


def test_looks_cost_something_and_the_last_one_least():
    one = Measured(1.2, 0.5, 50.0, 20, 100, looks=False)
    wide = {n: Measured(1.2, 0.5, 50.0, n, 100).interval() for n in (3, 8, 20)}
    assert wide[3][1] > one.interval()[1] and wide[20][1] > one.interval()[1]
    assert Measured(1.2, 0.5, 50.0, 3, 100).above(0) > one.above(0)


def test_holm_counts_all_measured_claims_of_a_paper():
    """Three at p = 0.02: none holds after Holm; with one that was never run the others pay for it too."""
    z = float(stats.norm.isf(0.01))
    found = Measured(z, 1.0, 1e9, 1, 100, looks=False)
    names = ["miss-a", "miss-b", "miss-c"]
    claims = [claim("higher", n, 50.0) for n in names]
    told = judge(claims, dict.fromkeys(names, found))
    assert [told[n].p[0] for n in names] == pytest.approx([0.06] * 3)
    told = judge(claims, {"miss-a": found})
    assert told["miss-a"].p[0] == pytest.approx(0.06) and told["miss-b"].word == "not run"
    strong = Measured(5.0, 1.0, 1e9, 1, 100, looks=False)
    told = judge(claims, {"miss-a": strong, "miss-b": found, "miss-c": found})
    assert told["miss-a"].word == "holds" and told["miss-b"].p[0] == pytest.approx(0.04)
    other = Claim(id="shira-a", paper="Q", words="w", kind="timing", where="elsewhere")
    with pytest.raises(AddendaError, match="claims of one paper"):
        judge([*claims, other], {})
    assert judge([other], {})["shira-a"].word == "timing"
    void = judge(claims, {"miss-a": strong}, {"miss-b": "every rate diverged"})
    assert (void["miss-b"].word, void["miss-b"].why) == ("void", "every rate diverged")
    assert void["miss-a"].p[0] == pytest.approx(3 * 2 * stats.norm.sf(5), rel=1e-3)


def test_something_better_by_less_than_the_margin_says_so():
    told = judge([claim("higher")], {"miss-x": Measured(0.4, 0.1, 1e9, 1, 100, looks=False)})["miss-x"]
    assert told.word == "holds" and told.why == "by less than the margin"
    exact = Measured(0.0, 0.0, 1e9, 1, 100, looks=False)  # the same answers on every item
    assert judge([claim("equal")], {"miss-x": exact})["miss-x"].word == "holds"
