"""Models that are trained by other losses are refused by name, whatever is asked of them, before anything is done."""

import json

import pytest
import torch
import transformers as T

from addenda.core.base.errors import AddendaError
from addenda.models.kinds import check_module
from addenda.models.load import load_model
from addenda.train.evaluate import evaluate
from addenda.train.generate import generate
from addenda.train.tune import tune
from tiny_models import CHARACTERS, SUMS, config, make_llama, make_tokenizer

SIZE = len(CHARACTERS) + 4
BOTH = {"vocab_size": SIZE, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        "forced_eos_token_id": None}  # fmt: skip
T5 = {"vocab_size": SIZE, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": 0,
      "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
XLNET = {"vocab_size": SIZE, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
OTHERS = {
    "BertForMaskedLM": (lambda: T.BertForMaskedLM(config(T.BertConfig)), "masked words"),
    "RobertaForMaskedLM": (lambda: T.RobertaForMaskedLM(config(T.RobertaConfig)), "masked words"),
    "BertForTokenClassification": (lambda: T.BertForTokenClassification(config(T.BertConfig)), "each token"),
    "BertForQuestionAnswering": (lambda: T.BertForQuestionAnswering(config(T.BertConfig)), "span"),
    "BertForPreTraining": (lambda: T.BertForPreTraining(config(T.BertConfig)), "pretraining"),
    "BertLMHeadModel": (lambda: T.BertLMHeadModel(config(T.BertConfig)), "later tokens"),
    "XLNetLMHeadModel": (lambda: T.XLNetLMHeadModel(T.XLNetConfig(**XLNET)), "permuted"),
    "T5ForConditionalGeneration": (lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)), "decoder answers"),
    "BartForConditionalGeneration": (lambda: T.BartForConditionalGeneration(T.BartConfig(**BOTH)), "decoder answers"),
    "MarianMTModel": (lambda: T.MarianMTModel(T.MarianConfig(**BOTH)), "decoder answers"),
    "LlamaModel": (lambda: T.LlamaModel(config()), "no head"),
}


@pytest.fixture(scope="module", params=OTHERS)
def other(request, tmp_path_factory):
    """(name, model, its folder, what is said of it)."""
    make, said = OTHERS[request.param]
    folder = tmp_path_factory.mktemp("other") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)
        model = make().eval()
        model.save_pretrained(folder)
    make_tokenizer(None).save_pretrained(folder)
    return request.param, model, folder, said


def test_a_loaded_model_is_refused_by_every_function(other, tmp_path):
    name, model, _, said = other
    tokenizer = make_tokenizer(None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = (
        lambda: tune(model, SUMS, tokenizer=tokenizer, steps=1, batch=4, progress=False, out=tmp_path / "run"),
        lambda: evaluate(model, tokenizer, SUMS),
        lambda: generate(model, tokenizer, ["1+1=?"]),
    )
    for call in calls:
        with pytest.raises(AddendaError, match=rf"{name}.*{said}.*causal LMs, sequence classifiers"):
            call()
    assert not (tmp_path / "run").exists()
    assert "_addenda" not in vars(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


COMMANDS = {
    "tune": "tune --model {m} --data {d} --steps 1 --out {o}",
    "eval": "eval --model {m} --data {d} --split train",
    "generate": "generate hello --model {m}",
    "compare": "compare --model {m} --data {d} --methods lora --yes --out {o}",
    "compress": "compress --model {m} --out {o}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_its_folder(other, tmp_path, capsys, command):
    """Encoders of texts are turned into classifiers by data with labels alone, and here are none."""
    from addenda.cli.main import run

    _, _, folder, _ = other
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, SUMS)))
    places = {"m": folder, "d": tmp_path / "data.jsonl", "o": tmp_path / "out"}
    with pytest.raises(SystemExit) as left:
        run([word.format(**places) for word in COMMANDS[command].split()])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "addenda: " in said and "Traceback" not in said
    assert not (tmp_path / "out" / "adapter.safetensors").exists()


@pytest.mark.parametrize("task", ["causal", None])
def test_a_folder_is_refused_before_it_is_read(other, task):
    name, _, folder, said = other
    (weights := folder / "model.safetensors").rename(away := folder / "away")
    try:
        if task is None and name in ("BertForMaskedLM", "RobertaForMaskedLM", "BertForTokenClassification",
                                     "BertForQuestionAnswering", "BertForPreTraining", "LlamaModel"):  # fmt: skip
            pytest.skip("a classifier to be, where the data has labels")
        with pytest.raises(AddendaError, match=rf"{name}.*{said}"):
            load_model(folder, task=task)
    finally:
        away.rename(weights)


def test_an_encoder_with_another_head_becomes_a_classifier_where_the_data_has_labels(tmp_path):
    T.BertForMaskedLM(config(T.BertConfig)).save_pretrained(tmp_path / "mlm")
    make_tokenizer(None).save_pretrained(tmp_path / "mlm")
    rows = [{"text": t, "label": label} for t, label in (("a b", "x"), ("c d", "y")) for _ in range(4)]
    made = tune(tmp_path / "mlm", rows, "lora:rank=2", columns={"text": "text", "label": "label"}, steps=1, batch=4,
                progress=False, dtype="float32")  # fmt: skip
    assert type(made.model).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize(
    "name", ["Wav2Vec2ForSequenceClassification", "DetrForObjectDetection", "WhisperForConditionalGeneration"]
)
def test_sounds_and_objects_are_refused_by_name(tmp_path, name):
    kind = {"Wav2Vec2": "Wav2Vec2Config", "Detr": "DetrConfig", "Whisper": "WhisperConfig"}[name.partition("For")[0]]
    getattr(T, kind)(architectures=[name]).save_pretrained(tmp_path)
    with pytest.raises(AddendaError, match=name):
        load_model(tmp_path)


def test_what_is_supported_passes():
    check_module(make_llama())
    check_module(torch.nn.Linear(2, 2))
    check_module(T.BertLMHeadModel(config(T.BertConfig, is_decoder=True)))
    check_module(T.BartForCausalLM(T.BartConfig(**BOTH)))
    check_module(T.BertForSequenceClassification(config(T.BertConfig)))


def test_a_module_that_takes_other_names_is_said_to_before_it_is_trained(tiny):
    flags = [p.requires_grad for p in tiny.parameters()]
    with pytest.raises(AddendaError, match=r"Tiny\.forward takes ids; texts are given as input_ids and attention_mask"):
        tune(tiny, SUMS[:4], tokenizer=make_tokenizer(), steps=1, progress=False)
    with pytest.raises(AddendaError, match=r"Tiny\.forward takes ids; texts are given as input_ids"):
        evaluate(tiny, make_tokenizer(), SUMS[:4])
    assert [p.requires_grad for p in tiny.parameters()] == flags
