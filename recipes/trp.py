"""Trained Rank Pruning (Xu et al. 2018, arXiv:1812.02402): can a net be cut to low rank with no fine-tuning?

Claims. (1) After Trained Rank Pruning (TRP) a net is cut at its training threshold without loss. (2) At as many
multiplications it is better than a plainly trained net that is decomposed afterwards (channel-wise: Zhang et al.;
spatial-wise: Jaderberg et al.). (3) The nuclear norm adds to that. (4) At half the multiplications the loss is about a
point: 91.74 to 90.50 at 2.17 times fewer is published for CIFAR-10. (5), not in the paper: it is faster by the clock,
a matter of time, not measured again.

ResNet-20 on 10,000 images of Fashion-MNIST (`apt-get install dataset-fashion-mnist`), 50 epochs, judged by 5,000.
Arms, for both schemes (channel, spatial): TRP at its best λ, 0 among them, by the accuracy on validation images at half
the multiplications; TRP without a nuclear norm (`bare`) and with the best λ above 0 (`nuclear`); a plain net. None is
fine-tuned. Each is judged whole, cut at the training threshold (`|threshold`), at half the multiplications (`|2x`), and
that with batch norms recalibrated on training images (`|2x recalibrated`), a plain net by both schemes
(`plain|spatial 2x`).
"""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import addenda as ad
from addenda.comparing.entries import (
    BudgetRecord,
    Config,
    DataRecord,
    MethodRecord,
    ModelRecord,
    SplitResult,
    TrialRecord,
    Until,
)
from addenda.comparing.record import Record
from addenda.core.disk.atomic import readable, write_atomically
from addenda.core.file.identity import plain
from addenda.core.file.identity import versions as computed_by
from addenda.models.machine import hardware, versions
from addenda.statistics.spending import LOOKS
from recipes.nets import Task, answered, fashion, varied
from recipes.store import SEEDS, Busy, Clock, Store

PERIOD, ENERGIES, LAMBDAS = 20, (0.98, 0.95, 0.9), (0.0, 3e-4, 3e-3, 1e-2, 3e-2)
EPOCHS = 50
SCHEMES = ("channel", "spatial")
SEARCH_SEED = 1000


@dataclass(frozen=True)
class Arm:
    """How a net is trained. scheme: None for a plain one."""

    scheme: str | None = None
    energy: float = 1.0
    nuclear: float = 0.0

    @property
    def name(self) -> str:
        return "plain" if self.scheme is None else f"{self.scheme}-{self.energy:g}-{self.nuclear:g}"


