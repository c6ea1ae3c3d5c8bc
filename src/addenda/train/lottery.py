"""Lottery-ticket sparse fine-tuning: train everything, see which K numbers moved most, go back and train those alone.

    1. train all maskable tensors (method `full`; heads too) from θ0
    2. positions = the K largest |θ − θ0|, over all maskable tensors together, exactly K
    3. back to θ0, bit for bit, heads included; train `sparse` at the positions, with a new optimizer

It is LT-SFT (Ansell et al. 2022, arXiv 2110.07560), whose result adds up: a language's and a task's sparse changes act
together, and one is swapped for another. For a task trained on a language, that language's adapter is attached, acts,
and stays as it is: θ0 is then base + language.

Where the authors' code has traps: equal changes are taken from the first, not all of them; numbers outside of the
positions cannot move, whatever the optimizer, its momentum or decay, as they are not trained. Decay pulls to θ0 in the
second phase. iterations: each goes on from where the last one's second phase ended, adds its share of K to the
positions, and goes back to θ0. l1: a pull towards θ0, l1 · mean |θ − θ0| over the numbers that train in this phase
(theirs: over all parameters of the model, trained or not), added to the gradient behind clipping; heads have none.

OUT/
  lottery.json               what the run is: base, language, data, heads, options
  full-1/                    checkpoints of the first phase, gone once the positions are chosen
  positions-1.safetensors    the positions, written once
  sparse-1/                  checkpoints of the second phase
  adapter.safetensors        the result, an ordinary adapter

Killed at any moment, the same call goes on in the phase where it stopped.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from addenda.core.adapter.attach import attach, detach
from addenda.core.adapter.handle import Adapter
from addenda.core.adapter.switch import switch
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.disk.lock import one_at_a_time
from addenda.core.modules.wrappers import unwrap
from addenda.core.site.site import owners_of, site_at
from addenda.core.site.targets import Target, exactly
from addenda.core.state.state import find_state
from addenda.data.encode import Overflow
from addenda.data.encoded import Encoded
from addenda.models.machine import processes
from addenda.train.fit import FitResult, fit
from addenda.train.left_alone import left_alone
from addenda.train.lottery_folder import LotteryFolder, digest_of
from addenda.train.lottery_inputs import PHASE, RANGES, maskable, phases_of, read_data
from addenda.train.most_changed import Trained, at_random, most_changed
from addenda.train.pull import pulled


@dataclass(frozen=True)
class LotteryResult:
    """What `lottery` gives: the adapter, on the model and acting beside what acted before.

    positions: of each site, rising, in its matrix as its layer sees it. full, sparse: what `fit` gave in each
    iteration; None where an interrupted run had done that phase. path: of adapter.safetensors, with `out`.
    """

    adapter: Adapter
    positions: dict[str, Tensor]
    full: tuple[FitResult | None, ...]
    sparse: tuple[FitResult | None, ...]
    model: nn.Module
    tokenizer: Any = None
    path: Path | None = None

    @property
    def k(self) -> int:
        """How many numbers were chosen."""
        return sum(map(len, self.positions.values()))


@dataclass
class _Run:
    """One call: the model, the data, where it may change the model, and what each phase is given."""

    model: nn.Module
    data: Encoded
    held: Encoded | None
    name: str
    seed: int
    heads: tuple[str, ...]
    sites: list[str]  # maskable, in the model's order
    around: tuple[str, ...]  # the adapters that act beside it
    phases: dict[str, dict[str, Any]]  # "full", "sparse": options for `fit`, and l1
    folder: LotteryFolder | None
    labels: tuple[str, ...] = ()
    positions: dict[str, Tensor] = field(default_factory=dict)

    def attached(self, method: str, **how: Any) -> Adapter:
        """Attach a phase's adapter beside those that act."""
        adapter = attach(self.model, method, also_train=self.heads, name=self.name, seed=self.seed, **how)
        switch(self.model, [*self.around, self.name])
        adapter.labels = self.labels
        return adapter

    def fitted(self, adapter: Adapter, phase: str, iteration: int, begun_with: str) -> FitResult:
        """Train an attached adapter as its phase says."""
        options = dict(self.phases[phase])
        l1, steps = options.pop("l1"), options["steps"]
        options["optimizer"] = pulled(options.get("optimizer", "auto"), adapter, l1, steps)
        out = None if self.folder is None else self.folder.phase(phase, iteration)
        return fit(
            self.model, adapter, self.data, eval=self.held, seed=self.seed, out=out, resume=out is not None,
            begun_with=begun_with, **options,
        )  # fmt: skip


