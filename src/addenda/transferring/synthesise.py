"""Inputs of a task, made by a language model from a few of its own: seeds in a numbered list, which the model goes on.

    made = synthesise(model, tokenizer, seeds, 250, temperature=0.8, seed=1)
    made.texts                        # up to 250 new lines
    print(made.counts)                 # 412 samples: 803 lines, 211 malformed, 94 repeats, 12 copies of seeds

    Here are 10 examples:
    1. Sort ascending: 61 -402 7
    …
    5. Sort descending: 9 12 -300
    6.                                 ← from here on the model writes; line by line that is 6., 7., …

The prompt is that of Trans-LoRA (arXiv:2405.17258): nothing else of the task is read, and no answer. Each sample has
the seeds in an order of its own, and random numbers of its own (`train.generate`), so that sample i is the same in
whatever batch it is made, up to the rounding of logits. A line is dropped where it is not of the task's format
(`formats`), was there before, is a seed, or has half of the word triples that only one seed has (`measures.leakage`).
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.base.ranges import MANY, Range
from addenda.core.base.visible import label
from addenda.data.encode import check_tokenizer, end_ids, start_ids
from addenda.data.task import normalised
from addenda.train.generate import Draw, check_writes, continuations, pad_of, uniform
from addenda.transferring.formats import Accepts, Format, format_of
from addenda.transferring.measures import leakage
from addenda.transferring.question import context_of

TRIES = 20  # samples for each input that is wanted, where no cap is given
_NUMBER = re.compile(r"\s*\d+[.)]\s+")


@dataclass(frozen=True)
class Counts:
    """What became of the lines that were written. tokens: read and written, padding not counted."""

    samples: int = 0
    lines: int = 0
    malformed: int = 0  # of another format, without a number, or cut off
    repeats: int = 0
    copies: int = 0  # of a seed, up to case and spacing
    near_copies: int = 0  # of a seed, by word triples
    tokens: int = 0
    seconds: float = 0.0

    @property
    def new(self) -> int:
        return self.lines - self.malformed - self.repeats - self.copies - self.near_copies

    def __add__(self, other: "Counts") -> "Counts":
        theirs = asdict(other)
        return Counts(**{name: value + theirs[name] for name, value in asdict(self).items()})

    def __str__(self) -> str:
        return (
            f"{self.samples:,} samples: {self.lines:,} lines, {self.malformed:,} malformed, {self.repeats:,} repeats, "
            f"{self.copies + self.near_copies:,} copies of seeds, {self.new:,} new; "
            f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        )


@dataclass(frozen=True)
class Synthesis:
    """New inputs in the order in which they were made. stopped: which cap ended it before n were there, else empty.

    refused: the first malformed lines, to show.
    """

    texts: list[str] = field(default_factory=list)
    counts: Counts = Counts()
    stopped: str = ""
    refused: list[str] = field(default_factory=list)

    def __add__(self, more: "Synthesis") -> "Synthesis":
        refused = (self.refused + more.refused)[:10]
        return replace(self, texts=self.texts + more.texts, counts=self.counts + more.counts, refused=refused)


@checked(special={"n": Range(1, MANY, whole=True)})
def synthesise(
    model: Any,
    tokenizer: Any,
    seeds: Sequence[str],
    n: int,
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
    batch: int = 32,
    lines: int = 1,
    same_order: int = 1,
    format: str | re.Pattern | Accepts | Format | None = None,
    max_new_tokens: int | None = None,
    tries: int | None = None,
    max_tokens: int | None = None,
    max_minutes: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Synthesis:
    """Return n new inputs of the task that the seeds are inputs of, or fewer where a cap comes first.

    model: a causal LM, as it acts now. seeds: two or more different lines. temperature, top_p: see `generate`. batch:
    samples at once; lines: how many lines of a sample are taken, of which only the first saw nothing but seeds.
    same_order: so many samples in a row see the seeds in one order, and where they are in one batch read them once.
    format: of the lines, see `formats`; None: as the seeds are. max_new_tokens: of a sample; by default twice the
    longest seed's for each line. tries: samples at most, 20 for each input unless said; max_tokens: read and written,
    max_minutes: by the clock, so that equal calls may differ there; each is looked at between batches.

    Raises AddendaError for seeds that do not do (`Sampler`), and where no line at all could be used.
    """
    sampler = Sampler(
        model, tokenizer, seeds, temperature=temperature, top_p=top_p, seed=seed, batch=batch, lines=lines,
        same_order=same_order, format=format, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    caps = Caps.of(n, tries, max_tokens, max_minutes)
    made = Synthesis()
    while len(made.texts) < n and not (stopped := caps.reached(made.counts)):
        made += sampler.more(made, caps)
        if say is not None:
            say(f"{len(made.texts):,} of {n:,} inputs; {made.counts}")
    if not made.texts:
        raise nothing(made, sampler.format)
    return replace(made, texts=made.texts[:n], stopped="" if len(made.texts) >= n else stopped)


@dataclass(frozen=True)
class Caps:
    """What may be spent on synthetic inputs: samples, tokens, and minutes by the clock."""

    tries: int
    max_tokens: int | None = None
    max_minutes: float | None = None

    @classmethod
    def of(cls, n: int, tries: int | None, max_tokens: int | None, max_minutes: float | None) -> "Caps":
        return cls(TRIES * n if tries is None else tries, max_tokens, max_minutes)

    def reached(self, counts: Counts) -> str:
        """Return which cap is reached, in words; empty where none is."""
        if counts.samples >= self.tries:
            return f"{self.tries:,} samples (tries)"
        if self.max_tokens is not None and counts.tokens >= self.max_tokens:
            return f"{self.max_tokens:,} tokens (max_tokens)"
        if self.max_minutes is not None and counts.seconds >= 60 * self.max_minutes:
            return f"{self.max_minutes:g} minutes (max_minutes)"
        return ""


class Sampler:
    """The batches of one synthesis, each by what was made before: so that a killed one goes on with the same lines.

    Raises AddendaError for fewer than two different seeds, an empty one, one of several lines, and a list of them that
    leaves the model's context no room for a line; and for a model that cannot write.
    """

    def __init__(
        self, model: Any, tokenizer: Any, seeds: Sequence[str], *, temperature: float, top_p: float | None = None,
        seed: int = 0, batch: int = 32, lines: int = 1, same_order: int = 1,
        format: str | re.Pattern | Accepts | Format | None = None, max_new_tokens: int | None = None,
    ):  # fmt: skip
        check_writes(model)
        check_tokenizer(tokenizer)
        self.seeds = check_seeds(seeds)
        self.format = format_of(format, self.seeds)
        self.model, self.tokenizer = model, tokenizer
        self.temperature, self.top_p, self.seed = temperature, 1.0 if top_p is None else top_p, seed
        self.size, self.lines, self.same_order = batch, lines, same_order
        sizes = [len(self._ids(f" {s}")) for s in self.seeds]
        self.max_new_tokens = max_new_tokens or lines * (2 * max(sizes) + 4)
        limit, longest = context_of(model), len(self._prompt(self.seeds))
        if limit is not None and longest + self.max_new_tokens > limit:
            raise AddendaError(
                f"The list of the {len(self.seeds)} seeds has {longest:,} tokens, and with {self.max_new_tokens:,} new "
                f"ones it is longer than the {limit:,} of the model's context. Give fewer or shorter seeds, fewer "
                "lines= of a sample, or max_new_tokens=."
            )
        self._ends = end_ids(model, tokenizer, False)
        self._breaks: dict[int, int] = {}  # line breaks in the text of a token

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompt(self, seeds: Sequence[str]) -> list[int]:
        listed = "\n".join(f"{i}. {s}" for i, s in enumerate(seeds, 1))
        text = f"Here are {2 * len(seeds)} examples:\n{listed}\n{len(seeds) + 1}."
        return start_ids(self.tokenizer) + self._ids(text)

    def _ordered(self, sample: int) -> list[str]:
        stream = Stream(self.seed, "order of seeds", str(sample // self.same_order))
        return [self.seeds[i] for i in np.argsort(stream.raw(len(self.seeds)), kind="stable")]

    def _full(self, row: list[int]) -> bool:
        """Return whether a row has written all of its lines."""
        for t in row:
            if t not in self._breaks:
                self._breaks[t] = self.tokenizer.decode([t]).count("\n")
        return sum(self._breaks[t] for t in row) >= self.lines

    def more(self, before: Synthesis, caps: Caps | None = None) -> Synthesis:
        """Return what the next batch brings: its new inputs and its counts. before: all that was made."""
        began, first = time.perf_counter(), before.counts.samples
        samples = range(first, min(first + self.size, caps.tries if caps else first + self.size))
        prompts = [self._prompt(self._ordered(i)) for i in samples]
        draw = Draw(uniform(self.seed, "synthesise", samples, self.max_new_tokens), self.temperature, self.top_p)
        rows = continuations(
            self.model, prompts, max_new_tokens=self.max_new_tokens, batch=self.size, ends=self._ends,
            pad=pad_of(self.tokenizer, self._ends), draw=draw, ended=self._full,
        )  # fmt: skip
        known = {normalised(text) for text in before.texts}
        tally: dict[str, Any] = {"malformed": 0, "repeats": 0, "copies": 0, "near_copies": 0}
        inputs, refused = [], []
        written = [line for row in rows for line in self._parsed(row)]
        for line in written:
            verdict = "malformed" if line is None or not self.format(line) else self._stale(line, known)
            if verdict:
                tally[verdict] += 1
                refused += [line] if verdict == "malformed" and line else []
                continue
            assert line is not None
            known.add(normalised(line))
            inputs.append(line)
        tokens = sum(map(len, prompts)) + sum(map(len, rows))
        spent = {"tokens": tokens, "seconds": time.perf_counter() - began}
        return Synthesis(
            inputs, Counts(len(samples), len(written), **tally, **spent), refused=[label(r, 200) for r in refused[:10]]
        )

    def _parsed(self, row: list[int]) -> list[str | None]:
        """Return the lines of what a sample has written, without their numbers; None for one that is none.

        A line counts where it has ended: by a line break, or by the text's end before the last token that it may have.
        """
        text = self.tokenizer.decode(row, skip_special_tokens=True)
        found = text.split("\n")
        whole = len(row) < self.max_new_tokens
        found = found[: self.lines] if len(found) > self.lines or whole else [*found[:-1], ""]
        while len(found) > 1 and whole and not found[-1].strip():
            found = found[:-1]
        numbered = [found[0], *(_NUMBER.sub("", f, count=1) if _NUMBER.match(f) else "" for f in found[1:])]
        return [line.strip() or None for line in numbered]

    def _stale(self, line: str, known: set[str]) -> str:
        """Return why a line is nothing new: it repeats another, or a seed; empty where it is."""
        found = leakage([line], self.seeds)
        if found.exact:
            return "copies"
        if normalised(line) in known:
            return "repeats"
        return "near_copies" if found.near else ""


def check_seeds(seeds: Sequence[str]) -> list[str]:
    """Return seeds as a list, without space around. Raises AddendaError for those that nothing can be made from."""
    if isinstance(seeds, str) or not all(isinstance(s, str) for s in seeds):
        raise AddendaError("Seeds are a list of texts, two inputs of the task or more.")
    found = [s.strip() for s in seeds]
    if wrong := [i for i, s in enumerate(found) if not s or len(s.splitlines()) != 1]:
        raise AddendaError(
            f"A seed is one line of text; of these, {', '.join(map(str, wrong[:8]))} (from 0) are empty or have "
            "several lines, which a numbered list cannot show."
        )
    if len({normalised(s) for s in found}) < max(2, len(found)):
        raise AddendaError(
            f"Seeds are two or more inputs, each different from the others: {len(found)} were given, "
            f"{len({normalised(s) for s in found})} of them different. Give others."
        )
    return found


def nothing(made: Synthesis, format: Format) -> AddendaError:
    """Return the error for a generator that wrote nothing that can be used."""
    shown = f" It wrote, among others: {'; '.join(map(repr, made.refused[:3]))}." if made.refused else ""
    return AddendaError(
        f"Nothing that the generator wrote can be used ({made.counts}). The format: {format.said}.{shown} Look at "
        "format=, take another temperature, more lines or tries, or seeds that show the task better."
    )
