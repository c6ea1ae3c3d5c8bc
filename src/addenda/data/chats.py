"""A chat as the text that a template makes of it, cut into what is given and what is learned.

A chat is rendered as a whole, and again up to every answer, as `generate` would begin it. Where the shorter renderings
begin the whole, all answers are learned, each from what `generate` starts with up to the template's end of a turn:

    whole    user: 3+4? ‖ assistant: 7 ‖ user: 1+1? ‖ assistant: 2 ‖
    learned                          7 ‖                         2 ‖

Templates that write an earlier turn otherwise once there is a later one (Qwen3 drops its reasoning) have no text that
is right for all answers: those that mark answers with {% generation %} are believed, else the last one is learned, and
the note says so. A template may begin the model's turn with words that it does not write before an answer (DeepSeek-R1:
<think>); an answer that begins with them goes on from there.

Whatever a turn holds besides its text goes to the template, and is refused by name where the template does not read it.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.data.examples import Chat, Pair

HARMLESS = {"id", "index", "uuid", "timestamp", "created_at", "date", "time", "model", "language", "lang", "source"}
PROBE = "ADDENDA-ANSWER"
REWRITES = "the chat template writes earlier turns otherwise once a later one comes, so only the last answer is learned"
OPENS = (
    "the chat template begins the model's turn with {!r}, which these answers lack; learned is what it writes of them"
)


@dataclass(frozen=True)
class Segment:
    """A piece of text. ends: how many special tokens there are from the end of an answer on; None: not known."""

    text: str
    learned: bool = False
    ends: int | None = 0


@dataclass(frozen=True)
class Ending:
    """What a template puts behind an answer, and before one where `generate` is to write it.

    suffix: its text, None where no rendering shows it; token: the special token that ends a turn; ends: how many of
    those the suffix holds; opener: what only `generate` starts with.
    """

    suffix: str | None = None
    token: int | None = None
    text: str = ""  # up to that token and with it
    ends: int = 0
    opener: str = ""


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of a tokenizer's special tokens, those that were added later among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, t in added.items() if getattr(t, "special", False))}


def ending_of(tokenizer: Any) -> Ending:
    """Return how the tokenizer's template ends an answer, seen on one."""
    user = {"role": "user", "content": "a"}
    try:
        prompt_text = _render(tokenizer, [user], {}, True)
        chat = _render(tokenizer, [user, {"role": "assistant", "content": PROBE}], {})
    except ValueError:  # a template that wants more than this
        return Ending()
    at = chat.rfind(PROBE)
    if at < 0:
        return Ending()
    suffix = chat[at + len(PROBE) :]
    special, ids = special_ids(tokenizer), tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    ends = [i for i in ids if i in special]
    token = ends[0] if ends else None
    text = str(tokenizer.convert_ids_to_tokens(token)) if token is not None else ""
    place = suffix.find(text)
    opener = "" if chat.startswith(prompt_text) or not prompt_text.startswith(chat[:at]) else prompt_text[at:]
    return Ending(suffix, token, suffix[: place + len(text)] if text and place >= 0 else suffix, len(ends), opener)


def segments(example: Pair | Chat, tokenizer: Any, ending: Ending | None) -> tuple[list[Segment], str]:
    """Return the pieces of an example in order, and a note where not all of its answers are learned.

    ending: of the template; None for plain text. Raises ValueError for a chat that the template cannot take, or of
    which parts would be lost.
    """
    turns, more, learned = _turns(example)
    if ending is None:
        return _plain(example, turns, more, learned), ""
    _check_read(tokenizer, turns, more)
    chat = _render(tokenizer, turns, more)
    pieces = [_Turn.of(tokenizer, turns, more, i, ending) for i in _answers(turns)]
    answers = [p for p in pieces if learned[p.place]]
    if not answers:
        raise ValueError("no answer of it is learned: every weight is 0")
    if all(p.begins(chat) for p in answers):
        note = OPENS.format(ending.opener) if any(p.opened for p in answers) else ""
        return _cut(chat, [p for p in pieces if p.begins(chat)], learned), note
    if marked := _marked(tokenizer, turns, more, learned, ending):
        return marked, ""
    answer = answers[-1]
    if answer.place != len(turns) - 1:
        raise ValueError(f"{REWRITES.partition(', so')[0]}, and the last answer has weight 0")
    if answer.own is not None:
        return [Segment(answer.prompt), Segment(answer.own, True, ending.ends)], REWRITES if len(answers) > 1 else ""
    if not answer.begins(chat):
        raise ValueError(f"the chat template rewrites what came before turn {answer.place}")
    return [Segment(chat[: answer.start]), Segment(chat[answer.start :], True, answer.ends)], REWRITES


