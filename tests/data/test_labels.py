"""What labels mean, and which output of a head each is."""

import json
import math

import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.core.file.header import read as read_file
from addenda.data.labels import scale_of
from addenda.data.read import read
from addenda.data.subsets import Subset
from addenda.models.load import load_model, wanted_by
from addenda.train.evaluate import evaluate
from addenda.train.tune import tune
from shared import read_raw, write_raw
from tiny_models import make_bert, make_tokenizer

TEXTS = ["a", "bb", "ccc", "dddd"]
POLAR = [{"text": t, "label": label} for t, label in zip(TEXTS, ["pos", "pos", "pos", "neg"], strict=True)]
QUICK = {"steps": 2, "batch": 4, "dtype": "float32", "progress": False}


def polar(names=("pos", "neg"), outputs=None):
    """A classifier that finds every text positive; {0: "pos", 1: "neg"} unless named otherwise."""
    model = make_bert(outputs or len(names))
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {n: i for i, n in enumerate(names)}
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.arange(model.config.num_labels, 0, -1.0))
    return model


def saved(folder, model):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def rows(labels):
    return [{"text": "ab", "label": label} for label in labels]


# -- names and order ---------------------------------------------------------------------------------------------------


def test_a_classifier_is_judged_by_the_names_of_its_outputs():
    model, tokenizer = polar(), make_tokenizer()
    assert evaluate(model, tokenizer, POLAR).accuracy == 0.75
    assert evaluate(model, tokenizer, read(POLAR, task="label")).accuracy == 0.75  # read before, by the alphabet
    assert evaluate(model, tokenizer, POLAR[:3]).accuracy == 1.0  # a class is missing
    assert evaluate(model, tokenizer, POLAR[3:]).accuracy == 0.0
    by_place = [r | {"label": int(r["label"] == "neg")} for r in POLAR]
    for written in (by_place, [r | {"label": str(r["label"])} for r in by_place]):
        assert evaluate(model, tokenizer, written).accuracy == 0.75
    with pytest.raises(AddendaError, match=r"row 0: column 'label' holds 'Pos', expected .* Did you mean 'pos'\?"):
        evaluate(model, tokenizer, rows(["Pos"]))
    with pytest.raises(AddendaError, match="in another order than the model's outputs, which are 'pos', 'neg'"):
        evaluate(model, tokenizer, POLAR, labels=["neg", "pos"])


def test_a_data_set_that_numbers_its_own_classes_is_read_by_name():
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
    numbered = [r | {"label": ["neg", "pos"].index(r["label"])} for r in POLAR]
    data = datasets.Dataset.from_list(numbered, features=features)
    assert evaluate(polar(), make_tokenizer(), data).accuracy == 0.75
    other = data.cast_column("label", datasets.ClassLabel(names=["bad", "pos"]))
    with pytest.raises(AddendaError, match="a class 'bad' in column 'label' that is none of the model's"):
        evaluate(polar(), make_tokenizer(), other)
    none = datasets.Dataset.from_list([*numbered, {"text": "x", "label": -1}], features=features)
    with pytest.raises(AddendaError, match="row 4: column 'label' holds -1"):
        evaluate(polar(), make_tokenizer(), none)


def test_a_head_without_names_wants_all_classes_or_their_numbers():
    model, tokenizer = polar((), outputs=3), make_tokenizer()
    assert evaluate(model, tokenizer, rows([0, 0, 1])).accuracy == pytest.approx(2 / 3)
    assert evaluate(model, tokenizer, rows(["LABEL_0", "LABEL_2"])).accuracy == 0.5
    with pytest.raises(AddendaError, match=r"2 labels .* the model's head has 3 outputs without names"):
        evaluate(model, tokenizer, POLAR)
    with pytest.raises(AddendaError, match="counted from 0; the largest is 3"):
        evaluate(model, tokenizer, rows([0, 3]))
    model.config.id2label = {0: "a", 1: "b", 2: "a"}
    with pytest.raises(AddendaError, match="two classes are called 'a'"):
        evaluate(model, tokenizer, rows(["a"]))


