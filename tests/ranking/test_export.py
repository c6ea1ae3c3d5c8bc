"""What of a reranker is merged, what is written as its parts, and that the report says which."""

import numpy as np
import pytest

import addenda as ad
import tiny_models
from addenda.core.base.errors import AddendaError
from addenda.exporting.cross_encoder import CrossEncoderReport
from addenda.ranking.export import export_reranker
from addenda.ranking.folder import FolderReport, is_folder, read_folder
from addenda.ranking.reranker import Reranker
from shared import stir


def make(language: str) -> Reranker:
    model = tiny_models.make_bert(1)
    stir(ad.attach(model, language, name="de"))
    stir(ad.attach(model, "lora:rank=2", also_train=["classifier"], name="task"), seed=1)
    ad.switch(model, None)
    return Reranker(model, tiny_models.make_pair_tokenizer(), max_length=64, stride=4, batch=8)


def test_weights_are_merged_and_bottlenecks_are_not_and_the_report_says_so(tmp_path):
    given = make("shira:density=0.1")
    given.composition = ad.Stack("de", "task")
    report = export_reranker(given, tmp_path / "merged")
    assert isinstance(report, CrossEncoderReport) and "de + task merged into" in str(report)
    assert "Passages (stride 4) are no part of such a folder" in str(report)
    assert (tmp_path / "merged" / "config.json").is_file() and not is_folder(tmp_path / "merged")
    given = make("pfeiffer:rank=4")
    given.composition = ad.Stack("de", "task")
    report = export_reranker(given, tmp_path / "parts")
    assert isinstance(report, FolderReport)
    assert "cannot be merged, since 'de' changes what modules return (pfeiffer at" in str(report)
    assert "Reranker.load opens it, sentence-transformers does not" in str(report)
    assert read_folder(tmp_path / "parts", device="cpu").settings == {"max_length": 64, "stride": 4, "batch": 8}
    with pytest.raises(AddendaError, match="An ONNX model holds weights alone, and here 'de' changes"):
        export_reranker(given, tmp_path / "onnx", onnx=True)
    assert not (tmp_path / "onnx").exists()


def test_without_a_composition_what_acts_is_exported(tmp_path):
    given = make("lora:rank=4")
    ad.switch(given.model, ["de", "task"])
    assert "de + task merged into" in str(export_reranker(given, tmp_path / "both"))
    ad.switch(given.model, "task")
    assert "task merged into" in str(export_reranker(given, tmp_path / "one"))
    ad.switch(given.model, None)
    assert "the base merged into" in str(export_reranker(given, tmp_path / "none"))


@pytest.mark.parametrize("language", ["pfeiffer:rank=4", "lora:rank=4"])
def test_a_reranker_opens_both_and_ranks_as_before(tmp_path, language):
    given = make(language)
    given.composition = ad.Stack("de", "task")
    documents = ["draws maps", "a tool for small files", "x" * 90]
    want = given.predict([("a small tool", d) for d in documents])
    export_reranker(given, tmp_path / "out")
    again = Reranker.load(tmp_path / "out", device="cpu")
    if language.startswith("pfeiffer"):
        assert (again.max_length, again.stride, again.batch) == (64, 4, 8)
        assert repr(again.composition) == "Stack('de', 'task')"
    else:  # a plain model, which knows its length and nothing of passages
        assert again.max_length == 64 and again.composition is None
        again.stride = 4
    np.testing.assert_allclose(again.predict([("a small tool", d) for d in documents]), want, atol=1e-5)
    assert [d for d, _ in again.rank("a small tool", documents)] == [
        d for d, _ in given.rank("a small tool", documents)
    ]


def test_an_encoder_is_no_reranker(tmp_path):
    tiny_models.make_bert(1).bert.save_pretrained(tmp_path / "bert")
    tiny_models.make_pair_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(AddendaError, match="it is an encoder, and no reranker"):
        Reranker.load(tmp_path / "bert", device="cpu")
    with pytest.raises(AddendaError, match=r"base= is for a folder with reranker\.json"):
        Reranker.load(tmp_path / "bert", base=tmp_path)