def prompt(example: Pair | Chat, tokenizer: Any, ending: Ending | None) -> list[Segment]:
    """Return what `generate` starts from: the pieces before the last answer, as by `segments`. Raises ValueError."""
    turns, more, learned = _turns(example)
    if ending is None:
        return _plain(example, turns, more, learned)[:-1]
    _check_read(tokenizer, turns[:-1], more)
    chat = _render(tokenizer, turns[:-1], more, True)
    pieces = [_Turn.of(tokenizer, turns, more, i, ending) for i in _answers(turns)[:-1]]
    if not all(p.begins(chat) for p in pieces if learned[p.place]):
        return [Segment(chat)]
    return _cut(chat, [p for p in pieces if p.begins(chat)], learned, rest=True)


@dataclass(frozen=True)
class _Turn:
    """One answer, in the rendering where it is the last turn."""

    place: int
    prompt: str  # what `generate` starts from
    start: int  # where the answer begins in `text`
    text: str  # up to the answer's end, with what the template puts behind it
    short: str  # up to the end of the turn only
    ends: int | None
    opened: bool = False  # whether the template's opener is missing before it
    own: str | None = None  # what follows the prompt, where the template leaves part of the answer out

    @classmethod
    def of(cls, tokenizer: Any, turns: list[dict], more: dict, i: int, ending: Ending) -> "_Turn":
        prefix = _render(tokenizer, turns[:i], more, True)
        text = _render(tokenizer, turns[: i + 1], more)
        ends, short = None, text
        if ending.suffix is not None and text.endswith(ending.suffix):
            ends, short = ending.ends, text.removesuffix(ending.suffix) + ending.text
        header = prefix.removesuffix(ending.opener) if ending.opener else prefix
        opened = not text.startswith(prefix) and text.startswith(header)
        start = len(prefix) if text.startswith(prefix) else len(header) if opened else -1
        content, answer = str(turns[i].get("content")), None
        reasoned = "</think>" in content
        if reasoned and start >= 0 and _bare(content) not in _bare(prefix[-40:] + text[start:]):  # it leaves that out
            opener = ending.opener.strip()
            inner = content.lstrip().removeprefix(opener).lstrip("\n") if opener else content
            answer = inner + (ending.suffix or "")
        return cls(i, prefix, start, text, short, ends, opened, answer)

    def begins(self, whole: str) -> bool:
        """Return whether the whole chat goes on as this answer's own rendering does."""
        return self.own is None and self.start >= 0 and whole.startswith(self.short)


def _cut(whole: str, pieces: list[_Turn], learned: list[bool], *, rest: bool = False) -> list[Segment]:
    """Return the pieces of a rendering, cut at the bounds of its answers. rest: with what stands behind the last."""
    parts, at = [], 0
    for p in pieces:
        full = whole.startswith(p.text)
        end = len(p.text if full else p.short)
        ends = p.ends if full or not p.ends else 1
        parts += [Segment(whole[at : p.start]), Segment(whole[p.start : end], learned[p.place], ends)]
        at = end
    while parts and not rest and not parts[-1].learned:  # nothing is learned behind it
        parts.pop()
    return parts + ([Segment(whole[at:])] if rest else [])


