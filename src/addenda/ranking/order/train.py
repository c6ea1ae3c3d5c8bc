"""Training of the adapter that orders images: groups of one query, the loss over each, and nothing of the encoders.

A step takes `accumulate` groups; a group is up to `batch` images of one query whose values, or comparisons, are known.
Groups are never cut: a step over two groups of 32 is two forwards, each with its own pairs. Values are learned in units
of their query (centre and spread are kept), so that counts and years can be learned side by side. What a run draws
depends on its seed and the step alone; a run that was killed goes on and ends with the same bits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.random import Stream
from addenda.core.disk.lock import one_at_a_time
from addenda.core.file.identity import digest, goes_on, plain, versions
from addenda.core.file.states import read_state, write_state
from addenda.ranking.order.adapter import OrderAdapter, Scores
from addenda.ranking.order.file import Made, Scale, save_order
from addenda.ranking.order.losses import OrderLoss
from addenda.ranking.order.ratings import Ratings
from addenda.ranking.order.settings import OrderSettings
from addenda.ranking.order.towers import Towers
from addenda.train.settings import Settings
from addenda.train.states import load_state, state_of

FILE, STATE = "order.safetensors", "state.safetensors"
EVERY = 50  # steps between two states on disk
STEPS, LEAST = 200, 400


@dataclass(frozen=True)
class OrderResult:
    """A trained adapter, what it was made with, (step, loss) of every step, and where its file is, if it has one."""

    adapter: OrderAdapter
    made: Made
    losses: list[tuple[int, float]] = field(default_factory=list)
    path: Path | None = None
    resumed_from: int = 0


def scales_of(ratings: Ratings) -> dict[str, Scale]:
    """Return the centre and spread of each query's values; 0 and 1 where there are comparisons only."""
    found = {}
    for query in ratings.queries:
        values = list(ratings.values.get(query, {}).values())
        found[query] = Scale(fmean(values), pstdev(values) or 1.0) if values else Scale()
    return found


