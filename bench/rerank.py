"""100 candidates of a query, scored: the base, a merged change, two live sparse ones, language and task bottlenecks.

And `Reranker.rank` on 100 texts, against a loop by length as one writes it by hand, with the tokenizer's work in both.
All arms alternate in one process, each round in another order; a ratio is of one round's arm and base. --model: one of
the embedded encoders (minilm, e5, splade-tiny; else minilm). The bars are those of the issue on rerankers.
"""

import statistics
import time
from typing import Any

import torch

from bench.measure import in_process, spread

SPARSE = ("sparse:density=0.02", "shira:density=0.02")  # the first that is there
BARS = {"merged": 1.02, "two sparse": 1.10, "language + task bottlenecks": 1.25, "the same, MAD-X": 1.25}
CANDIDATES, BATCH, RANK = 100, 32, 1.05


def run(given) -> tuple[dict, str]:
    from addenda.models.encoders import ENCODERS

    name = given.model if given.model in ENCODERS else "minilm"
    found = in_process(rounds, name, given.rounds, given.threads)
    found["rank"] = in_process(ranked, name, given.rounds, given.threads)
    return found, table(found)


def rounds(name: str, count: int, threads: int) -> dict:
    """Seconds of each arm in each round, one more went before; and how far merged scores are from live ones."""
    import addenda as ad
    from addenda.models.encoders import ENCODERS
    from addenda.models.load import load_model

    torch.set_num_threads(threads)
    folder = ENCODERS[name].setup()

    def fresh():
        return load_model(folder, task="label", labels=1, dtype="float32", device="cpu").model

    def stirred(*methods: str):
        model = fresh()
        for i, method in enumerate(methods):
            options: Any = {"also_train": ["classifier"]} if i == len(methods) - 1 else {}
            g = torch.Generator().manual_seed(i)
            for p in ad.attach(model, method, name=f"a{i}", **options).parameters():
                p.data += 0.01 * torch.randn(p.shape, generator=g)
        return model

    known = {i.name for i in ad.catalogue()}
    sparse = next(m for m in SPARSE if m.partition(":")[0] in known)
    two, merged = stirred(sparse, sparse), stirred(sparse, sparse)
    ad.switch(two, ["a0", "a1"])
    ad.switch(merged, ["a0", "a1"])
    ad.merge(merged, allow_loss=1.0)
    ad.detach(merged, keep_merged=True)
    width = two.config.hidden_size
    bottlenecks = stirred(f"pfeiffer:rank={width // 2}", f"pfeiffer:rank={width // 16}")  # factors of 2 and 16
    blocks = {
        "language + task bottlenecks": ad.Stack("a0", "a1"),
        "the same, MAD-X": ad.Stack("a0", "a1", skip="own"),
    }
    arms = {"base": fresh(), "merged": merged, "two sparse": two}
    g = torch.Generator().manual_seed(7)
    lengths = sorted(torch.randint(24, 129, (CANDIDATES,), generator=g).tolist(), reverse=True)
    batches = [_batch(lengths[i : i + BATCH], g) for i in range(0, CANDIDATES, BATCH)]

    def seconds(arm: str) -> float:
        started = time.perf_counter()
        if arm in blocks:
            with ad.composed(bottlenecks, blocks[arm]):
                for batch in batches:
                    bottlenecks(**batch)
        else:
            for batch in batches:
                arms[arm](**batch)
        return time.perf_counter() - started

    names = [*arms, *blocks]
    found: dict[str, list[float]] = {arm: [] for arm in names}
    with torch.no_grad():
        apart = max(float((two(**b).logits - merged(**b).logits).abs().max()) for b in batches)
        for i in range(count + 1):
            for arm in names[i % len(names) :] + names[: i % len(names)]:
                taken = seconds(arm)
                if i:
                    found[arm].append(taken)
    return {"model": name, "sparse": sparse, "apart": apart, "seconds": found}


def ranked(name: str, count: int, threads: int) -> dict[str, list[float]]:
    """Seconds of `rank` and of a loop by hand in each round, one more went before; their orders are the same."""
    import addenda as ad
    from addenda.models.encoders import ENCODERS
    from addenda.models.load import load_model

    torch.set_num_threads(threads)
    loaded = load_model(ENCODERS[name].setup(), task="label", labels=1, dtype="float32", device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    reranker, g = ad.Reranker(model, tokenizer, batch=BATCH), torch.Generator().manual_seed(7)

    def text(tokens: int) -> str:
        return tokenizer.decode(torch.randint(1000, 20_000, (tokens,), generator=g).tolist())

    query, documents = text(8), [text(n) for n in torch.randint(16, 120, (CANDIDATES,), generator=g).tolist()]

    def by_hand() -> list[int]:
        limit = reranker.max_length
        rows = tokenizer([query] * CANDIDATES, documents, truncation="only_second", max_length=limit)["input_ids"]
        order = sorted(range(CANDIDATES), key=lambda i: -len(rows[i]))
        scores = torch.empty(CANDIDATES)
        with torch.no_grad():
            for at in range(0, CANDIDATES, BATCH):
                some = order[at : at + BATCH]
                batch = tokenizer.pad({"input_ids": [rows[i] for i in some]}, return_tensors="pt")
                scores[some] = model(**batch).logits[:, 0]
        return scores.argsort(descending=True, stable=True).tolist()

    arms = {"by hand": by_hand, "rank": lambda: [i for i, _ in reranker.rank(query, documents)]}
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for i in range(count + 1):
        orders = []
        for arm in list(arms)[:: 1 if i % 2 else -1]:
            started = time.perf_counter()
            orders.append(arms[arm]())
            if i:
                found[arm].append(time.perf_counter() - started)
        if "token_type_ids" not in tokenizer.model_input_names and orders[0] != orders[1]:
            raise RuntimeError("the two loops order the documents differently")
    return found


def _batch(lengths: list[int], g: torch.Generator) -> dict:
    ids = torch.randint(1000, 20_000, (len(lengths), max(lengths)), generator=g)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def table(found: dict) -> str:
    seconds = found["seconds"]
    lines = [f"{found['model']}, {CANDIDATES} pairs of 24-128 tokens in batches of {BATCH} by length, float32; two "
             f"sparse: {found['sparse']} twice; ratios to the base of the same round.", "",
             "| arm | seconds | to the base | bar |", "| --- | --- | --- | --- |"]  # fmt: skip
    for arm, taken in seconds.items():
        ratios = [t / b for t, b in zip(taken, seconds["base"], strict=True)]
        bar = BARS.get(arm)
        said = "" if bar is None else f"{bar:.2f}: {'met' if statistics.median(ratios) <= bar else 'not met'}"
        lines.append(f"| {arm} | {statistics.median(taken):.3f} | {spread(ratios)} | {said} |")
    hand, own = found["rank"]["by hand"], found["rank"]["rank"]
    ratios = [r / h for r, h in zip(own, hand, strict=True)]
    met = "met" if statistics.median(ratios) <= RANK else "not met"
    lines += ["", f"`rank` of {CANDIDATES} texts: {statistics.median(own):.3f} s, a loop by hand "
                  f"{statistics.median(hand):.3f} s, ratio {spread(ratios)} (bar {RANK:.2f}: {met})."]  # fmt: skip
    lines += ["", f"Merged scores are within {found['apart']:.1e} of the live ones."]
    return "\n".join(lines)
