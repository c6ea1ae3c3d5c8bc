"""What a model can be given: positions and padding."""

import warnings
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode
from addenda.data.limits import positions
from addenda.data.read import read
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit
from addenda.train.generate import generate
from addenda.train.tune import tune
from tiny_models import config, make_bert, make_llama, make_tokenizer

QUICK = {"steps": 1, "batch": 4, "progress": False}
TEXTS = [{"text": "ab" * (i % 5 + 1), "label": i % 2} for i in range(12)]


def small(kind, of, **options):
    torch.manual_seed(0)
    return of(config(kind, **options)).eval()


def gpt2(of=GPT2ForSequenceClassification, **options):
    torch.manual_seed(0)
    made = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=2, n_positions=64, **options)
    return of(made).eval()


def test_how_many_tokens_have_a_position():
    assert positions(make_bert()) == 256
    assert positions(make_llama()) is None
    assert positions(gpt2()) == 64
    assert positions(small(RobertaConfig, RobertaForSequenceClassification)) == 255  # pad 0: the first is 1
    roberta = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    published = RobertaConfig(vocab_size=80, max_position_embeddings=514, pad_token_id=1, **roberta)
    assert positions(RobertaForSequenceClassification(published)) == 512
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    bart |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 80}
    assert positions(BartForSequenceClassification(BartConfig(max_position_embeddings=128, **bart))) == 128
    opt = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
    }
    assert positions(OPTForCausalLM(OPTConfig(vocab_size=80, max_position_embeddings=128, **opt))) == 128


def test_what_is_longer_is_refused_with_the_right_number():
    roberta, tokenizer = small(RobertaConfig, RobertaForSequenceClassification), make_tokenizer()
    fits, longer = [{"text": "a" * n, "label": n % 2} for n in (255, 2)], [{"text": "a" * 256, "label": 0}, *TEXTS]
    assert len(evaluate(roberta, tokenizer, fits).items) == 2
    for do in (
        lambda: evaluate(roberta, tokenizer, longer),
        lambda: tune(roberta, longer, tokenizer=tokenizer, **QUICK),
    ):
        with pytest.raises(AddendaError, match="longer than 255 tokens"):
            do()
    with pytest.raises(AddendaError, match="longer than 255 tokens"):
        evaluate(roberta, tokenizer, longer, max_length=500)
    assert len(evaluate(roberta, tokenizer, longer, overflow="truncate").items) == 13


def test_an_answer_ends_where_the_positions_end_and_says_so():
    model, tokenizer = gpt2(GPT2LMHeadModel), make_tokenizer(template=None)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    prompts = ["a" * 60, "b" * 7, "c" * 50, "d" * 3]
    with pytest.warns(UserWarning, match="answers to 2 of 4 prompts"):
        answers = generate(model, tokenizer, prompts, max_new_tokens=20)
    for prompt, answer in zip(prompts, answers, strict=True):  # nothing depends on what else is asked
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert generate(model, tokenizer, [prompt], max_new_tokens=20) == [answer]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert generate(model, tokenizer, prompts, max_new_tokens=4) == [a[:4] for a in answers]
    with pytest.raises(AddendaError, match="Prompt 1 has 64 tokens, and the model has positions for 64"):
        generate(model, tokenizer, ["a", "a" * 64], max_new_tokens=1)


def test_a_fit_of_its_own_examples_fills_rows_as_the_model_expects():
    model, tokenizer = gpt2(pad_token_id=7), make_tokenizer()
    encoded = encode(read(TEXTS, task="label"), tokenizer)
    losses = []
    for pad in (7, 0):
        adapter = ad.attach(model, "lora:rank=2", seed=0)
        made = fit(model, adapter, replace(encoded, pad=pad), steps=2, batch=4, attention=None)
        losses.append(made.losses)
        ad.detach(model)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("pad", [0, 2, 7])
def test_a_decoders_loss_does_not_depend_on_the_batch(pad):
    model, tokenizer = gpt2(pad_token_id=pad), make_tokenizer()
    alone, together = (evaluate(model, tokenizer, TEXTS, batch=n).losses for n in (1, 12))
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(together), rtol=1e-4, atol=1e-5)
    assert tune(model, TEXTS, tokenizer=tokenizer, **QUICK).steps == 1


def test_a_decoder_without_a_padding_token_is_refused():
    model, tokenizer = gpt2(), make_tokenizer()
    for do in (lambda: evaluate(model, tokenizer, TEXTS), lambda: tune(model, TEXTS, tokenizer=tokenizer, **QUICK)):
        with pytest.raises(AddendaError, match=r"Set model.config.pad_token_id = 0, which"):
            do()
    assert len(evaluate(model, tokenizer, TEXTS, batch=1).items) == 12


@pytest.mark.parametrize("pair", [None, "bbbb"])
def test_what_is_cut_keeps_the_tokens_that_a_classifier_reads_by(pair):
    tokenizer = make_tokenizer(template=None)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|>", pair="<|start|> $A <|end|> $B:1 <|end|>:1",
        special_tokens=[("<|start|>", 1), ("<|end|>", 2)],
    )  # fmt: skip
    rows = [{"text": "a" * n, "label": n % 2} | ({"text2": pair} if pair else {}) for n in (3, 30, 41)]
    options = {"text": "text", "pair": "text2"} if pair else {}
    made = encode(read(rows, task="label", **options), tokenizer, max_length=12, overflow="truncate")
    assert max(made.lengths) == 12
    assert all(row[0] == 1 and row[-1] == 2 and row.count(2) == (2 if pair else 1) for row in made.ids)
    with pytest.raises(AddendaError, match=r"row 0, cannot be cut to 2 tokens"):
        encode(read(rows, task="label", **options), tokenizer, max_length=2, overflow="truncate")


def test_of_a_pair_the_second_text_alone_can_be_cut():
    tokenizer = make_tokenizer(template=None)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|>", pair="<|start|> $A <|end|> $B:1 <|end|>:1",
        special_tokens=[("<|start|>", 1), ("<|end|>", 2)],
    )  # fmt: skip
    rows = [{"query": "a" * 7, "document": "b" * n, "label": n % 2} for n in (2, 30)]
    data = read(rows, task="label", text="query", pair="document")
    made = encode(data, tokenizer, max_length=12, overflow="truncate_second")
    a, b = (tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in "ab")
    assert made.ids == [[1, *[a] * 7, 2, b, b, 2]] * 2
    with pytest.raises(AddendaError, match=r"row 0: the first text leaves no room for the second within 10 tokens"):
        encode(data, tokenizer, max_length=10, overflow="truncate_second")
    alone = read([{"text": "a", "label": 0}, {"text": "b", "label": 1}], task="label")
    for given in (alone, read([{"question": "a", "answer": "b"}])):
        with pytest.raises(AddendaError, match="no pairs of texts"):
            encode(given, tokenizer, max_length=12, overflow="truncate_second")
