"""`addenda rerank`: documents in order for a query, in many languages: index, train, language, eval, search, export."""

from pathlib import Path
from typing import Annotated, Any

import typer

from addenda.cli.common import Device, Dtype, draw, say, short, tell

PARTS, HOW = "The reranker", "How it reads"

app = typer.Typer(name="rerank", help="Order documents for a query, in many languages.", no_args_is_help=True)

Collected = Annotated[
    str, typer.Option("--data", "-d", help="A BEIR folder, or debian:LANGUAGE: Debian's package descriptions.")
]
Limit = Annotated[int | None, typer.Option("--limit", help="Documents, of debian:… only.")]
Base = Annotated[
    str, typer.Option("--model", "-m", help="Folder of an encoder, or e5, minilm, splade-tiny.", rich_help_panel=PARTS)
]
First = Annotated[str, typer.Option("--first", help="The first stage: bm25, e5, or the folder of a bi-encoder.")]
Task = Annotated[Path | None, typer.Option("--adapter", "-a", help="The task's adapter file.", rich_help_panel=PARTS)]
Folder = Annotated[
    Path | None,
    typer.Option("--reranker", help="A folder that `rerank export` wrote, in place of these.", rich_help_panel=PARTS),
]
QueryPart = Annotated[
    Path | None, typer.Option("--query-part", help="Adapter file of the query's language.", rich_help_panel=PARTS)
]
DocumentPart = Annotated[
    Path | None, typer.Option("--document-part", help="Adapter file of the documents'.", rich_help_panel=PARTS)
]
Where = Annotated[
    str,
    typer.Option("--where", help="Which parts act: query, document, both, or split by tokens.", rich_help_panel=PARTS),
]
MaxLength = Annotated[
    int | None, typer.Option("--max-length", help="Tokens of a pair; only documents are cut.", rich_help_panel=HOW)
]
Stride = Annotated[
    int | None,
    typer.Option("--stride", help="Read long documents in passages that share so many tokens.", rich_help_panel=HOW),
]
Rate = Annotated[float | None, typer.Option("--rate", help="Highest learning rate. Default: the catalogue's.")]
Depth = Annotated[int, typer.Option("--depth", help="Documents of the first stage that are put in order.")]


def register(main: typer.Typer) -> None:
    app.command()(index)
    app.command()(train)
    app.command()(language)
    app.command("eval")(evaluate)
    app.command()(search)
    app.command()(export)
    main.add_typer(app)


def index(
    out: Annotated[Path, typer.Option("--out", "-o", help="The index, one file.")],
    data: Collected = "debian:de",
    first: First = "e5",
    limit: Limit = None,
) -> None:
    """Index documents, for `rerank search`."""
    from addenda.ranking.search import build
    from addenda.ranking.sources import collection_of

    collection = collection_of(data, limit=limit, judged=False)
    say(f"indexing {len(collection.documents):,} documents of {collection.name} by {first}")
    tell(f"written: {build(collection, out, first=first)}")


