"""Trained Rank Pruning (Xu et al. 2018, arXiv:1812.02402): can a net be cut to low rank with no fine-tuning?

Claims. (1) After Trained Rank Pruning (TRP) a net is cut at its training threshold without loss. (2) At as many
multiplications it is better than a plainly trained net that is decomposed afterwards (channel-wise: Zhang et al.;
spatial-wise: Jaderberg et al.). (3) The nuclear norm adds to that. (4) At half the multiplications the loss is about a
point: 91.74 to 90.50 at 2.17 times fewer is published for CIFAR-10. (5), not in the paper: it is faster by the clock.

Arms, for both schemes: a plain net and its decompositions, TRP, TRP + nuclear norm. No arm is fine-tuned. Each is
judged as it comes out, as in the paper, and with its batch norms recalibrated on training images, which the plain net
needs more. TRP's energy and λ are chosen on a validation split, by the accuracy at half the multiplications, with
another seed.

`--data fashion` (default): ResNet-20 on 10,000 images of Fashion-MNIST (`apt-get install dataset-fashion-mnist`).
`--data digits`: a net of three convolutions on the digits of scikit-learn, in a minute.
"""

import argparse
import hashlib
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import addenda as ad
from addenda.core.file.identity import versions
from addenda.models.machine import pick_dtype
from recipes.common import Finding, Interval, all_of, conclude, in_turns, over_seeds
from recipes.kept import Runs, parsed, part_of
from recipes.nets import Task, accuracy, digits, fashion, varied

PERIOD, ENERGIES, LAMBDAS = 20, (0.98, 0.95, 0.9), (3e-3, 1e-2, 3e-2)
TIMES = (1.5, 2.0, 3.0)  # how many times fewer multiplications of the whole net
POSTHOC = {"channel": "Zhang", "spatial": "Jaderberg"}
SEARCH_SEED = 1000


# ---- one run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """scheme: None for a plain net."""

    scheme: str | None = None
    energy: float = 1.0
    nuclear: float = 0.0

    @property
    def name(self) -> str:
        return "plain" if self.scheme is None else f"{self.scheme}-{self.energy:g}-{self.nuclear:g}"


def trained(task: Task, arm: Arm, seed: int, epochs: int, dtype: torch.dtype) -> nn.Module:
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
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = net(images)
            F.cross_entropy(logits.float(), y[rows]).backward()
            if trp:
                trp.before_step()
            optimizer.step()
            optimizer.zero_grad()
            halves.step()
    return net.eval()


def judged(net: nn.Module, task: Task, scheme: str, part: str, points: list[dict]) -> list[dict]:
    """Each point of one decomposition: accuracy as it is and with batch norms recalibrated, multiplications, ranks."""
    some, made = task.parts["train"][0][:2000], []
    for point in points:
        rule = {k: v for k, v in point.items() if k == "energy"}
        rule = rule or {"keep": share(net, scheme, some[:1], point["times"])}
        low = ad.factorise(net, scheme, **rule, example=some[:1])
        told = {
            **point, "scheme": scheme, "speedup": low.speedup, "parameters": list(low.parameters),
            "ranks": low.ranks, "as it is": accuracy(low.model, task.parts[part]),
        }  # fmt: skip
        ad.recalibrate(low.model, some.contiguous(memory_format=torch.channels_last).split(500))
        told["recalibrated"] = accuracy(low.model, task.parts[part])
        made.append(told)
    return made


def share(net: nn.Module, scheme: str, example: Tensor, times: float) -> float:
    """What of the layers' multiplications must stay so that the whole net's are `times` fewer."""
    whole, layers = ad.macs(net, example), ad.factorise(net, scheme, energy=1, example=example).layers
    chosen = sum(x.macs[0] for x in layers if x.macs)
    return 1 - (1 - 1 / times) * sum(whole.values()) / chosen


