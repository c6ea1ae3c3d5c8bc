"""A comparison on images, end to end: a fresh head, a subset, corrupt files, and a report that speaks of images."""

import json

import pytest

from addenda.comparing.report import answer, page
from addenda.comparing.run import Watch, compare
from addenda.comparing.stats import analyse
from addenda.comparing.subject import from_files
from addenda.core.base.errors import AddendaError
from addenda.train import attention
from pictures import save_backbone, write


@pytest.fixture(autouse=True)
def _one_attention(monkeypatch):
    """Measured, it may differ from one comparison to the next, and with it the bits."""
    monkeypatch.setattr(attention, "measure", lambda *_: attention.Attention("sdpa"))


@pytest.fixture
def files(tmp_path):
    """A tiny random backbone, and class folders with a test split."""
    save_backbone(tmp_path / "model")
    write(tmp_path / "data" / "train", 20)
    write(tmp_path / "data" / "test", 15, start=50)
    return tmp_path / "model", tmp_path / "data", tmp_path / "record"


def run(files, **options):
    model, data, out = files
    asked = {"methods": ["lora:rank=2", "shira"], "budget": "steps=30", "seeds": 2, "batch": 8, "dtype": "float32"}
    asked |= {"subset": "4/class", "rates": 1, "watch": Watch(say=lambda text: None)}
    return compare(model, data, out=out, **(asked | options))


def test_a_comparison_of_images(files):
    record = run(files, full=True, items=20)
    assert list(record.config.methods) == ["lora:rank=2", "shira", "head", "full"]
    assert record.config.data.sizes == {"train": 8, "test": 20, "validation": 8}
    assert record.config.data.subset == "4/class"
    assert "8 training images of 2 classes (blue, red)" in record.config.data.description
    assert record.config.data.metric == "accuracy" and record.config.data.example is None
    assert record.find("base", "control") is None  # an untrained head has no answers
    head = record.config.methods["head"]
    assert head.trainable == 32 * 2 + 2 and head.title == "Head alone"
    for label in ("lora:rank=2", "shira"):
        assert record.config.methods[label].trainable > head.trainable
    for t in record.trials_of(stage="final"):
        assert len(t.test.items) == 20 and t.images_per_second > 0
    found = analyse(record)
    assert found.control == "head" and "head" not in found.leaders and "full" not in found.leaders
    assert max(e.mean for e in found.test.values()) > 0.8
    said = answer(record, found)
    assert "the control (head alone," in said and "base control" not in said
    text = page(record)
    for word in ("question", "exact match", "zero-shot", "tokens", "Dashed: the base"):
        assert word not in text.lower().replace("dashed: the base", "Dashed: the base"), word
    assert "8 training images" in text and "Head alone" in text
    small = sum(f.stat().st_size for f in files[2].rglob("*.json"))
    assert small < 100_000


def test_it_goes_on_where_it_stopped(files):
    first = run(files)
    done = sorted((files[2] / "trials").glob("*.json"))
    done[-1].unlink()
    again = run(files)
    assert len(again.trials) == len(first.trials)
    for t in first.trials_of(stage="final"):
        same = again.find(t.method, "final", t.seed)
        assert same.losses == t.losses and same.test.items == t.test.items


def test_the_test_set_chooses_nothing(files):
    """With the test images' classes exchanged, training, the search and its choice stay as they were."""
    searched = {"rates": 3, "methods": "lora:rank=2", "budget": "steps=8", "seeds": 1, "around": {"lora:rank=2": 0.03}}
    one = run(files, **searched)
    blue, red = (files[1] / "test" / n for n in ("blue", "red"))
    blue.rename(blue.with_name("swap"))
    red.rename(blue)
    blue.with_name("swap").rename(red)
    files[2].rename(files[2].with_name("first"))
    two = run(files, **searched)
    for t in one.trials:
        other = two.find(t.method, t.stage, t.seed, t.rate, t.steps)
        assert (other.losses, other.validation) == (t.losses, t.validation)
        if t.stage == "final":
            assert other.test.accuracy == pytest.approx(1 - t.test.accuracy)


def test_without_splits_of_its_own(tmp_path):
    save_backbone(tmp_path / "model")
    write(tmp_path / "data", 60)
    subject = from_files(tmp_path / "model", tmp_path / "data", dtype="float32")
    sizes = {k: len(v) for k, v in subject.splits.items()}
    assert sum(sizes.values()) == 120 and set(sizes) == {"train", "validation", "test"}
    keys = {k: {p.key for p in e.pictures} for k, e in subject.splits.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    assert subject.fresh and subject.heads == ("classifier",)
    assert subject.reading("auto").general is None
    with pytest.raises(AddendaError, match="loss of a causal LM, and this model is none"):
        subject.reading(tmp_path / "text.txt")


def test_corrupt_images_are_told_and_left_out(files):
    harmed = files[1] / "test" / "blue" / "050.png"
    harmed.write_bytes(b"nothing")
    with pytest.raises(AddendaError, match=r"test/blue/050.png"):
        run(files, items=None)
    record = run(files, items=None, skip_corrupt=True)
    assert record.config.data.skipped == {"test": 1} and record.config.data.sizes["test"] == 29
    assert "1 corrupt images of test were left out" in record.config.notes[0]
    assert "1 corrupt images of test" in page(record)


def test_a_class_that_training_lacks_is_told(files):
    (files[1] / "test" / "blue").rename(files[1] / "test" / "up")
    with pytest.raises(AddendaError, match="up is of no known class"):
        run(files)
    assert not files[2].exists()


def test_the_record_names_what_decides_it(files):
    run(files, image_size=8)
    known = json.loads((files[2] / "config.json").read_text())
    assert known["data"]["description"].endswith("resized to 8 × 8.")
    for options in (
        {"image_size": 8, "methods": ["lora:rank=2", "miss:rank=2"]},
        {"image_size": 12},
        {"image_size": 8, "subset": "2/class"},
    ):
        with pytest.raises(AddendaError, match="Choose another --out"):
            run(files, **options)
