"""What is hidden of a text: how much, never special tokens, the same for one seed, step and row; windows; the table."""

import numpy as np
import pytest

from addenda.core.base.errors import AddendaError
from addenda.data.encoded import IGNORE
from addenda.data.masked import JUDGED, masked
from addenda.data.read import read
from tiny_models import CHARACTERS, make_tokenizer

TEXTS = [f"{'abcdefgh'[i % 8] * (i % 5 + 2)} {i:03d} xyz and some more" for i in range(60)]


@pytest.fixture
def tokenizer():
    """A token a character, `<|start|>` and `<|end|>` around a text, and a mask token."""
    from tokenizers.processors import TemplateProcessing

    made = make_tokenizer(None)
    made.add_special_tokens({"mask_token": "<|mask|>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 2)]
    )
    return made


def encoded(tokenizer, texts=TEXTS, held=None, **options):
    options = {"limit": 64} | options
    return masked(read(texts, task="masked"), held and read(held, task="masked"), tokenizer, **options)


def test_fifteen_of_a_hundred_are_hidden_and_labels_stand_where_they_are(tokenizer):
    data, _ = encoded(tokenizer, vocabulary="all")
    kinds = np.zeros(3)
    for step in range(40):
        batch = data.drawn(step).batch(range(len(data)))
        ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
        for i, row in enumerate(data.ids):
            chosen = labels[i] != IGNORE
            assert chosen.sum() == max(1, round(0.15 * (len(row) - 2)))
            assert not chosen[0] and not chosen[len(row) - 1 :].any()
            true = np.array(row + [data.pad] * (ids.shape[1] - len(row)))
            assert (labels[i][chosen] == true[chosen]).all() and (ids[i][~chosen] == true[~chosen]).all()
            hidden, kept = ids[i][chosen] == data.mask, ids[i][chosen] == true[chosen]
            kinds += [hidden.sum(), (~hidden & ~kept).sum(), kept.sum()]
    share = kinds / kinds.sum()  # 60 rows × 40 draws × about 3: two standard errors are below 0.01
    assert abs(share[0] - 0.8) < 0.015 and abs(share[1] - 0.1) < 0.012 and abs(share[2] - 0.1) < 0.012


def test_a_draw_depends_on_seed_step_and_row_alone(tokenizer):
    data, held = encoded(tokenizer, held=TEXTS[:9], seed=7)
    one = data.drawn(3).batch([5, 2])
    again, _ = encoded(tokenizer, held=TEXTS[:9], seed=7)
    assert (again.drawn(3).batch([2, 5])["input_ids"].flip(0) == one["input_ids"]).all()
    assert (again.take([5, 2]).drawn(3).batch([0, 1])["input_ids"] == one["input_ids"]).all()
    other, judged = encoded(tokenizer, held=TEXTS[:9], seed=8)
    assert (other.drawn(3).batch([5, 2])["input_ids"] != one["input_ids"]).any()
    assert (data.drawn(4).batch([5, 2])["input_ids"] != one["input_ids"]).any()
    assert held.seed == judged.seed == JUDGED  # what is judged by is the same for runs of all seeds
    assert (held.batch(range(9))["input_ids"] == judged.batch(range(9))["input_ids"]).all()
    assert (
        held.digest == judged.digest
        and data.digest != other.digest == encoded(tokenizer, held=TEXTS[:9], seed=8)[0].digest
    )


def test_the_table_has_the_tokens_of_both_texts_and_no_other(tokenizer):
    data, held = encoded(tokenizer, ["abba ab", "bab a"], ["acca"])
    letters = sorted(tokenizer.convert_tokens_to_ids(list("abc ")))
    assert data.table.tolist() == letters == held.table.tolist()
    batch = data.drawn(0).batch([0, 1])
    labels = batch["labels"][batch["labels"] != IGNORE]
    assert batch["table"].tolist() == letters and int(labels.max()) < 4
    whole, _ = encoded(tokenizer, ["abba ab", "bab a"], vocabulary="all")
    same = whole.drawn(0).batch([0, 1])["labels"]
    assert (same[same != IGNORE] == batch["table"][labels]).all() and "table" not in whole.batch([0])
    assert len(whole.candidates) == len(CHARACTERS)


def test_long_texts_are_read_in_windows_between_special_tokens(tokenizer):
    data, _ = encoded(tokenizer, ["a" * 25, "b" * 21, "c" * 3], limit=12)
    assert [len(row) for row in data.ids] == [12, 12, 12, 12, 5]  # the last 5 and 1 tokens say little alone
    assert all((row[0], row[-1]) == (1, 2) for row in data.ids)
    assert any("2 of 3 texts are longer than 10 tokens" in text for text in data.said)
    assert any("only 3 texts of 53 tokens" in text for text in data.said)
    assert any("over 3 of" in text for text in data.said)


def test_what_cannot_be_filled_in_is_refused(tokenizer):
    with pytest.raises(AddendaError, match=r"no mask token.*tokenizer\.mask_token"):
        encoded(make_tokenizer(None))
    with pytest.raises(AddendaError, match="2 tokens leave no room beside 2 special"):
        encoded(tokenizer, limit=2)
    with pytest.raises(AddendaError, match="no token that could be hidden"):
        encoded(tokenizer, ["ßß", "éé"])
    with pytest.raises(AddendaError, match="vocabulary must be 'texts' or 'all', got 'half'"):
        encoded(tokenizer, vocabulary="half")
