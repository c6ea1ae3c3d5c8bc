"""A stack of weight changes as sentence-transformers' folder: keys, activation, scores in a fresh process, and ONNX."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import addenda as ad
import tiny_models
from addenda.core.base.errors import AddendaError
from addenda.exporting.cross_encoder import export_cross_encoder, mergeable
from addenda.exporting.onnx_model import far
from shared import bits as bits_of
from shared import same_bits, stir
from tiny_models import make_pair_tokenizer

PAIRS = [("a small tool", "draws maps"), ("maps", "a tool for files"), ("x", "a long text about nothing at all")]
STACKS = {
    "sparse": ("shira:density=0.1", "shira:density=0.2"),
    "low rank": ("lora:rank=2", "dora:rank=2"),
    "vectors": ("bitfit", "ln-tuning"),
    "all of it": ("full", "ln-tuning"),
}


def make(language: str, task: str) -> tuple:
    model = tiny_models.make_bert(1)
    head = {"bitfit": ["classifier.bias"], "full": ["classifier.weight", "classifier.bias"]}.get(language, ())
    stir(ad.attach(model, language, name="de", exclude=head))
    stir(ad.attach(model, task, name="task", also_train=["classifier"]), seed=2)
    ad.switch(model, None)
    return model, make_pair_tokenizer()


def logits(model, tokenizer, composition=None) -> torch.Tensor:
    batch = tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="pt")
    with torch.no_grad():
        if composition is None:
            return model(**batch).logits[:, 0]
        with ad.composed(model, composition):
            return model(**batch).logits[:, 0]


@pytest.mark.parametrize("kind", STACKS)
def test_the_folder_is_a_plain_model_with_the_live_scores(tmp_path, kind):
    model, tokenizer = make(*STACKS[kind])
    before, stack = bits_of(model), ad.Stack("de", "task")
    want = logits(model, tokenizer, stack)
    ad.switch(model, "de")
    report = export_cross_encoder(model, stack, tokenizer, tmp_path / "out", activation="sigmoid", max_length=40)
    assert same_bits(before, bits_of(model)) and "de: active" in ad.status(model) and "task: idle" in ad.status(model)
    assert report.moved <= 1e-5 and "de + task merged" in str(report) and report.onnx is None
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert {*f.keys()} == {*tiny_models.make_bert(1).state_dict()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
    assert not any(p.suffix in (".bin", ".pt", ".py") for p in (tmp_path / "out").rglob("*"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    own = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert own.model_max_length == 40 and tokenizer.model_max_length == 256
    torch.testing.assert_close(logits(plain, own), want, atol=1e-5, rtol=0)
    assert (want - logits(tiny_models.make_bert(1), tokenizer)).abs().max() > 1e-3


CODE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from sentence_transformers import CrossEncoder
pairs = json.loads(sys.argv[2])
model = CrossEncoder(sys.argv[1], device="cpu", local_files_only=True)
print(json.dumps({"scores": model.predict([tuple(p) for p in pairs]).tolist(),
                  "activation": type(model.activation_fn).__name__, "max": model.max_seq_length,
                  "order": [r["corpus_id"] for r in model.rank(pairs[0][0], [p[1] for p in pairs])]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_sentence_transformers_opens_it_in_a_fresh_process(tmp_path, activation):
    pytest.importorskip("sentence_transformers")
    model, tokenizer = make("shira:density=0.1", "lora:rank=2")
    stack = ad.Stack("de", "task")
    export_cross_encoder(model, stack, tokenizer, tmp_path / "out", activation=activation, max_length=64)
    want = logits(model, tokenizer, stack)
    command = [sys.executable, "-c", CODE, str(tmp_path / "out"), json.dumps(PAIRS)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    wanted = want.sigmoid() if activation == "sigmoid" else want
    torch.testing.assert_close(torch.tensor(found["scores"]), wanted, atol=1e-5, rtol=0)
    assert found["activation"].lower() == activation and found["max"] == 64
    with torch.no_grad(), ad.composed(model, stack):
        batch = tokenizer([PAIRS[0][0]] * 3, [d for _, d in PAIRS], padding=True, return_tensors="pt")
        assert found["order"] == model(**batch).logits[:, 0].argsort(descending=True).tolist()


@pytest.mark.slow
def test_onnxruntime_gives_the_live_scores_for_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, tokenizer = make("shira:density=0.1", "lora:rank=2")
    stack = ad.Stack("de", "task")
    report = export_cross_encoder(model, stack, tokenizer, tmp_path / "out", onnx=True)
    assert report.onnx is not None and report.onnx <= 1e-5 and "onnxruntime" in str(report)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "onnx" / "model.onnx"))
    assert [p.name for p in (tmp_path / "out" / "onnx").iterdir()] == ["model.onnx"]
    batch = tokenizer(*map(list, zip(*PAIRS, strict=True)), padding=True, return_tensors="np")
    (found,) = session.run(None, {k: v for k, v in batch.items() if k in {i.name for i in session.get_inputs()}})
    torch.testing.assert_close(torch.from_numpy(found)[:, 0], logits(model, tokenizer, stack), atol=1e-5, rtol=0)


def test_what_no_weight_can_hold_is_refused_before_anything_is_written(tmp_path):
    model, tokenizer = make("lora:rank=2", "lora:rank=2")
    stir(ad.attach(model, "pfeiffer:rank=2", name="p"))
    ad.switch(model, None)
    cases = (
        (ad.Stack("de", "p"), "'p' changes what modules return .*Reranker.load opens"),
        (ad.Stack(ad.Split("de", "task", sizes=(1, None), pooled=0)), "Split gives parts of the input"),
        (ad.Average("de", "task"), "Average gives parts"),
        (ad.Stack("de", "task").without([0]), "it leaves layers out"),
        (ad.Stack("fr"), "No adapter is called 'fr'"),
    )
    for composition, said in cases:
        with pytest.raises(AddendaError, match=said):
            export_cross_encoder(model, composition, tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert mergeable(model, ad.Stack("de", "task")) is None


def test_what_is_there_stays_there(tmp_path):
    model, tokenizer = make("lora:rank=2", "lora:rank=2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    before = bits_of(model)
    with pytest.raises(AddendaError, match="is there already, and nothing is written over"):
        export_cross_encoder(model, ad.Stack("de"), tokenizer, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(AddendaError, match="one of identity, sigmoid"):
        export_cross_encoder(model, ad.Stack("de"), tokenizer, tmp_path / "new", activation="relu")  # type: ignore[arg-type]

    class Broken:
        model_max_length, model_input_names = 8, ("input_ids",)

        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(AddendaError, match="disk is full"):
        export_cross_encoder(model, ad.Stack("de"), Broken(), tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and same_bits(before, bits_of(model))
    ad.switch(model, "de")
    ad.merge(model)
    with pytest.raises(AddendaError, match="merged into the base"):
        export_cross_encoder(model, ad.Stack("de"), tokenizer, tmp_path / "new")


def test_a_tokenizer_that_reads_otherwise_when_read_back_is_refused(tmp_path):
    model, _ = make("lora:rank=2", "lora:rank=2")
    told = tiny_models.make_tokenizer()
    told.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # which no file of it says
    with pytest.raises(AddendaError, match=r"encodes a pair in another way \(token_type_ids differ\)"):
        export_cross_encoder(model, ad.Stack("de"), told, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_how_far_outputs_are_from_each_other():
    one = torch.tensor([[2.0], [4.0]])
    assert far(one, one) == 0 and far(one + 0.4, one) == pytest.approx(0.1)
    assert far(one[:1], one) == float("inf") and far(one * float("nan"), one) == float("inf")
