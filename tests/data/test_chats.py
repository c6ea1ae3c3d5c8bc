"""Chats as templates write them: what is learned, and that no part of a chat is lost.

The templates are written here, in the forms of those that models come with.
"""

import pytest
import torch
from tests.data.test_encode import learned, shown

from addenda.core.base.errors import AddendaError
from addenda.data.encode import encode, end_ids, prompt_ids
from addenda.data.examples import Chat
from addenda.data.read import read
from addenda.train.evaluate import evaluate
from addenda.train.generate import generate
from addenda.train.tune import tune
from tiny_models import TEMPLATE, make_llama, make_tokenizer

CHATML = TEMPLATE
PHI3 = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (  # reasoning is written for the last turn only, where an empty one stands if there is none
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set c = m['content'] %}{% set r = m.reasoning_content or '' %}"
    "{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}"
    "{% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
R1 = (  # reasoning is never written, and the model is made to begin with it
    "{% for m in messages %}{% if m['role'] == 'user' %}<|start|>{{ m['content'] }}"
    "{% else %}<|start|>: {{ m['content'].split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>: <think>\n{% endif %}"
)
MARKED = QWEN3.replace("{{ c }}", "{% generation %}{{ c }}{% endgeneration %}")
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TWO = [("user", "3+4?"), ("assistant", "7"), ("user", "1+1?"), ("assistant", "2")]


def tokenizer_of(template):
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens(["<think>", "</think>"])  # not special, as in the models that have them
    return tokenizer


def chat(turns, **more):
    return {"messages": [t if isinstance(t, dict) else {"role": t[0], "content": t[1]} for t in turns], **more}


def encoded(template, turns, **more):
    tokenizer = tokenizer_of(template)
    made = encode(read([chat(turns, **more)]), tokenizer)
    return shown(tokenizer, made.ids[0]), learned(tokenizer, made).strip("."), made


@pytest.mark.parametrize(
    ("template", "turns", "wanted", "said"),
    [
        (CHATML, TWO, ["7<|end|>", "2<|end|>"], False),
        (PHI3, TWO, ["7<|end|>", "2<|end|>"], False),
        (QWEN3, TWO, ["<think>\n\n</think>\n\n2<|end|>"], True),
        (QWEN3, TWO[:2], ["<think>\n\n</think>\n\n7<|end|>"], False),
        (QWEN3, [*TWO[:3], ("assistant", "<think>\nr\n</think>\n\n2")], ["<think>\nr\n</think>\n\n2<|end|>"], True),
        (R1, TWO, ["7<|end|>", "2<|end|>"], True),
        (R1, [("user", "a"), ("assistant", "<think>\nr\n</think>\n\n2")], ["r\n</think>\n\n2<|end|>"], False),
        (R1, [*TWO[:1], ("assistant", "<think>x</think>7"), *TWO[2:3], ("assistant", "<think>y</think>2")],
         ["y</think>2<|end|>"], True),
        (MARKED, TWO, ["7<|end|>", "2<|end|>"], False),
        (PLAIN, TWO, ["7\n<|end|>", "2\n<|end|>"], False),
    ],
)  # fmt: skip
def test_what_is_learned_of_several_turns(template, turns, wanted, said):
    whole, found, made = encoded(template, turns)
    assert [part for part in found.split(".") if part] == wanted
    assert whole.endswith(wanted[-1])
    assert bool(made.said) == said
    labels, ids = made.labels[0], made.ids[0]
    assert all(t in (-100, i) for t, i in zip(labels, ids, strict=True))


@pytest.mark.parametrize("template", [CHATML, PHI3, QWEN3, MARKED, PLAIN, None])
def test_the_prompt_is_what_generate_starts_from(template):
    tokenizer = tokenizer_of(template)
    made = encode(read([chat(TWO)]), tokenizer)
    begun = prompt_ids(tokenizer, Chat((*TWO[:3], ("assistant", ""))))
    assert made.ids[0][: len(begun)] == begun
    if template not in (None, PLAIN):
        assert shown(tokenizer, begun) == tokenizer.apply_chat_template(
            chat(TWO[:3])["messages"], tokenize=False, add_generation_prompt=True
        )


ODD = ["<|unk|>", "<|pad|>", "<|end|>", "<|start|>"]


@pytest.mark.parametrize("template", [CHATML, PHI3, QWEN3, R1, PLAIN, None])
@pytest.mark.parametrize("odd", ODD)
def test_special_tokens_in_an_answer_end_nothing(template, odd):
    tokenizer = tokenizer_of(template)
    rows = [{"question": "q", "answer": f"a{odd}b"}, chat([("user", "q"), ("assistant", f"a{odd}b"), *TWO[:2]])]
    for row in rows:
        found = learned(tokenizer, encode(read([row]), tokenizer))
        if "messages" not in row or template is not QWEN3:
            assert f"a{odd}b" in found
        assert found.endswith("<|end|>")
        assert found.count("<|end|>") == found.replace(odd, "", odd == "<|end|>").count("<|end|>") + (odd == "<|end|>")


