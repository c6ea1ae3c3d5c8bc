import numpy as np
import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.data.encode import end_ids, prompt_ids
from addenda.data.examples import Chat
from addenda.train.generate import Draw, continuations, generate, uniform
from tiny_models import make_bert, make_llama, make_tokenizer

PROMPTS = ["1+1=?", "a", "2+2=?", "bc, d", "1+1=?", "1+1=?", "the longest of them", "1+1=?"]


def by_hand(model, tokenizer, prompts, seed, temperature, top_p, tokens):
    """Row by row, without a cache and without padding, in float64 and numpy."""
    ends, answers = end_ids(model, tokenizer), []
    for i, prompt in enumerate(prompts):
        ids, numbers = prompt_ids(tokenizer, prompt), Stream(seed, "generate", str(i)).uniform(tokens).double().numpy()
        row = []
        for number in numbers:
            logits = model(torch.tensor([ids + row])).logits[0, -1].detach().double().numpy() / temperature
            p = np.exp(logits - logits.max())
            p /= p.sum()
            order = np.argsort(-p, kind="stable")
            kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
            p = np.where(np.isin(np.arange(len(p)), kept), p, 0) if top_p < 1 else p
            token = int(np.argmax(np.cumsum(p) > number * p.sum()))
            if token in ends:
                break
            row.append(token)
        answers.append(tokenizer.decode(row, skip_special_tokens=True))
    return answers


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.6)])
def test_drawn_rows_are_those_of_a_loop_in_numpy_whatever_the_batch(temperature, top_p):
    model, tokenizer = make_llama(), make_tokenizer()
    options = {"temperature": temperature, "top_p": top_p, "seed": 3, "max_new_tokens": 6}
    wanted = by_hand(model, tokenizer, PROMPTS, 3, temperature, top_p, 6)
    for batch in (1, 3, 8):
        assert generate(model, tokenizer, PROMPTS, batch=batch, **options) == wanted
    assert len(set(wanted)) == len(wanted)  # those of one prompt too
    assert generate(model, tokenizer, PROMPTS, **options | {"seed": 4}) != wanted


def test_without_a_temperature_the_likeliest_tokens_are_written_as_transformers_writes_them():
    model, tokenizer = make_llama(), make_tokenizer()
    made = generate(model, tokenizer, PROMPTS[:2], max_new_tokens=5)
    assert made == generate(model, tokenizer, PROMPTS[:2], max_new_tokens=5, temperature=1e-4)
    assert made != generate(model, tokenizer, PROMPTS[:2], max_new_tokens=5, temperature=1.0)


def test_drawn_tokens_are_as_frequent_as_the_model_says():
    logits = torch.tensor([[2.0, 0.0, 1.0, -30.0]]).expand(4000, -1)
    found = Draw(uniform(0, "test", range(4000), 2), 0.8).token(logits, step=1).bincount(minlength=4) / 4000
    assert torch.allclose(found, torch.softmax(logits[0] / 0.8, -1), atol=0.02)
    nucleus = Draw(torch.tensor([[0.0], [1.0]]), 0.8, top_p=0.9).token(logits[:2], step=0)
    assert nucleus.tolist() == [0, 2]  # the last one of those that may be, at the largest number


@pytest.mark.on_device
def test_the_same_tokens_are_drawn_on_every_device(device):
    logits = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) * 3
    for top_p in (1.0, 0.8):
        draw = Draw(uniform(0, "test", range(64), 3), 0.9, top_p)
        assert torch.equal(draw.token(logits.to(device), 2).cpu(), draw.token(logits, 2))


@pytest.mark.parametrize("drawn", [True, False])
def test_a_row_ends_where_it_says_itself(drawn):
    model, tokenizer = make_llama(), make_tokenizer()
    ids = [tokenizer(p)["input_ids"] for p in PROMPTS]
    draw = Draw(uniform(0, "test", range(len(ids)), 12), 1.0) if drawn else None
    options = {"max_new_tokens": 12, "batch": 3, "ends": [2], "pad": 0, "draw": draw}
    whole = continuations(model, ids, **options)
    made = continuations(model, ids, **options, ended=lambda row: sum(row) > 150)
    for row, long in zip(made, whole, strict=True):
        assert row == long[: len(row)]
        assert sum(row[:-1]) <= 150
        assert sum(row) > 150 or row == long
    assert any(len(row) < len(long) for row, long in zip(made, whole, strict=True))


