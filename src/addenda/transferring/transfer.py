"""`transfer`: an adapter's task moves to another base, without the data it was trained on (Trans-LoRA).

    found = addenda.transfer("task.bundle", "models/old", "models/new", "moved/", method="dora:rank=8")
    print(found)            # what was made, what of it was taken, how alike the two answer, what it cost

    bundle ── seeds ── synthesise (target) ── filter (judge) ── label (source + adapter) ── distil (target) ── out/

Source and target may be of any family, with any tokenizer, and the two adapters of any method: the target makes inputs
of the bundle's seeds, the discriminator keeps those that are like the task's, the old adapter answers them, and a new
one learns the answers (arXiv:2405.17258). First eight samples go through all stages (`rehearse`), which says what the
run will take. Killed at any moment, the same call goes on where it was and ends with the same bits; its work is in
OUT.unfinished (`train.unfinished`) until OUT is there: adapter.safetensors, the bundle for the next transfer, report.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.adapter.assign import Spec
from addenda.core.adapter.handle import Adapter
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.ranges import MANY, Range
from addenda.core.disk.access import path_of, writing
from addenda.core.file.identity import base_of, digest, plain, versions
from addenda.core.file.save import save
from addenda.core.file.tokenizer import mark
from addenda.core.method.catalogue import build
from addenda.core.site.targets import Target
from addenda.data.encode import end_ids, use_chat
from addenda.data.read import read
from addenda.models.load import config_of
from addenda.train import checkpoint
from addenda.train.fit import Progress
from addenda.train.left_alone import left_alone
from addenda.train.settings import check_options
from addenda.train.start import read_start
from addenda.train.tune import starting_rate
from addenda.train.unfinished import Unfinished
from addenda.train.unfinished import check_apart as check_out
from addenda.transferring import sides as of_sides
from addenda.transferring.account import account, check_judged
from addenda.transferring.bundle import Bundle, read_bundle
from addenda.transferring.distil import FURTHER, DistilResult, Mode, check_mode, distil
from addenda.transferring.gather import FILE, Gathered, gather
from addenda.transferring.inputs import inputs_of
from addenda.transferring.label import Labels, check_end, label
from addenda.transferring.rehearse import Rehearsal, agree, as_json, rehearse
from addenda.transferring.report import Report, write_report
from addenda.transferring.sides import Sides
from addenda.transferring.synthesise import Caps, Sampler

ADAPTER, BUNDLE = "adapter.safetensors", "transfer.bundle"
EPOCHS = 10  # where neither steps nor epochs are given
OPTIONS = tuple(n for n in FURTHER if n not in ("progress", "memory_floor"))


class Work(Unfinished):
    """The files of one transfer until its folder is there."""

    finished = "result"

    def pieces(self) -> list[Path]:
        return [self.folder / FILE]

    def _clear(self) -> None:
        checkpoint.drop(self.folder / "checkpoints")
        super()._clear()


@dataclass(frozen=True)
class TransferResult:
    """What `transfer` made. model: the target with the adapter on it, which acts; report: what transfer.json says."""

    path: Path
    adapter: Adapter
    model: nn.Module
    tokenizer: Any
    gathered: Gathered
    labels: Labels
    distilled: DistilResult
    report: Report

    def __str__(self) -> str:
        return str(self.report)


@checked(also=OPTIONS, special={"n": Range(1, MANY, whole=True)})
def transfer(
    bundle: str | Path | Bundle,
    source: of_sides.Given,
    target: of_sides.Given,
    out: str | Path,
    *,
    adapter: Any = None,
    judge_model: of_sides.Given | None = None,
    method: Spec | None = None,
    mode: Mode = "sequence",
    top_k: int | None = None,
    start: str | Path | None = None,
    targets: Target | Iterable[Target] | None = None,
    exclude: Iterable[Target] = (),
    n: int | None = None,
    temperature: float = 1.0,
    top_p: float | None = None,
    lines: int = 1,
    same_order: int = 1,
    format: Any = None,
    threshold: float = 0.0,
    tries: int | None = None,
    max_tokens: int | None = None,
    max_minutes: float | None = None,
    max_new_tokens: int = 64,
    steps: int | None = None,
    epochs: float | None = None,
    batch: int = 8,
    sample_batch: int = 32,
    seed: int = 0,
    eval_data: Any = None,
    name: str = "default",
    within: float | None = None,
    ask: Callable[[str], bool] | None = None,
    dtype: Any = "auto",
    device: Any = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
    leave: Callable[[Path], None] | None = None,
    **options,
) -> TransferResult:
    """Move the adapter of a bundle to a target, and write the new one with a report to the folder `out`.

    bundle: of `make_bundle`, its file or itself. source, target: folders, or loaded (model, tokenizer). adapter: the
    source's file, or its name on a loaded source; None: the file beside the bundle that is its own by hash.
    judge_model: the model that the discriminator was trained on, where that is not the source (a second transfer).
    method, targets, exclude, start, mode, top_k: of the new adapter, see `distil`. n: inputs to learn from, the
    bundle's count unless said. temperature, top_p, lines, same_order, format, tries, max_tokens, max_minutes: see
    `synthesise`; sample_batch: samples at once. threshold: of the discriminator's margin; where a cap comes before n
    have passed, the best of the others fill up. max_new_tokens: of an answer of the teacher's. steps, or epochs (10 if
    neither), of `batch`. eval_data: real examples, if there are any, to judge source, target and student by.
    within: seconds; where the dry run predicts more, `ask` is asked with a sentence, and without it nothing begins.
    leave: is given the finished folder before it gets its name. options: those of `fit`, such as rate.

    Raises AddendaError before the first long stage for a bundle, adapter or base that do not belong together, source
    and target in one, seeds or prompts that do not fit, logits across vocabularies or chat templates, models without an
    end of text, a generator that yields nothing usable, eval_data that are no single questions, and a folder that is
    taken; and for a full disk, with what is done kept.
    """
    say = say or (lambda _: None)
    given = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
    of_sides.check_apart(source, target)
    place = path_of(out, "out").resolve()
    folders = (source, target, *([judge_model] if judge_model is not None else []))
    for folder in [path_of(f) for f in folders if isinstance(f, str | Path)]:
        check_out(folder, place)
        config_of(folder, trust_remote_code)
    if steps is not None and epochs is not None:
        raise AddendaError(f"Give steps or epochs, not both; got steps={steps} and epochs={epochs}.")
    method = build(method) if isinstance(method, str) else method
    if start is None and options.get("rate") is None:
        options["rate"] = starting_rate(build("lora") if method is None else method)
    check_options(steps=steps or 1, batch=batch, seed=seed, **options)
    begun = None if start is None else read_start(start, method, place).sha256
    n = given.count if n is None else n
    steps = math.ceil((epochs or EPOCHS) * math.ceil(n / batch)) if steps is None else steps
    caps = Caps.of(n, tries, max_tokens, max_minutes)
    real = None if eval_data is None else read(path_of(eval_data) if isinstance(eval_data, str | Path) else eval_data)
    if real is not None:
        inputs_of(real)
    work = Work(place, {})
    work.check_free()
    say("reading the models")
    opening = {"adapter": adapter, "judge_model": judge_model, "dtype": dtype, "device": device}
    with of_sides.opened(given, source, target, **opening, trust_remote_code=trust_remote_code) as sides:
        student = sides.target
        sampler = Sampler(
            student.model, student.tokenizer, given.seeds, temperature=temperature, top_p=top_p, seed=seed,
            batch=sample_batch, lines=lines, same_order=same_order, format=format,
        )  # fmt: skip
        teacher = (sides.source.model, sides.source.tokenizer) if mode == "logits" else None
        check_mode(mode, student.model, student.tokenizer, teacher, top_k, options)
        if mode == "logits" and use_chat(student.tokenizer, None) is not given.chat:
            raise AddendaError(
                "The bundle's adapter answers prompts without the chat template that both tokenizers have, and a "
                "student by logits would have to learn the same prompts with it. Take mode='sequence'."
            )
        if real is not None:
            check_judged(given, sides, real)  # now, and not behind the last stage
        check_end(end_ids(sides.source.model, sides.source.tokenizer, given.chat))
        check_end(end_ids(student.model, student.tokenizer))
        labelling = {"max_new_tokens": max_new_tokens, "batch": sample_batch, "chat": given.chat}
        learning: dict[str, Any] = {
            "method": method, "mode": mode, "teacher": teacher, "top_k": top_k, "start": start, "targets": targets,
            "exclude": tuple(exclude), "seed": seed, "name": name, **options,
        }  # fmt: skip
        settings = {
            "n": n, "temperature": temperature, "top_p": top_p, "lines": lines, "same_order": same_order,
            "format": sampler.format.said, "threshold": threshold, **asdict(caps), "max_new_tokens": max_new_tokens,
            "steps": steps, "batch": batch, "sample_batch": sample_batch, "seed": seed, "mode": mode, "top_k": top_k,
            "method": str(method or "lora"), "targets": str(targets), "exclude": str(tuple(exclude)), "start": begun,
            **options,
        }  # fmt: skip
        work.identity = plain(_identity(given, sides) | {"settings": settings})
        with work, left_alone(student.model):
            rehearsal = _rehearsed(work, lambda: rehearse(
                sampler, sides, given, n, caps, threshold=threshold, steps=steps, batch=batch, labelling=labelling,
                distilling=learning,
            ), within, ask, say)  # fmt: skip
            gathered = gather(
                sampler, sides, n, caps, threshold=threshold, batch=sample_batch, folder=work.folder, say=say
            )
            with sides.teaching():
                prompts = [given.prompt(text) for text in gathered.texts]
                labels = label(sides.source.model, sides.source.tokenizer, prompts, say=say, **labelling)
                began = time.perf_counter()
                made = distil(
                    student.model, student.tokenizer, labels, steps=steps, batch=batch, progress=progress, resume=True,
                    out=work.folder / "checkpoints", **learning,
                )  # fmt: skip
                spent = time.perf_counter() - began
            told = account(given, sides, settings, rehearsal, gathered, labels, made, spent, real, work.resumed)
            _write(work, made.adapter, given.under(student.model, student.tokenizer, made.adapter), told, leave)
            work.finish()
    return TransferResult(place, made.adapter, student.model, student.tokenizer, gathered, labels, made, told)


def _identity(bundle: Bundle, sides: Sides) -> dict[str, Any]:
    """Return what decides the bits of a transfer besides its settings."""
    about = {"name": bundle.name, "seeds": bundle.seeds, "system": bundle.system, "adapter": bundle.adapter}
    return {
        "bundle": digest([plain(about), digest(bundle.file.hex())]), "source": plain(bundle.teacher.base),
        "target": base_of(sides.target.model), "tokenizer": mark(sides.target.tokenizer).sha256,
        "template": digest(getattr(sides.target.tokenizer, "chat_template", None)), "versions": versions(),
    }  # fmt: skip


def _rehearsed(work: Work, run: Callable[[], Rehearsal], within, ask, say) -> dict[str, Any]:
    """Return the dry run of this transfer: the one that it began with, where it goes on."""
    known = (work.notes() or {}).get("rehearsal")
    if isinstance(known, dict):
        say(f"going on with {work.folder}")
        return known
    try:
        found = run()
        say(str(found))
        agree(found, within, ask)
    except BaseException:
        work.drop()
        raise
    work.note(rehearsal=as_json(found))
    return as_json(found)


def _write(work: Work, adapter: Adapter, bundle: Bundle, report: Report, leave: Callable[[Path], None] | None) -> None:
    """Write the finished folder, which has its name only when all is in it."""
    folder = work.folder / work.finished
    with writing(folder):
        folder.mkdir(exist_ok=True)
        save(adapter, folder / ADAPTER)
        bundle.save(folder / BUNDLE)
        write_report(folder, report)
    if leave is not None:
        leave(folder)
