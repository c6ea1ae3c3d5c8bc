"""The embedded task: equal on every machine, no question in two splits, and the sizes that a comparison needs."""

from itertools import combinations

import pytest

from addenda.core.base.errors import AddendaError
from addenda.data import task as module
from addenda.data.task import Example, chat, deduplicated, embedded_task, few_shot, normalised, split

pytest.importorskip("reasoning_gym", reason="the embedded task needs the extra: pip install 'addenda[demo]'")

GOLDEN = {
    "train": "c789fad8fafa05e98e72635d8e43583599d98c538ed286737681db90024bf3a6",
    "validation": "b7c6fb3be553627ed568603f2637795d642bb477e73704cb6978d540f68f3db8",
    "test": "aed1b11e3e0c829977da64c0b63d1c68d848d9956bef1af338cbaa8cbc9de911",
    "ood": "472d43d9677dd9ac7f0496b1de33e5be871232ee0403d83959b89b19dd77bd18",
}


def numbers(example: Example) -> list[int]:
    return [int(n) for n in example.question.split(": ")[1].split()]


def test_the_task_is_the_same_on_every_machine_and_run():
    task = embedded_task()
    embedded_task.cache_clear()
    assert task == embedded_task()
    assert task.hashes == GOLDEN


def test_no_question_is_in_two_splits_or_twice_in_one():
    splits = embedded_task().splits
    keys = {name: {normalised(e.question) for e in examples} for name, examples in splits.items()}
    assert all(len(keys[name]) == len(splits[name]) for name in splits)
    assert all(not keys[one] & keys[other] for one, other in combinations(keys, 2))


def test_every_split_is_large_enough():
    sizes = {name: len(examples) for name, examples in embedded_task().splits.items()}
    assert sizes["train"] >= 6000
    assert sizes["validation"] >= 400
    assert sizes["test"] >= 500
    assert sizes["ood"] >= 200
    assert 100 * sizes["train"] < 2 * (2 * module.LARGEST) ** module.NUMBERS  # questions there could be


@pytest.mark.parametrize("name", ["train", "validation", "test", "ood"])
def test_answers_are_right_and_numbers_as_large_as_said(name):
    for example in embedded_task().splits[name]:
        given = numbers(example)
        assert len(given) == module.NUMBERS
        down = example.question.startswith("Sort descending: ")
        assert example.answer == " ".join(str(v) for v in sorted(given, reverse=down))
        largest = max(map(abs, given))
        assert module.LARGEST < largest <= module.OOD_LARGEST if name == "ood" else largest <= module.LARGEST


def test_both_directions_come_up_equally_often():
    test = embedded_task().splits["test"]
    assert 0.45 < sum("ascending" in e.question for e in test) / len(test) < 0.55


def test_a_split_depends_on_the_question_alone():
    whole = embedded_task().splits
    some = split(whole["test"][::3] + whole["train"][::7], module.SHARES)
    assert some["test"] == whole["test"][::3]
    assert some["train"] == whole["train"][::7]
    assert some["validation"] == []


def test_questions_that_differ_in_case_or_spacing_are_one():
    first = Example("Sort ascending: 2 1", "1 2")
    assert deduplicated([first, Example("sort  ascending: 2 1 ", "?")]) == [first]


def test_a_shared_question_is_an_error_that_names_it():
    twice = Example("Sort ascending: 2 1", "1 2")
    with pytest.raises(AddendaError, match=r"train and test .* share 1 questions.*2 1"):
        module._check_disjoint({"train": [twice], "test": [twice]})


def test_messages_end_with_the_answer_or_wait_for_it():
    example = Example("Sort ascending: 2 1", "1 2")
    assert [m["role"] for m in chat(example)] == ["system", "user", "assistant"]
    assert chat(example)[-1]["content"] == "1 2"
    assert chat(example, answer=False) == chat(example)[:-1]


def test_eight_shots_come_from_the_training_split():
    task = embedded_task()
    messages = few_shot(task, task.splits["test"][0])
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 8, "user"]
    assert messages[1]["content"] == task.splits["train"][0].question
    assert messages[-1]["content"] == task.splits["test"][0].question
    with pytest.raises(AddendaError, match="got 0"):
        few_shot(task, task.splits["test"][0], n=0)
