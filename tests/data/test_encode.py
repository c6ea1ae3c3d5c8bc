import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.data.batches import Collator, batches
from addenda.data.encode import IGNORE, encode, end_ids, prompt_ids
from addenda.data.read import read
from tiny_models import SUMS, make_tokenizer

GOLDEN = [[5, 3], [0, 1], [2, 4]]  # the order may not change between releases


def shown(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def learned(tokenizer, made, i=0):
    """The row with what is not learned as dots."""
    pairs = zip(made.ids[i], made.labels[i], strict=True)
    return "".join("." if t == IGNORE else tokenizer.convert_ids_to_tokens(i) for i, t in pairs)


def test_only_the_answer_and_its_end_are_learned():
    tokenizer = make_tokenizer()
    made = encode(read(SUMS), tokenizer)
    prompt = "<|start|>user\n7+5=?<|end|>\n<|start|>assistant\n"
    i = 7 * 8 + 5
    assert shown(tokenizer, made.ids[i]) == prompt + "12<|end|>"
    assert learned(tokenizer, made, i) == "." * (len(made.ids[i]) - 3) + "12<|end|>"
    assert all(t in (IGNORE, k) for t, k in zip(made.labels[i], made.ids[i], strict=True))
    assert made.ids[i][:-3] == prompt_ids(tokenizer, "7+5=?")


def test_all_turns_of_the_assistant_are_learned():
    tokenizer = make_tokenizer()
    turns = [("system", "be"), ("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")]
    chat = {"messages": [{"role": r, "content": c} for r, c in turns]}
    made = encode(read([chat]), tokenizer)
    rendered = shown(tokenizer, made.ids[0])
    assert rendered == tokenizer.apply_chat_template(chat["messages"], tokenize=False).removesuffix("\n")
    assert learned(tokenizer, made).replace(".", "") == "b<|end|>d<|end|>"


def test_without_a_template_the_texts_are_joined():
    tokenizer = make_tokenizer(template=None)
    made = encode(read(SUMS), tokenizer)
    assert shown(tokenizer, made.ids[9]) == "1+1=?2<|end|>"
    assert learned(tokenizer, made, 9) == ".....2<|end|>"
    assert prompt_ids(tokenizer, "1+1=?") == made.ids[9][:-2]
    assert encode(read(SUMS), make_tokenizer(), chat=False).ids == made.ids
    with pytest.raises(AddendaError, match="this one has none"):
        encode(read(SUMS), tokenizer, chat=True)
    tokenizer.eos_token = None
    with pytest.raises(AddendaError, match="an answer has no end"):
        encode(read(SUMS), tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    rewriting = "{% for m in messages %}{{ m['content'] if loop.last else 'x' }};{% endfor %}"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    with pytest.raises(AddendaError, match="row 0: the chat template rewrites"):
        encode(read([{"messages": [{"role": r, "content": c} for r, c in turns]}]), make_tokenizer(rewriting))


def test_long_examples():
    tokenizer, rows = make_tokenizer(), read([*SUMS[:3], {"question": "q" * 50, "answer": "yes"}])
    assert len(encode(rows, tokenizer)) == 4
    with pytest.raises(AddendaError, match=r"1 of 4 .* than 40 tokens \(row 3; the longest, row 3, has 73\)"):
        encode(rows, tokenizer, max_length=40)
    assert len(encode(rows, tokenizer, max_length=40, overflow="drop")) == 3
    cut = encode(rows, tokenizer, max_length=40, overflow="truncate")
    assert len(cut.ids[3]) == 40
    assert learned(tokenizer, cut, 3).replace(".", "") == "yes<|end|>"
    for overflow in ("error", "truncate"):
        with pytest.raises(AddendaError, match="answers longer than the context of 4"):
            encode(rows, tokenizer, max_length=4, overflow=overflow)
    with pytest.raises(AddendaError, match="drops all 4"):
        encode(rows, tokenizer, max_length=4, overflow="drop")
    with pytest.raises(AddendaError, match="overflow must be"):
        encode(rows, tokenizer, max_length=4, overflow="cut")


def test_batches_are_padded_to_their_longest():
    tokenizer = make_tokenizer()
    made = encode(read(SUMS), tokenizer)
    rows = [made[0], made[63]]
    batch = Collator(made.pad, "causal")(rows)
    longest = len(made.ids[63])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, longest)
    assert batch["attention_mask"].tolist()[0] == [1] * len(made.ids[0]) + [0] * (longest - len(made.ids[0]))
    assert batch["labels"][0, -1] == IGNORE
    assert Collator(made.pad, "causal", multiple=8)(rows)["input_ids"].shape[1] % 8 == 0
    labelled = encode(read([{"text": "ab", "label": 1}, {"text": "a", "label": 0}], task="label"), tokenizer)
    batch = Collator(labelled.pad, labelled.kind)([labelled[0], labelled[1]])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.long


def test_the_order_is_a_pass_over_the_data_and_groups_lengths():
    lengths = [5 + i % 40 for i in range(100)]
    plain, grouped = batches(lengths, 8, 13, 0, group=False), batches(lengths, 8, 13, 0)
    for order in (plain, grouped):
        assert sorted(i for rows in order for i in rows) == list(range(100))
        assert sorted(map(len, order)) == [4] + [8] * 12

    def padded(order):
        return sum(max(lengths[i] for i in rows) * len(rows) for rows in order)

    assert padded(grouped) < 0.8 * padded(plain)
    assert batches(lengths, 8, 30, 0) == batches(lengths, 8, 40, 0)[:30]
    assert batches(lengths, 8, 13, 1) != grouped
    assert batches([3] * 6, 2, 3, 0, group=False) == GOLDEN


def test_end_tokens():
    assert end_ids(None, make_tokenizer()) == [2]


@pytest.mark.parametrize(("form", "options"), [
    ("label", {"chat": False}), ("label", {"skip_corrupt": True}), ("pair", {"skip_corrupt": True}),
    ("image", {"overflow": "drop"}), ("image", {"chat": True}),
])  # fmt: skip
def test_options_of_another_kind_of_data_are_refused(form, options):
    from addenda.data.examples import Data, Labelled, Pair
    from addenda.data.prepare import Preparation

    examples = {"label": Labelled("a", 0), "pair": Pair("a", "b"), "image": None}[form]
    data = Data((examples,), form, ("x", "y"))
    with pytest.raises(AddendaError, match=f"{next(iter(options))}=.* for"):
        encode(data, Preparation((4, 4)) if form == "image" else make_tokenizer(), **options)
