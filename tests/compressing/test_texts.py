"""Text in windows: all of it, every text's first before any text's second."""

from addenda.compressing.texts import cut, windows
from tiny_models import make_tokenizer


def text(n: int, start: int = 0) -> str:
    return "".join(chr(ord("a") + (start + i * i // 7) % 26) for i in range(n))


def test_no_token_is_lost_between_two_windows():
    tokenizer, long = make_tokenizer(), text(5000)
    ids = tuple(tokenizer(long, verbose=False)["input_ids"])
    rows = cut(tokenizer, [long], 1000, 48)
    assert sum(rows, ()) == ids[: len(ids) // 48 * 48]  # the last 8 are too few
    assert {len(r) for r in rows} == {48}
    rows = cut(tokenizer, [long[:1000]], 1000, 48)
    assert sum(rows, ()) == ids[:1000] and len(rows[-1]) == 40


def test_a_calibration_file_gives_the_tokens_that_it_holds(tmp_path):
    (tmp_path / "text.txt").write_text(text(8 * 4096))
    seen, held = windows(make_tokenizer(), tmp_path / "text.txt", 10**6, 64)
    assert seen.tokens == 7 * 4096 and held.tokens == 16 * 64


def test_texts_take_turns():
    tokenizer = make_tokenizer()
    texts = [text(200, 1), text(40, 2), text(20, 3), text(100, 4)]
    rows = cut(tokenizer, texts, 6, 50)
    whole = [tuple(tokenizer(t)["input_ids"]) for t in texts]
    turns = [whole[0][:50], whole[1], whole[3][:50], whole[0][50:100], whole[3][50:], whole[0][100:150]]
    assert rows == tuple(turns)
