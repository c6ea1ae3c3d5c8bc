"""`addenda order`: a few rated images in, a folder in order out, for every kind of encoders."""

import csv
import errno
import os
import shutil

import pytest
from tests.ranking.order.tiny_towers import apart, both, noise

from addenda.cli.main import run
from addenda.ranking.order import rank, towers
from addenda.ranking.order.file import load_order


def call(*arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        run(["order", *map(str, arguments)])
    assert (stopped.value.code or 0) == code


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    with (folder / "rated.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["image", "query", "value"])
        for i in range(24):
            noise(folder / "photos" / f"{i:02d}.png", i)
            writer.writerow([f"photos/{i:02d}.png", "how many red squares", i % 5])
    vit, bert = apart(folder)
    made = {kind: ["--model", both(folder / kind, kind)] for kind in ("clip", "siglip")}
    return {"folder": folder, "apart": ["--image-encoder", vit, "--text-encoder", bert], **made}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["apart", "clip", "siglip"])
def test_trained_ranked_and_judged_from_the_command_line(place, tmp_path, capsys, kind):
    folder, towers = place["folder"], place[kind]
    call("train", "--data", folder / "rated.csv", *towers, "--steps", 5, "--batch", 8, "--width", 16, "--held", 0.3,
         "--out", tmp_path / "run")  # fmt: skip
    told = capsys.readouterr()
    assert "step 5/5, loss" in told.err and "spearman" in told.out
    assert "a ridge on the mean of each image's patches" in told.out
    adapter = tmp_path / "run" / "order.safetensors"
    before = {p: p.read_bytes() for p in (folder / "photos").iterdir()}
    call("rank", folder / "photos", "how many blue squares", "--adapter", adapter, *towers, "--out", tmp_path / "o.csv",
         "--sheet", tmp_path / "sheet.png", "--copy", tmp_path / "copies", "--top", 4)  # fmt: skip
    with (tmp_path / "o.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["rank"] for r in rows] == ["1", "2", "3", "4"]
    assert {r["nearest trained query"] for r in rows} == {"how many red squares"}
    assert len(list((tmp_path / "copies").iterdir())) == 4 and (tmp_path / "sheet.png").is_file()
    assert {p: p.read_bytes() for p in (folder / "photos").iterdir()} == before
    call("eval", "--data", folder / "rated.csv", "--adapter", adapter, *towers, "--against", adapter)
    told = " ".join(capsys.readouterr().out.split())
    assert "mean Spearman" in told and "not told apart from the other adapter: mean Spearman +0.000" in told


def test_images_are_made_and_pooled_as_in_training_without_being_told_again(place, tmp_path, capsys):
    folder, towers = place["folder"], place["apart"]
    call("train", "--data", folder / "rated.csv", *towers, "--image-size", 24, "--grid", 2, "--steps", 1, "--batch", 4,
         "--width", 16, "--out", tmp_path / "run")  # fmt: skip
    ask = ["--adapter", tmp_path / "run" / "order.safetensors", *towers]
    call("rank", folder / "photos", "red", *ask, "--out", tmp_path / "a.csv")
    call("rank", folder / "photos", "red", *ask, "--image-size", 24, "--out", tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    call("eval", "--data", folder / "rated.csv", *ask)
    assert "mean Spearman" in capsys.readouterr().out
    call("rank", folder / "photos", "red", *ask, "--image-size", 16, "--out", tmp_path / "c.csv", code=2)
    assert "how images are prepared" in capsys.readouterr().err and not (tmp_path / "c.csv").exists()


def test_steps_grow_with_the_queries(place, tmp_path, monkeypatch):
    from addenda.ranking.order import train as module

    monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(module, "LEAST", 4)
    rows = (place["folder"] / "rated.csv").read_text().splitlines()
    for queries, wanted in ((1, 4), (2, 6)):
        more = [row.replace("red", f"red{k}") for k in range(queries) for row in rows[1:]]
        data = place["folder"] / f"of{queries}.csv"
        data.write_text("\n".join([rows[0], *more]) + "\n")
        out = tmp_path / f"run{queries}"
        call("train", "--data", data, *place["apart"], "--batch", 4, "--width", 16, "--out", out)
        assert len(load_order(out / "order.safetensors")[1].scales) == queries
        assert load_order(out / "order.safetensors")[1].training["steps"] == wanted


def test_an_adapter_of_other_encoders_is_refused(place, tmp_path, capsys):
    folder = place["folder"]
    call("train", "--data", folder / "rated.csv", *place["apart"], "--steps", 1, "--batch", 4, "--width", 16,
         "--out", tmp_path / "run")  # fmt: skip
    ask = ["rank", folder / "photos", "red", "--adapter", tmp_path / "run" / "order.safetensors"]
    call(*ask, *place["clip"], "--out", tmp_path / "o.csv", code=2)
    assert "the image encoder" in capsys.readouterr().err and not (tmp_path / "o.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--data", "none.csv", "--out", "run"], "none.csv"),
        (["train", "--data", "r.csv", "--out", "run", "--ties", "no"], "skip"),
        (["train", "--data", "r.csv", "--out", "run", "--pairs", "0", "--regression", "0"], "at least one above 0"),
        (["train", "--data", "r.csv", "--out", "run", "--width", "12"], "heads"),
        (["rank", "photos", " ", "--adapter", "a", "--out", "o.csv"], "The sentence to order by is empty"),
        (["rank", "photos", "red", "--adapter", "a", "--out", "o.csv"], "a"),
        (["eval", "--data", "r.csv", "--adapter", "a"], "a"),
    ],
)
def test_what_cannot_be_is_said_before_an_encoder_is_read(arguments, words, tmp_path, monkeypatch, capsys):
    from addenda.models.wheels import Wheel

    monkeypatch.setattr(Wheel, "model_folder", lambda *_, **__: pytest.fail("a model was looked at"))
    monkeypatch.chdir(tmp_path)
    call(*arguments, code=2)
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told
    assert not [p for p in tmp_path.iterdir() if p.name != "cache"]


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """The words that rank by a tiny adapter; the folder that holds it."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADDENDA_CACHE", str(out / "cache"))
        call("train", "--data", place["folder"] / "rated.csv", *place["apart"], "--steps", 1, "--batch", 4, "--width",
             16, "--out", out)  # fmt: skip
    return ["--adapter", out / "order.safetensors", *place["apart"]]


def rows_of(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("red " * 200, "longer than the 16 tokens"),
        ("wie viele rote Quadrate", "similarity"),
        ("何個の赤い四角", "what an order by so different a sentence is worth was never measured"),
    ],
)
def test_sentences_that_nobody_trained_are_ordered_by_with_a_word(
    place, trained, tmp_path, capsys, monkeypatch, sentence, words
):
    monkeypatch.setattr(rank, "FAR", 1.0)  # encoders drawn at random find everything near
    call("rank", place["folder"] / "photos", sentence, *trained, "--out", tmp_path / "o.csv", "--top", 2)
    assert words in capsys.readouterr().err
    rows = rows_of(tmp_path / "o.csv")
    assert len(rows) == 2 and float(rows[0]["similarity"]) < 1


@pytest.mark.parametrize(("sentence", "words"), [("", "is empty"), (" ", "is empty"), ("red \udcff", "not UTF-8")])
def test_what_is_no_sentence_is_refused(place, trained, tmp_path, capsys, sentence, words):
    call("rank", place["folder"] / "photos", sentence, *trained, "--out", tmp_path / "o.csv", code=2)
    assert words in capsys.readouterr().err and not (tmp_path / "o.csv").exists()


def test_originals_are_written_over_by_nothing(place, trained, tmp_path, capsys):
    """A sheet in the place of a photo, copies among the photos: refused before an image is looked at."""
    photos = shutil.copytree(place["folder"] / "photos", tmp_path / "photos")
    before = {p: p.read_bytes() for p in photos.iterdir()}
    ask = ["rank", photos, "red", *trained, "--out", tmp_path / "o.csv"]
    for more, words in [
        (["--sheet", photos / "00.png"], "is there already"),
        (["--sheet", tmp_path / "s.jpg"], "End it in .png"),
        (["--copy", photos / "ranked"], "would be of the copies too"),
        (["--copy", photos / "00.png" / "x"], "is no folder"),
        (["--copy", photos], "is there already"),
    ]:
        call(*ask, *more, code=2)
        assert words in capsys.readouterr().err and not (tmp_path / "o.csv").exists()
    assert {p: p.read_bytes() for p in photos.iterdir()} == before
    for _ in range(2):  # a sheet among the photos is none of them
        call(*ask, "--sheet", photos / "sheet.png")
        assert len(rows_of(tmp_path / "o.csv")) == 24


def test_corrupt_images_are_named_or_left_out(place, trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    for i in range(6):
        noise(photos / f"{i}.png", i)
    (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:-30])
    ask = ["rank", photos, "red", *trained, "--out", tmp_path / "o.csv"]
    call(*ask, code=2)
    assert "1.png: image file is truncated" in capsys.readouterr().err
    (photos / "0.png").write_bytes(b"")
    call(*ask, code=2)
    assert "0.png: the file is empty" in capsys.readouterr().err
    call(*ask, "--skip-corrupt")
    told = capsys.readouterr().err
    assert "0.png: the file is empty" in told and "left out: 1.png" in told
    assert len(rows_of(tmp_path / "o.csv")) == 4
    (tmp_path / "rated.csv").write_text("image,query,value\n" + "".join(f"photos/{i}.png,red,{i}\n" for i in range(6)))
    learn = ["train", "--data", tmp_path / "rated.csv", *place["apart"], "--steps", 1, "--batch", 2, "--width", 16]
    call(*learn, "--out", tmp_path / "run", code=2)
    assert "line 2: " in capsys.readouterr().err
    call(*learn, "--out", tmp_path / "run", "--skip-corrupt", "--held", 0.5)
    told = capsys.readouterr().err
    assert "0.png is empty" in told and "1 corrupt images left out: photos/1.png" in told
    judge = ["eval", "--data", tmp_path / "rated.csv", *trained]
    call(*judge, code=2)
    assert "line 2: " in capsys.readouterr().err
    call(*judge, "--skip-corrupt")
    told = capsys.readouterr()
    assert "0.png is empty" in told.err and "left out: photos/1.png" in told.err and "mean Spearman" in told.out
    (tmp_path / "two.csv").write_text("image,query,value\n" + "".join(f"photos/{i}.png,red,{i}\n" for i in (2, 3)))
    call("eval", "--data", tmp_path / "two.csv", *trained)
    told = capsys.readouterr().out
    assert "three images at least" in " ".join(told.split()) and "nan" not in told
    alone = tmp_path / "alone"
    noise(alone / "a.png", 1)
    call("rank", alone, "red", *trained, "--out", tmp_path / "one.csv", "--sheet", tmp_path / "one.png")
    assert [r["rank"] for r in rows_of(tmp_path / "one.csv")] == ["1"]
    (alone / "a.png").write_bytes(b"no image")
    call("rank", alone, "red", *trained, "--out", tmp_path / "one.csv", "--skip-corrupt", code=2)
    assert "can be decoded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "more", "words"),
    [
        (["image,query,value", "00.png,red,1"], [], "rates one image for 'red'"),
        (["image,query,value", "00.png,red,1", "01.png,red,1"], [], "All 2 images"),
        (["image,query,value", "00.png,red,1", "01.png,red,2", "00.png,red,3"], [], "line 4: 00.png has the value 3"),
        (["image,query,value", "00.png,red,1", "01.png,red,2", "02.png,blue,3"], [], "rates one image for 'blue'"),
        (["image,query,value", "00.png,red,", "01.png,red,"], [], "rates no image"),
        (["image,query,value", "00.png,red,nan", "01.png,red,2"], [], "line 2: column 'value' holds 'nan'"),
        (["image,query", "00.png,red"], [], "no column 'value'"),
        (["better,worse,query", "00.png,01.png,red", "01.png,00.png,red"], [], "circle"),
        (["better,worse,query", "00.png,00.png,red"], [], "line 2: 00.png is compared with itself"),
        (["image,query,value", "00.png,red,1", "01.png,red,2"], ["--batch", 1], "--batch 1 makes groups of one image"),
        (["image,query,value", "00.png,red,1", "01.png,red,2"], ["--out", "rated.csv"], "is a file"),
        (["image,query,value", "00.png,red,1", "01.png,red,2"], ["--held", 0.5], "held out"),
    ],
)
def test_ratings_that_cannot_be_are_said_before_an_encoder_is_read(
    place, tmp_path, capsys, monkeypatch, rows, more, words
):
    shutil.copytree(place["folder"] / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "rated.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(towers, "load_towers", lambda *_, **__: pytest.fail("an encoder was read"))
    monkeypatch.chdir(tmp_path / "photos")
    call("train", "--data", "rated.csv", "--out", "run", *more, code=2)
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told and not (tmp_path / "photos" / "run").exists()


def test_a_disk_that_is_full_leaves_nothing_half_done(place, trained, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)  # nothing is written otherwise; what can be made again is then not kept
    call("rank", place["folder"] / "photos", "red", *trained, "--out", tmp_path / "o.csv", code=2)
    assert "The disk is full" in capsys.readouterr().err
    assert [p for p in tmp_path.iterdir() if p.name != "cache"] == []