@checked(also=PHASE, special=RANGES)
@one_at_a_time
def lottery(
    model: str | Path | nn.Module,
    data: Any,
    *,
    k: int,
    steps: Any,
    full: Mapping[str, Any] | None = None,
    iterations: int = 1,
    l1: float = 0.0,
    positions: Literal["largest", "random"] = "largest",
    norms: bool = True,
    embeddings: bool = True,
    exclude: Iterable[Target] = (),
    also_train: str | Iterable[str] = "auto",
    eval_data: Any = None,
    tokenizer: Any = None,
    columns: dict | None = None,
    max_length: int | None = None,
    overflow: Overflow = "error",
    chat: bool | None = None,
    dtype: Any = "auto",
    device: Any = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    resume: bool = True,
    name: str = "default",
    seed: int = 0,
    **options,
) -> LotteryResult:
    """Choose K numbers of a model by training all of them, and train these alone; the module says how.

    model, data, eval_data, tokenizer and the options of reading are those of `tune`; a loaded model also takes
    `Encoded` data, and needs no tokenizer for that. k: how many numbers, of all sites and iterations together. steps,
    batch, rate (by default that of `full`) and all other options of `fit` are of each phase; full: those of the first
    phase that differ, such as {"steps": 100, "rate": 2e-5}. l1: the pull towards the start, in both phases unless
    `full` says another. positions: "random" draws as many from all maskable numbers instead, which takes no first
    phase. norms, embeddings: whether they are maskable; exclude: what is not, besides heads. also_train: heads, trained
    as whole copies in both phases, from the base's values; "auto": a classifier's.

    Adapters that act when it is called go on acting, and do not learn. Returned, the result's adapter acts with them.

    Raises AddendaError for whatever a user could mend, and leaves a loaded model as it was: a k larger than there are
    numbers, a folder of another run (other base, language, data, heads or options), and all that `tune` and `fit` do.
    """
    if positions not in ("largest", "random"):
        raise AddendaError(f"positions must be 'largest' or 'random', got {positions!r}.")
    if iterations > k:
        raise AddendaError(f"Each of {iterations} iterations chooses at least one number, and k={k}.")
    phases = phases_of(steps, l1, seed, options, full)
    reading = {"max_length": max_length, "overflow": overflow, "chat": chat}
    loading = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "seed": seed}
    model, data, held, tokenizer, heads, labels = read_data(
        model, data, eval_data, tokenizer, columns or {}, reading, loading, also_train, phases["sparse"]
    )
    if processes() > 1:
        raise AddendaError("A lottery run is of one process; start it without a launcher.")
    host = find_state(model)
    around = () if host is None else tuple(n for n in host.state.active if n != name)
    sites = maskable(model, norms=norms, embeddings=embeddings, exclude=exclude, heads=heads)
    sizes = {path: site_at(unwrap(model), path).weight.numel() for path in sites}
    if k > sum(sizes.values()):
        raise AddendaError(
            f"k={k:,} is above the {sum(sizes.values()):,} numbers of the {len(sites)} maskable tensors of this "
            f"{type(unwrap(model)).__name__}."
        )
    folder = None
    if out is not None:
        what = {"k": k, "iterations": iterations, "positions": positions, "seed": seed, "phases": phases}
        folder = LotteryFolder(Path(out), resume).begin(model, data, held, heads, sites, around, what)
    run = _Run(model, data, held, name, seed, heads, sites, around, phases, folder, labels)
    with left_alone(model), _still(model, around):
        adapter, fulls, sparses = _train(run, k, iterations, None if positions == "largest" else sizes)
    path = None if folder is None else folder.finish(adapter)
    return LotteryResult(adapter, run.positions, tuple(fulls), tuple(sparses), model, tokenizer, path)