def test_rows_of_one_prompt_read_it_once():
    model, tokenizer = make_llama(), make_tokenizer()
    read = []
    model.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"].shape), with_kwargs=True)
    generate(model, tokenizer, ["1+1=?"] * 6 + ["2+2=?"], temperature=1.0, max_new_tokens=2)
    assert [rows for rows, columns in read if columns > 1] == [2]


def test_chats_are_prompts_too():
    tokenizer, model = make_tokenizer(), make_llama()
    turns = (("system", "add"), ("user", "1+1=?"), ("assistant", ""))
    made = generate(model, tokenizer, [Chat(turns)], max_new_tokens=3)
    assert len(made) == 1 and made == generate(model, tokenizer, Chat(turns), max_new_tokens=3)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    messages = [{"role": role, "content": content} for role, content in turns[:-1]]
    assert prompt_ids(tokenizer, messages) == prompt_ids(tokenizer, Chat(turns))
    assert generate(model, tokenizer, [messages], max_new_tokens=3) == (
        generate(model, tokenizer, [Chat(turns)], max_new_tokens=3)
    )
    for wrong, said in (
        (messages, "a list of messages .* of its own, got dict"),
        ([[*messages, {"role": "assistant", "content": "2"}]], "last message is the assistant's"),
        ([[]], "is no chat"),
        ([[{"content": "a"}]], "every message needs 'role' and 'content'"),
        ([5], "got int"),
    ):
        with pytest.raises(AddendaError, match=said):
            generate(model, tokenizer, wrong)


def test_what_cannot_be():
    tokenizer = make_tokenizer()
    with pytest.raises(AddendaError, match="none of them empty; empty: \\[1\\]"):
        generate(make_llama(), tokenizer, ["a", " "])
    with pytest.raises(AddendaError, match="cannot generate text"):
        generate(make_bert(), tokenizer, ["a"])
    for option in ({"top_p": 0.5}, {"seed": 1}):
        with pytest.raises(AddendaError, match=f"{next(iter(option))}= is for drawn answers"):
            generate(make_llama(), tokenizer, ["a"], **option)
    with pytest.raises(AddendaError, match="top_p must be a positive number"):
        generate(make_llama(), tokenizer, ["a"], temperature=1.0, top_p=0)


def test_what_a_folder_asks_of_generation_changes_neither_greedy_nor_drawn_answers(monkeypatch):
    model, tokenizer = make_llama(), make_tokenizer()
    greedy, drawn = ({"max_new_tokens": 8} | more for more in ({}, {"temperature": 1.0, "seed": 2}))
    wanted = [generate(model, tokenizer, PROMPTS[:3], **options) for options in (greedy, drawn)]
    said = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning", lambda text, *_: said.append(text))
    assert wanted == [generate(model, tokenizer, PROMPTS[:3], **options) for options in (greedy, drawn)]
    assert said == []
    asked = {"repetition_penalty": 9.0, "num_beams": 3, "no_repeat_ngram_size": 1, "min_new_tokens": 8, "top_k": 1}
    asked |= {"min_length": 60, "suppress_tokens": [5, 6, 7], "bad_words_ids": [[8]], "guidance_scale": 3.0}
    asked |= {
        "encoder_repetition_penalty": 4.0,
        "max_time": 1e-9,
        "return_dict_in_generate": True,
        "penalty_alpha": 0.5,
    }
    asked |= {"cache_implementation": "static", "stop_strings": ["a"], "num_return_sequences": 2}
    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    assert wanted == [generate(model, tokenizer, PROMPTS[:3], **options) for options in (greedy, drawn)]


def test_logits_that_are_not_finite_are_told():
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(AddendaError, match=r"not finite.*another dtype"):
        generate(model, make_tokenizer(), PROMPTS[:2], temperature=1.0)


@pytest.mark.parametrize("given", [None, "folder", 3])
def test_what_is_no_tokenizer_is_said_to_be_none(given):
    with pytest.raises(AddendaError, match="Expected a tokenizer, such as AutoTokenizer"):
        generate(make_llama(), given, ["1+1"])


def test_prompts_are_a_list():
    with pytest.raises(AddendaError, match=r"generate takes a list of prompts, got NoneType. Give \[prompt\]"):
        generate(make_llama(), make_tokenizer(), None)
