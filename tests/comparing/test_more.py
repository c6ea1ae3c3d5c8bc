"""Going on with a record by its folder alone."""

import json
import shutil

import pytest
from tests.comparing.test_run import QUIET, noted, run, written

from addenda.comparing.budget import Budget
from addenda.comparing.more import kept, said_in
from addenda.comparing.run import compare
from addenda.core.base.errors import AddendaError


@pytest.fixture
def files(tmp_path):
    return written(tmp_path)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A record with options that are not the defaults."""
    place = written(tmp_path_factory.mktemp("once"))
    run(place, rates=1, items=12, validation=5, targets=["q_proj", "v_proj"], around={"shira": 0.02}, full=True,
        columns={"question": "question"}, budget="steps=3")  # fmt: skip
    return place[2]


@pytest.fixture
def record(files, once):
    shutil.copytree(once, files[2])
    return files[2]


def test_what_a_record_was_asked_for_is_all_that_more_needs(files, record):
    made = compare(*files[:2], more=record, seeds=3, watch=QUIET)
    assert made.path == record and list(made.config.methods) == ["lora:rank=2", "shira", "full"]
    assert [t.seed for t in made.trials_of("shira", "final")] == [0, 1, 2]
    at_once = run((*files[:2], record.parent / "whole"), rates=1, items=12, validation=5, around={"shira": 0.02},
                  targets=["q_proj", "v_proj"], full=True, columns={"question": "question"}, budget="steps=3",
                  seeds=3)  # fmt: skip
    assert at_once.config.options == made.config.options
    for t in at_once.trials_of(stage="final"):
        assert made.find(t.method, "final", t.seed).losses == t.losses


def test_more_alone_goes_on_where_a_record_stopped(files, record):
    finals = sorted((record / "trials").glob("final*"))
    kept_losses = json.loads(finals[0].read_text())["losses"]
    finals[0].unlink()
    made = compare(*files[:2], more=str(record), watch=QUIET)
    assert len(made.config.seeds) == 2 and not made.config.looks
    assert json.loads(finals[0].read_text())["losses"] == kept_losses
    made = compare(*files[:2], more=record, until="decided", max_minutes=100, watch=QUIET)
    assert made.config.until.max_minutes == 100 and made.config.until.stopped
    before = noted(record)
    assert compare(*files[:2], more=record, watch=QUIET).config == made.config and noted(record) == before
    longer = compare(*files[:2], more=record, max_minutes=200, watch=QUIET)
    assert longer.config.until.max_minutes == 200


@pytest.mark.parametrize(("asked", "says"), [
    ({"margin": 1.0}, r"margin= cannot be given\. For other arms, another budget or another place, repeat"),
    ({"margin": 2.0}, r"margin= cannot be given"),  # be it the default
    ({"out": "runs/compare", "full": False}, r"out=, full= cannot be given"),
    ({"methods": ["lora"], "out": "there"}, r"methods=, out= cannot be given"),
    ({"model": None}, r"about the model model and the data sums.jsonl; where they are is not kept .*model= and data="),
    ({"seeds": 1}, r"seeds was 2, now 1"),
    ({"max_minutes": 4}, "max_minutes= is read with until='decided' only"),
    ({"seeds": 3, "until": "decided"}, r"give one"),
    ({"seeds": 0}, r"seeds must be at least 1"),
])  # fmt: skip
def test_what_cannot_be_is_named_and_nothing_is_touched(files, record, asked, says):
    before = noted(record)
    where = {"model": files[0], "data": files[1], "watch": QUIET} | asked
    with pytest.raises(AddendaError, match=says):
        compare(more=record, **where)
    assert noted(record) == before


def test_other_data_another_model_and_no_record(files, record, tmp_path):
    before = noted(record)
    other = tmp_path / "other.jsonl"
    other.write_text(files[1].read_text().replace("+", "-"))
    with pytest.raises(AddendaError, match="is about other data"):
        compare(files[0], other, more=record, seeds=3, watch=QUIET)
    assert noted(record) == before
    with pytest.raises(AddendaError, match=r"No record at .*nowhere"):
        compare(*files[:2], more=tmp_path / "nowhere", watch=QUIET)
    with pytest.raises(AddendaError, match=r"^more is the path"):
        compare(*files[:2], more=5, watch=QUIET)
    assert not (tmp_path / "nowhere").exists()


def test_records_that_do_not_say_enough(files, record):
    config = json.loads((record / "config.json").read_text())
    for change, says in [
        ({"options": None}, "does not keep what it was asked for.*Repeat its first call with out="),
        ({"options": config["options"] | {"of": "a subject"}}, "was made from Python, with subject="),
        ({"options": config["options"] | {"colour": "red"}}, "no option 'colour'"),
        ({"options": config["options"] | {"rates": 0}}, "rates must be from 1 to 100"),
        ({"options": config["options"] | {"columns": {"question": 5}}}, r"options\.columns\.question: expected"),
        ({"identity": None}, "did not keep which base"),
    ]:
        changed = {k: v for k, v in (config | change).items() if v is not None}
        (record / "config.json").write_text(json.dumps(changed))
        before = noted(record)
        with pytest.raises(AddendaError, match=says):
            compare(*files[:2], more=record, seeds=3, watch=QUIET)
        assert noted(record) == before


def test_no_path_of_a_machine_is_kept(record, files):
    assert str(files[0].parent) not in (record / "config.json").read_text()
    options = json.loads((record / "config.json").read_text())["options"]
    assert options["of"] == "files" and options["budget"] == "steps=3" and options["around"] == {"shira": 0.02}
    assert "seeds" not in options and "model" not in options and "trust_remote_code" not in options
    asked = {
        "budget": Budget("parameters", 5e5, 40),
        "subject": object(),
        "model": None,
        "methods": ["lora"],
        "general": "/a/path",
    }
    assert kept(asked) == {"budget": "parameters=500000", "methods": ["lora"], "of": "a subject"}
    assert kept(asked | {"general": None})["general"] is None
    named = kept(asked | {"subject": None, "data": "sort-numbers"})
    assert (named["of"], named["data"]) == ("embedded", "sort-numbers") and "model" not in named


def test_where_a_command_says_that_things_are():
    assert said_in("addenda compare --model m -d 'my data.jsonl' --seeds 3") == {"model": "m", "data": "my data.jsonl"}
    assert said_in("addenda compare --model=m --data=d") == {"model": "m", "data": "d"}
    assert said_in("addenda compare --yes") == said_in("python -m recipes.svft --model m") == said_in("addenda '") == {}
