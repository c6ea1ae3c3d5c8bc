"""A step of masked language modelling, and what a language's part wins over its head alone.

The step: forward and backward of a Pfeiffer adapter on an encoder (splade-tiny, e5) over rows of 128 tokens, with the
loss at the hidden places over the tokens of the texts, and as it is commonly computed: logits of the whole vocabulary
at every place. Rounds in turn; the ratio of the medians.

The part: e5 on texts of a language (`--model`: a .txt file, a text a line; without one it is left out). A head is
fitted to the frozen encoder for H steps; then a Pfeiffer adapter of reduction 2 trains S steps under it, the head as it
is; or the head alone goes on, H + S steps in all. Both are judged on texts held out, with one draw of masks. `--quick`
makes H and S few and rows short. `--arms` chooses between | of "step splade-tiny", "step e5", "part".
"""

import statistics
import time
from pathlib import Path
from typing import Any

from bench.measure import in_process

MODELS, ROWS, TOKENS, RANK = ("splade-tiny", "e5"), 16, 128, 48
SIZES = {"head": 300, "steps": 300, "batch": 16, "tokens": 128, "held": 400}
QUICK = {"head": 60, "steps": 60, "batch": 8, "tokens": 64, "held": 150}


def run(given) -> tuple[dict, str]:
    parts = given.arms.split("|") if given.arms else [*(f"step {m}" for m in MODELS), "part"]
    found: dict[str, Any] = dict(given.earlier)
    for name in MODELS:
        if f"step {name}" in parts:
            found[f"step {name}"] = in_process(steps, name, given.rounds, given.threads)
    texts = Path(given.model)
    if "part" in parts and texts.is_file():
        found["part"] = in_process(part, texts, QUICK if given.quick else SIZES, given.threads)
    return found, table(found)


def steps(name: str, rounds: int, threads: int) -> dict:
    """Seconds of a step, each way."""
    import torch
    import torch.nn.functional as F

    import addenda as ad
    from addenda.data.encoded import IGNORE
    from addenda.data.masked import masked
    from addenda.data.read import read
    from addenda.models.encoders import encoder_named
    from addenda.models.load import load_model
    from addenda.train.loss import inputs_of, score

    torch.set_num_threads(threads)
    loaded = load_model(encoder_named(name).setup(), task="masked", dtype="float32")
    model, texts = loaded.model, words()
    data, _ = masked(read(texts, task="masked"), None, loaded.tokenizer, limit=TOKENS)
    rows = sorted(range(len(data)), key=lambda i: -data.lengths[i])[:ROWS]
    adapter = ad.attach(model, f"pfeiffer:rank={RANK}", seed=0)
    model.train()
    batch = data.drawn(0).batch(rows)
    assert data.table is not None
    ids = torch.from_numpy(data.table)
    labels = batch["labels"].clone()
    labels[labels != IGNORE] = ids[labels[labels != IGNORE]]

    def ours() -> torch.Tensor:
        return score(model, batch, "masked").mean

    def whole() -> torch.Tensor:
        logits = model(**inputs_of(model, batch)).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)

    seconds: dict[str, list[float]] = {"ours": [], "whole": []}
    for turn in range(rounds + 1):
        for way, loss in (("ours", ours), ("whole", whole)):
            started = time.perf_counter()
            loss().backward()
            if turn:
                seconds[way].append(time.perf_counter() - started)
            for p in adapter.parameters():
                p.grad = None
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    return {"seconds": seconds, "medians": medians, "ratio": medians["ours"] / medians["whole"], "table": len(ids),
            "vocabulary": len(loaded.tokenizer), "rows": ROWS, "tokens": TOKENS}  # fmt: skip


def words() -> list[str]:
    """The docstrings of modules of the standard library, cut into texts: on every machine, and long enough."""
    import sysconfig

    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py"))[:40]
    return [p.read_text(encoding="utf-8")[:2000] for p in files if p.stat().st_size > 4096]


def part(file: Path, sizes: dict, threads: int) -> dict:
    """Nats on held-out text: of the head as fitted, of the part over it, of the head that went on alone."""
    import torch

    import addenda as ad
    from addenda.data.masked import masked
    from addenda.data.read import read
    from addenda.models.encoders import encoder_named
    from addenda.models.load import load_model
    from addenda.train.evaluate import evaluate
    from addenda.train.fit import fit
    from addenda.train.masked_head import fit_head

    torch.set_num_threads(threads)
    folder = encoder_named("e5").setup()
    loaded = load_model(folder, task="masked", dtype="float32")
    rest, held = read(file, task="masked").split(0.05, 0)
    train, judged = masked(rest, held, loaded.tokenizer, limit=sizes["tokens"])
    assert judged is not None and train.table is not None
    judged = judged.first(sizes["held"])
    found: dict[str, Any] = sizes | {"texts": len(rest), "table": len(train.table)}
    head, steps, batch = (sizes[k] for k in ("head", "steps", "batch"))

    def clocked(name: str, work) -> None:
        started = time.perf_counter()
        work()
        found[f"{name} seconds"] = time.perf_counter() - started
        found[name] = evaluate(model, examples=judged).loss
        print(name, found[name], f"{found[f'{name} seconds']:.0f} s", flush=True)

    model: Any = loaded.model
    clocked("fitted", lambda: fit_head(model, train, steps=head, batch=batch))
    adapter = ad.attach(model, "pfeiffer:rank=192", seed=0)
    clocked("part", lambda: fit(model, adapter, train, steps=steps, batch=batch, rate=1e-3, attention=None))
    ad.detach(model)
    model = load_model(folder, task="masked", dtype="float32").model
    clocked("alone", lambda: fit_head(model, train, steps=head + steps, batch=batch))
    found["gain"] = found["alone"] - found["part"]
    return found


def table(found: dict) -> str:
    lines = [
        "| | loss over the texts' tokens where hidden | over all tokens everywhere | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name in MODELS:
        if (row := found.get(f"step {name}")) is not None:
            ours, whole = row["medians"]["ours"], row["medians"]["whole"]
            lines.append(f"| {name}, {row['rows']} × {row['tokens']}, {row['table']:,} of {row['vocabulary']:,} tokens "
                         f"| {ours:.3f} s | {whole:.3f} s | {row['ratio']:.2f} |")  # fmt: skip
    if (row := found.get("part")) is not None:
        taken = row["fitted seconds"] + row["part seconds"]
        lines += [
            "",
            f"Held-out nats a token, {row['texts']:,} texts, {row['table']:,} tokens: {row['alone']:.2f} of the head "
            f"({row['head'] + row['steps']} steps), {row['part']:.2f} with the part ({row['head']} steps of the head, "
            f"{row['steps']} of the part, in {taken:.0f} s): {row['gain']:.2f} better.",
        ]
    return "\n".join(lines)
