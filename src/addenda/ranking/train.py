"""`train_reranker`: an encoder and a collection in; a reranker, as an adapter of any method, out.

    made = train_reranker("e5", collection, "pfeiffer:rank=24", out="run/", steps=1000, batch=4)
    made.reranker.rank("a lightweight database", documents)

Every step learns from a few queries, each with its answers and with hard negatives (`negatives`, `query_groups`). The
head is new: one output on the encoder, and it belongs to the adapter. A language's adapter may act beside it, frozen:
then the task learns to work on that, and another language's can take its place (`language=`).

The folder `out` holds adapter.safetensors, README.md, run.json and checkpoints/, as `tune` leaves them. Killed at any
moment, the same call goes on where it stopped and ends with the same bits.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from addenda.compose.composition import composed
from addenda.compose.stack import Stack
from addenda.core.adapter.attach import attach
from addenda.core.adapter.handle import Adapter
from addenda.core.adapter.load import load
from addenda.core.adapter.switch import switch
from addenda.core.base.arguments import checked, names_of
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, shown
from addenda.core.disk.lock import one_at_a_time
from addenda.core.disk.place import folder_for, is_first
from addenda.core.file.identity import digest
from addenda.core.file.save import save
from addenda.core.file.trained_on import content_hash, note_training
from addenda.core.method.catalogue import build
from addenda.core.method.contract import Method
from addenda.core.site.targets import Target
from addenda.core.state.outside import drawn_in
from addenda.core.state.state import find_state, free_name, name_of
from addenda.models.encoders import encoder_folder
from addenda.models.load import Loaded, load_model
from addenda.ranking.collection import Collection, Run
from addenda.ranking.first_stage import first_stage
from addenda.ranking.groups import Groups
from addenda.ranking.losses import LossName, RankingLoss
from addenda.ranking.measures import by_query, means
from addenda.ranking.negatives import hard_negatives
from addenda.ranking.query_groups import query_groups
from addenda.ranking.reranker import Reranker
from addenda.ranking.trec import strict
from addenda.train.card import check_ours, is_finished, mend, write_all
from addenda.train.checkpoint import drop, latest
from addenda.train.fit import FitResult, Progress, fit
from addenda.train.inputs import check_loaded
from addenda.train.left_alone import left_alone
from addenda.train.loss import score
from addenda.train.lottery import lottery as drawn_by_lottery
from addenda.train.lottery_folder import drop as drop_lottery
from addenda.train.lottery_folder import is_of_lottery
from addenda.train.settings import check_options
from addenda.train.theirs import PASSED, translated
from addenda.train.together import agreed
from addenda.train.tune import calibration, starting_rate

FURTHER = (*names_of(fit, without=("eval", "memory_floor", "begun_with", "tracking")), *PASSED)
RELEVANCE = ("relevance",)  # the name of the one output
DEPTH = 20  # documents of a first stage that are put in order where a run is judged


@dataclass(frozen=True)
class RerankerResult(FitResult):
    """What `fit` returns, and the reranker that was trained, which acts on the model.

    said: of the groups that were learned from, in words. after: {"RR@10", "first stage", "queries"} on the split for
    validation, where it was asked for; path: of adapter.safetensors, with `out`.
    """

    reranker: Reranker | None = None
    said: tuple[str, ...] = ()
    after: dict[str, float] | None = None
    path: Path | None = None


@checked(also=FURTHER, translate=translated)
@one_at_a_time
def train_reranker(
    model: str | Path | nn.Module,
    collection: Collection,
    method: str | Method = "pfeiffer",
    *,
    steps: int,
    tokenizer: Any = None,
    language: str | Path | Adapter | None = None,
    skip: Literal["last", "own"] = "last",
    loss: LossName = "listwise",
    temperature: float = 1.0,
    teacher: Run | None = None,
    negatives: int = 7,
    runs: Sequence[Run] | None = None,
    depth: int = 100,
    split: str = "train",
    dev: str | None = None,
    judge: int | None = None,
    targets: Target | Iterable[Target] | None = None,
    exclude: Iterable[Target] = (),
    also_train: str | Sequence[str] = "auto",
    max_length: int | None = None,
    batch: int = 4,
    seed: int = 0,
    dtype: Any = "auto",
    device: Any = None,
    out: str | Path | None = None,
    resume: bool = True,
    name: str = "reranker",
    lottery: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options,
) -> RerankerResult:
    """Train a cross-encoder to order the documents of a collection.

    model: the folder of an encoder or of a classifier with one output, the name of an embedded encoder ("e5"), or a
    loaded classifier with its tokenizer=. method: of the adapter; targets, exclude, also_train: as in `tune`. language:
    an adapter that acts beside, before it and frozen: its name on the model, or its file; a part of what the run is;
    skip: as of `Stack`. lottery: options of `ad.lottery` (k=, full=, positions=, …), with the method "sparse", whose
    checkpoints are in `out`/lottery. batch: queries in a step. max_length: tokens of a pair; only documents are cut.

    loss, temperature, teacher: see `losses` and `query_groups`. negatives: for each query, drawn out of the best
    `depth` documents of each of the runs; runs: of first stages, by default BM25's. split: what is learned; dev: the
    split that is judged by during the run, by the same loss. judge: so many of its queries are reranked at the end, for
    RR@10 over the first 20 documents of BM25. All other options are those of `fit`; rate is by default where the
    catalogue starts a search for the method's.

    Raises AddendaError for whatever a user could mend, before anything is loaded where that can be: a collection that
    cannot be searched, a query without an answer or enough negatives, a query longer than the model, a folder of
    another run. A loaded model is then as it was, without the adapter.
    """
    objective = RankingLoss(loss, temperature)
    chosen = None if _is_drawn(method, lottery, targets, skip) else build(method) if isinstance(method, str) else method
    if chosen is None and options.get("rate") is None:
        options.pop("rate", None)  # each phase has its own
    elif options.get("rate") is None:
        options["rate"] = starting_rate(chosen)
    check_options(steps=steps, batch=batch, seed=seed, **options)
    if judge is not None and dev is None:
        raise AddendaError("judge= reranks queries of the split for validation: give dev=.")
    collection.check()
    parts = [split] if dev is None else [split, dev]
    asked = list(dict.fromkeys(q for part in parts for q in collection.split(part)))
    folder = None if out is None else folder_for(out, apart=(model,))
    if folder is not None:
        check_ours(folder)
        _check_kind(folder, chosen is None, resume)
    if runs is None:
        runs = [first_stage(collection, "bm25", queries=asked, k=depth)]
    drawn = {p: hard_negatives(collection, runs, negatives=negatives, split=p, depth=depth, seed=seed) for p in parts}
    loaded = _loaded(model, tokenizer, {"dtype": dtype, "device": device, "seed": seed})
    reranker = Reranker(loaded.model, loaded.tokenizer, max_length=max_length)
    limit = reranker.max_length
    groups = {
        part: query_groups(
            collection, found.by_query, loaded.tokenizer, objective, split=part, limit=limit, teacher=teacher,
            said=found.said,
        )
        for part, found in drawn.items()
    }  # fmt: skip
    heads = loaded.heads if also_train == "auto" else ([also_train] if isinstance(also_train, str) else also_train)
    loaded.check_heads(tuple(heads))
    with left_alone(loaded.model):
        beside = _language(loaded, language, name)
        train, tested = groups[split], None if dev is None else groups[dev]
        about = {"steps": steps, "batch": batch, "seed": seed, "progress": progress}
        if chosen is None:
            if beside is not None:
                switch(loaded.model, [beside.name])
            drew = drawn_by_lottery(
                loaded.model, train, eval_data=tested, also_train=heads, exclude=exclude, name=name, resume=resume,
                out=None if folder is None else folder / "lottery", **about, **(lottery or {}), **options,
            )  # fmt: skip
            adapter = drew.adapter
            made = drew.sparse[-1] or FitResult(adapter, steps, [])  # which a finished run has no more
        else:
            adapter = attach(
                loaded.model, chosen, targets=targets, exclude=exclude, also_train=heads, name=name, seed=seed,
                calibration=calibration(loaded.model, train, batch, seed), loss=_mean(train),
            )  # fmt: skip
            start = None
            if beside is not None:
                switch(loaded.model, [beside.name, name])
                start = digest([content_hash(beside), skip])
                if skip != "last":
                    reranker.composition = Stack(beside.name, name, skip=skip)
            acting = nullcontext() if reranker.composition is None else composed(loaded.model, reranker.composition)
            with acting, _still(beside):
                made = fit(
                    loaded.model, adapter, train, eval=tested, resume=resume and folder is not None, begun_with=start,
                    out=None if folder is None else folder / "checkpoints", **about, **options,
                )  # fmt: skip
        adapter.labels = RELEVANCE
        note_training(adapter, tokenizer=loaded.tokenizer, beside=[] if beside is None else [beside])
        after = None if dev is None or judge is None else _judged(reranker, collection, dev, judge)
        path = None
        if folder is not None:
            told = {
                "method": _described(chosen, lottery), "targets": targets or getattr(chosen, "targets", None),
                "rate": starting_rate(build("full")), "exclude": exclude, "also_train": list(heads), "loss": loss,
                "temperature": temperature, "negatives": negatives, "depth": depth, "split": split, "dev": dev,
                "max_length": limit, "batch": batch, "seed": seed, "steps": steps, "note": loaded.note,
                "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."), **options,
            }  # fmt: skip
            if beside is not None:
                told |= {"language": beside.name, "language_sha256": content_hash(beside), "skip": skip}
            known = {"train": collection.name, "form": "label", "labels": RELEVANCE, "examples": len(train),
                     "digest": train.digest, "collection": collection.digest()}  # fmt: skip
            path = _written(folder, adapter, loaded.source, {"options": told, "data": known}, made, after)
    said = tuple(line for part in groups.values() for line in part.said)
    return RerankerResult(**vars(made), reranker=reranker, said=said, after=after, path=path)


def _is_drawn(method: Any, lottery: Mapping | None, targets: Any, skip: str) -> bool:
    """Return whether a lottery run chooses what is trained. Raises AddendaError for options that do not go together."""
    sparse = method == "sparse"
    if sparse and lottery is None:
        raise AddendaError("The method 'sparse' wants its positions chosen: give lottery={'k': …}, see `ad.lottery`.")
    if lottery is not None and not sparse:
        raise AddendaError(f"lottery= is for the method 'sparse', got {method!r}. Leave it out, or take that method.")
    if sparse and (targets is not None or skip != "last"):
        what = "targets= chooses no tensors of a lottery run, exclude= leaves some out" if targets is not None else (
            "skip= is of bottlenecks, and sparse changes add up"
        )  # fmt: skip
        raise AddendaError(f"{what}. Leave it out.")
    if lottery is not None and (
        own := [k for k in ("out", "name", "eval_data", "also_train", "steps") if k in lottery]
    ):
        raise AddendaError(f"lottery= holds {own[0]!r}, which is an option of the call itself. Give it there.")
    return sparse


def _check_kind(folder: Path, drawn: bool, resume: bool) -> None:
    """Raise AddendaError where a folder holds a run of the other kind: a lottery, or none (drawn: what this one is)."""
    there = folder / "checkpoints" if drawn else folder / "lottery"
    if not (latest(there) if drawn else is_of_lottery(there)):
        return
    if resume:
        raise AddendaError(
            f"{shown(folder)} holds {'a run that is no lottery' if drawn else 'a lottery run'}. Repeat the call with "
            "its options to go on with it, or start again with resume=False (--no-resume) or in another folder (--out)."
        )
    if is_first():
        (drop if drawn else drop_lottery)(there)


def _described(method: Method | None, lottery: Mapping | None) -> dict[str, Any]:
    if method is None:
        return {"name": "sparse", "options": dict(lottery or {})}
    return {"name": method.name, "options": method.options(defaults=True)}


def _loaded(model: Any, tokenizer: Any, loading: dict) -> Loaded:
    """Return the model with one output; a bare encoder gets a new head."""
    if isinstance(model, nn.Module):
        check_loaded(model, tokenizer, loading)
        source = getattr(model, "name_or_path", "") or type(model).__name__
        return Loaded(model, tokenizer, source, drawn_in(model))
    if tokenizer is not None:
        raise AddendaError("A folder brings its own tokenizer; give tokenizer= with a loaded model only.")
    return load_model(encoder_folder(model), task="label", labels=1, **loading)


def _language(loaded: Loaded, given: str | Path | Adapter | None, name: str) -> Adapter | None:
    """Return the adapter that acts beside, frozen: one on the model, or one of a file, loaded."""
    if given is None:
        return None
    model, host = loaded.model, find_state(loaded.model)
    there = () if host is None else host.state.records
    own = given.name if isinstance(given, Adapter) else str(given)
    if own in there and host is not None:
        found = Adapter(host.root, own)
    elif isinstance(given, Adapter):
        raise AddendaError(f"The adapter {own!r} of language= is not attached to this model.")
    else:
        path = path_of(given, "language")
        stem = name_of(path, "language")
        free = free_name(model, f"{stem}-language" if stem == name else stem)
        found = load(model, path, name=free, tokenizer=loaded.tokenizer)
    if found.name == name:
        raise AddendaError(f"The language's adapter and the reranker's are both called {name!r}. Give another name=.")
    return found


@contextmanager
def _still(beside: Adapter | None) -> Iterator[None]:
    """Keep the language's adapter from learning, for a `with` block."""
    trained = [] if beside is None else [p for p in beside.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def _mean(train: Groups):
    return lambda model, batch: score(model, batch, train.kind, objective=train.objective).mean


def _judged(reranker: Reranker, collection: Collection, dev: str, count: int) -> dict[str, float]:
    """Return RR@10 of a first stage's documents before and after they are put in order."""
    qrels = dict(list(collection.split(dev).items())[:count])
    before = first_stage(collection, "bm25", queries=qrels, k=DEPTH)
    after = reranker.rerank(collection, before, depth=DEPTH)
    found = [means(by_query(qrels, strict(run), ["RR@10"]))["RR@10"] for run in (after, before)]
    return {"RR@10": found[0], "first stage": found[1], "queries": len(qrels)}


def _written(folder: Path, adapter: Adapter, base: str, about: dict, made: FitResult, after: Any) -> Path:
    """Write adapter, run.json and card, or mend those of a run that was finished before."""
    path = folder / "adapter.safetensors"
    last = made.evaluations[-1] if made.evaluations else None
    judged = None if last is None else {k: last[k] for k in ("loss", "accuracy", "items")} | (after or {})
    if made.losses and not agreed(lambda: is_finished(folder, made)):
        if is_first() or adapter.sharded:
            save(adapter, path)
        agreed(lambda: write_all(folder, adapter, base=base, made=made, before=None, after=judged, **about))
    elif not adapter.sharded:
        agreed(lambda: mend(folder, adapter))
    return path
