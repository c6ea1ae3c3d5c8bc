"""A reranker as base, adapters and composition: it comes back with its scores, and a changed folder is refused."""

import json
from pathlib import Path

import pytest
import torch

import addenda as ad
import tiny_models
from addenda.core.base.errors import AddendaError
from addenda.ranking.folder import FILE, is_folder, read_folder, save_folder
from shared import bits as bits_of
from shared import same_bits, stir
from tiny_models import make_pair_tokenizer

QUERIES, DOCUMENTS = ["a small tool", "maps", "x"], ["draws maps", "a tool for files", "a long text about nothing"]


def make() -> tuple:
    model, tokenizer = tiny_models.make_bert(1), make_pair_tokenizer()
    for i, name in enumerate(("fi", "de")):
        stir(ad.attach(model, "pfeiffer:rank=4", name=name), seed=i)
    stir(ad.attach(model, "pfeiffer:rank=4", also_train=["classifier"], name="task"), seed=9)
    ad.switch(model, None)
    composition = ad.Stack(ad.Split("fi", "de", by="separator:2", pooled=0), "task", skip="own").without("first:1")
    return model, tokenizer, composition


def scores(model, tokenizer, composition) -> torch.Tensor:
    batch = tokenizer(QUERIES, DOCUMENTS, padding=True, return_tensors="pt")
    with torch.no_grad(), ad.composed(model, composition):
        return model(**batch).logits[:, 0]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    model, tokenizer, composition = make()
    return save_folder(
        model, tokenizer, composition, tmp_path_factory.mktemp("f") / "out", max_length=64, stride=8
    ).path


def test_a_folder_comes_back_with_its_scores(tmp_path):
    model, tokenizer, composition = make()
    before, want = bits_of(model), scores(model, tokenizer, composition)
    ad.switch(model, ["fi", "task"])
    report = save_folder(
        model, tokenizer, composition, tmp_path / "out", max_length=64, stride=8, batch=16, reason="it is a bottleneck"
    )
    assert "cannot be merged, since it is a bottleneck" in str(report) and "3 adapters (fi, de, task)" in str(report)
    assert same_bits(before, bits_of(model)) and "fi: active" in ad.status(model) and is_folder(tmp_path / "out")
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.safetensors")}
    assert names == {"base/model.safetensors", *(f"adapters/{n}.safetensors" for n in ("fi", "de", "task"))}
    opened = read_folder(tmp_path / "out", device="cpu")
    assert repr(opened.composition) == repr(composition) and opened.composition.leave_out == "first:1"
    assert opened.settings == {"max_length": 64, "stride": 8, "batch": 16}
    assert [*ad.adapters(opened.model)] == ["fi", "de", "task"] and "active" not in ad.status(opened.model)
    assert torch.equal(scores(opened.model, opened.tokenizer, opened.composition), want)


def test_a_base_by_hash_is_named_and_must_be_that_one(tmp_path):
    model, tokenizer, composition = make()
    report = save_folder(model, tokenizer, composition, tmp_path / "out", base="hash")
    assert not (tmp_path / "out" / "base").exists() and "the base's hash" in str(report)
    with pytest.raises(AddendaError, match="holds the hash of its base, not the base"):
        read_folder(tmp_path / "out")
    for name, seed in (("same", 0), ("other", 1)):
        plain = tiny_models.make_bert(1, seed=seed)
        if name == "same":  # whose head was drawn anew
            torch.nn.init.normal_(plain.classifier.weight)
        plain.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    opened = read_folder(tmp_path / "out", base=tmp_path / "same", device="cpu")
    assert torch.equal(scores(opened.model, opened.tokenizer, composition), scores(model, tokenizer, composition))
    with pytest.raises(AddendaError, match="trained on other base weights"):
        read_folder(tmp_path / "out", base=tmp_path / "other", device="cpu")
    moved = tiny_models.make_bert(1)
    with torch.no_grad():  # where no adapter looks
        moved.bert.encoder.layer[0].attention.self.query.bias[0] += 1
    moved.save_pretrained(tmp_path / "moved")
    tokenizer.save_pretrained(tmp_path / "moved")
    with pytest.raises(AddendaError, match=r"moved is not the one of .*out: its weights have the SHA-256"):
        read_folder(tmp_path / "out", base=tmp_path / "moved", device="cpu")


def edited(raw: dict, path: str, value) -> dict:
    *above, last = path.split(".")
    at = raw
    for key in above:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return raw


