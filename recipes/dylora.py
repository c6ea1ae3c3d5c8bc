"""DyLoRA (Valipour et al. 2022, arXiv:2210.07558): one training run for every rank?

Claims. (1) One DyLoRA of rank 8, cut to b ranks without further training, does as well at every b as a LoRA that was
trained at rank b. (2) A plain LoRA of rank 8 does not survive the same cut. (3) Covering ranks 1 to 8 costs 4 to 7
times less than a LoRA for each.

Arms, on every linear layer (the paper: query and value, which move this model little): LoRA trained at b = 1, 2, 4 and
8; DyLoRA trained once, both forms (all ranks up to the drawn one learn, or only the drawn one: `frozen`), judged at
each b; LoRA of rank 8 cut to its first b ranks, and, which the paper leaves out, to the best b ranks of its change by a
singular value decomposition.
"""

import statistics
from argparse import Namespace

import torch

from addenda import AddendaError
from addenda.comparing.arm import Arm, center, parse_arm
from addenda.comparing.entries import BudgetRecord, Config, MethodRecord, SplitResult, TrialRecord, as_json
from addenda.comparing.record import Record
from addenda.comparing.search import Look, driven, grid, search
from addenda.comparing.stats import analyse
from addenda.comparing.subject import Subject
from addenda.comparing.trial import TrialSettings, attached, judged, looks
from addenda.core.adapter.handle import Adapter
from addenda.exporting.nested import set_rank
from addenda.models.machine import hardware, versions
from addenda.train.evaluate import evaluate
from addenda.train.fit import fit
from recipes.common import (
    VALIDATION,
    Finding,
    Interval,
    all_of,
    conclude,
    gap,
    identity,
    options,
    recorded,
    search_steps,
    subject,
)
from recipes.kept import Runs

TOP, RANKS = 8, (1, 2, 4, 8)
TARGETS = "linear"
DYLORA, FROZEN = f"dylora:rank={TOP},frozen=False", f"dylora:rank={TOP},frozen=True"
MARGIN = 0.02


def main() -> None:
    given = options(__doc__, "dylora")
    on = None if given.old else subject(given.model)
    with Runs(given, identity(given, subject=on) if on else {}) as runs:
        told(given, on, runs)


def told(given: Namespace, on: Subject | None, runs: Runs) -> None:
    """Run what is missing, and conclude. on: None where nothing is run."""
    specs = [*(f"lora:rank={b}" for b in RANKS), DYLORA, FROZEN]
    print(f"{len(specs)} arms, {given.seeds} seeds, {given.steps} steps; about 15 minutes on 2 quiet cores.")
    rates = {spec: best_rate(runs, on, spec, given) for spec in specs}
    made = {}
    for seed in range(given.seeds):
        for spec in specs:
            name = f"final-{_file(spec)}-seed{seed}"
            made[spec, seed] = runs.once(name, lambda s=spec, n=seed: trained(on, s, n, rates[s], given.steps))
    record = as_record(given, on, runs, made, rates)
    found = analyse(record)
    nested = {b: gap(found, f"DyLoRA at {b}", f"LoRA {b}") for b in RANKS}
    frozen = {b: gap(found, f"DyLoRA frozen at {b}", f"LoRA {b}") for b in RANKS}
    cut = {b: gap(found, f"LoRA 8 cut to {b}", f"LoRA {b}") for b in RANKS[:-1]}
    svd = {b: gap(found, f"LoRA 8, best {b}", f"LoRA {b}") for b in RANKS[:-1]}
    step = {s: statistics.median(made[s, n]["step_seconds"] for n in range(given.seeds)) for s in specs}
    lora = statistics.mean(step[s] for s in specs[: len(RANKS)])
    findings = [
        Finding(
            f"at every rank within {MARGIN:.0%} of a LoRA trained for it",
            "; ".join(f"b = {b}: {nested[b].points()}, frozen {frozen[b].points()}" for b in RANKS),
            every(nested.values(), -MARGIN),
        ),
        Finding(
            "a plain LoRA does not survive the cut",
            "; ".join(f"b = {b}: first ranks {cut[b].points()}, by SVD {svd[b].points()}" for b in RANKS[:-1]),
            below(cut[1]),
        ),
        Finding(
            "covers ranks 1 to 8 at 4 to 7 times less cost",
            f"a step takes {step[DYLORA] / lora:.2f} of LoRA's (frozen {step[FROZEN] / lora:.2f}), so eight runs "
            f"of the same length cost {8 * lora / step[DYLORA]:.1f} times as much as one",
            "holds" if 8 * lora / step[DYLORA] >= 4 else "does not hold",
        ),
    ]
    table = [
        {"arm": a, "accuracy": round(e.mean, 4), "low": round(e.low, 4), "high": round(e.high, 4)}
        for a, e in found.test.items()
    ]
    conclude(given, "DyLoRA, arXiv:2210.07558", findings, table)


def best_rate(runs: Runs, on: Subject | None, spec: str, given: Namespace) -> float:
    if given.old:
        return runs.once(f"final-{_file(spec)}-seed0", dict)["rate"]
    rates, steps = grid(center(spec), given.rates), search_steps(given.steps)

    def run(look: Look) -> TrialRecord:
        name = f"search-{_file(spec)}-{look.rate:g}-{look.steps}-seed{look.seed}"
        made = runs.once(name, lambda: trained(on, spec, look.seed, look.rate, look.steps, search=True))
        return TrialRecord.of({"method": spec, "stage": "search", **made})

    chosen = driven(search(rates, steps, steps), run)
    if chosen.rate is None:
        raise AddendaError(f"{spec} is void: {chosen.why}.")
    return chosen.rate