def _train(run: _Run, k: int, iterations: int, random: dict[str, int] | None) -> tuple[Adapter, list, list]:
    """Make the iterations, and return the last adapter, which stays on the model, with what `fit` gave in each phase.

    random: sizes by path, where positions are drawn.
    """
    adapter: Any = None
    fulls: list[FitResult | None] = []
    sparses: list[FitResult | None] = []
    before: dict[str, Tensor] = {}  # what the second phase of the iteration before has trained
    for i in range(1, iterations + 1):
        count = k * i // iterations - k * (i - 1) // iterations
        kept = None if run.folder is None else run.folder.positions(i)
        fulls.append(None)
        if kept is None:
            if random is None:
                fulls[-1], new = _chosen(run, i, count, before)
            else:
                new = at_random(random, count, run.seed, run.positions)
            kept = _united(run.sites, run.positions, new)
            if run.folder is not None:
                run.folder.keep(i, kept)
        run.positions = kept
        sparses.append(None)
        if i < iterations and run.folder is not None and run.folder.positions(i + 1) is not None:
            continue  # nothing needs this one any more
        if i < iterations and random is not None:
            continue
        adapter = run.attached("sparse", positions=run.positions)
        sparses[-1] = run.fitted(adapter, "sparse", i, digest_of(run.positions))
        if i < iterations:
            before = {path: t.clone() for path, t in adapter.state_dict().items()}
            detach(run.model, run.name)
    return adapter, fulls, sparses


def _chosen(run: _Run, i: int, count: int, before: dict[str, Tensor]) -> tuple[FitResult, dict[str, Tensor]]:
    """Train everything, and return that with the positions of the `count` largest changes that are new."""
    adapter = run.attached("full", targets=exactly(unwrap(run.model), run.sites))
    sites = dict(adapter.sites())
    if before:
        _go_on(adapter, run.positions, before)
    made = run.fitted(adapter, "full", i, digest_of(before))
    owners = owners_of(adapter.model)
    trained = []
    for path in run.sites:
        value = sites[path]._parameters["value"]
        assert value is not None
        trained.append(Trained(path, value.detach(), site_at(adapter.model, path, owners).matrix))
    found = most_changed(trained, count, run.positions)
    del trained, value
    detach(run.model, run.name)
    return made, found


@torch.no_grad()
def _go_on(adapter: Adapter, positions: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Put what a sparse adapter has trained into an adapter of whole copies, heads too."""
    for path, t in adapter.sites():
        value = t._parameters["value"]
        assert value is not None
        if path in positions:
            index = positions[path].long().to(value.device)
            flat = value.flatten()
            flat[index] += before[f"{path}/values"].to(flat)
            value.copy_(flat.view(value.shape))
        elif f"{path}/value" in before:
            value.copy_(before[f"{path}/value"])


def _united(sites: list[str], old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the positions of both, rising, in the order of the sites."""
    both = {p: [t[p] for t in (old, new) if p in t] for p in sites}
    return {p: torch.cat(parts).sort().values for p, parts in both.items() if parts}


@contextmanager
def _still(model: nn.Module, around: tuple[str, ...]) -> Iterator[None]:
    """Keep the adapters that act beside from learning, for a `with` block."""
    host = find_state(model)
    live = [p for n in around for p in Adapter(host.root, n).parameters() if p.requires_grad] if host else []
    for p in live:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in live:
            p.requires_grad_(True)