HASH = "0" * 64
EDITS = {
    "schema": ("schema", 2, "its schema is 2, and this version reads 1"),
    "true schema": ("schema", True, "its schema is True"),
    "a key more": ("run", "os.system", "and nothing else"),
    "a key less": ("settings", None, "and nothing else"),
    "another base": ("base.folder", "../elsewhere", "in the folder 'base' or nowhere"),
    "no hash of the base": ("base.sha256", "x", "the base is a SHA-256"),
    "a path of an adapter": ("adapters.task.file", "/etc/passwd", "the adapter 'task' is a SHA-256"),
    "another hash": ("adapters.task.sha256", HASH, "is not the file that was written"),
    "a name that is a path": ("adapters", {"../task": {"sha256": HASH}}, "is no name of an adapter"),
    "no adapters": ("adapters", {}, "1 to 64, by name"),
    "one less": ("adapters.fi", None, "'fi' takes part and is not among the adapters"),
    "one more": ("adapters.x", {"sha256": HASH}, "'x' is there and takes no part"),
    "another composition": (
        "composition",
        {"stack": ["task"]},
        "is there and takes no part. The composition was edited",
    ),
    "a stranger": ("composition", {"stack": ["fi", "de", "task", "fr"]}, "'fr' takes part"),
    "twice": ("composition", {"stack": ["fi", "de", "task", "fi"]}, "through 'fi' twice"),
    "code": ("composition", {"eval": ["task"]}, "is one of stack, average, fuse, split"),
    "a text": ("composition", "Stack('task')", "an object of JSON"),
    "settings": ("settings.batch", 0, "batch is a number from 1 to"),
    "no batch": ("settings", {"max_length": None, "stride": None, "batch": None}, "batch is a number"),
    "a setting more": ("settings.device", "cuda", "the settings are"),
    "entries": ("tokenizer.entries", 0, "the tokenizer's entries are a number"),
    "no tokenizer": ("tokenizer.sha256", None, "the tokenizer is a SHA-256"),
}


def copied(written: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_description_is_refused_before_anything_is_loaded(written, tmp_path, monkeypatch, case):
    path, value, said = EDITS[case]
    folder = copied(written, tmp_path)
    raw = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(edited(raw, path, value)))
    monkeypatch.setattr("addenda.ranking.folder.load_model", lambda *a, **k: pytest.fail("a weight was read"))
    with pytest.raises(AddendaError, match=said):
        read_folder(folder)


def test_a_damaged_folder_is_refused(written, tmp_path):
    with pytest.raises(AddendaError, match="There is no folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(AddendaError, match=f"has no {FILE}, so it is no reranker"):
        read_folder(tmp_path)
    folder = copied(written, tmp_path)
    text = (folder / FILE).read_text()
    for broken, said in (
        (text[:-20], "is not JSON"),
        (text.replace('"schema"', '"schema": 1, "schema"', 1), "is not JSON"),
    ):
        (folder / FILE).write_text(broken)
        with pytest.raises(AddendaError, match=said):
            read_folder(folder)
    (folder / FILE).write_text(text)
    file = folder / "adapters" / "task.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(AddendaError, match="is not the file that was written"):
        read_folder(folder)
    file.unlink()
    file.symlink_to(written / "adapters" / "task.safetensors")
    with pytest.raises(AddendaError, match=r"there is no file adapters/task\.safetensors"):
        read_folder(folder)
    file.unlink()
    file.write_bytes(data)
    tokens = folder / "tokenizer" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"a": 4', '"a": 5').replace('"b": 5', '"b": 4'))
    with pytest.raises(AddendaError, match="is not the one that was written there"):
        read_folder(folder, device="cpu")


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    model, tokenizer, composition = make()
    cases = (
        (ad.Split("fi", "de", sizes=torch.tensor([1, 2, 3])), {}, "which no file can hold"),
        (ad.Stack("fr"), {}, "No adapter is called 'fr'"),
        (composition, {"base": "link"}, "'copy' or 'hash', got 'link'"),
        (composition, {"batch": 0}, "batch must be at least 1"),
        (composition, {"max_length": 0}, "max_length must be at least"),
    )
    for given, options, said in cases:
        with pytest.raises(AddendaError, match=said):
            save_folder(model, tokenizer, given, tmp_path / "out", **options)
        assert not [*tmp_path.iterdir()]
    (tmp_path / "out").mkdir()
    with pytest.raises(AddendaError, match="is there already"):
        save_folder(model, tokenizer, composition, tmp_path / "out")
