"""`addenda order`: images in the order that a sentence asks for: train, rank, eval."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from addenda.cli.common import Device, SkipCorrupt, draw, say, tell

TOWERS, LOSS = "The two encoders", "What is learned"

app = typer.Typer(name="order", help="Order images by a sentence.", no_args_is_help=True)

Both = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="Folder of a CLIP or SigLIP model, in place of two.", rich_help_panel=TOWERS),
]
ImageTower = Annotated[
    str | None,
    typer.Option("--image-encoder", help="Folder of an image encoder. Default: dinov2-small.", rich_help_panel=TOWERS),
]
TextTower = Annotated[
    str | None, typer.Option("--text-encoder", help="Folder of a text encoder. Default: e5.", rich_help_panel=TOWERS)
]
Side = Annotated[int | None, typer.Option("--image-size", help="Side of the images in pixels.", rich_help_panel=TOWERS)]
Grid = Annotated[
    int,
    typer.Option(
        "--grid", help="Patches are pooled to at most so many squared; fewer make faster steps.", rich_help_panel=TOWERS
    ),
]
Rated = Annotated[
    Path,
    typer.Option(
        "--data", "-d", help="Table of image, query, value or better, worse, query; or a folder of grades or stars."
    ),
]
Query = Annotated[str | None, typer.Option("--query", help="The sentence, where the data names none.")]
Circles = Annotated[bool, typer.Option("--allow-circles", help="Comparisons may contradict each other.")]


def register(main: typer.Typer) -> None:
    app.command()(train)
    app.command()(rank)
    app.command("eval")(evaluate)
    main.add_typer(app)


def train(
    data: Rated,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapter and the run's state.")],
    query: Query = None,
    model: Both = None,
    image_encoder: ImageTower = None,
    text_encoder: TextTower = None,
    image_size: Side = None,
    grid: Grid = 10,
    held_share: Annotated[float | None, typer.Option("--held", help="Share of images to judge by.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps. Default: 200 for each query, at least 400.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Images of a group.")] = 64,
    accumulate: Annotated[int, typer.Option("--accumulate", help="Groups of a step.")] = 1,
    rate: Annotated[float, typer.Option("--rate", help="Highest learning rate.")] = 3e-4,
    seed: Annotated[int, typer.Option("--seed", help="Of start, order and dropout.")] = 0,
    regression_weight: Annotated[
        float, typer.Option("--regression", help="Weight of the values themselves.", rich_help_panel=LOSS)
    ] = 0.2,
    pairs_weight: Annotated[
        float, typer.Option("--pairs", help="Weight of the relational head's pairs.", rich_help_panel=LOSS)
    ] = 1.0,
    zero_weight: Annotated[float, typer.Option("--zero", help="Weight of the zero.", rich_help_panel=LOSS)] = 0.0,
    ranknet_weight: Annotated[
        float, typer.Option("--ranknet", help="Weight of pairs of the regression head.", rich_help_panel=LOSS)
    ] = 0.0,
    ties: Annotated[str, typer.Option("--ties", help="skip, half or paper.", rich_help_panel=LOSS)] = "skip",
    adapter_width: Annotated[int, typer.Option("--width", help="Of the adapter.", rich_help_panel=LOSS)] = 384,
    allow_circles: Circles = False,
    skip_corrupt: SkipCorrupt = False,
    device: Device = None,
) -> None:
    """Learn to order images from ratings or comparisons, resumable."""
    from addenda.core.disk.access import check_above
    from addenda.core.disk.place import folder_for
    from addenda.data.pixels import check_decoded
    from addenda.ranking.order.evaluate import evaluate_order
    from addenda.ranking.order.features import Features
    from addenda.ranking.order.losses import OrderLoss
    from addenda.ranking.order.rank import ImageOrder
    from addenda.ranking.order.ridge import RidgeOrder
    from addenda.ranking.order.settings import OrderSettings
    from addenda.ranking.order.split import held_out
    from addenda.ranking.order.train import FILE, check_loss, train_order

    loss = OrderLoss(
        regression=regression_weight,
        pairs=pairs_weight,
        zero=zero_weight,
        ranknet=ranknet_weight,
        ties=ties,  # type: ignore[arg-type]
    )
    settings = OrderSettings(width=adapter_width)
    folder_for(out, apart=(data, model, image_encoder, text_encoder))
    check_above(out / FILE, "out")
    ratings = _rated(data, query, allow_circles, skip_corrupt)
    ratings.check_learnable()
    kept, judged = (ratings, None) if held_share is None else held_out(ratings, held_share, seed)
    kept.check_learnable()
    check_loss(kept, loss, batch)
    towers = _towers(model, image_encoder, text_encoder, image_size, device, grid=grid)
    features = Features(towers)
    say(f"looking at {len(ratings.pictures):,} images, each once")
    kept, patches, problems = _looked_at(features, kept)
    if judged is not None:  # now, not when the training is done
        judged, _, more = _looked_at(features, judged)
        problems |= more
    if not skip_corrupt:
        check_decoded(problems, len(ratings.pictures), ratings.source)
    _tell_left_out(problems)

    def told(step: int, of: int, loss: float) -> None:
        if step % max(1, of // 10) == 0 or step == of:
            say(f"step {step}/{of}, loss {loss:.4f}")

    made = train_order(
        towers, kept, patches, settings=settings, loss=loss, steps=steps, rate=rate, batch=batch,  # type: ignore[arg-type]
        accumulate=accumulate, seed=seed, out=out, progress=told,
    )  # fmt: skip
    if judged is not None and not judged.queries:
        say("none of the images that were held out is left to judge by")
    elif judged is not None:
        found = evaluate_order(
            ImageOrder(towers, made.adapter, made.made),
            judged,
            against=RidgeOrder(features, kept, patches) if set(judged.values) <= set(kept.values) else None,
        )
        _shown(found, "held out")
        if found.difference and found.difference[0] == found.difference[0]:  # else the table has said why there is none
            tell(found.against("a ridge on the mean of each image's patches, fitted to the same ratings"))
    tell(f"written: {made.path}")


def rank(
    folder: Annotated[Path, typer.Argument(help="A folder of images, and those in it.")],
    sentence: Annotated[str, typer.Argument(help="What is to come first.")],
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="The file of `order train`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The table to write (CSV).")],
    sheet: Annotated[Path | None, typer.Option("--sheet", help="A contact sheet too (PNG), the best first.")] = None,
    copy: Annotated[
        Path | None, typer.Option("--copy", help="A new folder of copies with the rank in their names.")
    ] = None,
    top: Annotated[int | None, typer.Option("--top", help="Only so many.")] = None,
    least_score: Annotated[
        float | None, typer.Option("--above", help="Only scores above it, in the query's units.")
    ] = None,
    model: Both = None,
    image_encoder: ImageTower = None,
    text_encoder: TextTower = None,
    image_size: Side = None,
    skip_corrupt: SkipCorrupt = False,
    device: Device = None,
) -> None:
    """Order a folder of images by a sentence: a table, a contact sheet, copies. The images stay as they are."""
    from addenda.core.base.errors import AddendaError
    from addenda.core.disk.access import check_above
    from addenda.core.disk.whole import free_place
    from addenda.ranking.order.file import check_towers, load_order
    from addenda.ranking.order.rank import ImageOrder, images_in
    from addenda.ranking.order.sheet import copy_ranked, is_sheet, sheet_place, table_place, write_sheet, write_table
    from addenda.ranking.order.towers import check_sentence

    check_sentence(sentence)
    made = load_order(adapter)  # before the encoders, which take longer
    table_place(out)
    if sheet is not None:
        sheet_place(sheet)
    if copy is not None:
        check_above(copy, "copy")
    if copy is not None and folder.resolve() in free_place(copy, "copy").resolve().parents:
        raise AddendaError(
            f"{copy} lies in {folder}, and the next order would be of the copies too. Choose another copy=."
        )
    unread: list[str] = []
    found = images_in(folder, skip_corrupt=skip_corrupt, skipped=unread)
    pictures = [p for p in found if not is_sheet(p.stored)]  # type: ignore[arg-type]
    _tell_unread(unread)
    towers = _towers(model, image_encoder, text_encoder, image_size, device, made=made[1])
    if towers.cut(sentence):
        say(f"note: the sentence is longer than the {towers.longest} tokens that the text encoder reads, and was cut")
    check_towers(made[1], towers.identity, adapter)
    order = ImageOrder(towers, *made)
    rows = order.rank(pictures, sentence, skip_corrupt=skip_corrupt)
    _tell_left_out(order.skipped)
    if order.far(rows[0].similarity):
        say(
            f"note: the nearest trained query is {rows[0].nearest!r}, similarity {rows[0].similarity:.2f}: what an "
            "order by so different a sentence is worth was never measured"
        )
    rows = [r for r in rows if least_score is None or r.score > least_score][:top]
    if not rows:
        raise AddendaError(f"No image has a score above {least_score:g}, in units of {order.nearest(sentence)[0]!r}.")
    tell(f"written: {write_table(rows, out)}")
    if sheet is not None:
        tell(f"written: {write_sheet(rows, sheet)}")
    if copy is not None:
        tell(f"written: {copy_ranked(rows, copy)}")


def evaluate(
    data: Rated,
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="The file of `order train`.")],
    query: Query = None,
    model: Both = None,
    image_encoder: ImageTower = None,
    text_encoder: TextTower = None,
    image_size: Side = None,
    allow_circles: Circles = False,
    skip_corrupt: SkipCorrupt = False,
    device: Device = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Another adapter of the same encoders: which one orders better?")
    ] = None,
) -> None:
    """Compare the order of rated images with their ratings: by query and over all, with an interval."""
    from addenda.ranking.order.evaluate import evaluate_order
    from addenda.ranking.order.file import check_towers, load_order
    from addenda.ranking.order.rank import ImageOrder

    files = [adapter, *([] if against is None else [against])]
    made = [load_order(file) for file in files]
    ratings = _rated(data, query, allow_circles, skip_corrupt)
    towers = _towers(model, image_encoder, text_encoder, image_size, device, made=made[0][1])
    for file, (_, about) in zip(files, made, strict=True):
        check_towers(about, towers.identity, file)
    order, *other = (ImageOrder(towers, *found) for found in made)
    if skip_corrupt:
        ratings, _, problems = _looked_at(order.features, ratings)
        _tell_left_out(problems)
    found = evaluate_order(order, ratings, against=other[0] if other else None)
    _shown(found, str(data))
    if other:
        tell(found.against())


def _towers(
    model: Path | None, image: str | None, text: str | None, image_size: int | None, device: str | None, *,
    grid: int = 10, made: Any = None,
) -> Any:  # fmt: skip
    """Return the encoders. made: of an adapter's file, whose images and patches are as in training."""
    from addenda.ranking.order.towers import load_towers

    if made is not None:
        grid, image_size = made.grid, image_size or made.image_size
    return load_towers(model, image=image, text=text, image_size=image_size, grid=grid, device=device)


