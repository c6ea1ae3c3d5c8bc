"""What `recipes.order` takes: its runs as a list, what matters first, a few steps of each kind timed, and a plan."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from addenda.ranking.order.adapter import OrderAdapter
from addenda.ranking.order.losses import OrderLoss
from recipes.order_arms import LOSSES, Bench
from recipes.order_measured import kept
from recipes.order_setting import ADAPTERS, ALIGNMENT, QUERIES, RIDGES, TUNED, Setting, run_name
from recipes.order_tuned import tuned
from recipes.seconds import told

STEPS = 3  # that are timed, after one that is not


@dataclass(frozen=True)
class Unit:
    """One run with a record of its own. what: "features", whose arm is the part's name, or "run"."""

    name: str
    what: str
    subject: str
    arm: str
    images: int = 0
    seed: int = 0

    @property
    def block(self) -> str:
        """What is run with all of its seeds, or left out."""
        return f"{self.subject}: features" if self.what == "features" else f"{self.subject}: {self.arm} {self.images}"

    def run(self, bench: Bench) -> dict:
        if self.what == "features":
            return bench.features(self.subject, self.arm, self.seed)
        return bench.run(self.subject, self.arm, self.images, self.seed)


def units(setting: Setting) -> list[Unit]:
    """Return all runs: first what the claims need, then the other baselines and sizes, then the dearest."""
    most, fewer = max(setting.images), [n for n in reversed(setting.images) if n != max(setting.images)]
    first = [("mosaics", arm, n) for n in reversed(setting.images) for arm in RIDGES]
    first += [("mosaics", arm, most) for arm in ("dual", "blind", "regression", "pairwise", "shuffled")]
    first += [("mosaics", arm, n) for n in fewer for arm in ("dual", "blind")]
    small = {s: [(s, arm, setting.few) for arm in (*RIDGES, "dual", "blind")] for s in ("grades", "textile")}
    rest = [("mosaics", "ranknet", most)]
    rest += [("mosaics", arm, n) for n in fewer for arm in ADAPTERS if arm not in ("dual", "blind")]
    names = [("mosaics", ALIGNMENT, n) for n in reversed(setting.images)]
    dear = [[("mosaics", arm, n) for arm in TUNED] for n in (most, *fewer)]
    made = _features("mosaics", setting) + _runs(first, setting)
    made += _features("grades", setting) + _runs(small["grades"], setting)
    made += _runs(dear[0], setting)
    made += [Unit("mosaics-features-names", "features", "mosaics", "names"), *_runs(names, setting)]
    made += _runs(rest, setting)
    made += _features("textile", setting) + _runs(small["textile"], setting)
    return made + [unit for some in dear[1:] for unit in _runs(some, setting)]


def _features(subject: str, setting: Setting) -> list[Unit]:
    parts = [("test", 0), ("validation", 0), *(("train", seed) for seed in setting.seeds)]
    return [Unit(f"{subject}-features-{which}{f'-{seed}' * (which == 'train')}", "features", subject, which, seed=seed)
            for which, seed in parts]  # fmt: skip


def _runs(blocks: Sequence[tuple[str, str, int]], setting: Setting) -> list[Unit]:
    return [Unit(run_name(s, arm, n, seed), "run", s, arm, n, seed) for s, arm, n in blocks for seed in setting.seeds]


# ---- seconds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speeds:
    """Seconds on this machine now, of one process: by image, step, sentence, or run."""

    seconds: Mapping[str, float]

    def of(self, unit: Unit, setting: Setting) -> float:
        share = 1 if unit.subject == "mosaics" else 2
        if unit.what == "features":
            counts = {"test": setting.test // share, "validation": setting.validation, "names": setting.names,
                      "train": setting.most(unit.subject)}  # fmt: skip
            return counts[unit.arm] * self.seconds["image"]
        judged = self.seconds["judging"]
        if unit.arm in ADAPTERS:
            texts = sum(len(of) for of in QUERIES[unit.subject].values())
            steps = setting.of(setting.steps, unit.images) * self.seconds[_step(unit.arm)]
            scored = self.seconds["sentence by pairs" if unit.arm == "pairwise" else "sentence"]
            return judged + steps + texts * scored / share
        if unit.arm in TUNED:
            steps = setting.of(setting.tuned_steps, unit.images) * self.seconds[unit.arm]
            return judged + steps + setting.test * self.seconds["image"]
        return judged + self.seconds["ridge"]

    def total(self, left: Sequence[Unit], setting: Setting) -> float:
        return sum(self.of(unit, setting) for unit in left)


def _step(arm: str) -> str:
    return "step of one head" if arm in LOSSES and not LOSSES[arm].needs_pairs else "step of both heads"