@pytest.mark.parametrize("of", ["folder", "module"])
def test_training_keeps_the_order_and_the_file_carries_it(tmp_path, of):
    folder = saved(tmp_path / "model", polar())
    model = folder if of == "folder" else load_model(folder, dtype="float32").model
    given = {} if of == "folder" else {"tokenizer": make_tokenizer()}
    made = tune(model, POLAR, out=tmp_path / "run", eval_data=POLAR[:2], rate=1e-9, **given, **QUICK)
    assert made.before["accuracy"] == made.after["accuracy"] == 1.0
    assert made.adapter.labels == ("pos", "neg")
    assert read_file(made.path)[0].labels == ("pos", "neg")
    assert "2 labels in order: 'pos', 'neg'" in ad.inspect(made.path)
    with pytest.raises(AddendaError, match="holds 'great', expected one of 'pos', 'neg'"):
        tune(folder, [*POLAR, *rows(["great"])], **QUICK)


def test_an_adapter_away_from_its_run_is_judged_in_its_own_order(tmp_path):
    import transformers

    from tiny_models import config

    encoder = saved(tmp_path / "encoder", transformers.BertForMaskedLM(config(transformers.BertConfig)))
    several = rows(["b", "a", "c"] * 8)
    data = [r | {"text": r["label"] * (i % 4 + 1)} for i, r in enumerate(several)]
    made = tune(
        encoder, data, out=tmp_path / "run", rate=1e-2, **(QUICK | {"steps": 40}), columns={"labels": list("bca")}
    )
    assert evaluate(made.model, made.tokenizer, data).accuracy == 1.0
    moved = made.path.rename(tmp_path / "moved.safetensors")
    loaded = load_model(encoder, dtype="float32", seed=3, **wanted_by(moved))
    adapter = ad.load(loaded.model, moved)
    assert adapter.labels == ("b", "c", "a")
    for part in (data, data[1:2], [r for r in data if r["label"] != "b"]):
        assert evaluate(loaded.model, loaded.tokenizer, part).accuracy == 1.0
    with pytest.raises(AddendaError, match=r"3 labels .* has 2 outputs"):
        ad.load(load_model(encoder, dtype="float32", labels=2).model, moved)


def test_the_command_line_judges_by_the_file(tmp_path, capsys):
    from addenda.cli.main import run

    folder = saved(tmp_path / "model", polar())
    made = tune(folder, POLAR, out=tmp_path / "run", rate=1e-9, **QUICK)
    moved = made.path.rename(tmp_path / "moved.safetensors")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in POLAR[:3]))
    options = ["--model", str(folder), "--data", str(tmp_path / "test.jsonl"), "--dtype", "float32"]
    for more in ([], ["--adapter", str(moved)]):
        with pytest.raises(SystemExit, match="0"):
            run(["eval", *options, *more])
    told = capsys.readouterr()
    assert told.out.count("3 of 3 right") == 2
    assert told.err.count("data: 2 classes in column 'label': 'pos', 'neg'") == 2


@pytest.mark.parametrize("labels", [["a", "a"], [1, 2], "ab", {"a": 1}, [""], ["a", "b", "c"]])
def test_labels_of_a_hostile_file(tmp_path, labels):
    model = polar()
    made = tune(model, POLAR, tokenizer=make_tokenizer(), out=tmp_path / "run", **QUICK)
    header, tensors = read_raw(made.path)
    write_raw(tmp_path / "bad.safetensors", header | {"labels": labels}, tensors)
    with pytest.raises(AddendaError, match="labels"):
        ad.load(polar(), tmp_path / "bad.safetensors")


