"""Ratings and comparisons from tables, grades and sidecars, and what is refused of them."""

import csv
import json
import math
from dataclasses import replace

import pytest
from tests.ranking.order.tiny_towers import image

from addenda import AddendaError
from addenda.core.disk.access import sha256_of
from addenda.ranking.order import ratings
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
    twice = read_ratings(table(photos, [*rows, rows[0]]))  # two people agree, and nobody contradicts them
    assert twice.comparisons == {"red": ((0, 1), (1, 2), (0, 1))}
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


@pytest.mark.parametrize("value", ["much", "nan", "inf", "-inf", "1e999", "1e200", "True"])
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


def test_a_table_in_parquet_says_nothing_where_it_has_no_value(photos):
    import pyarrow
    import pyarrow.parquet

    names = [f"{i}.png" for i in range(4)]
    about = {"image": names, "query": ["red"] * 4, "value": [0.0, None, float("nan"), 2.0]}
    pyarrow.parquet.write_table(pyarrow.table(about), photos / "r.parquet")
    assert read_ratings(photos / "r.parquet").values == {"red": {0: 0.0, 1: 2.0}}
    pyarrow.parquet.write_table(pyarrow.table(about | {"value": [1.0, float("inf"), 1.0, 1.0]}), photos / "r.parquet")
    with pytest.raises(AddendaError, match="row 1: column 'value' holds 'inf'"):
        read_ratings(photos / "r.parquet")
    (photos / "r.parquet").write_bytes((photos / "r.parquet").read_bytes()[:-9])
    with pytest.raises(AddendaError, match=r"r\.parquet"):
        read_ratings(photos / "r.parquet")


def test_a_table_of_other_columns_or_of_no_query_is_refused_with_what_is_wanted(photos):
    with pytest.raises(AddendaError, match=r"no column 'value'; it has 'image', 'query', 'values'\. Did you mean"):
        read_ratings(table(photos, [{"image": "0.png", "query": "red", "values": "1"}]))
    with pytest.raises(AddendaError, match="line 2: column 'query' is empty"):
        read_ratings(table(photos, [{"image": "0.png", "query": "  ", "value": "1"}]))
    with pytest.raises(AddendaError, match="line 2: column 'better' is empty"):
        read_ratings(table(photos, [{"better": "", "worse": "0.png", "query": "red"}]))


def test_images_that_cannot_be_read_are_left_out_where_asked_and_named(photos, monkeypatch):
    (photos / "empty.png").touch()
    refused = photos / "4.png"
    monkeypatch.setattr(ratings, "sha256_of", lambda path: sha256_of(photos / "shut" if path == refused else path))
    (photos / "shut").mkdir()  # to read a folder fails for everybody, and is no matter of rights
    rows = [{"image": f"{i}.png", "query": "red", "value": str(n)} for n, i in enumerate((0, "empty", 1, 4))]
    with pytest.raises(
        AddendaError, match=r"2 of 4 rows .*line 3: .*empty\.png is empty; line 5: .*4\.png cannot be read"
    ):
        read_ratings(table(photos, rows))
    found = read_ratings(table(photos, rows), skip_corrupt=True)
    assert found.values == {"red": {0: 0.0, 1: 2.0}}
    assert [s.partition(":")[0] for s in found.skipped] == ["line 3", "line 5"]
    assert found.of([0]).skipped == found.skipped


def test_grades_and_stars_that_cannot_be_are_refused_by_file(tmp_path):
    graded, stars = tmp_path / "graded", tmp_path / "stars"
    for i in range(3):
        image(graded / str(i + 1) / f"{i}.png", i)
        image(stars / f"{i}.png", i)
        (stars / f"{i}.png.xmp").write_text(f'<x:xmpmeta xmp:Rating="{i + 0.5}"/>')
    assert sorted(read_ratings(stars, query="good").values["good"].values()) == [0.5, 1.5, 2.5]
    (stars / "1.png.xmp").write_bytes(b"\0\xff" * 99)  # says nothing, so nothing is known
    assert sorted(read_ratings(stars, query="good").values["good"].values()) == [0.5, 2.5]
    (stars / "1.png.xmp").write_text('<x:xmpmeta xmp:Rating="9"/>')
    with pytest.raises(AddendaError, match=r"1\.png\.xmp gives 9 stars"):
        read_ratings(stars, query="good")
    (graded / "2" / "empty.png").touch()
    (graded / "2" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AddendaError, match=r"2 of 5 images .*empty\.png is empty; .*there is no file .*gone\.png"):
        read_ratings(graded, query="sharp")
    (graded / "2" / "gone.png").unlink()
    assert len(read_ratings(graded, query="sharp", skip_corrupt=True).pictures) == 3
    (graded / "2" / "empty.png").unlink()
    (graded / "3" / "0.png").write_bytes((graded / "1" / "0.png").read_bytes())
    with pytest.raises(AddendaError, match="the same image with two values, 3 and 1"):
        read_ratings(graded, query="sharp")
    (graded / ("9" * 200)).mkdir()
    with pytest.raises(AddendaError, match="the grade 999"):
        read_ratings(graded, query="sharp")
    (tmp_path / "none" / "1").mkdir(parents=True)
    with pytest.raises(AddendaError, match="rates no image"):
        read_ratings(tmp_path / "none", query="sharp").check_learnable()
    image(tmp_path / "loose" / "a.png", 1)
    with pytest.raises(AddendaError, match="nothing says what they are worth"):
        read_ratings(tmp_path / "loose", query="sharp")


def test_a_query_has_values_or_comparisons_where_it_is_learned(photos):
    rated = read_ratings(table(photos, [{"image": f"{i}.png", "query": "red", "value": str(i)} for i in range(3)]))
    both = replace(rated, comparisons={"red": ((0, 1),)})
    with pytest.raises(AddendaError, match="has values and comparisons for 'red'"):
        both.check_learnable()
    replace(rated, comparisons={"blue": ((0, 1),)}).check_learnable()
