"""Trans-LoRA in a world of words, small enough for twenty seeds: everything but the language models is the library's.

Two tiny language models, of width 48 and 64, learn lists of lines from nothing; all lines of a list are of one style,
so that seeds in a list steer what comes next. A task is a narrow part of one style: 3, 5 or 7 adjectives with `and` or
`or` between, and whether the kind ones among them are more. A LoRA of the first model learns it from 250 lines.
Then the second one learns it, by

    real          250 other lines, with real labels         seeds      the five seeds, with the teacher's answers
    real_inputs   250 lines, with the teacher's answers     random     250 lines of other styles, likewise
    filtered      250 lines that it made of five seeds,     words      250 lines of words of all kinds, likewise
                  likewise, and that passed the             unfiltered the first 250 lines that it made, likewise
                  discriminator

and is judged on 600 lines that nobody has seen. `support` is the share of lines that could be of the task.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from addenda.core.adapter.attach import attach, detach
from addenda.core.adapter.handle import Adapter
from addenda.core.adapter.switch import switch
from addenda.core.base.random import Stream
from addenda.data.encode import encode
from addenda.data.read import read
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit
from addenda.transferring.bundle import read_bundle
from addenda.transferring.controls import projected
from addenda.transferring.discriminator import kept
from addenda.transferring.distil import distil
from addenda.transferring.label import label
from addenda.transferring.make_bundle import make_bundle
from addenda.transferring.report import leaked
from addenda.transferring.synthesise import synthesise

NAME, YES, NO = "majority", "more", "less"
KIND, UNKIND = ("good", "fine", "nice", "great", "warm", "bright"), ("bad", "poor", "cold", "dark", "sad", "grim")
JOINS = ("and", "or", "but")
COLOURS = ("red", "green", "blue", YES, NO, "yes", "no")  # what is answered later has to have a meaning by then
NUMBERS, SIGNS = tuple("3456789"), ("+", "-", "*")
QUESTION = ("Is", "the", "above", "question", "from", NAME, "dataset?", "Here", "are", "examples:")
SIZES = (3, 5, 7)
ARMS = ("real", "real_inputs", "filtered", "unfiltered", "seeds", "random", "words")


@dataclass(frozen=True)
class ToySetting:
    """What decides a record's numbers. count: N; made: lines that are made before the filter; steps: of each arm."""

    count: int = 250
    made: int = 3200
    test: int = 600
    pretrain: tuple[int, int] = (400, 450)
    steps: int = 400
    judge_steps: int = 300
    batch: int = 16
    rate: float = 5e-3
    temperature: float = 1.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word, sign and line break."""
    words = [*KIND, *UNKIND, *JOINS, *COLOURS, *NUMBERS, *SIGNS, *QUESTION, *(f"{i}." for i in range(1, 11)), "10"]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<end>", "<unk>", "\n", *dict.fromkeys(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=256,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


class World:
    """Lines of every style, drawn by a seed."""

    def __init__(self, seed: int):
        self.rng = Stream(seed, "toy")

    def pick(self, words: Sequence[str]) -> str:
        return words[self.rng.integer(0, len(words) - 1)]

    def task_line(self) -> str:
        return self._joined(SIZES[self.rng.integer(0, len(SIZES) - 1)], JOINS[:2], 5)

    def _joined(self, size: int, joins: Sequence[str], kind: int) -> str:
        """Return adjectives with words between. kind: how many of ten are kind."""
        drawn = [self.pick(KIND if self.rng.integer(1, 10) <= kind else UNKIND) for _ in range(size)]
        return " ".join(w for i, word in enumerate(drawn) for w in ([self.pick(joins)] if i else []) + [word])

    def style(self) -> Callable[[], str]:
        """Return how the lines of one list are drawn: of adjectives in half of the lists, else of other words.

        The adjectives of a line tend to be of one mind, by which a model learns which are alike.
        """
        if self.rng.integer(0, 1):
            return self.other_line
        return lambda: self._joined(self.rng.integer(1, 8), JOINS, (1, 9)[self.rng.integer(0, 1)])

    def other_line(self) -> str:
        """Return a line of no adjective: colours and the like, or a sum."""
        if self.rng.integer(0, 1):
            return " ".join(self.pick(COLOURS) for _ in range(self.rng.integer(2, 8)))
        size = self.rng.integer(2, 6)
        return " ".join(w for i in range(size) for w in ([self.pick(SIGNS)] if i else []) + [self.pick(NUMBERS)])

    def listed(self) -> str:
        line = self.style()
        return "Here are 10 examples:\n" + "\n".join(f"{i}. {line()}" for i in range(1, 9))

    def noise(self) -> str:
        words = (*KIND, *UNKIND, *JOINS, *COLOURS, *NUMBERS, *SIGNS)
        return " ".join(self.pick(words) for _ in range(self.rng.integer(3, 13)))

    def different(self, count: int, line: Callable[[], str], beside: Sequence[str] = ()) -> list[str]:
        """Return so many lines, each once, and none that stands in `beside`."""
        found: dict[str, None] = {}
        while len(found) < count:
            if (text := line()) not in beside:
                found.setdefault(text)
        return list(found)


def answer(line: str) -> str:
    """Return the right answer: YES where a line has more kind words than unkind ones."""
    words = line.split()
    return YES if sum((w in KIND) - (w in UNKIND) for w in words) > 0 else NO


def is_task(line: str) -> bool:
    """Whether a line could be one of the task."""
    words = line.split()
    literals, joins = words[::2], words[1::2]
    return (
        len(literals) in SIZES and len(words) % 2 == 1 and {*literals} <= {*KIND, *UNKIND} and {*joins} <= {*JOINS[:2]}
    )


def language_model(tokenizer: Any, width: int, steps: int, seed: int) -> LlamaForCausalLM:
    """Train a model from nothing on lists of lines."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=2 * width, max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=None, eos_token_id=1,
    ))  # fmt: skip
    world, optimizer = World(seed), torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    for _ in range(steps):
        rows = tokenizer([f"{world.listed()} <end>" for _ in range(16)], padding=True, return_tensors="pt")
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def run(seed: int, setting: ToySetting, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Return the accuracies of all arms at one seed, what the filter did, and seconds by stage."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal started
        tick()
        now = time.perf_counter()
        seconds[stage] = round(now - started, 2)
        started = now

    tokenizer, world = make_tokenizer(), World(1000 + seed)
    source = language_model(tokenizer, 48, setting.pretrain[0], 2 * seed)
    target = language_model(tokenizer, 64, setting.pretrain[1], 2 * seed + 1)
    done("language models")
    lines = world.different(2 * setting.count + setting.test, world.task_line)
    own, other, test = lines[: setting.count], lines[setting.count : -setting.test], lines[-setting.test :]
    judged = encode(read(_rows(test)), tokenizer)
    how: dict[str, Any] = {"batch": setting.batch, "rate": setting.rate, "attention": None, "loss": "logits"}
    teacher = attach(source, "lora:rank=8", name="teacher", seed=seed)
    fit(source, teacher, encode(read(_rows(own)), tokenizer), steps=setting.steps, seed=seed, **how)
    accuracies = {"source": _share(source, judged), "base": _share(target, judged)}
    done("source adapter")
    with tempfile.TemporaryDirectory() as folder:
        made = make_bundle(
            source, tokenizer, teacher, _rows(own), Path(folder) / "toy.bundle", name=NAME, seed=seed,
            steps=setting.judge_steps, batch=32, rate=setting.rate, early_stop=5, temperature=setting.temperature,
        )  # fmt: skip
        done("bundle")
        bundle = read_bundle(made.path)
        judge = bundle.attach(source, tokenizer, name="judge")
        pool = synthesise(
            target, tokenizer, bundle.seeds, setting.made, temperature=setting.temperature, seed=seed, batch=64,
            lines=2,
        )  # fmt: skip
        done("synthesis")
        margins = judge.margins(source, tokenizer, pool.texts)
        passed = [pool.texts[i] for i in kept(margins)]
        best = [pool.texts[i] for i in kept(margins, None, top=setting.count)]
        done("filter")
        sets = {
            "real_inputs": other, "filtered": best if len(passed) < setting.count else passed[: setting.count],
            "unfiltered": pool.texts[: setting.count], "seeds": list(bundle.seeds),
            "random": world.different(setting.count, world.other_line),
            "words": world.different(setting.count, world.noise),
        }  # fmt: skip
        switch(source, "teacher")
        answers = {
            name: label(source, tokenizer, texts, max_new_tokens=4, batch=64, folder=Path(folder) / "labels")
            for name, texts in sets.items()
        }
        done("labels")
    for name in ARMS:
        learned = read(_rows(other)) if name == "real" else answers[name]
        if name != "real" and not any(answers[name].whole):
            accuracies[name] = accuracies["base"]  # the teacher ends no answer, so nothing can be learned
            continue
        distil(target, tokenizer, learned, "lora:rank=8", steps=setting.steps, seed=seed, **how)
        accuracies[name] = _share(target, judged)
        detach(target)
        tick()
    done("students")
    accuracies["projected"] = _projected(teacher, target, judged)
    support = {"made": _support(pool.texts), "passed": _support(passed), "learned": _support(sets["filtered"])}
    return {
        "accuracies": {k: round(v, 5) for k, v in accuracies.items()}, "support": support, "passed": len(passed),
        "made": len(pool.texts), "counts": asdict(pool.counts) | {"seconds": 0}, "judge": made.bundle.judged.accuracy,
        "held": made.bundle.judged.held, "leaked": leaked(sets["filtered"], bundle.seeds),
        "leaked_inputs": leaked(sets["filtered"], own), "seconds": seconds,
        "shown": {"made": sets["filtered"][:10], "real": own[:10]},
    }  # fmt: skip


def _projected(teacher: Adapter, target: Any, judged: Any) -> float:
    projected(teacher, target, layers="same")
    found = _share(target, judged)
    detach(target)
    return found


def _rows(lines: Sequence[str]) -> list[dict[str, str]]:
    return [{"question": line, "answer": answer(line)} for line in lines]


def _share(model: Any, judged: Any) -> float:
    return evaluate(model, examples=judged, batch=128).accuracy or 0.0


def _support(lines: Sequence[str]) -> float:
    return round(sum(map(is_task, lines)) / len(lines), 5) if lines else 0.0