def _rated(data: Path, query: str | None, allow_circles: bool, skip_corrupt: bool) -> Any:
    """Return the ratings of --data; what was left out of them is told."""
    from addenda.ranking.order.ratings import read_ratings

    ratings = read_ratings(data, query=query, allow_circles=allow_circles, skip_corrupt=skip_corrupt)
    _tell_unread(ratings.skipped)
    return ratings


def _tell_unread(skipped: Sequence[str]) -> None:
    if skipped:
        say(f"{len(skipped)} left out, which cannot be read: {'; '.join(skipped[:8])}")


def _tell_left_out(problems: Mapping[str, str]) -> None:
    if problems:
        say(f"{len(problems)} corrupt images left out: {', '.join(list(problems)[:8])}")


def _looked_at(features: Any, ratings: Any) -> tuple[Any, list, dict[str, str]]:
    """Return the ratings of images that can be decoded, their patches, and why others cannot, by name."""
    from addenda.ranking.order.features import all_of

    patches, problems = all_of(features, ratings.pictures)
    sound = [i for i, p in enumerate(patches) if p is not None]
    return ratings.of(sound), [patches[i] for i in sound], problems


def _shown(found: Any, title: str) -> None:
    from rich.table import Table

    from addenda.ranking.order.measures import MEASURES

    table = Table("query", "images", *MEASURES, title=title)
    for query, measures in found.by_query.items():
        table.add_row(query, str(found.counts[query]), *(_number(measures[m]) for m in MEASURES))
    if len(found.by_query) > 1:
        table.add_row("all", "", *(_number(found.mean[m]) for m in MEASURES), style="bold")
    if found.by_query:
        draw(table)
        mean, (low, high) = found.mean["spearman"], found.interval
        if mean == mean:
            tell(f"mean Spearman {mean:.3f} ({low:.3f} to {high:.3f}, 95 %, over images)")
        else:
            tell("no correlation: it wants a query with three images at least, and values that differ")
    for query, share in found.compared.items():
        tell(f"{query}: {share:.1%} of the comparisons are in the right order")


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"