def trained(task: Task, arm: Arm, seed: int, epochs: int) -> nn.Module:
    """SGD as in the paper: momentum 0.9, decay 1e-4, a tenth of the rate after a half and after three quarters."""
    torch.manual_seed(seed)
    net, (x, y) = task.net().to(memory_format=torch.channels_last), task.parts["train"]
    trp = None
    if arm.scheme is not None:
        trp = ad.TrainedRankPruning(net, arm.scheme, energy=arm.energy, period=PERIOD, nuclear=arm.nuclear)
    optimizer = torch.optim.SGD(net.parameters(), task.rate, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(y) // task.batch)
    halves = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
    draw = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=draw)
        for rows in order.split(task.batch)[: len(y) // task.batch]:
            images = varied(x[rows], task.shift, draw).contiguous(memory_format=torch.channels_last)
            if trp:
                trp.before_forward()
            F.cross_entropy(net(images), y[rows]).backward()
            if trp:
                trp.before_step()
            optimizer.step()
            optimizer.zero_grad()
            halves.step()
    return net.eval()


def cut(net: nn.Module, task: Task, scheme: str, how: str, energy: float, part: str) -> str:
    """Return the answers of a net that is cut by a scheme: how is threshold, 2x or 2x recalibrated."""
    some = task.parts["train"][0][:2000]
    rule = {"energy": energy} if how == "threshold" else {"keep": share(net, scheme, some[:1], 2.0)}
    low = ad.factorise(net, scheme, **rule, example=some[:1]).model  # type: ignore[arg-type]
    if how.endswith("recalibrated"):
        ad.recalibrate(low, some.contiguous(memory_format=torch.channels_last).split(500))
    return answered(low, task.parts[part])


def share(net: nn.Module, scheme: str, example: Tensor, times: float) -> float:
    """What of the layers' multiplications must stay so that the whole net's are `times` fewer."""
    whole, layers = ad.macs(net, example), ad.factorise(net, scheme, energy=1, example=example).layers
    chosen = sum(x.macs[0] for x in layers if x.macs)
    return 1 - (1 - 1 / times) * sum(whole.values()) / chosen


class Nets:
    """The nets of this recipe, as a place where claims are tested. task: Fashion-MNIST, read when it is needed."""

    def __init__(
        self, folders: Mapping[str, str], root: Path, clock: Clock, task: Task | None = None, epochs: int = EPOCHS
    ):
        self.store, self.clock, self.epochs, self._given = Store(root / "trp", folders), clock, epochs, task
        self.void: dict[str, str] = {}
        self._pace = 0.0  # seconds an epoch

    @cached_property
    def task(self) -> Task:
        return self._given or fashion(10_000, 5_000)

    def settle(self) -> None:
        """Nothing is void here: nets are compared with what is chosen on validation images."""

    def forget(self) -> None:
        """Nothing is held that another subject would want."""

    def record(self, arms: Iterable[str], seeds: Sequence[int]) -> Record:
        return self.store.of(arms, seeds)

    def ensure(self, arms: Iterable[str], seeds: Sequence[int]) -> None:
        """Run what is missing. Raises Busy where another process is at some of it."""
        busy, nets = False, {name: self.arm(name) for name in sorted({a.partition("|")[0] for a in arms})}
        for arm in dict.fromkeys(nets.values()):  # two names may be of one net, where λ = 0 is the best
            names = [n for n, of_it in nets.items() if of_it == arm]
            wanted = [a for a in self.store.folders if a.partition("|")[0] in names]
            for seed in seeds:
                if any(self.store.find(a, "final", seed) is None for a in wanted):
                    busy |= not self._run(arm, seed, wanted)
        if busy:
            raise Busy

    def _run(self, arm: Arm, seed: int, wanted: list[str]) -> bool:
        with self.store.alone(f"final-{arm.name}-{seed}") as mine:
            wanted = [a for a in wanted if self.store.find(a, "final", seed) is None]
            if mine and wanted:
                print(f"  trp: {arm.name}, seed {seed}", file=sys.stderr, flush=True)
                net, took = self._trained(arm, seed, self.epochs)
                for of_it in sorted(wanted, key=lambda a: "|" not in a):  # the whole one last
                    how = of_it.partition("|")[2]
                    scheme = arm.scheme or how.partition(" ")[0]
                    way = how if arm.scheme else how.partition(" ")[2]
                    energy = arm.energy if arm.scheme else self._energy()
                    if how:
                        items = cut(net, self.task, scheme, way, energy, "test")
                    else:
                        items = answered(net, self.task.parts["test"])
                    self._write(of_it, seed, items, took)
        return mine

    def _trained(self, arm: Arm, seed: int, epochs: int) -> tuple[nn.Module, float]:
        self.clock.spare(self._pace * epochs)
        started = time.perf_counter()
        net = trained(self.task, arm, seed, epochs)
        took = time.perf_counter() - started
        self._pace = took / epochs
        return net, took

    def _write(self, name: str, seed: int, items: str, took: float) -> None:
        result = SplitResult(accuracy=items.count("1") / len(items), items=items)
        steps = self.epochs * (len(self.task.parts["train"][1]) // self.task.batch)
        made = TrialRecord(
            method=name, seed=seed, stage="final", rate=self.task.rate, steps=steps, status="ok",
            test=result, seconds=round(took, 1),
        )  # fmt: skip
        self.store.write(made, self._config)

    # ---- what is chosen on validation images ----

    def arm(self, name: str) -> Arm:
        """Return how the nets of a name are trained. Raises Busy where another process is at its search."""
        if name == "plain":
            return Arm()
        scheme, _, form = name.partition(" trp")
        energy, found = self._energy(), {n: 0.0 for n in LAMBDAS[:1]}
        if form != " bare":
            found = {n: self._looked(Arm("channel", energy, n)) for n in LAMBDAS if n or not form}
        return Arm(scheme, energy, max(found, key=lambda n: found[n]))

    def _energy(self) -> float:
        found = {e: self._looked(Arm("channel", e)) for e in ENERGIES}
        return max(found, key=lambda e: found[e])

    def _looked(self, arm: Arm) -> float:
        """Return the accuracy on validation images at half the multiplications, after half as many epochs."""
        file = self.store.path / "search" / f"{arm.name}.json"
        if not file.exists():
            with self.store.alone(f"search-{arm.name}") as mine:
                if not mine:
                    raise Busy
                if not file.exists():
                    print(f"  trp: search, {arm.name}", file=sys.stderr, flush=True)
                    net, _ = self._trained(arm, SEARCH_SEED, max(1, self.epochs // 2))
                    items = cut(net, self.task, str(arm.scheme), "2x", arm.energy, "validation")
                    kept = {"arm": arm.name, "epochs": max(1, self.epochs // 2), "seed": SEARCH_SEED}
                    kept |= {"accuracy": round(items.count("1") / len(items), 4), "images": len(items)}
                    write_atomically(file, (readable(kept) + "\n").encode())
        return float(json.loads(file.read_text(encoding="utf-8"))["accuracy"])

    def _config(self, folder: str) -> Config:
        of = {k: sha256(b"".join(t.numpy().tobytes() for t in v)).hexdigest() for k, v in self.task.parts.items()}
        names = sorted(a for a in self.store.folders if self.store.folders[a] == folder)
        steps = self.epochs * (len(self.task.parts["train"][1]) // self.task.batch)
        identity = {
            "data": of, "epochs": self.epochs, "period": PERIOD, "energies": ENERGIES, "lambdas": LAMBDAS,
            "versions": computed_by(), "arms": names,
        }  # fmt: skip
        sizes = {k: len(v[1]) for k, v in self.task.parts.items()}
        return Config(
            title="Trained Rank Pruning", created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            command="python -m recipes run", model=ModelRecord(name=self.task.net.__name__, dtype="float32"),
            data=DataRecord(name="images", sizes=sizes, metric="accuracy"), seeds=SEEDS,
            budget=BudgetRecord(kind="steps", value=steps, steps=steps, batch=self.task.batch),
            methods={a: MethodRecord(title=a, options={}, steps=steps) for a in names},
            versions=versions(), hardware=hardware(), looks=(), identity=plain(identity), until=Until(looks=LOOKS),
        )  # fmt: skip