def trained(on: Subject | None, spec: str, seed: int, rate: float, steps: int, search: bool = False) -> dict:
    """One run; unless it is of a search, its test answers at each rank that it can be cut to."""
    assert on is not None
    arm, settings = _arm(spec), TrialSettings(batch=16)
    with attached(on, arm, settings, seed) as adapter:
        made = fit(
            on.model, adapter, on.splits["train"], steps=steps, batch=16, rate=rate, seed=seed, attention=None,
            eval=on.splits["validation"].first(VALIDATION), eval_every=looks(steps, "search"),
        )  # fmt: skip
        told = {"status": "ok", "rate": rate, "steps": steps, "seed": seed, "step_seconds": made.step_seconds}
        told["validation"] = [[e["step"], {k: e[k] for k in ("loss", "accuracy", "items")}] for e in made.evaluations]
        if search:
            return told
        test = on.splits["test"]
        told["test"] = as_json(judged(evaluate(on.model, examples=test)))
        if spec.startswith("dylora"):
            for b in RANKS:
                set_rank(adapter, b)
                told[f"at {b}"] = as_json(judged(evaluate(on.model, examples=test)))
        elif arm.method.options(defaults=True)["rank"] == TOP:
            whole = adapter.state_dict()
            for b in RANKS[:-1]:
                for how, function in (("first", first), ("best", best)):
                    adapter.load_state_dict(function(adapter, whole, b))
                    told[f"{how} {b}"] = as_json(judged(evaluate(on.model, examples=test)))
    return told


@torch.no_grad()
def first(adapter: Adapter, whole: dict, b: int) -> dict:
    """The first b ranks, at the scale that they were trained with."""
    cut = {k: t.clone() for k, t in whole.items()}
    for path in _paths(whole):
        cut[f"{path}/A"][b:] = 0
        cut[f"{path}/B"][:, b:] = 0
    return cut


@torch.no_grad()
def best(adapter: Adapter, whole: dict, b: int) -> dict:
    """The b largest singular directions of B A."""
    cut = {k: t.clone() for k, t in whole.items()}
    for path in _paths(whole):
        A, B = whole[f"{path}/A"].double(), whole[f"{path}/B"].double()
        left, small = torch.linalg.qr(B)
        U, S, Vt = torch.linalg.svd(small @ A, full_matrices=False)
        S[b:] = 0
        cut[f"{path}/B"].copy_(left @ U * S.sqrt())
        cut[f"{path}/A"].copy_(S.sqrt()[:, None] * Vt)
    return cut


def _paths(tensors: dict) -> list[str]:
    return [k.removesuffix("/A") for k in tensors if k.endswith("/A")]


def as_record(given: Namespace, on: Subject | None, runs: Runs, made: dict, rates: dict) -> Record:
    """The answers as the record of a comparison whose arms are (method, rank judged at)."""
    answers = {f"LoRA {b}": (f"lora:rank={b}", "test") for b in RANKS}
    answers |= {f"DyLoRA at {b}": (DYLORA, f"at {b}") for b in RANKS}
    answers |= {f"DyLoRA frozen at {b}": (FROZEN, f"at {b}") for b in RANKS}
    answers |= {f"LoRA 8 cut to {b}": (f"lora:rank={TOP}", f"first {b}") for b in RANKS[:-1]}
    answers |= {f"LoRA 8, best {b}": (f"lora:rank={TOP}", f"best {b}") for b in RANKS[:-1]}
    methods = {arm: MethodRecord(title=arm, options={}, rates=(rates[spec],)) for arm, (spec, _) in answers.items()}
    if on is None:
        return recorded(given.out, answers)
    config = Config(
        title="DyLoRA: one run for every rank", model=on.about_model, data=on.about_data, methods=methods,
        budget=BudgetRecord(kind="steps", value=given.steps, steps=given.steps, batch=16),
        seeds=tuple(range(given.seeds)), versions=versions(), hardware=hardware(),
        command="python -m recipes.dylora", identity=runs.identity, looks=(),
    )  # fmt: skip
    there = (given.out / "config.json").exists()
    record = Record.read(given.out).changed(config) if there else Record.write_config(given.out, config)
    for arm, (spec, key) in answers.items():
        for seed in range(given.seeds):
            run = made[spec, seed]
            if record.find(arm, "final", seed) is None:
                kept = {k: run[k] for k in ("status", "rate", "steps", "seed")}
                test = SplitResult.of(run[key])
                record = record.write_trial(TrialRecord(method=arm, stage="final", **kept, test=test))
    return Record.read(given.out)


def every(gaps, limit: float) -> str:
    """Whether all of several differences are above a limit."""
    return all_of(g.above(limit) for g in gaps)


def below(x: Interval) -> str:
    return "holds" if x.high < 0 else "does not hold" if x.low > -MARGIN else "cannot tell"


def _arm(spec: str) -> Arm:
    return parse_arm(spec, TARGETS)


def _file(spec: str) -> str:
    return spec.replace(":", "-").replace(",", "-").replace("=", "")


if __name__ == "__main__":
    main()