def timed(bench: Bench, left: Sequence[Unit]) -> Speeds:
    """Time a few steps of what is among these runs, on made-up images: nothing is trained or kept."""
    s, towers = bench.setting, bench.towers
    pixels = np.zeros((16, s.side, s.side, towers.preparation.channels), np.uint8)
    shape = towers.patches(towers.preparation.tensor(torch.from_numpy(pixels))).shape
    found = {"image": _seconds(lambda: towers.patches(towers.preparation.tensor(torch.from_numpy(pixels)))) / 16}
    arms = {u.arm for u in left if u.what == "run"}
    texts = [q for of in QUERIES["mosaics"].values() for q in of]
    values = dict.fromkeys(texts, np.arange(s.test) % 4.0)
    scores = {q: np.random.default_rng(k).normal(size=s.test) for k, q in enumerate(texts)}
    groups = {group: list(of) for group, of in QUERIES["mosaics"].items()}
    found["judging"] = _seconds(lambda: kept(scores, values, groups, s.draws, "classes"), 1)
    found["ridge"] = 2.0  # pixels decoded, and a kernel of 500 images: no need to be exact
    if arms & {*ADAPTERS}:
        patches = torch.from_numpy(np.random.default_rng(0).normal(size=(s.test, *shape[1:]))).float()
        adapter, group = OrderAdapter(bench.settings, towers.image_width, towers.text_width), patches[: s.batch]
        tokens, rated = towers.tokens(texts[0]), torch.arange(len(group)) % 4.0
        optimizer = torch.optim.AdamW(adapter.parameters())
        for arm in ("dual", "regression"):
            loss = LOSSES.get(arm, OrderLoss())

            def step(loss: OrderLoss = loss) -> None:
                loss.of_values(adapter(group, *tokens, pairs=loss.needs_pairs), rated).backward()
                optimizer.step()
                optimizer.zero_grad()

            found[_step(arm)] = _seconds(step)
        found["sentence"] = _seconds(lambda: bench.scored(adapter, towers, patches, texts[0], None), 1)
        found["sentence by pairs"] = _seconds(lambda: bench.scored(adapter, towers, patches, texts[0], group), 1)
    for arm in TUNED:
        if arm in arms:
            few = pixels[: s.tuned_batch], np.arange(min(16, s.tuned_batch) * 2.0).reshape(-1, 2) % 3
            lora = s.lora if arm == "lora" else ""

            def steps(count: int, few=few, lora: str = lora) -> None:
                tuned(towers, *few, lora=lora, steps=count, batch=s.tuned_batch, rate=1e-5, head_rate=1e-5, seed=0)

            found[arm] = max(_seconds(lambda: steps(3), 1) - _seconds(lambda: steps(1), 1), 1e-6) / 2
    return Speeds(found)


def _seconds(make: Callable[[], object], times: int = STEPS) -> float:
    make()
    started = time.perf_counter()
    for _ in range(times):
        make()
    return (time.perf_counter() - started) / times


# ---- plan ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What will be run, in order. said: what is left out, in words; seconds: that all of it takes one process."""

    units: tuple[Unit, ...]
    seconds: float
    said: tuple[str, ...]


def plan(
    setting: Setting, speeds: Speeds, within: float | None, processes: int, done: Callable[[Unit], bool],
    cannot: Callable[[Unit], str] = lambda unit: "",
) -> Plan:  # fmt: skip
    """Take blocks in order while they fit into so many seconds of so many processes; a block is all seeds of an arm.

    cannot: why a unit cannot be run, "" where it can.
    """
    room = float("inf") if within is None else within * processes
    blocks: dict[str, list[Unit]] = {}
    why: dict[str, str] = {}
    for unit in units(setting):
        if reason := cannot(unit):
            why[reason] = unit.subject
        elif not done(unit):
            blocks.setdefault(unit.block, []).append(unit)
    chosen, out, seconds = [], [], 0.0
    for block, of in blocks.items():
        more = speeds.total(of, setting)
        if seconds + more > room:
            out.append(block)
            continue
        chosen, seconds = [*chosen, *of], seconds + more
    said = [f"left out: {subject}. {reason}" for reason, subject in why.items()]
    if out:
        said.append(f"left out, for a later call: {', '.join(out)}")
    return Plan(tuple(chosen), seconds, tuple(said))


def cost_lines(left: Sequence[Unit], speeds: Speeds, setting: Setting, processes: int) -> list[str]:
    """Return what the runs that are not done take, by subject and arm, and what so many processes need for all."""
    kinds: dict[str, list[Unit]] = {}
    for unit in left:
        kinds.setdefault(f"{unit.subject}: {'features' if unit.what == 'features' else unit.arm}", []).append(unit)
    lines = [f"{kind:<28} {len(of):>4} runs {told(speeds.total(of, setting)):>9}" for kind, of in kinds.items()]
    total = speeds.total(left, setting)
    by = f"{told(total / processes)} of {processes} processes" if processes > 1 else ""
    return [*lines, f"{'in all':<28} {len(left):>4} runs {told(total):>9}  {by}".rstrip()]
