"""Ratings and comparisons from tables, grades and sidecars, and what is refused of them."""

import csv
import json
import math

import pytest
from tests.ranking.order.tiny_towers import image

from addenda import AddendaError
from addenda.ranking.order.ratings import read_ratings


def table(folder, rows, name="ratings.csv"):
    path = folder / name
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def photos(tmp_path):
    for i in range(5):
        image(tmp_path / f"{i}.png", i)
    return tmp_path


def test_a_long_table_of_values_by_query(photos):
    said = [("0", "red", "3"), ("1", "red", "0"), ("0", "blue", "1.5"), ("2", "blue", "")]
    rows = [{"image": f"{i}.png", "query": query, "value": value} for i, query, value in said]
    found = read_ratings(table(photos, rows))
    assert [p.name for p in found.pictures] == ["0.png", "1.png"]
    assert found.values == {"red": {0: 3.0, 1: 0.0}, "blue": {0: 1.5}}  # what is not said is not there
    lines = "\n".join(json.dumps(r) for r in rows[:3])
    (photos / "r.jsonl").write_text(lines)
    assert read_ratings(photos / "r.jsonl").values == found.values
    assert read_ratings(table(photos, [{"image": "3.png", "value": "2"}]), query="sharp").values == {"sharp": {0: 2.0}}


def test_comparisons(photos):
    rows = [
        {"better": "0.png", "worse": "1.png", "query": "red"},
        {"better": "1.png", "worse": "2.png", "query": "red"},
    ]
    found = read_ratings(table(photos, rows))
    assert found.comparisons == {"red": ((0, 1), (1, 2))}
    circle = [*rows, {"better": "2.png", "worse": "0.png", "query": "red"}]
    with pytest.raises(AddendaError, match=r"circle: .*png above .*line \d"):
        read_ratings(table(photos, circle))
    assert len(read_ratings(table(photos, circle), allow_circles=True).comparisons["red"]) == 3
    other = [*rows, {"better": "2.png", "worse": "0.png", "query": "blue"}]
    assert set(read_ratings(table(photos, other)).comparisons) == {"red", "blue"}
    with pytest.raises(AddendaError, match=r"line 2: .*with itself"):
        read_ratings(table(photos, [{"better": "0.png", "worse": "0.png", "query": "red"}]))


def test_grades_and_stars(tmp_path):
    for grade, shades in (("1", (0, 1)), ("5", (2,))):
        for shade in shades:
            image(tmp_path / "graded" / grade / f"{shade}.png", shade)
    found = read_ratings(tmp_path / "graded", query="sharp")
    assert {found.pictures[i].name: v for i, v in found.values["sharp"].items()} == {
        "1/0.png": 1.0, "1/1.png": 1.0, "5/2.png": 5.0
    }  # fmt: skip
    for name, said in (("a", 'xmp:Rating="4"'), ("b", "<xmp:Rating>2</xmp:Rating>"), ("c", 'xmp:Rating="0"')):
        image(tmp_path / "stars" / f"{name}.png", ord(name))
        (tmp_path / "stars" / f"{name}.xmp").write_text(f"<x:xmpmeta {said if '<' not in said else '>' + said}")
    found = read_ratings(tmp_path / "stars", query="good")
    assert sorted(found.values["good"].values()) == [2.0, 4.0]
    with pytest.raises(AddendaError, match="query="):
        read_ratings(tmp_path / "graded")
    image(tmp_path / "graded" / "other.png", 9)
    with pytest.raises(AddendaError, match=r"other\.png"):
        read_ratings(tmp_path / "graded", query="sharp")


def test_one_file_under_two_names_is_one_image_with_one_value(photos):
    (photos / "again.png").write_bytes((photos / "0.png").read_bytes())
    rows = [{"image": "0.png", "query": "red", "value": "1"}, {"image": "again.png", "query": "red", "value": "1"}]
    assert len(read_ratings(table(photos, rows)).pictures) == 1
    rows[1]["value"] = "2"
    with pytest.raises(AddendaError, match=r"line 3: .*value 2 .*1 in line 2"):
        read_ratings(table(photos, rows))


@pytest.mark.parametrize("value", ["much", "nan", "inf", "-inf", "1e999"])
def test_values_that_are_no_finite_numbers_are_refused_by_line(photos, value):
    rows = [{"image": "0.png", "query": "red", "value": "1"}, {"image": "1.png", "query": "red", "value": value}]
    with pytest.raises(AddendaError, match=r"line 3: column 'value'"):
        read_ratings(table(photos, rows))


def test_files_that_are_not_there_or_empty_are_refused_by_line(photos):
    (photos / "empty.png").touch()
    rows = [{"image": "none.png", "query": "red", "value": "1"}, {"image": "empty.png", "query": "red", "value": "1"}]
    with pytest.raises(AddendaError, match=r"line 2: .*no file.*line 3: .*empty"):
        read_ratings(table(photos, rows))
    with pytest.raises(AddendaError, match="no column 'query'"):
        read_ratings(table(photos, [{"image": "0.png", "value": "1"}]))


def test_what_cannot_be_learned_is_said(photos):
    alike = read_ratings(table(photos, [{"image": f"{i}.png", "query": "red", "value": "2"} for i in range(3)]))
    with pytest.raises(AddendaError, match="All 3 images"):
        alike.check_learnable()
    with pytest.raises(AddendaError, match="rates one image"):
        alike.of([1]).check_learnable()
    assert alike.of([2, 0]).values == {"red": {0: 2.0, 1: 2.0}}
    assert math.isclose(sum(alike.values["red"].values()), 6)
