"""Tables, contact sheets and copies of an order; the originals stay as they are."""

import csv
import os

import pytest
from PIL import Image
from tests.ranking.order.tiny_towers import image

from addenda import AddendaError
from addenda.data.examples import Picture
from addenda.ranking.order.rank import Ranked
from addenda.ranking.order.sheet import SIDE, copy_ranked, is_sheet, picked, write_sheet, write_table


def rows(folder, n=8):
    files = [image(folder / f"{i}.png", i) for i in range(n)]
    return [Ranked(i + 1, Picture(str(i), 0, f.name, f), 5.0 - i, 'sharp, "red"', 0.5) for i, f in enumerate(files)]


def test_a_table_has_rank_file_score_and_nearest_query(tmp_path):
    made = rows(tmp_path / "in")
    path = write_table(made, tmp_path / "order.csv")
    with path.open(newline="") as f:
        read = list(csv.reader(f))
    assert read[0] == ["rank", "file", "score", "nearest trained query", "similarity"]
    assert read[1] == ["1", "0.png", "5", 'sharp, "red"', "0.500"]
    assert len(read) == 9
    assert write_table(made[:2], path) == path  # over its own kind
    (tmp_path / "mine.csv").write_text("a,b\n")
    with pytest.raises(AddendaError):
        write_table(made, tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "a,b\n"


def test_a_name_that_is_no_utf8_comes_back_from_the_table(tmp_path):
    name = os.fsdecode(b"\xff.png")
    made = [Ranked(1, Picture("k", 0, name, b""), 1.0, "q", 1.0)]
    assert b"\xff.png" in write_table(made, tmp_path / "o.csv").read_bytes()


def test_a_sheet_shows_the_best_first_and_every_kth_of_many(tmp_path):
    made = rows(tmp_path / "in", 8)
    path = write_sheet(made, tmp_path / "sheet.png", across=4)
    with Image.open(path) as sheet:
        assert sheet.size[0] == 4 * (SIDE + 8) + 8
        assert sheet.convert("L").getextrema()[0] < 60
    assert [r.rank for r in picked(made, 3)] == [1, 5, 8]
    assert picked(made, 60) == made


def test_a_sheet_is_written_over_a_sheet_and_over_no_image(tmp_path):
    made = rows(tmp_path / "in", 3)
    path = write_sheet(made, tmp_path / "sheet.png")
    assert is_sheet(path) and write_sheet(made[:2], path) == path
    photo = tmp_path / "in" / "0.png"
    before = photo.read_bytes()
    assert not is_sheet(photo)
    with pytest.raises(AddendaError, match="is there already"):
        write_sheet(made, photo)
    assert photo.read_bytes() == before
    with pytest.raises(AddendaError, match=r"sheet\.jpg would be called something else"):
        write_sheet(made, tmp_path / "sheet.jpg")


@pytest.mark.parametrize("name", ["new\nline.png", "\x1b[31m.png", "日本語.png", os.fsdecode(b"\xff.png"), "ü" * 120])
def test_names_of_any_kind_stand_on_a_sheet(tmp_path, name):
    (made,) = rows(tmp_path / "in", 1)
    odd = Ranked(1, Picture("k", 0, name, made.picture.stored), 1.0, "q", 1.0)
    assert is_sheet(write_sheet([odd], tmp_path / "sheet.png"))


def test_letters_scores_and_white_images_can_be_told_apart_on_a_sheet(tmp_path):
    Image.new("RGB", (9, 9), "white").save(tmp_path / "white.png")

    def drawn(name, score):
        row = Ranked(1, Picture("k", 0, name, tmp_path / "white.png"), score, "q", 1.0)
        with Image.open(write_sheet([row], tmp_path / "sheet.png")) as sheet:
            return sheet.convert("L").tobytes(), sheet.convert("L").crop((7, 7, 9 + SIDE, 9 + SIDE)).getextrema()[0]

    sheets = [
        drawn(n, s)[0] for n, s in (("ä", 1), ("ö", 1), ("é", 1), ("я", 1), ("a", 1987), ("a", 1988), ("a", 0.002))
    ]
    assert len(set(sheets)) == 7
    assert drawn("a", 1)[1] < 255  # its edge


def test_names_and_scores_stay_in_their_column(tmp_path):
    Image.new("RGB", (9, 9), "white").save(tmp_path / "white.png")
    long = [Ranked(i, Picture("k", 0, "W" * 200 + ".png", tmp_path / "white.png"), -1e-9, "q", 1.0) for i in (1, 2)]
    with Image.open(write_sheet(long, tmp_path / "sheet.png")) as sheet:
        between = sheet.convert("L").crop((10 + SIDE, 0, 14 + SIDE, sheet.height))
    assert between.getextrema() == (255, 255)


def test_a_copy_s_name_is_cut_where_the_rank_would_make_it_too_long(tmp_path):
    file = image(tmp_path / "in" / f"{'x' * 251}.png", 1)
    out = copy_ranked([Ranked(1, Picture("k", 0, file.name, file), 1.0, "q", 1.0)], tmp_path / "out")
    (copied,) = out.iterdir()
    assert copied.name.startswith("1-xxx") and copied.suffix == ".png" and len(copied.name) <= 255
    assert copied.read_bytes() == file.read_bytes()


def test_copies_have_their_rank_in_the_name_and_nothing_is_written_over(tmp_path):
    made = rows(tmp_path / "in", 12)
    before = {p: p.read_bytes() for p in (tmp_path / "in").iterdir()}
    out = copy_ranked(made, tmp_path / "out")
    assert sorted(p.name for p in out.iterdir())[:2] == ["01-0.png", "02-1.png"]
    assert (out / "03-2.png").read_bytes() == before[tmp_path / "in" / "2.png"]
    assert {p: p.read_bytes() for p in (tmp_path / "in").iterdir()} == before
    with pytest.raises(AddendaError, match="is there already"):
        copy_ranked(made, tmp_path / "out")
    (tmp_path / "in" / "5.png").unlink()
    with pytest.raises(AddendaError):
        copy_ranked(made, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_sheet_of_one_shows_the_best():
    assert picked([1, 2, 3], 1) == [1] and picked([1, 2, 3, 4, 5], 2) == [1, 5] and picked([1], 1) == [1]