def test_only_the_templates_end_stops_generation():
    tokenizer = make_tokenizer(CHATML.replace("<|end|>", "<|start|>"))  # turns end with another token than texts
    assert end_ids(None, tokenizer) == [1]
    assert end_ids(None, tokenizer, chat=False) == [2]
    model = make_llama()
    model.generation_config.eos_token_id = [1, 2]  # its makers say that both end a turn
    assert end_ids(model, tokenizer) == [1, 2]
    model.generation_config.eos_token_id = 2
    assert end_ids(model, tokenizer) == [1]
    rows = [{"question": "q", "answer": "a<|end|>b<|pad|>c"}]
    made = tune(model, rows, tokenizer=tokenizer, steps=60, batch=1, rate=1e-2, progress=False)
    assert evaluate(made.model, tokenizer, rows).accuracy == 1.0
    assert generate(made.model, tokenizer, ["q"], max_new_tokens=8) == ["abc"]  # special tokens are left out
    assert torch.equal(
        torch.tensor(prompt_ids(tokenizer, "q")), torch.tensor(encode(read(rows), tokenizer).ids[0][:-6])
    )


TOOLS = (
    "{% if tools %}{{ tools | length }} tools: {{ tools[0].name }}\n{% endif %}{% for m in messages %}<|start|>"
    "{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}={{ c.name }}={% endfor %}"
    "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}


def test_tools_and_their_calls_reach_the_template():
    turns = [("user", "q"), CALL, {"role": "tool", "content": "7"}, ("assistant", "is 7")]
    whole, found, _ = encoded(TOOLS, turns, tools=[{"name": "add"}])
    assert whole.startswith("1 tools: add\n<|start|>user\nq<|end|>")
    assert [part for part in found.split(".") if part] == ["=add=<|end|>", "is 7<|end|>"]
    as_text, _, _ = encoded(TOOLS, turns, tools='[{"name": "add"}]')
    assert as_text == whole
    assert encoded(TOOLS, turns[:2])[1] == "=add=<|end|>"


def test_turns_of_weight_0_are_given_and_not_learned():
    turns = [TWO[0], {"role": "assistant", "content": "8", "weight": 0}, *TWO[2:]]
    for template in (CHATML, PHI3, None):
        whole, found, _ = encoded(template, turns)
        assert "8" in whole and found == "2<|end|>"
    whole, found, _ = encoded(CHATML, [*TWO[:3], {"role": "assistant", "content": "2", "weight": 0}])
    assert found == "7<|end|>" and whole.endswith("7<|end|>")
    weighted = [{"role": r, "content": c, "weight": int(r == "assistant")} for r, c in TWO]
    assert read([chat(weighted)]).digest == read([chat(TWO)]).digest


def test_equal_chats_have_equal_digests_and_others_do_not():
    plain = read([chat(TWO)])
    assert repr(plain.examples[0]) == f"Chat(messages={tuple(TWO)!r})"
    made = [plain, read([chat(TWO, tools=[{"name": "a"}])]), read([chat(TWO, tools=[{"name": "b"}])])]
    assert len({d.digest for d in made}) == len({d.examples[0].key for d in made}) == 3
    assert read([chat(TWO, tools=None, other="x")]).digest == plain.digest


@pytest.mark.parametrize(
    ("template", "turns", "more", "says"),
    [
        (
            CHATML,
            TWO,
            {"tools": [{"name": "a"}]},
            "row 0: the chat template does not read 'tools', which would be lost",
        ),
        (CHATML, [TWO[0], CALL, TWO[0], TWO[1]], {}, "does not read 'tool_calls' of turn 1"),
        (CHATML, [TWO[0], {**CALL, "content": "c"}], {}, "does not read 'tool_calls' of turn 1"),
        (CHATML, [TWO[0], {"role": "assistant", "content": "7", "reasoning_content": "r"}], {}, "'reasoning_content'"),
        (CHATML, [{"role": "user", "content": "q", "images": ["x.png"]}, TWO[1]], {}, "'images' of turn 0"),
        (CHATML, [TWO[0], {"role": "assistant", "content": "7", "weight": 0}], {}, "every weight is 0"),
        (None, [TWO[0], {"role": "assistant", "content": "7", "name": "x"}], {}, "'name' wants a chat template"),
        (None, TWO, {"tools": [{"name": "a"}]}, "'tools' wants a chat template"),
        ("{{ raise_exception('No system turn') }}", TWO, {}, "row 0: .*does not take it: No system turn"),
        ("{{ messages[0].x.y }}", TWO, {}, "row 0: the chat template does not take it"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(template, turns, more, says):
    with pytest.raises(AddendaError, match=says):
        encoded(template, turns, **more)


@pytest.mark.parametrize(
    ("turn", "more", "says"),
    [
        ({"weight": 0.5}, {}, "message 1 has the weight 0.5; 0 .not learned. and 1"),
        ({}, {"tools": "[" * 200_000}, "column 'tools' is nested too deeply"),
        ({"content": None}, {}, "message 1, holds None, a text was expected"),
        ({"content": "\ud800"}, {}, "surrogate"),
        ({"tool_calls": [{"name": "\ud800"}]}, {}, "surrogate"),
        ({"tool_calls": [{1, 2}]}, {}, "cannot be kept"),
        ({}, {"functions": [{"name": "a"}]}, "'functions' would be lost"),
        ({}, {"tools": "{oops"}, "row 0"),
        ({}, {"tools": {"name": "a"}}, "must be a list"),
    ],
)
def test_chats_that_cannot_be_read(turn, more, says):
    with pytest.raises(AddendaError, match=says):
        read([chat([TWO[0], {"role": "assistant", "content": "7"} | turn], **more)])
    with pytest.raises(AddendaError, match="only the assistant's turns are learned"):
        read([chat([{"role": "user", "content": "q", "weight": 1}, TWO[1]])])


def test_a_prompt_that_the_template_does_not_take():
    with pytest.raises(AddendaError, match=r"This prompt cannot be written: .* no such turn"):
        prompt_ids(make_tokenizer("{{ raise_exception('no such turn') }}"), "q")
