"""What a file keeps of a tokenizer: equal for equal ones, another for others, and how those differ."""

import pytest

pytest.importorskip("transformers")
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from addenda.core.base.errors import AddendaError
from addenda.core.file.tokenizer import difference, mark, pieces
from addenda.core.state.vocabulary import Vocabulary

MERGES = [("c", "a"), ("l", "l"), ("ca", "ll"), ("<", "ca")]


def made(merges=MERGES, letters="abcl<>/"):
    """A tokenizer of merged pairs, as most models have."""
    vocabulary = dict.fromkeys([*letters, *(a + b for a, b in merges)])
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, list(merges)))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def test_a_mark_is_equal_after_saving_and_loading_and_for_the_tokenizer_inside(tmp_path):
    tokenizer = made()
    tokenizer.add_tokens([AddedToken("<call>", lstrip=True), "</call>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert mark(again) == mark(tokenizer) == mark(tokenizer.backend_tokenizer)
    assert mark(tokenizer).entries == len(tokenizer)


def other_merges():
    return made([MERGES[1], MERGES[0], *MERGES[2:]])


def other_letters():
    return made(letters="bacl<>/")


def more_tokens():
    tokenizer = made()
    tokenizer.add_tokens(["x"])
    return tokenizer


def otherwise_found():
    tokenizer = more_tokens()
    tokenizer.add_tokens([AddedToken("y", single_word=True)])
    return tokenizer


def test_what_gives_other_numbers_has_another_mark():
    tokenizer = more_tokens()
    tokenizer.add_tokens(["y"])
    marks = [
        mark(t).sha256 for t in (made(), other_merges(), other_letters(), more_tokens(), tokenizer, otherwise_found())
    ]
    assert len(set(marks)) == len(marks)


def test_a_difference_names_sizes_and_the_first_token_that_differs():
    tokenizer = made()
    tokenizer.add_tokens(["<call>", "</call>"])
    known = tokenizer.get_vocab()
    v = Vocabulary(9, 2, ("t",), {t: known[t] for t in ("<call>", "</call>")}, *mark(tokenizer))
    assert difference(tokenizer, v) is None
    other = made()
    other.add_tokens(["</call>", "<call>"])
    told = difference(other, v)
    assert told is not None and f"'<call>', which is number {known['<call>']} there, and here it is" in told
    lacking = difference(made(), v)
    assert lacking is not None and "there is none here" in lacking and f"training {len(tokenizer)}" in lacking
    merged = other_merges()
    merged.add_tokens(["<call>", "</call>"])
    assert "the new tokens are the same" in (difference(merged, v) or "")


def test_pieces_are_what_a_text_was_before_it_was_a_token():
    tokenizer = made()
    before = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("<call>"))
    assert len(before) > 1
    assert pieces(tokenizer, "<call>") == before
    tokenizer.add_tokens(["<call>"])
    assert tokenizer.tokenize("<call>") == ["<call>"]
    assert pieces(tokenizer, "<call>") == pieces(tokenizer.backend_tokenizer, "<call>") == before


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(AddendaError, match="Expected a tokenizer"):
        mark("a text")


def test_a_number_far_above_how_many_there_are_is_refused():
    far = Tokenizer(models.WordLevel({"a": 0, "b": 90_000_000}, unk_token="a"))
    with pytest.raises(AddendaError, match=r"2 tokens, and one of them the number 90,000,000"):
        mark(far)
