"""A task's inputs: what its prompts ask, apart from how they are asked, and the few of them that are kept as seeds.

    found = inputs_of(read("task.jsonl"))
    found.texts, found.system                       # "Sort ascending: 3 1 2", …; the system turn that all begin with
    found.prompt("Sort ascending: 9 4")             # as `generate` and `encode` take it
    draw_seeds(found.texts, 5, seed=0)

An input is one text: the question of a pair, or the one user turn of a chat. Chats of several turns, of tools or of
different system turns have no such text, and are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.data.examples import Chat, Data, Pair

FEWEST = 2  # seeds: one tells nothing of what may differ


@dataclass(frozen=True)
class Inputs:
    """The inputs of a task in order, and the system turn that each stands under; None: no such turn."""

    texts: tuple[str, ...]
    system: str | None = None

    def prompt(self, text: str) -> str | Chat:
        """Return an input as a prompt of this task."""
        return prompt_of(text, self.system)


def prompt_of(text: str, system: str | None) -> str | Chat:
    """Return an input as `generate` takes it: the text, or a chat where it stands under a system turn."""
    return text if system is None else Chat((("system", system), ("user", text), ("assistant", "")))


def inputs_of(data: Data) -> Inputs:
    """Return the inputs of data. Raises AddendaError for a classifier's data, and chats that are no single question."""
    if data.form not in ("pair", "chat"):
        raise AddendaError(
            f"{data.source} holds {data.form}s, and an adapter of a causal LM is moved by questions that it answers. "
            "Give prompts and answers."
        )
    texts, systems, problems = [], set(), []
    for i, example in enumerate(data.examples):
        if isinstance(example, Pair):
            texts.append(example.question)
            systems.add(None)
            continue
        assert isinstance(example, Chat)
        roles = [role for role, _ in example.messages]
        if roles not in (["user", "assistant"], ["system", "user", "assistant"]) or example.more:
            problems.append(data.place(i))
            continue
        texts.append(example.messages[-2][1])
        systems.add(example.messages[0][1] if len(roles) == 3 else None)
    if problems:
        raise AddendaError(
            f"{len(problems)} of {len(data)} chats of {data.source} are not one question and its answer "
            f"({', '.join(problems[:5])}): turns before it, tools and weights are no part of an input that could be "
            "made anew. Give examples of one user turn."
        )
    if len(systems) > 1:
        raise AddendaError(
            f"The examples of {data.source} stand under {len(systems)} different system turns, and what is made of "
            "seeds stands under one. Give the data of each by itself."
        )
    return Inputs(tuple(texts), systems.pop() if systems else None)


def draw_seeds(inputs: Sequence[str], count: int = 5, *, seed: int = 0) -> tuple[str, ...]:
    """Return so many different inputs, drawn by the seed, of those that are one line of text.

    Raises AddendaError where there are not as many, and for fewer than two.
    """
    lines = [t for t in dict.fromkeys(text.strip() for text in inputs) if t and len(t.splitlines()) == 1]
    if count < FEWEST:
        raise AddendaError(f"Seeds show a model what an input looks like: {FEWEST} at least, got {count}.")
    if len(lines) < count:
        raise AddendaError(
            f"{count} seeds are wanted, and {len(lines)} of {len(inputs)} inputs are different and of one line. Give "
            "more data, or fewer seeds."
        )
    return tuple(lines[i] for i in Stream(seed, "seeds").choice(len(lines), count).tolist())
