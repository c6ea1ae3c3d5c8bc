"""MoSA (Zhang et al. 2023, arXiv:2312.02923): is a mixture of sparse adapters better than the dense adapter?

Claims. (1) With few examples MoSA does better than the dense adapter of the same size, and (2) better than full
fine-tuning; (3) so it does where one adapter learns two tasks. Not tested in the paper: (4) how much of it is the
consistency term, which costs a second forward and backward; (5) whether the mixture adds anything where the dense
adapter has that term too, for which the base's own dropout draws.

Settings: 5 and 50 examples of each of eight classes; and two tasks in one adapter (which library, and which kind of
thing?), 20 of each of eleven, a word in front of the text says which task it is. Arms, beside every MLP with r = 16 and
s = 0.1: the dense adapter (AdaptFormer) and MoSA (N = 4, shared down-projection; with two tasks N = 2 and nothing
shared, as the released script has it), each with and without the term, and full fine-tuning. Every seed is another draw
of the examples; the head is fitted to the frozen features of the same examples beforehand. Rates are searched on the
first draw's validation part, as large as its training part; the test set is looked at once.
"""

import hashlib
import statistics
from argparse import Namespace
from dataclasses import replace

import torch

from addenda.comparing.encoder import fit_head
from addenda.comparing.entries import DataRecord, TrialRecord
from addenda.comparing.record import FULL, Record
from addenda.comparing.run import Watch, compare
from addenda.comparing.subject import Subject, of_splits
from addenda.data.docstrings import KINDS, LIBRARIES, docstrings, splits
from addenda.data.encode import encode
from addenda.data.examples import Data, Labelled
from addenda.data.subsets import Subset
from addenda.models.load import load_model
from recipes.common import (
    VALIDATION,
    Finding,
    Interval,
    all_of,
    conclude,
    folder_of,
    options,
    over_seeds,
    recorded,
    search_steps,
)

SIZE, TERM, START = "rank=16", "@consistency=1", 1e-2
DENSE, SINGLE, DOUBLE = f"adaptformer:{SIZE}", f"mosa:{SIZE},parts=4", f"mosa:{SIZE},parts=2,share=none"
SETTINGS = {"5 a class": (5, SINGLE), "50 a class": (50, SINGLE), "two tasks, 20 a class": (20, DOUBLE)}


def main() -> None:
    given = options(__doc__, "mosa", seeds=5)
    print(f"{len(SETTINGS)} settings, {given.seeds} draws, 5 arms, {given.steps} steps; about an hour on 2 cores.")
    found = {name: draws(given, name) for name in SETTINGS}
    single = list(SETTINGS)[:2]

    def gaps(names, a: str | None, b: str | None) -> dict[str, Interval]:
        """Arm a minus arm b in each setting; None: its MoSA, "term": its MoSA with the term."""
        arms = {name: {None: SETTINGS[name][1], "term": SETTINGS[name][1] + TERM} for name in names}
        return {name: gap(found[name], arms[name].get(a, a), arms[name].get(b, b)) for name in names}

    dense, full, pair = gaps(single, "term", DENSE), gaps(single, "term", FULL), gaps(list(SETTINGS)[2:], "term", DENSE)
    without, term = gaps(SETTINGS, None, DENSE), gaps(SETTINGS, "term", None)
    fair = gaps(SETTINGS, "term", DENSE + TERM)
    findings = [
        Finding("with few examples MoSA is better than the dense adapter", said(dense), every(dense)),
        Finding("and better than full fine-tuning", said(full), every(full)),
        Finding("one adapter for two tasks: MoSA is better than the dense one", said(pair), every(pair)),
        Finding(
            "the consistency term is what does it (not tested in the paper)",
            f"MoSA with − without: {said(term)}; MoSA without − dense: {said(without)}; a step with it takes "
            f"{slower(found):.2f} of one without",
            every(term),
        ),
        Finding(
            "MoSA is better than a dense adapter with the same term (not tested in the paper)",
            said(fair),
            every(fair),
        ),
    ]
    conclude(given, "MoSA, arXiv:2312.02923", findings, table(found))


