"""The question about a text: where the answer stands, which two tokens it is, and the loss between them alone."""

import pytest
import torch
import torch.nn.functional as F

import addenda as ad
import tiny_models
from addenda.train.loss import score
from addenda.transferring.question import NO, YES, Asked, Wording, asked, context_of

CHAT = tiny_models.make_tokenizer()
PLAIN = tiny_models.make_tokenizer(template=None)


def test_the_prompt_is_the_users_turn_with_a_template_and_the_plain_text_without():
    with_template = Wording.of(CHAT, "sums", answers=("y", "n"))
    assert CHAT.decode(with_template.ids(CHAT, "3+4=?")) == (
        "<|start|>user\n3+4=?\nIs the above question from the sums dataset?<|end|>\n<|start|>assistant\n"
    )
    plain = Wording.of(PLAIN, " sums ", answers=("y", "n"))
    assert PLAIN.decode(plain.ids(PLAIN, "3+4=?")) == "3+4=?\nIs the above question from the sums dataset?"
    assert with_template.tokens == tuple(CHAT(["y", "n"])["input_ids"][i][0] for i in (0, 1))
    assert (with_template.chat, plain.chat) == (True, False)


def test_a_space_stands_before_the_answer_where_no_template_does(monkeypatch):
    tokens = {"yes": [7], "no": [8], " yes": [9], " no": [10]}

    class Whole:
        chat_template, unk_token_id = "yes", None

        def __call__(self, text, add_special_tokens):
            return {"input_ids": tokens[text]}

    assert Wording.of(Whole(), "sums").tokens == (7, 8)
    assert Wording.of(Whole(), "sums", chat=False).tokens == (9, 10)
    tokens[" no"] = [1, 2]
    spaceless = Wording.of(Whole(), "sums", chat=False)
    assert spaceless.tokens == (7, 8) and spaceless.answers == ("yes", "no")
    tokens["no"] = [7]
    with pytest.raises(ad.AddendaError, match=r"' no' is 2 tokens.*answers="):
        Wording.of(Whole(), "sums", chat=False)


def test_words_of_several_tokens_and_names_of_several_lines_are_refused():
    with pytest.raises(ad.AddendaError, match=r"'yes' is 3 tokens, 'no' is 2 tokens.*answers="):
        Wording.of(CHAT, "sums")
    with pytest.raises(ad.AddendaError, match="'ö' is unknown"):
        Wording.of(CHAT, "sums", answers=("ö", "n"))
    for name in ("", "two\nlines", 3):
        with pytest.raises(ad.AddendaError, match="one line of text"):
            Wording.of(CHAT, name, answers=("y", "n"))  # type: ignore[arg-type]
    for answers in ("yn", ("y",), ("y", " ")):
        with pytest.raises(ad.AddendaError, match="two words"):
            Wording.of(CHAT, "sums", answers=answers)


def test_the_loss_is_between_the_two_tokens_at_the_last_place_of_the_prompt():
    model, wording = tiny_models.make_llama(), Wording.of(CHAT, "s", answers=("y", "n"))
    rows = asked(model, CHAT, wording, ["1+1=?", "a long text of letters"], [YES, NO])
    found = score(model, rows.batch([0, 1]), rows.kind, right=True, keep=True)
    wanted, margins = 0.0, []
    for i, label in ((0, YES), (1, NO)):
        last = model(torch.tensor([rows.ids[i]])).logits[0, -1, list(wording.tokens)]
        wanted += F.cross_entropy(last[None].double(), torch.tensor([label])).item()
        margins.append((last[YES] - last[NO]).item())
    assert found.total.item() == pytest.approx(wanted, rel=1e-5) and found.count == 2
    assert found.logits is not None
    assert (found.logits[:, YES] - found.logits[:, NO]).tolist() == pytest.approx(margins, abs=1e-5)
    assert found.right is not None and found.right.tolist() == [margins[0] > 0, margins[1] < 0]


def test_rows_can_be_taken_and_cut_and_have_a_digest_of_their_own():
    rows = Asked([[1, 2, 3], [1, 2, 4, 5]], [YES, NO], (8, 9), 0)
    cut = rows.batch([0, 1], skip=2)
    assert cut["input_ids"].tolist() == [[3, 0], [4, 5]] and cut["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert cut["labels"].tolist() == [[YES, -100], [-100, NO]] and cut["table"].tolist() == [8, 9]
    assert rows.take([1]).ids == [[1, 2, 4, 5]] and rows.take([1]).digest != rows.digest
    assert rows.lengths == [3, 4] and rows.tokens == 7


def test_texts_that_are_empty_or_longer_than_the_context_are_refused():
    model, wording = tiny_models.make_llama(), Wording.of(CHAT, "s", answers=("y", "n"))
    assert context_of(model) == 256 and context_of(torch.nn.Linear(1, 1)) is None
    with pytest.raises(ad.AddendaError, match="1 of 2 texts are empty or no text, the first at 1"):
        asked(model, CHAT, wording, ["a", " "])
    with pytest.raises(ad.AddendaError, match=r"1 of 2 texts have more than the 256 tokens.*at 0, has 3"):
        asked(model, CHAT, wording, ["a" * 240, "a"])
