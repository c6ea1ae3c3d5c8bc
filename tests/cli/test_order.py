"""`addenda order`: a few rated images in, a folder in order out, for every kind of encoders."""

import csv

import pytest
from tests.ranking.order.tiny_towers import apart, both, noise

from addenda.cli.main import run


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
    call("eval", "--data", folder / "rated.csv", "--adapter", adapter, *towers)
    assert "mean Spearman" in capsys.readouterr().out


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