def draws(given: Namespace, name: str) -> list[Record]:
    """One comparison for each draw of the examples: rates are searched on the first, and kept."""
    per, mosa = SETTINGS[name]
    arms, made, rates = [DENSE, DENSE + TERM, mosa, mosa + TERM], [], dict.fromkeys((DENSE, DENSE + TERM), START)
    rates |= {mosa: START, mosa + TERM: START}
    for draw in range(given.seeds):
        out = given.out / name.replace(", ", "-").replace(" ", "-") / f"draw{draw}"
        if given.old:
            made.append(recorded(out, (*arms, FULL)))
            continue
        on = few(given.model, per, draw, two="two" in name)
        made.append(compare(
            methods=arms, full=True, out=out,
            budget=f"steps={given.steps}", seeds=1, rates=given.rates if draw == 0 else 1, around=rates, batch=16,
            items=None, validation=VALIDATION, search_steps=search_steps(given.steps), subject=on, watch=Watch(),
            title=f"MoSA: {name}, draw {draw}", command="python -m recipes.mosa",
        ))  # fmt: skip
        if draw == 0:
            rates = {arm: final(made[0], arm).rate for arm in (*arms, FULL)}
    return made


def few(model: str, per: int, draw: int, two: bool) -> Subject:
    """The encoder with a head fitted to `per` examples a class, which are all that there is to learn from."""
    rows, tasks = docstrings(), ("library", "kind") if two else ("library",)
    data = {part: joined([splits(rows, task)[part] for task in tasks]) for part in ("train", "test")}
    data["train"], data["validation"] = Subset(per, draw).of(data["train"])
    labels = data["train"].labels or ()
    encoder = load_model(folder_of(model), task="label", labels=len(labels))
    if sum(p.numel() for p in encoder.model.parameters()) < 10_000_000:
        torch.set_num_threads(1)  # several only wait for each other at this size
    encoded = {k: encode(d, encoder.tokenizer, max_length=64, overflow="truncate") for k, d in data.items()}
    told = f"{per} docstrings of each of {', '.join(labels)}, draw {draw}."
    about = DataRecord(name=f"docstrings-{'-'.join(tasks)}-{per}", description=told)
    on = of_splits(encoder, data, encoded, about)
    fit_head(on)
    return replace(on, heads=(), fresh=False)


def joined(tasks: list[Data]) -> Data:
    """Several tasks as one: their classes side by side, and a word in front of each text that says which it is of."""
    if len(tasks) == 1:
        return tasks[0]
    made, words, first = [], ("library", "kind"), 0
    for word, task in zip(words, tasks, strict=True):
        made += [Labelled(f"{word}: {e.text}", e.label + first) for e in task.examples]  # type: ignore[union-attr]
        first += len(task.labels or ())
    made.sort(key=lambda e: hashlib.sha256(e.text.encode()).hexdigest())
    return Data(tuple(made), "label", (*LIBRARIES, *KINDS), "docstrings")


def final(record: Record, arm: str) -> TrialRecord:
    """An arm's one final run."""
    return record.trials_of(arm, "final")[0]


def accuracy(run: TrialRecord | None) -> float:
    """On the test split; 0 where a run diverged before it could be judged."""
    return run.test.accuracy if run and run.test else 0.0


def gap(records: list[Record], a: str, b: str) -> Interval:
    """Accuracy of arm a minus that of arm b, paired by draw."""
    return over_seeds(accuracy(final(r, a)) - accuracy(final(r, b)) for r in records)


def said(gaps: dict[str, Interval]) -> str:
    return "; ".join(f"{name}: {g.points()}" for name, g in gaps.items())


def every(gaps: dict[str, Interval]) -> str:
    return all_of(g.above() for g in gaps.values())


def slower(found: dict[str, list[Record]]) -> float:
    """Seconds of a step of MoSA with the term, as a multiple of those without: the median over settings and draws."""
    return statistics.median(
        step(r, SETTINGS[name][1] + TERM) / step(r, SETTINGS[name][1]) for name, made in found.items() for r in made
    )


def step(record: Record, arm: str) -> float:
    return final(record, arm).step_seconds or 0.0


def table(found: dict[str, list[Record]]) -> list[dict]:
    """For each setting and arm: numbers trained, the rate, accuracy with its interval over draws; the base too."""
    rows = []
    for name, made in found.items():
        base = over_seeds(accuracy(r.find("base", "control")) for r in made)
        rows.append({"setting": name, "arm": "base", "accuracy": round(base.mean, 4)})
        for arm, about in made[0].config.methods.items():
            told = over_seeds(accuracy(final(r, arm)) for r in made)
            rows.append({
                "setting": name, "arm": arm, "trainable": about.trainable,
                "rate": final(made[0], arm).rate, "accuracy": round(told.mean, 4),
                "low": round(told.low, 4), "high": round(told.high, 4),
                "draws": [round(accuracy(final(r, arm)), 4) for r in made],
                "step_seconds": round(statistics.mean(step(r, arm) for r in made), 4),
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
