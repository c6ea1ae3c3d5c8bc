"""The two tasks of `recipes.trans_lora`: the embedded one of numbers, and one of words, made here of a list of ours."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from addenda import AddendaError
from addenda.core.base.random import Stream
from addenda.data.examples import Data
from addenda.data.read import of_task
from addenda.data.task import SHARES, Example, Task, deduplicated, digest, embedded_task, split

NUMBERS, WORDS = "sort-numbers", "sort-words"
TASKS = (NUMBERS, WORDS)
POOL, SEED = 9000, 50_000_000
_WORDS = """
apple river stone cloud garden winter hammer lantern bridge forest candle mirror basket window ladder pepper
island dragon silver copper butter carpet engine falcon guitar harbor iguana jacket kettle lemon magnet needle
orange pencil quartz rabbit saddle temple umbrella velvet walnut yogurt zipper anchor barrel camera desert eagle
fabric glacier helmet insect jungle kitten locket marble nickel oyster pillow quiver ribbon spider tunnel valley
wagon yellow zebra acorn beacon cactus dolphin ember feather ginger hollow ivory jasmine kernel lizard meadow
"""
NOUNS = tuple(_WORDS.split())


def task(name: str) -> Task:
    """Return a task by its name. Raises AddendaError for any other."""
    if name == NUMBERS:
        return embedded_task()
    if name == WORDS:
        return sort_words()
    raise AddendaError(f"There is no task {name!r} here. There are {', '.join(TASKS)}.")


@lru_cache(maxsize=1)
def sort_words() -> Task:
    """Three words to sort, a to z or back: drawn by a seed, split by a hash of the question, as the numbers are."""
    rng, made = Stream(SEED, "words"), []
    for _ in range(POOL):
        words = [NOUNS[int(i)] for i in rng.raw(8) % len(NOUNS)]
        words = list(dict.fromkeys(words))[:3]
        back = bool(rng.integer(0, 1))
        if len(words) == 3:
            made.append(Example(
                f"Sort {'z to a' if back else 'a to z'}: {' '.join(map(str, words))}",
                " ".join(sorted(map(str, words), reverse=back)),
            ))  # fmt: skip
    splits = split(deduplicated(made), SHARES)
    return Task(WORDS, "Sort three words from a to z, or back.", "exact match", splits,
                {name: digest(examples) for name, examples in splits.items()})  # fmt: skip


def data(name: str, part: str, rows: Sequence[int]) -> Data:
    """Return these rows of a split, as chats under the embedded task's system prompt."""
    whole = of_task(task(name), part)
    if max(rows) >= len(whole):
        raise AddendaError(f"The {part} split of {name} has {len(whole):,} examples, and {max(rows) + 1:,} are wanted.")
    return replace(whole, examples=tuple(whole.examples[i] for i in rows), source=name)


def drawn(name: str, count: int, seed: int) -> tuple[Data, Data]:
    """Return (what a source learns, as many other examples) of the training split, drawn by a seed."""
    rows = Stream(seed, "examples", name).choice(len(task(name).splits["train"]), 2 * count)
    rows = rows[torch.from_numpy(np.argsort(Stream(seed, "halves", name).raw(2 * count), kind="stable"))].tolist()
    return data(name, "train", rows[:count]), data(name, "train", rows[count:])