def latency(task: Task, made: list[dict]) -> dict:
    """Of every run whose ranks are known: time of the dense net and of its forms at the points of `TIMES`.

    Time asks nothing of values, so that a fresh net is cut to these ranks.
    """
    found: dict = {}
    for r in made:
        nets = {"dense": task.net().to(memory_format=torch.channels_last).eval()}
        for p in r["points"]:
            if p.get("times") and "ranks" in p:
                nets[f"{p['scheme']}, {p['times']:g} ×"] = ad.factorise(
                    nets["dense"], p["scheme"], ranks=p["ranks"]
                ).model
        if len(nets) > 1:
            x = task.parts["train"][0]
            found[f"{r['arm']}-seed{r['seed']}"] = {
                str(n): in_turns(nets, x[:n].contiguous(memory_format=torch.channels_last)) for n in (1, 64)
            }
    return found


def run(task: Task, arm: Arm, seed: int, epochs: int, dtype: torch.dtype) -> dict:
    """A finished run: the net's accuracy, and that of its decompositions at every point, on the test images."""
    started = time.perf_counter()
    net = trained(task, arm, seed, epochs, dtype)
    took = time.perf_counter() - started
    points = [{"energy": e} for e in ENERGIES] + [{"times": t} for t in TIMES]
    found = [
        point for scheme in ([arm.scheme] if arm.scheme else POSTHOC)
        for point in judged(net, task, scheme, "test", points)
    ]  # fmt: skip
    dense = accuracy(net, task.parts["test"])
    return {"arm": arm.name, "seed": seed, "epochs": epochs, "seconds": took, "dense": dense, "points": found}


def look(task: Task, arm: Arm, epochs: int, dtype: torch.dtype) -> dict:
    """A run of the search: the accuracy on the validation images at half the multiplications."""
    net = trained(task, arm, SEARCH_SEED, epochs, dtype)
    return judged(net, task, str(arm.scheme), "validation", [{"times": 2.0}])[0]


# ---- the claims ------------------------------------------------------------------------------------------------------


def main() -> None:
    given = arguments()
    parts = part_of(given.part)[1]
    if given.old:
        with Runs(given, {}) as runs:
            return told(given, None, torch.float32, "", 0, runs)
    torch.set_num_threads(given.threads)
    dtype, why = pick_dtype(given.dtype)
    task = {"fashion": fashion, "digits": digits}[given.data](given.images, given.test)
    epochs = given.epochs or task.epochs
    of = {k: hashlib.sha256(b"".join(t.numpy().tobytes() for t in v)).hexdigest() for k, v in task.parts.items()}
    identity = {
        "data": of, "epochs": epochs, "dtype": str(dtype), "period": PERIOD, "energies": ENERGIES, "lambdas": LAMBDAS,
        "times": TIMES, "seeds": given.seeds, "versions": versions(),
    }  # fmt: skip
    with Runs(given, identity, shared=parts > 1) as runs:
        told(given, task, dtype, why, epochs, runs)