def test_files_of_adapters_without_labels_are_what_they_were(tmp_path):
    model = make_bert()
    adapter = ad.attach(model, "lora:rank=2")
    header, _ = read_file(adapter.save(tmp_path / "a.safetensors"))
    assert header.labels == ()
    assert b"labels" not in (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(AddendaError, match="3 labels"):
        adapter.labels = ["a", "b", "c"]
    assert adapter.labels == ()


def test_adapters_that_act_together_must_agree():
    model = make_bert()
    for name, labels in (("one", ["a", "b"]), ("two", ["b", "a"])):
        ad.attach(model, "lora:rank=2", name=name).labels = labels
    assert evaluate(model, make_tokenizer(), rows(["b"])).items == evaluate(model, make_tokenizer(), rows([0])).items
    ad.switch(model, ["one", "two"])
    with pytest.raises(AddendaError, match="name the outputs differently"):
        evaluate(model, make_tokenizer(), rows(["b"]))


def test_comparing_and_small_subsets_keep_the_order(tmp_path):
    from addenda.comparing.subject import from_files

    folder = saved(tmp_path / "model", polar())
    data = [{"text": "x" * (i + 1), "label": ["pos", "neg"][i % 2]} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
    subject = from_files(folder, tmp_path / "d.jsonl", subset="2/class", dtype="float32")
    assert {e.names for e in subject.splits.values()} == {("pos", "neg")}
    with pytest.raises(AddendaError, match=r"has fewer of pos \(1\)"):
        Subset.parse("1/class").of(read([*rows(["neg"]), *data[:2], *data[3:5:2]], task="label", labels=["pos", "neg"]))


# -- kinds -------------------------------------------------------------------------------------------------------------


def kinds(values, **options):
    scale = scale_of(values, "label", **options)
    return scale.names, [scale.of(v) for v in values]


@pytest.mark.parametrize(
    ("values", "names", "made"),
    [
        (["spam", "ham"], ("ham", "spam"), [1, 0]),
        ([" spam", "ham "], ("ham", "spam"), [1, 0]),
        ([0, 2, 1], ("0", "1", "2"), [0, 2, 1]),
        (["0", "2", "1"], ("0", "1", "2"), [0, 2, 1]),
        ([1, 3], ("0", "1", "2", "3"), [1, 3]),
        ([True, False], ("False", "True"), [1, 0]),
        (["²", "½"], ("²", "½"), [0, 1]),
        (["٣", "٤"], ("٣", "٤"), [0, 1]),
        ([0.5, 1.7], None, [0.5, 1.7]),
        (["0.5", "1.7"], None, [0.5, 1.7]),
        (["0", "1.7", "-2", "1e3"], None, [0, 1.7, -2, 1000]),
        ([torch.tensor(1), torch.tensor(0)], ("0", "1"), [1, 0]),
    ],
)
def test_what_is_understood(values, names, made):
    assert kinds(values) == (names, made)


@pytest.mark.parametrize(
    ("values", "says", "classes", "numbers"),
    [
        ([0.0, 1.0], r"row 0: column 'label' holds 0\.0.*got a point", ("0", "1"), [0, 1]),
        (["0.0", "1.0"], r"holds '0\.0'.*got a point", ("0.0", "1.0"), [0, 1]),
        ([1, -1], "row 1: column 'label' holds -1, and it may be", ("-1", "1"), [1, -1]),
        (["007", "008"], "holds '007', and it may be a name or a number", ("007", "008"), [7, 8]),
        ([10001, 3], "2 different whole numbers up to 10,001 would be 10,002 classes", ("3", "10001"), [10001, 3]),
        ([10_000_000, 0], "10,000,001 classes", ("0", "10000000"), [1e7, 0]),
        (["1", "2", "x"], r"row 2: .*'x', and other rows .* such as '1' \(row 0\)", ("1", "2", "x"), None),
        (["1", "nan"], "row 1: .*'nan'", ("1", "nan"), None),
        ([True, 1], "row 0: .*True, and other rows", ("1", "True"), None),
        ([f"a text, number {i}" for i in range(300)], "300 hold another text, as classes do not", 300, None),
    ],
)
def test_what_could_be_two_things_is_refused_and_a_kind_decides(values, says, classes, numbers):
    with pytest.raises(AddendaError, match=says) as error:
        kinds(values)
    assert "--label-kind" in str(error.value)
    names = kinds(values, kind="class")[0]
    assert len(names) == classes if isinstance(classes, int) else names == classes
    if numbers is None:
        with pytest.raises(ValueError, match="a number was expected"):
            kinds(values, kind="number")
    else:
        assert kinds(values, kind="number") == (None, numbers)


@pytest.mark.parametrize("kind", [None, "class", "number"])
@pytest.mark.parametrize(
    "odd",
    [None, "", "  ", math.nan, math.inf, ["a"], {"a": 1}, b"a", "9" * 5000, 10**5000, "\ud800", object()],
    ids=range(12),
)
def test_what_is_no_label_is_told_by_its_row(odd, kind):
    good = ["1", "0"] if kind == "number" else ["a", "b"]
    with pytest.raises(AddendaError, match=r"1 of 3 rows .*row 2: .*column 'label'"):
        read(rows([*good, odd]), task="label", label_kind=kind)


def test_a_head_of_one_output_is_for_numbers():
    model, tokenizer = make_bert(labels=1), make_tokenizer()
    assert evaluate(model, tokenizer, rows([0, 1, 5])).accuracy is None
    with pytest.raises(AddendaError, match="Numbers want a model with one output; this one has 2 "):
        evaluate(polar(), tokenizer, rows([0, 1]), label_kind="number")
    with pytest.raises(AddendaError, match="label_kind must be 'class' or 'number', got 'clas'"):
        evaluate(polar(), tokenizer, rows([0, 1]), label_kind="clas")


def test_the_kind_is_said_and_taken_by_training(tmp_path, capsys):
    import transformers

    from tiny_models import config

    encoder = saved(tmp_path / "encoder", transformers.BertForMaskedLM(config(transformers.BertConfig)))
    data = rows([0.0, 1.0] * 4)
    with pytest.raises(AddendaError, match="got a point"):
        tune(encoder, data, **QUICK)
    made = tune(encoder, data, eval_data=rows([1.0]), label_kind="number", **(QUICK | {"progress": True}))
    assert made.after["accuracy"] is None
    assert "data: numbers to predict in column 'label'" in capsys.readouterr().err
    assert tune(encoder, data, label_kind="class", **QUICK).adapter.labels == ("0", "1")
    with pytest.raises(AddendaError, match=r"All 4 examples .* have the label '0'.* at least two classes"):
        tune(encoder, rows(["0"] * 4), **QUICK)


@pytest.mark.parametrize(("one", "other"), [("Pos", "pos"), ("very good", "very  good"), ("caf\u00e9", "cafe\u0301")])
def test_names_that_look_like_one_are_refused(one, other):
    rows = [{"text": f"t{i}", "label": [one, other, "neg"][i % 3]} for i in range(9)]
    with pytest.raises(AddendaError, match=r"look like one class.*label_kind='class'"):
        read(rows, task="label")
    assert len(read(rows, task="label", label_kind="class").labels) == 3
    assert len(read(rows, task="label", labels=["neg", one, other]).labels) == 3


def test_spaces_around_labels_are_said():
    made = read(
        [{"text": "a", "label": "pos "}, {"text": "b", "label": "neg"}, {"text": "c", "label": "pos"}], task="label"
    )
    assert made.labels == ("neg", "pos")
    assert "spaces around them left out" in made.said


@pytest.mark.parametrize("nothing", [None, "x" * 1000, float("nan"), ["x"], ""])
def test_a_row_without_a_label_is_named_before_labels_are_counted(nothing):
    rows = [{"text": "a", "label": "y"}, {"text": "b", "label": nothing}]
    with pytest.raises(AddendaError, match=r"row 1: column 'label' holds .*a label was expected"):
        read(rows, task="label", outputs=2)
