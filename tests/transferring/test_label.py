import pytest
import torch

import addenda as ad
from addenda.core.base.errors import AddendaError
from addenda.data.examples import Chat, Pair
from addenda.train.generate import generate
from addenda.transferring.label import Labels, label, teacher_hash
from tiny_models import SUMS, make_bert, make_llama, make_tokenizer

PROMPTS = [row["question"] for row in SUMS[:9]]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDENDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def teacher():
    """A model with an adapter, which acts, and a count of its forwards."""
    model = make_llama()
    adapter = ad.attach(model, "lora:rank=2", name="source")
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.register_forward_pre_hook(lambda m, a: vars(m).update(forwards=vars(m).get("forwards", 0) + 1))
    return model


def forwards(model) -> int:
    return vars(model).pop("forwards", 0)


def test_a_second_run_makes_no_forward_and_gives_the_live_teachers_answers(teacher):
    tokenizer = make_tokenizer()
    live = generate(teacher, tokenizer, PROMPTS, max_new_tokens=6, batch=1)
    forwards(teacher)
    first = label(teacher, tokenizer, PROMPTS, max_new_tokens=6, batch=2)
    assert list(first.answers) == live and first.kept == 0 and forwards(teacher) > 0
    again = label(teacher, tokenizer, PROMPTS, max_new_tokens=6, batch=2)
    assert forwards(teacher) == 0
    assert (again.answers, again.whole, again.kept, again.tokens) == (first.answers, first.whole, 1.0, 0)


def test_what_decides_the_answers_is_asked_anew(teacher):
    tokenizer = make_tokenizer()
    label(teacher, tokenizer, PROMPTS, max_new_tokens=4)
    before = {"max_new_tokens": 4}
    for change in ("settings", "template", "adapter", "base", "none acts"):
        forwards(teacher)
        if change == "settings":
            before = {"max_new_tokens": 5}
        elif change == "template":
            tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
        elif change == "adapter":
            next(iter(ad.adapters(teacher)["source"].parameters())).data.add_(0.1)
        elif change == "base":
            teacher.lm_head.weight.data.add_(0.01)
        else:
            with ad.disabled(teacher):
                label(teacher, tokenizer, PROMPTS, **before)
                assert forwards(teacher) > 0
                label(teacher, tokenizer, PROMPTS, **before)
                assert forwards(teacher) == 0
            continue
        label(teacher, tokenizer, PROMPTS, **before)
        assert forwards(teacher) > 0, change


def test_a_run_that_was_killed_goes_on_behind_what_it_kept(teacher, tmp_path):
    tokenizer = make_tokenizer()
    whole = label(teacher, tokenizer, PROMPTS, max_new_tokens=4, batch=1, folder=tmp_path / "other")  # pieces of four
    forwards(teacher)
    label(teacher, tokenizer, PROMPTS[:4], max_new_tokens=4, batch=1)
    rest = label(teacher, tokenizer, PROMPTS, max_new_tokens=4, batch=1)
    assert rest.answers == whole.answers and rest.kept == 4 / 9


def test_a_damaged_piece_is_made_anew(teacher, tmp_path):
    tokenizer = make_tokenizer()
    made = label(teacher, tokenizer, PROMPTS, max_new_tokens=4)
    [file] = (tmp_path / "cache" / "labels").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    forwards(teacher)
    assert label(teacher, tokenizer, PROMPTS, max_new_tokens=4).answers == made.answers
    assert forwards(teacher) > 0
    assert label(teacher, tokenizer, PROMPTS, max_new_tokens=4).answers == made.answers
    assert forwards(teacher) == 0


def test_only_answers_that_came_to_their_end_are_data():
    chat = Chat((("system", "add"), ("user", "1+1=?"), ("assistant", "")))
    assert Labels(("1+1=?", "2+2=?"), ("2", "4444"), (True, False)).data().examples == (Pair("1+1=?", "2"),)
    [made] = Labels((chat,), ("2",), (True,)).data().examples
    assert made.messages == (("system", "add"), ("user", "1+1=?"), ("assistant", "2"))
    with pytest.raises(AddendaError, match="None of the teacher's 1 answers came to its end"):
        Labels((chat,), ("2",), (False,)).data()
    with pytest.raises(AddendaError, match="1 of 2 prompts are chats"):
        Labels((chat, "a"), ("2", "b"), (True, True)).data()


def test_what_cannot_be():
    tokenizer, endless = make_tokenizer(), make_tokenizer(None)
    endless.eos_token = None
    model = make_llama()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(AddendaError, match="no token that ends an answer"):
        label(model, endless, PROMPTS)
    with pytest.raises(AddendaError, match=r"none of them empty; empty: \[1\]"):
        label(make_llama(), tokenizer, ["a", ""])
    with pytest.raises(AddendaError, match="do not fit in the 256 of the teacher's context"):
        label(make_llama(), tokenizer, ["a" * 240])
    with pytest.raises(AddendaError, match="cannot generate text"):
        label(make_bert(), tokenizer, ["a"])


def test_equal_tensors_under_another_alpha_are_another_teacher():
    models = [make_llama() for _ in range(3)]
    for model, alpha in zip(models, (4, 8, 4), strict=True):
        ad.attach(model, f"lora:rank=2,alpha={alpha}")
    one, two, same = (teacher_hash(model, make_tokenizer()) for model in models)
    assert one == same != two


def test_what_is_no_list_of_prompts_and_no_tokenizer_is_refused():
    with pytest.raises(AddendaError, match="label takes a list of prompts, got NoneType"):
        label(make_llama(), make_tokenizer(), None)
    with pytest.raises(AddendaError, match="Expected a tokenizer, such as AutoTokenizer"):
        label(make_llama(), None, ["1+1"])
