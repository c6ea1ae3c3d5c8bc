"""A sitting of the real part of `recipes.trans_lora`: what is missing, what it takes, as much as there is time for.

Every unit is timed in the small before any is run: a few steps, a batch of samples, of answers, of judging, on this
machine as it is now. A sitting begins no unit that would not end in it, and a record is written after each. Of several
processes each is at a seed of a task of its own. What a seed's arms share lies in the cache folder; where that is gone
it is made again for a seed of which arms are missing that read it, and for no other.
"""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from addenda import AddendaError
from addenda.core.adapter.attach import attach, detach
from addenda.core.disk.access import read_json
from addenda.core.disk.atomic import readable, write_atomically
from addenda.core.file.identity import base_of, plain, versions
from addenda.data.encode import encode
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit
from addenda.transferring.inputs import inputs_of
from addenda.transferring.label import label
from addenda.transferring.question import Wording, asked
from addenda.transferring.synthesise import Sampler, Synthesis
from recipes.seconds import told
from recipes.store import Clock, TimeUp, do_all, lock_of, lost
from recipes.trans_lora import begin
from recipes.trans_lora_claims import SEEDS
from recipes.trans_lora_real import FIRST, METHOD, READ, Bench, Setting, Unit, units
from recipes.trans_lora_tasks import NUMBERS, TASKS, data, drawn

STEPS, SMALL = 4, 16  # of training, and of everything else, that are timed
STEADY = 0.03
FILES = {"source": "source.safetensors", "bundle": "task.bundle", "filtered": "filtered.safetensors"}
Seconds = Mapping[str, float]  # of a step on target and source, of a sample, an answer, a judged text, an item


def sitting(
    root: Path, *, tasks: Sequence[str] | None = None, quick: bool = False, within: float = 3600.0,
    only_cost: bool = False, seeds: int | None = None, bench: Bench | None = None, processes: int = 1,
) -> bool:  # fmt: skip
    """Print the plan, then run what is missing, and return whether all of it is there. Killed, the next call goes on.

    processes: of how many the plan is; each is started for itself, with one thread. Raises AddendaError for a task that
    is not there, and for records of another setting.
    """
    if processes < 1:
        raise AddendaError(f"--processes is {processes}, and a number of at least 1 is wanted.")
    torch.set_num_threads(1)
    chosen = tuple(tasks or ((NUMBERS,) if quick else TASKS))
    if unknown := [t for t in chosen if t not in TASKS]:
        raise AddendaError(f"There is no task {unknown[0]!r} here. There are {', '.join(TASKS)}.")
    bench = bench or Bench(Setting())
    every = units(chosen, range(seeds or (2 if quick else SEEDS["real"])), quick)
    left = missing(root, bench, every)
    print(f"{len(every) - len(left)} of {len(every)} runs are on record.")
    if not left:
        return True
    seconds = timed(bench)
    for line in plan(left, seconds, bench.setting, within, healed(bench), processes):
        print(line)
    if only_cost:
        return False
    clock = Clock(within / 3600)
    bench.tick = lambda: clock.spare(0)
    root.joinpath("real").mkdir(parents=True, exist_ok=True)
    identity = plain({
        "setting": asdict(bench.setting), "versions": versions(), "target": base_of(bench.side("target").model),
    })  # fmt: skip
    try:
        for task in dict.fromkeys(u.task for u in left):
            begin(root / "real" / task, identity)
        do_all(left, lambda unit: _ran(unit, root, bench, every, clock, seconds), clock)
    except TimeUp:
        print("The time is up. The same command goes on.")
        return False
    print(steady(root, chosen))
    return True


def _ran(unit: Unit, root: Path, bench: Bench, every: Sequence[Unit], clock: Clock, seconds: Seconds) -> bool:
    """Do a unit that is missing; False where another process is at its seed."""
    lock = lock_of(root, f"{unit.task}-{unit.seed}")
    if not lock.take():
        return False
    try:
        left = missing(root, bench, [u for u in every if (u.task, u.seed) == (unit.task, unit.seed)])
        if any(u in read_by(unit) for u in left):  # another process began with these
            return False
        if unit in left:
            clock.spare(seconds_of(unit, seconds, bench.setting))
            print(f"  {unit}", flush=True)
            file = record_file(root, unit)
            made = bench.run(unit, read_json(file) if file.exists() else {})
            write_atomically(file, (readable(made) + "\n").encode())
    finally:
        lock.release()
    return True


def record_file(root: Path, unit: Unit) -> Path:
    """Return the record of a unit's seed, which all of its arms share."""
    return root / "real" / unit.task / "runs" / f"seed-{unit.seed}.json"


def missing(root: Path, bench: Bench, every: Sequence[Unit]) -> list[Unit]:
    """Return the units that are not on record, and those whose files these read and the cache has lost, in order."""
    left = {u for u in every if not on_record(root, u)}
    again = lost(left, read_by, lambda u: (bench.place(u) / FILES[u.what]).exists())
    return [u for u in every if u in left or u in again]


def read_by(unit: Unit) -> list[Unit]:
    """Return the units whose files a unit reads."""
    return [Unit(unit.task, unit.seed, what) for what in READ.get(unit.what, READ["an arm"])]