def _marked(tokenizer: Any, turns: list[dict], more: dict, learned: list[bool], ending: Ending) -> list[Segment]:
    """Return pieces by the template's own {% generation %} marks; none unless every answer has one."""
    source = _source(tokenizer, more)
    if not re.search(r"\{%-?\s*generation\s*-?%\}", source) or ending.token is None:
        return []
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {
        "tools": more.get("tools"),
        "documents": more.get("documents"),
        **more.get("chat_template_kwargs", {}),
    }
    variables |= {k: v for k, v in getattr(tokenizer, "special_tokens_map", {}).items() if isinstance(v, str)}
    variables = {k: v for k, v in variables.items() if v}
    texts, places = render_jinja_template([turns], chat_template=source, return_assistant_tokens_mask=True, **variables)
    chat, spans, answers = str(texts[0]), [(int(a), int(b)) for a, b in places[0]], _answers(turns)
    if len(spans) != len(answers):
        return []
    pieces, at = [], 0
    for i, (start, end) in zip(answers, spans, strict=True):
        if chat.startswith(ending.text, end) and not chat[start:end].endswith(ending.text):
            end += len(ending.text)
        pieces += [Segment(chat[at:start]), Segment(chat[start:end], learned[i], None)]
        at = end
    while pieces and not pieces[-1].learned:
        pieces.pop()
    return pieces


def _answers(turns: list[dict]) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def _turns(example: Pair | Chat) -> tuple[list[dict], dict, list[bool]]:
    """Return (turns as a template takes them, what belongs to all of them, which are learned)."""
    if isinstance(example, Pair):
        turns = [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.answer}]
        return turns, {}, [False, True]
    more = json.loads(example.more) if example.more else {}
    fields = more.pop("turns", {})
    turns = [
        {"role": role, "content": text} | fields.get(str(i), {}) for i, (role, text) in enumerate(example.messages)
    ]
    weights = [turn.pop("weight", 1) for turn in turns]
    return turns, more, [t["role"] == "assistant" and bool(w) for t, w in zip(turns, weights, strict=True)]


def _plain(example: Pair | Chat, turns: list[dict], more: dict, learned: list[bool]) -> list[Segment]:
    """Return the pieces without a template: the texts, one after the other."""
    keys = [k for turn in turns for k in turn if k not in {"role", "content"} | HARMLESS] + list(more)
    if keys or any(turn["content"] is None for turn in turns):
        raise ValueError(f"{(keys or ['a turn without content'])[0]!r} wants a chat template, and plain text is made")
    if isinstance(example, Pair):
        return [Segment(example.question), Segment(example.answer, True)]
    if not any(learned):
        raise ValueError("no answer of it is learned: every weight is 0")
    lines = [t["content"] + ("" if t["role"] == "assistant" else "\n") for t in turns]
    return [Segment(line, is_learned) for line, is_learned in zip(lines, learned, strict=True)]


def _check_read(tokenizer: Any, turns: list[dict], more: dict) -> None:
    """Raise ValueError for what the template would leave out without a word."""
    source = _source(tokenizer, more)
    keys = [(k, f" of turn {i}") for i, t in enumerate(turns) for k in t if k not in {"role", "content"} | HARMLESS]
    keys += [(k, "") for k in more if k != "chat_template_kwargs"]
    for key, where in keys:
        if not re.search(rf"\b{re.escape(key)}\b", source):
            raise ValueError(f"the chat template does not read {key!r}{where}, which would be lost")


def _source(tokenizer: Any, more: dict) -> str:
    """Return the template's own text."""
    try:
        return str(tokenizer.get_chat_template(tools=more.get("tools")))
    except (AttributeError, ValueError):
        return str(tokenizer.chat_template)


def _render(tokenizer: Any, turns: list[dict], more: dict, prompted: bool = False) -> str:
    """Return the template's text. Raises ValueError with what the template says."""
    variables = {k: more[k] for k in ("tools", "documents") if k in more} | more.get("chat_template_kwargs", {})
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompted, **variables)
    except Exception as error:  # a template is a program: it raises what it likes
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the chat template does not take it: {message[:300]}") from None


def _bare(text: str) -> str:
    return "".join(text.split())


def refused(error: ValueError) -> AddendaError:
    """Return the error for a prompt that no chat template can write, with the reason."""
    return AddendaError(f"This prompt cannot be written: {error}.")
