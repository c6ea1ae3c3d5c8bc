"""A task's inputs, and the seeds that are drawn of them."""

import pytest

import addenda as ad
import tiny_models
from addenda.data.encode import prompt_ids
from addenda.data.examples import Chat
from addenda.data.read import read
from addenda.transferring.inputs import draw_seeds, inputs_of

ROWS = [{"question": f"{a}+1=?", "answer": str(a + 1)} for a in range(6)]


def chats(system):
    turns = [[{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in ROWS]
    return read([{"messages": ([] if system is None else [{"role": "system", "content": system}]) + t} for t in turns])


def test_questions_are_the_inputs_and_the_system_turn_stands_apart():
    questions = tuple(r["question"] for r in ROWS)
    pairs, plain, under = (inputs_of(d) for d in (read(ROWS), chats(None), chats("be brief")))
    assert pairs.texts == plain.texts == under.texts == questions
    assert (pairs.system, plain.system, under.system) == (None, None, "be brief")
    assert pairs.prompt("x") == "x"


def test_a_prompt_is_the_one_that_the_data_has():
    tokenizer = tiny_models.make_tokenizer()
    for data in (read(ROWS), chats(None), chats("")):
        found = inputs_of(data)
        example = data.examples[2]
        theirs = prompt_ids(tokenizer, example if isinstance(example, Chat) else example.question)
        assert prompt_ids(tokenizer, found.prompt(found.texts[2])) == theirs


def test_chats_that_are_no_single_question_are_refused():
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    with pytest.raises(ad.AddendaError, match=r"1 of 1 chats .* are not one question"):
        inputs_of(read([{"messages": [*turns, {"role": "assistant", "content": "d"}]}]))
    mixed = [{"messages": [{"role": "system", "content": s}, *turns[:2]]} for s in ("x", "y")]
    with pytest.raises(ad.AddendaError, match="2 different system turns"):
        inputs_of(read(mixed))
    with pytest.raises(ad.AddendaError, match="labels"):
        inputs_of(read([{"text": "a", "label": 0}, {"text": "b", "label": 1}], task="label"))


def test_seeds_are_drawn_by_the_seed_of_the_draw_and_are_different_lines():
    texts = [*map(str, range(40)), "two\nlines", " 3 ", ""]
    drawn = draw_seeds(texts, 5, seed=1)
    assert drawn == draw_seeds(texts, 5, seed=1) != draw_seeds(texts, 5, seed=2)
    assert len({*drawn}) == 5 and {*drawn} <= {*map(str, range(40))}
    assert {*draw_seeds(texts, 40)} == {*map(str, range(40))}
    with pytest.raises(ad.AddendaError, match="2 at least, got 1"):
        draw_seeds(texts, 1)
    with pytest.raises(ad.AddendaError, match="41 seeds are wanted, and 40 of 43"):
        draw_seeds(texts, 41)