def told(given: argparse.Namespace, task: Task | None, dtype: torch.dtype, why: str, epochs: int, runs: Runs) -> None:
    """Run what is missing, and conclude. task: None where nothing is run."""
    part, parts = part_of(given.part)
    searching = max(1, epochs // 2)
    searches = [Arm("channel", e) for e in ENERGIES]
    if task is not None:
        say_cost(given, task, dtype, why, 5 * given.seeds * epochs + (len(searches) + len(LAMBDAS)) * searching)
    energy = chosen(runs, task, searches, searching, dtype).energy
    nuclear = chosen(runs, task, [Arm("channel", energy, n) for n in LAMBDAS], searching, dtype).nuclear
    arms = [Arm()] + [Arm(s, energy, n) for s in POSTHOC for n in (0.0, nuclear)]
    todo = [(arm, seed) for seed in range(given.seeds) for arm in arms]
    for arm, seed in [] if given.latency or given.old else todo[part::parts]:
        runs.once(f"{arm.name}-seed{seed}", lambda a=arm, s=seed: run(task, a, s, epochs, dtype))
    if not given.old and (
        missing := [f"{a.name}-seed{s}" for a, s in todo if not (runs.folder / f"{a.name}-seed{s}.json").exists()]
    ):
        print(f"{len(missing)} runs are another process's: start this again when they are done.", file=sys.stderr)
        return
    made = {(a.name, s): runs.once(f"{a.name}-seed{s}", dict) for a, s in todo}
    clock = runs.once("latency", lambda: latency(task, list(made.values())), again=True) if given.latency else None
    clock = clock or runs.known("latency")
    table = [row for arm in arms for row in rows(arm, [made[arm.name, s] for s in range(given.seeds)])]
    settings = {} if task is None else {
        "data": given.data, "epochs": epochs, "images": len(task.parts["train"][1]), "test": len(task.parts["test"][1]),
        "seeds": given.seeds, "dtype": str(dtype), "energy": energy, "nuclear": nuclear, "period": PERIOD,
    }  # fmt: skip
    conclude(given, "Trained Rank Pruning, arXiv:1812.02402", findings(given.seeds, made, energy, nuclear, clock),
             [settings, *table])  # fmt: skip


def say_cost(given: argparse.Namespace, task: Task, dtype: torch.dtype, why: str, total: int) -> None:
    """What all runs take, from a few steps. total: epochs."""
    print(
        f"{total} epochs of {len(task.parts['train'][1]):,} images in {5 * given.seeds} runs and a search, products in "
        f"{str(dtype).removeprefix('torch.')} ({why}): about {total * epoch_seconds(task, dtype) / 45:.0f} minutes "
        "of a processor's time, judging included.", file=sys.stderr,
    )  # fmt: skip


def epoch_seconds(task: Task, dtype: torch.dtype) -> float:
    """Of the processor's time, not the clock's: others may be at work here. From five steps, behind a first one."""
    took, most = {}, min(6, len(task.parts["train"][1]) // task.batch)
    for steps in (1, most):
        few = {"train": (task.parts["train"][0][: steps * task.batch], task.parts["train"][1][: steps * task.batch])}
        started = time.process_time()
        trained(replace(task, parts=few), Arm(), 0, 1, dtype)
        took[steps] = time.process_time() - started
    return (took[most] - took[1]) / max(most - 1, 1) * len(task.parts["train"][1]) / task.batch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.trp", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("records/recipes/trp"), help="record; an old one goes on")
    parser.add_argument("--data", choices=("fashion", "digits"), default="fashion")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: 12 of Fashion-MNIST, 40 of the digits")
    parser.add_argument("--images", type=int, default=10_000, help="to train on")
    parser.add_argument("--test", type=int, default=10_000, help="to judge by, at most")
    parser.add_argument("--dtype", default="auto", help="of the products in training; judging is float32")
    parser.add_argument("--threads", type=int, default=1, help="of this process")
    parser.add_argument("--latency", action="store_true", help="measure time, now and alone: the machine must be quiet")
    parser.add_argument("--part", default="0/1", help="I/N: N processes share the runs, and this one is the I-th")
    return parsed(parser)


def chosen(runs: Runs, task: Task | None, arms: list[Arm], epochs: int, dtype: torch.dtype) -> Arm:
    """The arm with the best accuracy on the validation images at half the multiplications, as it is."""
    found = [runs.once(f"search-{a.name}", lambda a=a: look(task, a, epochs, dtype)) for a in arms]
    return max(zip(arms, found, strict=True), key=lambda pair: pair[1]["as it is"])[0]


def at(made: dict, scheme: str, **point: float) -> dict:
    """The result of one decomposition of a run."""
    return next(p for p in made["points"] if p["scheme"] == scheme and all(p.get(k) == v for k, v in point.items()))


def findings(seeds: int, made: dict, energy: float, nuclear: float, clock: dict | None) -> list[Finding]:
    """The claims over the seeds. clock: what `latency` found."""

    def over(value) -> Interval:
        return over_seeds(value(k) for k in range(seeds))

    def got(arm: str, s: str, k: int, what: str = "as it is", **point: float):
        return at(made[arm, k], s, **point)[what]

    def ahead(a: str, b: str, s: str, how: str = "as it is") -> Interval:
        return over(lambda k: got(a, s, k, how, times=2.0) - got(b, s, k, how, times=2.0))

    def cut(arm: str, s: str) -> Interval:
        return over(lambda k: got(arm, s, k, energy=energy) - made[arm, k]["dense"])

    uncut, better, recalibrated, adds, loss, told = {}, {}, {}, {}, {}, {}
    for s, who in POSTHOC.items():
        trp, nuc = Arm(s, energy).name, Arm(s, energy, nuclear).name
        uncut[s] = cut(trp, s)
        times = {a: fmean(got(a, s, k, "speedup", energy=energy) for k in range(seeds)) for a in (trp, "plain")}
        told[s] = (
            f"{s}: {uncut[s].points()} at {times[trp]:.2f} × fewer multiplications, plain net "
            f"{cut('plain', s).points()} at {times['plain']:.2f} ×"
        )
        better[who], recalibrated[who] = ahead(nuc, "plain", s), ahead(nuc, "plain", s, "recalibrated")
        adds[s] = ahead(nuc, trp, s)
        loss[s] = over(lambda k, s=s, a=nuc: got(a, s, k, times=2.0) - made["plain", k]["dense"])
    return [
        Finding(
            f"cut at its training threshold ({energy:.0%} of the energy) without loss, here within half a point",
            "; ".join(told.values()), all_of(v.above(-0.005) for v in uncut.values()),
        ),
        Finding(
            "at 2 × fewer multiplications better than decomposing a plain net",
            "; ".join(f"TRP + nuclear − {w}: {better[w].points()}" for w in better),
            all_of(v.above() for v in better.values()),
        ),
        Finding(
            "the same with batch norms recalibrated on both sides (not in the paper)",
            "; ".join(f"TRP + nuclear − {w}: {recalibrated[w].points()}" for w in recalibrated),
            all_of(v.above() for v in recalibrated.values()),
        ),
        Finding(
            "the nuclear norm adds to TRP, at 2 × fewer multiplications",
            "; ".join(f"{s}: {adds[s].points()}" for s in adds), all_of(v.above() for v in adds.values()),
        ),
        Finding(
            "the loss at 2 × fewer multiplications is at most the published 1.24 points (CIFAR-10, 2.17 ×)",
            "; ".join(f"TRP + nuclear, {s}: {loss[s].points()}" for s in loss),
            all_of(v.above(-0.0124) for v in loss.values()),
        ),
        _by_the_clock(clock, [Arm(s, energy, nuclear).name for s in POSTHOC]),
    ]  # fmt: skip


def _by_the_clock(clock: dict | None, arms: list[str]) -> Finding:
    """Half the multiplications against the dense net, turn by turn: half of the turns lie between the ends."""
    claim = "2 × fewer multiplications are faster by the clock (not in the paper)"
    if clock is None:
        return Finding(claim, "not measured yet: python -m recipes.trp --latency, on a quiet machine", "cannot tell")
    told, parts = [], []
    for arm in arms:
        form = f"{arm.partition('-')[0]}, 2 ×"
        for n in ("1", "64"):
            took = [c[n] for name, c in clock.items() if name.startswith(f"{arm}-seed")]
            ratios = [a / b for t in took for a, b in zip(t["dense"], t[form], strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            parts.append("holds" if low > 1 else "does not hold" if high < 1 else "cannot tell")
            told.append(f"{arm}, {n} image{'s' if n != '1' else ''}: {middle:.2f} × ({low:.2f} to {high:.2f})")
    return Finding(claim, "; ".join(told), all_of(parts))


def rows(arm: Arm, made: list[dict]) -> list[dict]:
    """The table of one arm: means over seeds."""
    found = [{"arm": arm.name, "point": "dense", "accuracy": fmean(m["dense"] for m in made)}]
    for first in made[0]["points"]:
        point = {k: first[k] for k in ("energy", "times") if k in first}
        held = [at(m, first["scheme"], **point) for m in made]
        found.append({
            "arm": arm.name, "scheme": first["scheme"], **point,
            **{k: round(fmean(p[k] for p in held), 4) for k in ("speedup", "as it is", "recalibrated")},
            "parameters": round(fmean(p["parameters"][1] for p in held)),
        })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