def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapter, card, record and checkpoints.")],
    data: Collected = "debian:en",
    model: Base = "e5",
    method: Annotated[str, typer.Option("--method", help="A method and its options (see methods).")] = "pfeiffer",
    part: Annotated[
        Path | None, typer.Option("--part", help="Adapter of the training language, which acts beside, frozen.")
    ] = None,
    lottery: Annotated[
        int | None, typer.Option("--lottery", help="Train so many numbers of the model, in place of a method's.")
    ] = None,
    positions: Annotated[
        str, typer.Option("--positions", help="Of --lottery: the largest changes of training all, or random ones.")
    ] = "largest",
    loss: Annotated[
        str, typer.Option("--loss", help="pointwise, pairwise, listwise, distill or margins (these with --teacher).")
    ] = "listwise",
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="A TREC run of another system, to be learned from.")
    ] = None,
    first: Annotated[str, typer.Option("--first", help="Where hard negatives come from: bm25, e5, or both.")] = "bm25",
    negatives: Annotated[int, typer.Option("--negatives", help="Hard negatives for each query.")] = 7,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", help="Queries in a step.")] = 4,
    rate: Rate = None,
    seed: Annotated[int, typer.Option("--seed", help="Of start, order, negatives and dropout.")] = 0,
    limit: Limit = None,
    dev: Annotated[str | None, typer.Option("--dev", help="The split that the run is judged by.")] = None,
    judge: Annotated[int | None, typer.Option("--judge", help="Queries of it to be reranked at the end.")] = None,
    max_length: MaxLength = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with the run in --out.")] = True,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Train a reranker as an adapter of any method, resumable."""
    from addenda.core.base.errors import AddendaError
    from addenda.core.method.catalogue import build
    from addenda.ranking.bi_encoder import BiEncoder
    from addenda.ranking.first_stage import first_stage
    from addenda.ranking.losses import TAUGHT, RankingLoss
    from addenda.ranking.sources import collection_of
    from addenda.ranking.train import train_reranker
    from addenda.ranking.trec import read_run
    from addenda.train.progress import shown

    if lottery is not None and method not in ("pfeiffer", "sparse"):
        raise AddendaError(f"lottery= trains numbers of the model itself, and method={method!r} was given. Give one.")
    if positions not in ("largest", "random") or (lottery is None and positions != "largest"):
        raise AddendaError(f"positions= is 'largest' or 'random', and goes with lottery=; got {positions!r}.")
    more: dict[str, Any] = {} if lottery is None else {"lottery": {"k": lottery, "positions": positions}}
    method = "sparse" if more else method
    more |= {} if rate is None else {"rate": rate}
    build(method)
    RankingLoss(loss)  # type: ignore[arg-type]
    if (teacher is None) == (loss in TAUGHT):
        raise AddendaError(
            f"loss={loss!r} {'wants' if teacher is None else 'does not learn from'} teacher=, a TREC run."
        )
    if dev is None and judge is not None:
        raise AddendaError("judge= reranks queries of the split for validation: give dev=.")
    splits = tuple(dict.fromkeys(["train", dev] if dev else ["train"]))
    collection = collection_of(data, limit=limit, splits=splits)
    asked = [q for s in splits for q in collection.split(s)]
    stages: list[Any] = [] if first not in ("bm25", "both") else ["bm25"]
    if first != "bm25":
        say("reading the documents with the bi-encoder, for hard negatives")
        stages.append(BiEncoder.load("e5" if first == "both" else first))
    runs = [first_stage(collection, by, queries=asked, k=100) for by in stages]
    with shown(f"rerank {method}") as progress:
        made = train_reranker(
            model, collection, method, steps=steps, language=part, loss=loss,  # type: ignore[arg-type]
            teacher=None if teacher is None else read_run(teacher, collection), negatives=negatives, runs=runs, dev=dev,
            judge=judge, max_length=max_length, batch=batch, seed=seed, dtype=dtype, device=device, out=out,
            resume=resume, progress=progress, **more,
        )  # fmt: skip
    for line in made.said:
        tell(line)
    if made.after is not None:
        said = {k: f"{v:.3f}" for k, v in made.after.items()}
        tell(
            f"RR@10 {said['RR@10']}, the first stage's order {said['first stage']}, {made.after['queries']:.0f} queries"
        )
    tell(f"written: {made.path}")