@checked()
@one_at_a_time
def train_order(
    towers: Towers,
    ratings: Ratings,
    patches: Sequence[Tensor],
    *,
    settings: OrderSettings | None = None,
    loss: OrderLoss | None = None,
    steps: int | None = None,
    rate: float = 3e-4,
    batch: int = 64,
    accumulate: int = 1,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> OrderResult:
    """Train an adapter on images that are rated or compared.

    patches: of each image of `ratings`, P × D_i, from `Features`. steps: by default `STEPS` for each query, which take
    turns, and `LEAST` in all: as many as `recipes.order` takes with 500 images. batch: images of a group; accumulate:
    groups of a step. out: a folder for the file and the state of a run that is to go on. progress: told (step, steps,
    loss).
    Raises AddendaError for ratings of which nothing can be learned, impossible options, a loss that diverges, and a
    folder that holds another run.
    """
    settings, loss = settings or OrderSettings(), loss or OrderLoss()
    ratings.check_learnable()
    if len(patches) != len(ratings.pictures):
        raise AddendaError(f"There are patches of {len(patches)} images, and {len(ratings.pictures)} are rated.")
    check_loss(ratings, loss, batch)
    steps = steps or max(LEAST, STEPS * len(ratings.queries) // accumulate)
    schedule = Settings(
        steps=steps, rate=rate, schedule="cosine", warmup=warmup, weight_decay=weight_decay
    ).multiplier()
    scales, sentences = scales_of(ratings), {q: towers.tokens(q) for q in ratings.queries}
    options = {"steps": steps, "rate": rate, "batch": batch, "accumulate": accumulate, "weight_decay": weight_decay,
               "warmup": warmup, "seed": seed, "loss": asdict(loss), "data": _digest(ratings),
               "versions": versions()}  # fmt: skip
    made = Made(settings, (towers.image_width, towers.text_width), plain(towers.identity), scales, plain(options))
    folder = None if out is None else Path(out).expanduser()
    with torch.random.fork_rng([]):  # dropout draws from torch's generator, which is the caller's
        adapter = OrderAdapter(settings, *made.widths, seed=seed).train()
        optimizer = torch.optim.AdamW(_groups(adapter, weight_decay), lr=rate)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        run = _Run(adapter, optimizer, rates, made)
        torch.manual_seed(seed)
        begun = run.read(folder / STATE) if folder and (folder / STATE).is_file() else 0
        for step in range(begun, steps):
            total = 0.0
            for query, positions in groups(ratings, batch, accumulate, seed, step):
                stacked = torch.stack([patches[i] for i in positions])
                scores = adapter(stacked, *sentences[query], pairs=loss.needs_pairs)
                own = _loss_of(loss, scores, query, positions, ratings, scales[query]) / accumulate
                if own.requires_grad:  # else all of the group are ties, and ties are not asked for
                    own.backward()
                total += float(own.detach())
            if not math.isfinite(total):
                raise AddendaError(
                    f"The loss is {total} at step {step + 1} with rate {rate:g}: the run has diverged. Use a smaller "
                    "rate, or a longer warm-up."
                )
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad(set_to_none=True)
            run.losses.append((step + 1, total))
            if progress is not None:
                progress(step + 1, steps, total)
            if folder and ((step + 1) % EVERY == 0 or step + 1 == steps):
                run.write(folder / STATE, step + 1)
    path = save_order(folder / FILE, adapter, made) if folder else None
    return OrderResult(adapter.eval(), made, run.losses, path, begun)


def groups(ratings: Ratings, batch: int, count: int, seed: int, step: int) -> list[tuple[str, list[int]]]:
    """Return the groups of a step: (query, positions of its images), queries in turn, images drawn for the step.

    Of comparisons, whole pairs are drawn, until there are `batch` images.
    """
    queries = ratings.queries
    found = []
    for k in range(step * count, (step + 1) * count):
        cycle, place = divmod(k, len(queries))
        order = Stream(seed, "order of queries", str(cycle)).choice(len(queries), len(queries)).tolist()
        query, rng = queries[order[place]], Stream(seed, "order of images", str(k))
        known = list(ratings.values.get(query, {}))
        if known:
            at = rng.choice(len(known), min(batch, len(known))).tolist()
            found.append((query, [known[i] for i in at]))
            continue
        pairs, images = ratings.comparisons[query], dict.fromkeys(())
        for i in rng.choice(len(pairs), len(pairs)).tolist():
            if len(images.keys() | set(pairs[i])) > max(batch, 2):
                break
            images |= dict.fromkeys(pairs[i])
        found.append((query, list(images)))
    return found


def _loss_of(
    loss: OrderLoss, scores: Scores, query: str, positions: Sequence[int], ratings: Ratings, scale: Scale
) -> Tensor:
    """Return the loss, (), of one group."""
    rated = ratings.values.get(query)
    if rated:
        values = torch.tensor([rated[i] for i in positions], dtype=torch.float64)  # a moment in seconds has ten digits
        return loss.of_values(scores, ((values - scale.centre) / scale.spread).float(), zero=values == 0)
    new = {old: i for i, old in enumerate(positions)}
    inside = [(new[a], new[b]) for a, b in ratings.comparisons[query] if a in new and b in new]
    return loss.of_comparisons(scores, *torch.tensor(inside).t())


class _Run:
    """A run as it stands on disk between two steps."""

    def __init__(self, adapter: OrderAdapter, optimizer: torch.optim.Optimizer, rates: Any, made: Made):
        self.adapter, self.optimizer, self.rates, self.made = adapter, optimizer, rates, made
        self.losses: list[tuple[int, float]] = []

    @property
    def identity(self) -> dict[str, Any]:
        return plain({"settings": asdict(self.made.settings), "towers": self.made.towers, **self.made.training})

    def write(self, path: Path, step: int) -> None:
        write_state(path, {
            "step": step, "identity": self.identity, "adapter": dict(self.adapter.state_dict()),
            "optimizer": state_of(self.optimizer), "rates": self.rates.state_dict(), "losses": self.losses,
            "random": torch.get_rng_state(),
        }, "state of a run")  # fmt: skip

    def read(self, path: Path) -> int:
        """Go on with a state on disk; return its step. Raises AddendaError where it is of another run."""
        held = read_state(path)
        if not isinstance(held, dict) or "identity" not in held:
            raise AddendaError(f"{path} is no state of a run that orders images. Choose another out= (--out).")
        goes_on(
            f"The run in {path.parent}", held["identity"], self.identity,
            way="Repeat the call with its settings to go on with it, or choose another folder (--out).",
        )  # fmt: skip
        self.adapter.load_state_dict(held["adapter"])
        load_state(self.optimizer, held["optimizer"], path)
        self.rates.load_state_dict(held["rates"])
        self.losses = [(int(s), float(x)) for s, x in held["losses"]]
        torch.set_rng_state(held["random"])
        return int(held["step"])


def _groups(adapter: OrderAdapter, weight_decay: float) -> list[dict]:
    """Return the tensors for the optimizer: gains and biases do not decay."""
    matrices = [p for p in adapter.parameters() if p.dim() > 1]
    others = [p for p in adapter.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def check_loss(ratings: Ratings, loss: OrderLoss, batch: int) -> None:
    """Raise AddendaError where a loss finds nothing in such ratings, or in groups of so many images."""
    if batch < 2 and (loss.pairs or loss.ranknet):
        raise AddendaError(
            f"batch={batch} makes groups of one image, in which there is no pair to learn from. Give at least 2, or "
            "weights of 0 for pairs and ranknet."
        )
    compared = [q for q in ratings.comparisons if q not in ratings.values]
    if compared and not (loss.pairs or loss.ranknet):
        raise AddendaError(
            f"{compared[0]!r} has comparisons and no values, and this loss looks at values only. Give pairs or ranknet "
            "a weight above 0."
        )


def _digest(ratings: Ratings) -> str:
    said: Mapping[str, Any] = {
        "images": [p.key for p in ratings.pictures],
        # as lists: groups are drawn by the order in which queries and images stand
        "values": [[q, list(v.items())] for q, v in ratings.values.items()],
        "comparisons": [[q, list(p)] for q, p in ratings.comparisons.items()],
    }
    return digest(plain(said))
