"""What of a reranker is merged, what is written as its parts, and that the report says which."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import addenda as ad
import tiny_models
from addenda.core.base.errors import AddendaError
from addenda.exporting.cross_encoder import CrossEncoderReport
from addenda.ranking.export import export_reranker
from addenda.ranking.folder import FolderReport, is_folder, read_folder
from shared import stir


@dataclass
class Reads:
    """What an export asks a reranker for."""

    model: torch.nn.Module
    tokenizer: Any
    composition: ad.Composition | None = None
    max_length: int | None = 64
    stride: int | None = 4
    batch: int = 8


def make(language: str) -> Reads:
    model = tiny_models.make_bert(1)
    stir(ad.attach(model, language, name="de"))
    stir(ad.attach(model, "lora:rank=2", also_train=["classifier"], name="task"), seed=1)
    ad.switch(model, None)
    return Reads(model, tiny_models.make_pair_tokenizer())


def test_weights_are_merged_and_bottlenecks_are_not_and_the_report_says_so(tmp_path):
    given = make("shira:density=0.1")
    given.composition = ad.Stack("de", "task")
    report = export_reranker(given, tmp_path / "merged")
    assert isinstance(report, CrossEncoderReport) and "de + task merged into" in str(report)
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
