"""`compress`: a folder with a transformers model in, a smaller one out; the source is only read.

    text ─ windows ─┐
    model ──────────┴─ block by block: moments ─ solve ─ work folder ─ ranks ─ low-rank layers ─ judged ─ folder, report

Killed at any moment, the same call goes on where it was, and so does one that asks for other ranks. Memory above the
model: the statistics and one layer's factorisation of one block, the outputs of one block for all windows, and at the
end the chosen factors.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from torch import nn

from addenda.compressing import measure
from addenda.compressing.folder import METHOD, LowRankConfig
from addenda.compressing.humaneval import problems
from addenda.compressing.report import Report, rows_of, write_report
from addenda.compressing.settings import CompressionSettings
from addenda.compressing.stages import UNSEEN, Say, Stages, digest, put_all
from addenda.compressing.texts import Windows, windows
from addenda.compressing.work import Work
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of, writing
from addenda.core.site.targets import Target
from addenda.models.kinds import task_in, task_of
from addenda.models.load import Loaded, config_of, load_model
from addenda.models.machine import Peak, hardware, resident, versions
from addenda.models.pretrained import quiet
from addenda.reducing.choose import choose
from addenda.train.unfinished import check_apart, identity_of


@checked()
def compress(
    model: str | Path,
    *,
    out: str | Path,
    calibration: str | Path | None = None,
    settings: CompressionSettings | None = None,
    targets: Target | Iterable[Target] = "linear",
    exclude: Iterable[Target] = (),
    dtype: str = "auto",
    device: str | None = None,
    latency: bool = True,
    by_type: bool = True,
    humaneval: int = 0,
    trust_remote_code: bool = False,
    say: Say | None = None,
    leave: Callable[[Path, Report], None] | None = None,
) -> Report:
    """Write the low-rank form of the model in a folder to another folder, and say what that cost and brought.

    calibration: text, see `compressing.texts`; by default the standard library of Python. latency: measure tokens a
    second of both forms, which holds both in memory. by_type: judge each type of layer compressed alone, too.
    humaneval: how many of its problems to try before and after, which executes what the model writes
    (`compressing.humaneval`); 0: none, and nothing is executed. trust_remote_code: run code that the model's folder
    brings. say: called with one line of progress at a time. leave: called with the finished folder, before that gets
    its name, and the report: what it writes there comes to be with all the rest.
    Raises AddendaError for a model, text or settings that cannot be used, a taken target, another run for the same one
    and a full disk. The source is never written to, and an unfinished target keeps what is done.
    """
    if not isinstance(settings, CompressionSettings | None):
        raise AddendaError(f"settings= are CompressionSettings(…), got a {type(settings).__name__}.")
    settings, say, started = settings or CompressionSettings(), say or (lambda _: None), time.perf_counter()
    source, out = path_of(model, "model"), path_of(out, "out").resolve()
    config: Any = config_of(source, trust_remote_code)  # raises where there is no model
    packed = getattr(config, "quantization_config", None)
    if packed:
        raise AddendaError(_not_again(source, packed))
    if task_in(config) == "image":
        raise AddendaError(
            f"{source} holds a model of images ({', '.join(config.architectures or [type(config).__name__])}), and the "
            "statistics are of text. Give a causal LM or a classifier of texts."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise AddendaError(
            f"{source} holds an encoder and a decoder ({', '.join(config.architectures or [type(config).__name__])}), "
            "and blocks are solved one after the other along one stack. Give a causal LM or a classifier of texts."
        )
    check_apart(source, out)
    Work(out, {}).check_free()
    loaded = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    loaded.check_heads(())  # what is judged would be drawn at random
    causal = task_of(loaded.model) == "causal"
    settings = settings.settled(causal)
    if not causal and (wants := settings.wants_loss()):
        raise AddendaError(f"{wants} wants the loss of the next token, and a {type(loaded.model).__name__} has none.")
    problems = _problems(loaded.model, humaneval)
    shapes, dense = choose(loaded.model, targets, exclude, settings.storage)
    calibrate, judge = windows(
        loaded.tokenizer, calibration, settings.samples, settings.length, judge=settings.judge, seed=settings.seed
    )
    _fits(loaded.model, calibrate, judge)
    notes = _enough(calibrate, shapes, settings)
    notes += ["code of the model's folder was run (--trust-remote-code)"] if trust_remote_code else []
    for line in notes:
        say(line)
    with Work(out, settings.of_pieces() | {
        "model": identity_of(source), "dtype": loaded.note, "layers": sorted(shapes), "text": digest(calibrate.rows),
    }) as work:  # fmt: skip
        if work.resumed:
            say(f"going on with {work.folder}")
        stages = Stages(settings, loaded, work, shapes, calibrate, judge, say, notes, problems)
        before = stages.judged_before()
        base = resident(stages.device) or 0
        with Peak(stages.device) as peak:
            stages.calibrate()
            layers = stages.layers()
            chosen_ranks = stages.allocate(layers)
            if settings.sequential:
                stages.solve_again(chosen_ranks)
            low = stages.build(chosen_ranks)
        sizes = {"dense": _numbers(loaded.model)}
        harms = stages.alone(low) if by_type else {}
        speeds = stages.speeds(low) if latency else {}
        put_all(loaded.model, low)
        sizes["compressed"] = _numbers(loaded.model)
        report = Report(
            source=str(source), settings=dataclasses.asdict(settings), dtype=loaded.note, calibration=calibrate.source,
            tokens=calibrate.tokens, judged=judge.tokens, before=before, after=stages.judged(), sizes=sizes,
            alone=harms, speeds=speeds, layers=rows_of(layers, chosen_ranks, stages.errors, stages.uses), dense=dense,
            notes=notes, versions=versions(), hardware=hardware(), seconds=time.perf_counter() - started,
            stages=stages.seconds, memory=None if peak.bytes is None else max(peak.bytes - base, 0),
        )  # fmt: skip
        _save(loaded, low, settings, work, report, leave)
    return report


def _numbers(model: nn.Module) -> dict[str, int]:
    tensors = {id(p): p for p in model.parameters()}.values()
    return {"parameters": sum(p.numel() for p in tensors), "bytes": sum(p.numel() * p.element_size() for p in tensors)}


def _not_again(source: Path, packed: Any) -> str:
    kind = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
    if kind == METHOD:
        return (
            f"{source} has low-rank layers already. Compress the model that it was made of, or its dense form: "
            f"addenda compress --how dense --model {source} --out FOLDER."
        )
    return f"{source} is quantised ({kind}), and factors are found from full weights. Give the model it was made of."


def _fits(model: nn.Module, *texts: Windows) -> None:
    """Raise AddendaError for windows that are longer than what the model can read."""
    limit, longest = measure.positions(model), max(len(row) for text in texts for row in text.rows)
    if limit is not None and longest > limit:
        raise AddendaError(
            f"The windows of text have up to {longest:,} tokens, and this {type(model).__name__} has positions for "
            f"{limit:,}. Give --length {limit} or less."
        )


def _problems(model: nn.Module, count: int) -> list[dict[str, str]]:
    if not count:
        return []
    if task_of(model) != "causal":
        raise AddendaError(f"HumanEval wants a model that writes, and a {type(model).__name__} does not.")
    return problems(count)


def _enough(text: Windows, chosen: dict[str, tuple[int, int]], s: CompressionSettings) -> list[str]:
    """Return notes on a text that is short for the width of the layers. Raises AddendaError where it cannot do."""
    widest = max(chosen, key=lambda p: chosen[p][1])
    n = chosen[widest][1]
    if s.how in UNSEEN:
        return []
    if text.tokens < n:
        raise AddendaError(
            f"{text.source} gives {text.tokens:,} tokens for calibration, fewer than the {n:,} inputs of {widest}: "
            f"what they do not span would be fitted to nothing. Give at least {4 * n:,} tokens (more text, --samples "
            "or --length), or use --how svd, which needs none."
        )
    if text.tokens < 4 * n:
        return [
            f"only {text.tokens:,} tokens for the {n:,} inputs of {widest}: the factors fit these tokens better than "
            f"others like them; four times the width, {4 * n:,}, is safer"
        ]
    return []


def _save(
    loaded: Loaded,
    low: dict[str, nn.Module],
    s: CompressionSettings,
    work: Work,
    report: Report,
    leave: Callable[[Path, Report], None] | None,
) -> None:
    model, tokenizer = cast(Any, loaded.model), cast(Any, loaded.tokenizer)
    entries = {
        p: {"rank": layer.rank, "bias": layer.bias is not None, "form": s.storage}
        for p, layer in cast("dict[str, Any]", low).items()
    }
    model.config.quantization_config = cast(Any, LowRankConfig)(entries, made=f"addenda compress --how {s.how}")
    folder = work.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run may have left
    with writing(folder, report.sizes["compressed"]["bytes"]), quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_report(folder, report)
        if leave is not None:
            leave(folder, report)
    work.finish()