def on_record(root: Path, unit: Unit) -> bool:
    """Return whether a unit was run to its end."""
    file = record_file(root, unit)
    return file.exists() and unit.what in read_json(file).get("seconds", {})


def healed(bench: Bench) -> bool:
    """Return whether the truncated base is there, healed."""
    return (bench.home / f"base-{bench.setting.layers}" / "config.json").exists()


def timed(bench: Bench) -> Seconds:
    """Return seconds here and now. The source is timed as it is before it is healed."""
    s = bench.setting
    source, target = bench.truncated(s.layers), bench.side("target")
    own, _ = drawn(NUMBERS, max(SMALL, s.batch * STEPS), 0)
    texts = list(inputs_of(own).texts)[:SMALL]
    found: dict[str, float] = {}
    for name, side in (("target step", target), ("source step", source)):
        adapter = attach(side.model, METHOD, name="timed")
        made = fit(side.model, adapter, encode(own, side.tokenizer), steps=STEPS, batch=s.batch, rate=s.rate,
                   attention=None)  # fmt: skip
        found[name] = made.step_seconds
        detach(side.model, "timed")
    test = encode(data(NUMBERS, "test", range(SMALL)), target.tokenizer)
    found["item"] = _per(SMALL, lambda: evaluate(target.model, examples=test, batch=SMALL))
    sampler = Sampler(target.model, target.tokenizer, texts[:5], temperature=s.temperature, lines=s.lines, batch=SMALL)
    found["sample"] = _per(SMALL, lambda: sampler.more(Synthesis()))
    prompts: Any = list(data(NUMBERS, "test", range(SMALL)).examples)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"max_new_tokens": s.max_new_tokens, "batch": SMALL, "folder": folder}
        found["answer"] = _per(SMALL, lambda: label(source.model, source.tokenizer, prompts, **options))
    rows = asked(source.model, source.tokenizer, Wording.of(source.tokenizer, NUMBERS), texts)
    found["judged"] = _per(SMALL, lambda: evaluate(source.model, examples=rows, batch=SMALL))
    return found


def _per(count: int, run: Any) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) / count


def seconds_of(unit: Unit, seconds: Seconds, s: Setting) -> float:
    """Return what a unit takes: training, judging, sampling, answers, by the seconds of each."""
    judged, learned = s.test * seconds["item"], s.steps * seconds["target step"]
    samples = min(s.tries, 2.0 * s.count / s.lines)  # twice N lines: half of them pass, as a guess
    answers = s.count * seconds["answer"]
    return {
        "source": s.steps * seconds["source step"] + 1.5 * judged,
        "bundle": s.count * seconds["sample"] / 2 + s.judge_steps * (seconds["source step"] + 20 * seconds["judged"]),
        "pool": samples * (seconds["sample"] + seconds["judged"]),
        "real": learned + judged, "copied": judged, "projected": judged + 60, "seeds": learned + judged,
        "svft": learned + judged + answers + s.steps * seconds["source step"],
        "chain": 1.0 * (learned + judged + 3 * answers + samples * (seconds["sample"] + seconds["judged"])),
    }.get(unit.what, learned + judged + answers)  # fmt: skip


def plan(
    left: Sequence[Unit], seconds: Seconds, s: Setting, within: float, is_healed: bool, processes: int = 1
) -> list[str]:
    """Return the runs × their seconds, by what they are, and how many sittings of so many processes they make."""
    lines = ["milliseconds of a " + ", ".join(f"{name} {1000 * v:,.0f}" for name, v in seconds.items())]
    total = 0.0
    for what in dict.fromkeys(u.what for u in left):
        of = [u for u in left if u.what == what]
        one = seconds_of(of[0], seconds, s)
        total += one * len(of)
        lines.append(f"{what:<14} {len(of):>4} runs × {told(one):>8} = {told(one * len(of)):>9}")
    if not is_healed:
        heal = s.heal_steps * seconds["source step"] * s.heal_batch * s.heal_length / (s.batch * 48)
        total += heal
        lines.append(f"{'healing':<14} {1:>4} run  × {told(heal):>8} = {told(heal):>9}")
    longest = max(seconds_of(u, seconds, s) for u in left)
    sittings = max(1, math.ceil(total / within / processes))
    by = f", {processes} processes" if processes > 1 else ""
    lines.append(
        f"{'in all':<14} {len(left):>4} runs {'':>10} = {told(total):>9}: {sittings} sittings of {told(within)}{by}"
    )
    if longest > within:
        lines.append(f"The longest run takes {told(longest)}, more than a sitting: give a longer --within.")
    return lines


def steady(root: Path, tasks: Sequence[str]) -> str:
    """Return whether the arm of real labels is steady over its first seeds, in words."""
    from recipes.trans_lora import records_in

    said = []
    for task in tasks:
        values = [
            r["accuracies"]["real"] for r in records_in(root / "real" / task).values() if "real" in r["accuracies"]
        ]
        if len(values) < FIRST:
            said.append(f"{task}: {len(values)} of the {FIRST} seeds of real labels that tell how steady it is")
            continue
        mean = sum(values) / len(values)
        spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        enough = "steady enough" if spread <= STEADY else "more than 3: train longer (Setting.steps), in another --root"
        said.append(f"{task}: real labels vary by {100 * spread:.1f} points between seeds, {enough}")
    return "; ".join(said)