def language(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the part, its head and checkpoints.")],
    data: Annotated[
        str, typer.Option("--data", "-d", help="debian:LANGUAGE, plain texts as tune reads them, or a BEIR folder.")
    ] = "debian:de",
    model: Base = "e5",
    method: Annotated[str, typer.Option("--method", help="A method and its options.")] = "pfeiffer:rank=192",
    head: Annotated[Path | None, typer.Option("--head", help="A head to begin with, of another run.")] = None,
    head_steps: Annotated[
        int | None, typer.Option("--head-steps", help="Steps in which a new head is fitted to the encoder.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", help="Texts in a step.")] = 16,
    rate: Rate = None,
    seed: Annotated[int, typer.Option("--seed", help="Of start, order and what is hidden.")] = 0,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with the run in --out.")] = True,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Learn a language's part from plain texts: words are hidden and filled in (`tune --task masked` has more)."""
    from addenda.core.method.catalogue import build
    from addenda.models.encoders import encoder_folder
    from addenda.ranking.sources import FEWEST, texts_of
    from addenda.train.tune import tune

    build(method)
    texts = texts_of(data)
    few = f", fewer than {FEWEST}: a part of so little text is worth little" if len(texts) < FEWEST else ""
    say(f"{len(texts):,} texts of {data}{few}")
    more = {k: v for k, v in {"rate": rate, "head": head, "head_steps": head_steps}.items() if v is not None}
    made = tune(
        encoder_folder(model, say), texts, method, task="masked", out=out, steps=steps, batch=batch, seed=seed,
        eval_data=0.05, resume=resume, dtype=dtype, device=device, **more,
    )  # fmt: skip
    before, after = made.before, made.after
    if before and after:
        tell(f"loss on held-out texts: {before['loss']:.3f} before, {after['loss']:.3f} after (nats a hidden token)")
    tell(f"written: {made.path}")


def evaluate(
    data: Collected = "debian:de",
    model: Base = "e5",
    adapter: Task = None,
    reranker: Folder = None,
    query_part: QueryPart = None,
    document_part: DocumentPart = None,
    where: Where = "document",
    first: First = "e5",
    depth: Depth = 50,
    split: Annotated[str, typer.Option("--split", help="The judgements.")] = "test",
    queries: Annotated[int | None, typer.Option("--queries", help="Only so many.")] = None,
    margin: Annotated[float, typer.Option("--margin", help="What counts as equal, in points of AP (of 100).")] = 2.0,
    limit: Limit = 600,
    run_out: Annotated[Path | None, typer.Option("--run-out", help="The reranked answers, a TREC run.")] = None,
    max_length: MaxLength = None,
    stride: Stride = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure a reranker beside its first stage: AP, nDCG@10, RR@10, with intervals and a verdict."""
    from rich.table import Table

    from addenda.core.disk.whole import free_place
    from addenda.ranking.evaluate import MEASURES, RERANKED, evaluate_reranker
    from addenda.ranking.sources import DEBIAN, collection_of
    from addenda.ranking.trec import write_run

    if run_out is not None:
        free_place(run_out, "run-out")
    _check_parts(adapter, reranker, query_part, document_part)
    pool = limit if data.startswith(DEBIAN) else None
    collection = collection_of(data, limit=pool, splits=(split,))
    loaded = _reranker(model, adapter, reranker, query_part, document_part, where, max_length, stride, dtype, device)
    found = evaluate_reranker(
        loaded, collection, first=first, split=split, depth=depth, queries=queries, margin=margin / 100
    )
    shown = Table("system", *MEASURES, title=f"{collection.name}, {split}: {len(collection.documents):,} documents")
    for row in found.rows():
        shown.add_row(*row)
    draw(shown)
    for line in found.words():
        tell(line)
    if run_out is not None:
        tell(f"written: {write_run(found.runs[RERANKED], run_out)}")


def search(
    index: Annotated[Path, typer.Argument(help="A file of `rerank index`.")],
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    model: Base = "e5",
    adapter: Task = None,
    reranker: Folder = None,
    query_part: QueryPart = None,
    document_part: DocumentPart = None,
    where: Where = "document",
    top: Annotated[int, typer.Option("--top", help="Documents to show.")] = 10,
    depth: Depth = 50,
    max_length: MaxLength = None,
    stride: Stride = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Search an index; with an adapter or a reranker its best documents are put in order."""
    from addenda.core.base.errors import AddendaError
    from addenda.ranking.search import SearchIndex

    if not query.strip():
        raise AddendaError("The query is empty. Say what is looked for.")
    loaded = None
    held = SearchIndex.load(index)
    if adapter is not None or reranker is not None:
        _check_parts(adapter, reranker, query_part, document_part)
        loaded = _reranker(
            model, adapter, reranker, query_part, document_part, where, max_length, stride, dtype, device
        )
    elif query_part is not None or document_part is not None:
        raise AddendaError("A language's part acts with a task's adapter only. Give adapter=.")
    hits = held.search(query, loaded, top_k=top, depth=depth)
    if not hits:
        tell("no document shares a word with the query")
    for n, hit in enumerate(hits, 1):
        tell(f"{n:>3}  {hit.score:8.3f}  {hit.id}")
        tell(f"     {short(hit.document.whole, 160)}")


def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    model: Base = "e5",
    adapter: Task = None,
    query_part: QueryPart = None,
    document_part: DocumentPart = None,
    where: Where = "document",
    onnx: Annotated[bool, typer.Option("--onnx", help="Write the ONNX model too.")] = False,
    activation: Annotated[
        str, typer.Option("--activation", help="What sentence-transformers applies to a score: identity or sigmoid.")
    ] = "identity",
    base: Annotated[
        str, typer.Option("--base", help="Of what cannot be merged: copy the base, or write its hash only.")
    ] = "copy",
    max_length: MaxLength = None,
    stride: Stride = None,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """Write a reranker for others: as sentence-transformers' CrossEncoder; what cannot be merged as base and parts."""
    from addenda.core.disk.whole import free_place
    from addenda.ranking.export import export_reranker

    free_place(out, "out")
    _check_parts(adapter, None, query_part, document_part)
    loaded = _reranker(model, adapter, None, query_part, document_part, where, max_length, stride, dtype, device)
    tell(export_reranker(loaded, out, activation=activation, onnx=onnx, base=base))  # type: ignore[arg-type]


def _check_parts(adapter: Path | None, reranker: Path | None, *parts: Path | None) -> None:
    """Raise AddendaError where nothing says what ranks, or two things do; files are looked for before a model is."""
    from addenda.core.base.errors import AddendaError
    from addenda.core.file.header import read

    if adapter is None and reranker is None:
        raise AddendaError("What puts documents in order? Give adapter=, a file of `rerank train`, or reranker=.")
    if reranker is not None and (adapter is not None or any(p is not None for p in parts)):
        raise AddendaError("reranker= holds its own adapters. Give it, or adapter= and parts.")
    for path in (adapter, *parts):
        if path is not None:
            read(path)


def _reranker(
    model: str, adapter: Path | None, folder: Path | None, query_part: Path | None, document_part: Path | None,
    where: str, max_length: int | None, stride: int | None, dtype: str, device: str | None,
) -> Any:  # fmt: skip
    from addenda.models.encoders import encoder_folder
    from addenda.models.load import dtype_for, load_model
    from addenda.ranking.modular import modular
    from addenda.ranking.reranker import Reranker

    options: dict[str, Any] = {"max_length": max_length, "stride": stride}
    if folder is not None:
        held = Reranker.load(folder, dtype="float32" if dtype == "auto" else dtype, device=device)  # as it was written
        own = {"max_length": held.max_length, "stride": held.stride, "batch": held.batch}
        given = {k: v for k, v in options.items() if v is not None}
        return Reranker(held.model, held.tokenizer, held.composition, **own | given)
    files = [f for f in (adapter, query_part, document_part) if f is not None]
    loaded = load_model(
        encoder_folder(model, say), task="label", labels=1, dtype=dtype_for(files, dtype), device=device
    )
    made = modular(
        loaded.model, adapter, query=query_part, document=document_part, where=where,  # type: ignore[arg-type]
        tokenizer=loaded.tokenizer, base="exact" if dtype == "auto" else "compatible",
    )  # fmt: skip
    for note in made.notes:
        say(f"note: {note}")
    return Reranker(loaded.model, loaded.tokenizer, made.composition, **options)
