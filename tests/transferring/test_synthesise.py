import numpy as np
import pytest
import torch

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.transferring.synthesise import Sampler, Synthesis, synthesise
from lister import SEEDS, make_lister
from tiny_models import make_bert, make_llama, make_tokenizer


@pytest.fixture(scope="module")
def lister():
    return make_lister()


def by_hand(model, tokenizer, count, temperature, seed):
    """The first line of each sample, one by one, without a cache, in float64: an independent reading of the prompt."""
    lines = []
    for sample in range(count):
        order = np.argsort(Stream(seed, "order of seeds", str(sample)).raw(5), kind="stable")
        text = "Here are 10 examples:\n" + "".join(f"{i}. {SEEDS[k]}\n" for i, k in enumerate(order, 1)) + "6."
        ids, written = tokenizer(text)["input_ids"], ""
        for number in Stream(seed, "synthesise", str(sample)).uniform(16).tolist():
            logits = model(torch.tensor([ids])).logits[0, -1].detach().double()
            p = torch.softmax(logits / temperature, 0).numpy()
            ids = [*ids, int(np.argmax(np.cumsum(p) > number))]
            if (token := tokenizer.decode(ids[-1:])) in ("\n", "<|end|>"):
                break
            written += token
        else:
            written = ""
        lines.append(written.strip())
    return lines


def test_lines_are_those_of_a_loop_and_counted_by_what_became_of_them(lister):
    lines = by_hand(*lister, 64, 1.1, seed=2)
    new, counts = [], {"malformed": 0, "repeats": 0, "copies": 0}
    for line in lines:
        a, plus, rest = line[:1], line[1:2], line[2:]
        sum_of = a.isdigit() and plus == "+" and rest[:1].isdigit() and rest[1:] == "=?"
        where = "malformed" if not sum_of else "copies" if line in SEEDS else "repeats" if line in new else ""
        counts[where] = counts.get(where, 0) + 1
        new += [] if where else [line]
    made = synthesise(*lister, SEEDS, len(new), temperature=1.1, seed=2, batch=64, format=r"\d\+\d=\?")
    assert made.texts == new
    found = made.counts
    assert (found.samples, found.lines, found.new) == (64, 64, len(new))
    assert {k: getattr(found, k) for k in counts if k} == {k: v for k, v in counts.items() if k}
    assert min(counts.values()) > 0 and found.near_copies == 0 and made.stopped == ""
    assert (
        made.refused == [line for line in lines if line and not line.endswith("=?")][: len(made.refused)]
        or made.refused
    )


@pytest.mark.parametrize("options", [{"batch": 7}, {"batch": 16}, {"batch": 1}, {"same_order": 4}])
def test_a_sample_is_the_same_in_any_batch(lister, options):
    wanted = synthesise(*lister, SEEDS, 12, seed=5, batch=24, same_order=options.get("same_order", 1))
    assert synthesise(*lister, SEEDS, 12, seed=5, **options).texts == wanted.texts
    assert len(set(wanted.texts)) == 12 and not set(wanted.texts) & set(SEEDS)


def test_samples_of_one_order_read_their_seeds_once(lister):
    model, tokenizer = lister
    rows = []
    handle = model.register_forward_pre_hook(lambda m, a, k: rows.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    synthesise(model, tokenizer, SEEDS, 1, batch=8, same_order=4)
    handle.remove()
    assert rows[0][0] == 2 and rows[0][1] > 60  # the two orders
    assert all(row == (8, 1) for row in rows[1:])


def test_several_lines_of_a_sample_are_taken_without_their_numbers(lister):
    made = synthesise(*lister, SEEDS, 20, lines=4, seed=1, temperature=0.8)
    assert made.counts.lines > 2 * made.counts.samples
    assert all(len(t) == 5 and t[1] == "+" and t.endswith("=?") for t in made.texts)


def test_lines_as_they_are_read(lister):
    sampler = Sampler(*lister, SEEDS, temperature=1.0, lines=3, max_new_tokens=40)
    ids = lambda text: lister[1](text)["input_ids"]  # noqa: E731
    assert sampler._parsed(ids(" 1+1=?\n7. 2+2=?\n8. 3+3=?\n9. no")) == ["1+1=?", "2+2=?", "3+3=?"]
    assert sampler._parsed(ids(" 1+1=?\nno number\n8. 3+3=?\n")) == ["1+1=?", None, "3+3=?"]
    assert sampler._parsed(ids(" 1+1=?\n")) == ["1+1=?"]
    assert sampler._parsed(ids("\n\n")) == [None]
    assert sampler._parsed(ids(" 1+1=?" + "\n7. " + "2" * 30)) == ["1+1=?", None]  # cut off where it may write no more


def test_a_synthesis_goes_on_where_it_was(lister):
    sampler = Sampler(*lister, SEEDS, temperature=1.0, seed=3, batch=8)
    made = Synthesis()
    for _ in range(4):
        made += sampler.more(made)
    begun = Synthesis(made.texts[:], made.counts)
    whole = begun + Sampler(*lister, SEEDS, temperature=1.0, seed=3, batch=8).more(begun)
    assert whole.texts == (made + sampler.more(made)).texts
    assert whole.counts.samples == 40


@pytest.mark.parametrize(
    ("caps", "said"),
    [({"tries": 12}, "12 samples"), ({"max_tokens": 500}, "500 tokens"), ({"max_minutes": 1e-9}, "1e-09 minutes")],
)
def test_caps_end_it_and_say_so(lister, caps, said):
    made = synthesise(*lister, SEEDS, 90, seed=5, batch=8, **caps)
    assert said in made.stopped and 0 < len(made.texts) < 90
    assert made.counts.samples <= 12


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (["1+2=?"], "two or more"),
        (["1+2=?", "1+2=?"], "1 of them different"),
        (["1+2=?", " "], "one line"),
        (["1+2=?", "a\nb"], "one line"),
        ("1+2=?", "seeds must be"),
        (["1+2=?", "1" * 300], "longer than the 256 of the model's context"),
    ],
)
def test_seeds_that_cannot_be(lister, seeds, said):
    with pytest.raises(AddendaError, match=said):
        synthesise(*lister, seeds, 3)


def test_a_generator_that_writes_nothing_usable():
    with pytest.raises(AddendaError, match=r"Nothing that the generator wrote can be used .*12 malformed"):
        synthesise(make_llama(), make_tokenizer(), SEEDS, 3, tries=12)
    with pytest.raises(AddendaError, match="cannot generate text"):
        synthesise(make_bert(), make_tokenizer(), SEEDS, 3)
    with pytest.raises(AddendaError, match="tries must be"):
        synthesise(make_llama(), make_tokenizer(), SEEDS, 3, tries=0)


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(AddendaError, match=r"Expected a tokenizer, such as AutoTokenizer.*got NoneType"):
        synthesise(make_llama(), None, SEEDS, 2)
