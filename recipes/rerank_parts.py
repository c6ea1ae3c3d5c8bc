"""Language parts of `recipes.rerank`: bottlenecks by `tune --task masked`, K numbers by lottery on the same texts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.data.masked import masked
from addenda.data.read import read
from addenda.models.load import load_model
from addenda.train.lottery import lottery
from addenda.train.lottery_inputs import maskable
from addenda.train.masked_head import FILE, fit_head, load_head, parameters_of
from addenda.train.tune import tune

if TYPE_CHECKING:
    from recipes.rerank_arms import Bench
    from recipes.rerank_setting import Times

BATCH, HELD = 16, 0.05  # texts in a step; the share that a part is judged by


def bottlenecks(bench: "Bench", language: str, texts: list[str], steps: int, out: Path | None, seen: "Times") -> dict:
    """Train bottlenecks to fill in words, over a head that is fitted first, and return the losses on held-out texts."""
    given: dict[str, Any] = {"eval_data": HELD if len(texts) >= 100 else 0.5} if out else {"head_steps": 2}
    made = tune(
        bench.model, texts, f"pfeiffer:rank={bench.setting.part_rank}", task="masked", out=out, steps=steps,
        batch=BATCH, seed=0, max_length=bench.setting.max_length, progress=seen, save_every=max(1, steps // 8), **given,
    )  # fmt: skip
    if made.before is None or made.after is None:
        return {}
    return {"nats": [round(made.before["loss"], 4), round(made.after["loss"], 4)]}


def numbers(bench: "Bench", language: str, texts: list[str], steps: int, out: Path | None, seen: "Times") -> dict:
    """Train K numbers of the encoder to fill in words, under the head that the bottlenecks of this language have."""
    loaded = load_model(bench.model, task="masked", seed=0)
    limit = bench.setting.max_length
    data, _ = masked(read(texts, task="masked"), None, loaded.tokenizer, limit=limit, seed=0)
    head = bench.part_file("pfeiffer", language).parent / FILE
    if out is not None and head.is_file():
        load_head(loaded.model, head)
    elif loaded.fresh:
        fit_head(loaded.model, data, steps=2 if out is None else 300, seed=0)
    own = {name.rpartition(".")[0] for name in parameters_of(loaded.model)}
    sites = maskable(loaded.model, embeddings=False)
    exclude = [path for path in sites if any(path == n or path.startswith(f"{n}.") for n in own)]
    lottery(
        loaded.model, data, k=bench.numbers(bench.setting.part_rank), steps=steps, batch=BATCH, seed=0,
        embeddings=False, exclude=exclude, also_train=(), out=out, progress=seen, save_every=max(1, steps // 8),
    )  # fmt: skip
    return {}
