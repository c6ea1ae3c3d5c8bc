"""`tune`: a model, data and a method in; an adapter, its measurements and everything to repeat it out.

    made = addenda.tune("models/SmolLM2", "sums.jsonl", "lora:rank=16", out="run/", steps=200, eval_data=0.1)
    made = addenda.tune("models/dinov2", "photos/", "lora", out="run/", subset="8/class", image_size=112)
    print(made.after, made.tokens_per_second)

The folder `out` holds adapter.safetensors, README.md (a model card), run.json (everything to run it again) and
checkpoints/. Killed at any moment, the same call goes on where it stopped and ends with the same bits.
"""

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, get_args

from torch import nn

from addenda.core.adapter.assign import Spec
from addenda.core.adapter.attach import attach
from addenda.core.adapter.grow import by_text
from addenda.core.base.arguments import checked, names_of, unknown_names
from addenda.core.base.errors import AddendaError
from addenda.core.disk.access import path_of
from addenda.core.disk.lock import one_at_a_time
from addenda.core.disk.place import folder_for, is_first
from addenda.core.file.save import save
from addenda.core.method.catalogue import Info, build, catalogue
from addenda.core.method.contract import Method
from addenda.core.site.targets import Target
from addenda.data.batches import batches
from addenda.data.encode import Overflow, encode
from addenda.data.encoded import Encoded
from addenda.data.labels import LabelKind
from addenda.data.limits import padded, within
from addenda.data.masked import Vocabulary
from addenda.data.prepare import Preparation
from addenda.data.read import read
from addenda.data.subsets import Subset
from addenda.models.kinds import check_module, check_reads
from addenda.models.load import Loaded
from addenda.models.machine import device_of, pick_device, pick_dtype, resident
from addenda.quantizing.quantize import Form
from addenda.train import checkpoint
from addenda.train.card import check_ours, is_finished, mend, write_all
from addenda.train.evaluate import evaluate
from addenda.train.fit import FitResult, Progress, fit
from addenda.train.generate import generate
from addenda.train.inputs import check_loaded, context, read_inputs
from addenda.train.left_alone import left_alone
from addenda.train.loss import score
from addenda.train.masked import Masking
from addenda.train.new_tokens import keep_tokenizer, tokens_left_alone, with_new_tokens
from addenda.train.progress import announce, attaching, shown, silent, understood
from addenda.train.settings import check_options
from addenda.train.sharding import check_launch
from addenda.train.start import attach_start, read_start
from addenda.train.theirs import PASSED, translated
from addenda.train.together import agreed
from addenda.train.tracking import Trackers, Tracking, trackers_of

__all__ = ["TuneResult", "evaluate", "generate", "tune"]

FURTHER = (
    *names_of(fit, without=("eval", "memory_floor", "begun_with", "tracking")),
    *PASSED,
)  # what `tune` hands on to `fit`
COLUMNS = names_of(read, without=("task", "split"))
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class TuneResult(FitResult):
    """What `fit` returns, the model with the adapter on it, and the evaluations before and after (or None)."""

    model: nn.Module | None = None
    tokenizer: Any = None
    before: dict | None = None  # {"loss", "accuracy", "items"} of the base
    after: dict | None = None
    path: Path | None = None  # adapter.safetensors
    skipped: tuple[str, ...] = ()  # corrupt images that were left out


def _listed(given: Any) -> Any:
    """Return several targets as a list, which can be read twice and written down."""
    return sorted(given, key=str) if isinstance(given, Set) else [*given] if isinstance(given, Iterator) else given


def _left_alone(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: a call that ends with an error, or with Ctrl-C, leaves a loaded model as it was, adapters too.

    So it leaves the tokenizer where tokens are added to it.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = args[0] if args else kwargs.get("model")
        model = given if isinstance(given, nn.Module) else None
        with left_alone(model), tokens_left_alone(kwargs.get("tokenizer") if kwargs.get("add_tokens") else None):
            try:
                return function(*args, **kwargs)
            except KeyboardInterrupt as error:
                error.add_note(_kept(kwargs.get("out"), kwargs.get("resume", True), model))
                raise

    return call


@checked(also=FURTHER, translate=translated)
@_left_alone
@one_at_a_time
def tune(
    model: str | Path | nn.Module,
    data: Any,
    method: Spec | Mapping[Target, Spec] | None = None,
    *,
    start: str | Path | None = None,
    tokenizer: Any = None,
    targets: Target | Iterable[Target] | None = None,
    exclude: Iterable[Target] = (),
    also_train: str | Sequence[str] = "auto",
    head_bits: int | None = None,
    add_tokens: Iterable[str] = (),
    out: str | Path | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch: int = 16,
    seed: int = 0,
    eval_data: Any = None,
    max_length: int | None = None,
    overflow: Overflow = "error",
    chat: bool | None = None,
    columns: dict | None = None,
    subset: str | None = None,
    image_size: int | None = None,
    skip_corrupt: bool = False,
    label_kind: LabelKind | None = None,
    dtype: Any = "auto",
    device: Any = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = True,
    progress: Progress | bool = True,
    report_to: Trackers = "none",
    name: str = "default",
    task: Literal["masked"] | None = None,
    head: str | Path | None = None,
    head_steps: int | None = None,
    train_head: bool = False,
    vocabulary: Vocabulary = "texts",
    **options,
) -> TuneResult:
    """Train an adapter on a model and data, judged before and after; with `out` it is written there with its record.

    model: a folder of transformers' (causal LM, classifier or encoder, of texts or images), or a loaded module with
    tokenizer= (for images a `Preparation`). data: what `data.read` takes; columns: its options by name; label_kind:
    "class" or "number", where labels could be either. Classes are in the order of a kept head's names, else of the
    data's, and the adapter's file carries the names. subset: learn from a small part, see `subsets`, and judge by its
    other half where there is no eval_data. image_size: the side of images in pixels, where not what the folder says;
    skip_corrupt: leave out those that cannot be decoded. method, targets, exclude: see `attach`; methods that look at
    data first see eight batches of the training data. also_train: modules trained as whole copies; "auto": a
    classifier's head and whatever came without weights; head_bits: in so many bits, see `attach`. add_tokens: new
    tokens, whose rows are trained too (`train.new_tokens`); the tokenizer with them is saved in `out`/tokenizer. steps
    or epochs (1 if neither). eval_data: data, or a share of it to hold out by questions. max_length, overflow, chat:
    see `encode`. start: an adapter file whose values the run begins with; method (if not given), places and heads are
    then the file's, the optimizer and all schedules new (`train.start`).
    dtype: "auto" is bfloat16 where it is fast; a loaded module keeps its own. quantize: a form that the base's linear
    layers are kept in, see `quantizing.quantize`; "nf4" with LoRA is QLoRA. trust_remote_code: run code that the
    model's folder brings, which is never done unasked. progress: shown on stderr, or a function, or False.
    report_to: trackers that are told of every loss ("tensorboard", "wandb", "trackio", "mlflow", or several), whose
    files stand in `out`/trackers; no part of what the run is (`train.trackers`). task: "masked" has an encoder of texts
    fill in words of plain texts; head, head_steps, train_head and vocabulary are of that (`train.masked`).
    options: rate (if not given, where the catalogue starts a search for the method's), schedule, eval_every,
    early_stop, consistency, and what makes it fast and small: attention, loss, compile, group, optimizer,
    checkpointing, dead, … as in `fit`.

    Names of transformers' TrainingArguments that have an equal here are translated (learning_rate is rate), those that
    a launcher of several processes reads are passed on, and all others are refused (`train.theirs`).

    Raises AddendaError for whatever a user could mend: model, data, method, settings, an interrupted run of others.
    Options are checked before anything is read. A call that ends with an error or with Ctrl-C leaves a loaded module
    as it was, without the adapter; what is kept then are the checkpoints in `out`, from which the same call goes on.
    """
    if steps is not None and epochs is not None:
        raise AddendaError(f"Give steps or epochs, not both; got steps={steps} and epochs={epochs}.")
    asked, add_tokens = _built(method), [*by_text(add_tokens)]
    targets, exclude, also_train = (_listed(given) for given in (targets, exclude, also_train))
    others = {"add_tokens": add_tokens, "subset": subset, "image_size": image_size, "skip_corrupt": skip_corrupt,
              "label_kind": label_kind, "chat": chat, "overflow": overflow if overflow != "error" else None,
              "also_train": also_train if also_train != "auto" and train_head else None,
              "start": start if train_head else None, "quantize": quantize}  # fmt: skip
    masking = Masking.asked(
        task, model, others, head=head, head_steps=head_steps, train_head=train_head, vocabulary=vocabulary
    )
    begun = None if start is None else read_start(start, asked, None if out is None else path_of(out, "out"))
    if begun and add_tokens:
        raise AddendaError(
            "add_tokens= are new, and a run that begins with a file has the tokens of the file. Give one."
        )
    chosen = begun.method if begun else build("lora") if asked is None else asked
    if options.get("rate") is None:
        options["rate"] = starting_rate(chosen)
    if begun and dtype == "auto" and not isinstance(model, nn.Module):
        dtype = begun.dtype
    loading = {"dtype": dtype, "device": device, "seed": seed, "trust_remote_code": trust_remote_code}
    loading |= {k: v for k, v in (("image_size", image_size), ("quantize", quantize)) if v}
    columns = (columns or {}) | ({"label_kind": label_kind} if label_kind else {})
    model, data, eval_data = (path_of(x) if isinstance(x, str | Path) else x for x in (model, data, eval_data))
    _check(model, tokenizer, eval_data, columns, subset, overflow, out, loading, task)
    check_launch()
    trackers = trackers_of(report_to)
    if trackers and out is None:
        raise AddendaError("report_to= writes into the folder of the run: give out=.")
    check_options(steps=steps or 1, batch=batch, seed=seed, **options)
    judged = eval_data is not None or subset is not None or hasattr(data, "splits")
    _check_pairs(options, judged, out is not None)
    folder = None if out is None else folder_for(out, apart=(model, data, eval_data))
    if folder is not None:
        check_ours(folder)
    if not is_first():
        progress = False
    say = announce if progress is True else silent
    say(f"reading {'the data' if isinstance(model, nn.Module) else 'the data and the model'}")
    known_labels = begun.header.labels if begun else ()
    loaded, train, held = (
        masking.read(model, data, eval_data, tokenizer, columns, loading) if masking else
        read_inputs(model, data, eval_data, tokenizer, columns, subset, loading, known_labels)
    )  # fmt: skip
    model, tokenizer = loaded.model, loaded.tokenizer
    seen = isinstance(tokenizer, Preparation)
    limit = max_length if seen else within(max_length or context(model, tokenizer), model)
    texts = masking and masking.encoded(train, held, tokenizer, limit, seed)
    if masking and texts:
        if progress is True:
            understood(texts[0].said)
        ways: dict[str, Any] = {"batch": batch, "seed": seed, "resume": resume, "say": say}
        loaded = masking.headed(loaded, texts[0], folder, **ways)
        also_train = masking.heads(model) if train_head else also_train
    heads = loaded.heads if also_train == "auto" else ([also_train] if isinstance(also_train, str) else also_train)
    heads = begun.heads if begun else heads
    loaded.check_heads(tuple(heads))
    spec, places = chosen, targets
    if add_tokens:
        spec, places = with_new_tokens(model, tokenizer, add_tokens, chosen, targets), None
    reading: dict[str, Any] = {"max_length": limit, "overflow": overflow, "chat": chat, "skip_corrupt": skip_corrupt}
    encoded, *more = (
        [e for e in texts if e is not None] if texts else
        [encode(d, tokenizer, **reading) for d in (train, held) if d is not None]
    )  # fmt: skip
    encoded, *more = [padded(e, model, batch) for e in (encoded, *more)]
    tested = more[0] if more else None
    if progress is True and not masking:
        understood(encoded.said)
    steps = steps if steps is not None else math.ceil((epochs or 1) * math.ceil(len(encoded) / batch))
    say(_about(loaded, encoded, tested, steps))
    before = _judge(model, tested)
    floor = resident(device_of(model))
    adapter = attach_start(
        begun, model, method=asked, targets=targets, exclude=exclude, also_train=also_train, head_bits=head_bits,
        labels=train.labels or (), tokenizer=tokenizer, name=name,
    ) if begun else attach(
        model, spec, targets=places, exclude=exclude, also_train=heads, head_bits=head_bits, name=name, seed=seed,
        calibration=calibration(model, encoded, batch, seed), loss=lambda m, b: score(m, b, encoded.kind).mean,  # type: ignore[arg-type]
        progress=attaching() if progress is True else None,
    )  # fmt: skip
    adapter.labels = train.labels or ()
    if folder is not None and is_first():
        keep_tokenizer(folder, adapter, tokenizer)
    say(f"training {adapter.trainable:,} numbers: {adapter.kinds} at {len(adapter.methods)} sites; the first step …")
    with shown(f"tune {getattr(chosen, 'name', '')}") if progress is True else nullcontext(progress or None) as tell:
        made = fit(
            model, adapter, encoded, steps=steps, batch=batch, seed=seed, eval=tested, progress=tell,
            out=None if folder is None else folder / "checkpoints", resume=resume and folder is not None,
            memory_floor=floor, begun_with=begun.sha256 if begun else None,
            tracking=Tracking.under(folder, trackers), **options,
        )  # fmt: skip
    last = made.evaluations[-1] if made.evaluations else None
    ended = last is not None and last["step"] == (made.best_step or made.steps)
    kept = {k: last[k] for k in ("loss", "accuracy", "items")} if ended and last else None
    after = kept or _judge(model, tested)
    path = None
    if folder is not None:
        path = folder / "adapter.safetensors"
        told = {
            "method": _described(chosen), "targets": targets or (None if begun else getattr(chosen, "targets", None)),
            "exclude": exclude, "also_train": list(heads), "head_bits": head_bits, "add_tokens": add_tokens,
            "steps": steps, "epochs": epochs, "batch": batch, "seed": seed, "max_length": limit,
            "overflow": overflow, "chat": chat, "columns": columns, "note": loaded.note, "subset": subset,
            "image_size": image_size, "images": str(tokenizer) if train.form == "image" else None,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "quantize": quantize,
            "trust_remote_code": loaded.trust_remote_code, **options,
            **({"start": str(begun.path), "start_sha256": begun.sha256} if begun else {}),
            **({"task": task, **vars(masking), "head": head and str(head)} if masking else {}),
        }  # fmt: skip
        known = {"train": train.source, "form": train.form, "examples": len(encoded), "digest": train.digest}
        known |= {"labels": train.labels, "skipped": len(encoded.skipped)}
        if held is not None:
            known |= {"eval": held.source, "eval_examples": len(more[0]), "eval_digest": held.digest}
        target, about = folder, {"options": told, "data": known, "before": before, "after": after}
        if not agreed(lambda: is_finished(target, made)):
            if is_first() or adapter.sharded:  # of a sharded model all processes take part
                save(adapter, path, heads=not train_head)
                if masking:
                    masking.keep(model, target)
            agreed(lambda: write_all(target, adapter, base=loaded.source, made=made, **about))
        elif not adapter.sharded:
            agreed(lambda: mend(target, adapter, heads=not train_head))
    skipped = tuple(name for e in (encoded, *more) for name in e.skipped)
    return TuneResult(
        **vars(made), model=model, tokenizer=tokenizer, before=before, after=after, path=path, skipped=skipped
    )


def _about(loaded: Loaded, encoded: Encoded, tested: Encoded | None, steps: int) -> str:
    """Return what a run is going to do, for whoever waits for its first step."""
    count = sum(p.numel() for p in loaded.model.parameters())
    note = f", {loaded.note.partition(' (')[0]}" if loaded.note else ""
    size = f" of {encoded.tokens:,} tokens" if encoded.unit == "tokens" else ""
    judged = f", {len(tested):,} to judge by" if tested is not None else ""
    return (
        f"{type(loaded.model).__name__} of {count:,} numbers{note}; {len(encoded):,} examples{size}{judged}; "
        f"{steps:,} steps"
    )


def _kept(out: Any, resume: Any, model: nn.Module | None) -> str:
    """Return what an interrupted call has left, and how to go on."""
    folder = None if out is None else Path(out) / "checkpoints"
    last = None if folder is None else checkpoint.latest(folder)
    if out is None:
        said = "Nothing is kept: without out= there are no checkpoints."
    elif last is None:
        said = f"Nothing is kept yet: no checkpoint is in {folder}. The same call begins again."
    else:
        step = last.name.partition("-")[2]
        how = "The same call goes on there." if resume else "The same call, without resume=False, goes on there."
        said = f"Kept: step {step} of the run, in {last}. {how}"
    return said if model is None else f"{said} The model is as it was before the call, without the adapter."


def _check(
    model, tokenizer, eval_data, columns: dict, subset: str | None, overflow: str, out, loading: dict, task
) -> None:
    """Raise AddendaError for options of `tune`, as far as they can be judged before anything is read."""
    if isinstance(model, nn.Module):
        check_module(model, task)
        check_reads(model)
        check_loaded(model, tokenizer, loading)
    elif not isinstance(model, str | Path):
        raise AddendaError(f"Expected a folder or a torch.nn.Module as the model, got {type(model).__name__}.")
    elif tokenizer is not None:
        raise AddendaError("A folder brings its own tokenizer; give tokenizer= with a loaded model only.")
    if not isinstance(out, str | Path | None):
        raise AddendaError(f"out= is a folder, got {type(out).__name__}.")
    if unknown := [k for k in columns if k not in COLUMNS]:
        raise AddendaError(unknown_names(unknown, COLUMNS, "columns="))
    if overflow not in get_args(Overflow):
        raise AddendaError(f"overflow must be {', '.join(map(repr, get_args(Overflow)))}, got {overflow!r}.")
    if isinstance(eval_data, numbers.Number) and not (isinstance(eval_data, float) and 0 < eval_data < 1):
        raise AddendaError(f"A share of the data to judge by is between 0 and 1, got eval_data={eval_data!r}.")
    if subset is not None:
        Subset.parse(subset)
    if (form := loading.get("quantize")) is not None:
        Form.parse(form)
    pick_dtype(loading["dtype"], pick_device(loading["device"]))


def _check_pairs(options: dict, judged: bool, kept: bool) -> None:
    """Raise AddendaError for an option that acts with another only, and lacks it: it would be swallowed."""
    for names, there, wants in (
        (("eval_every", "early_stop"), judged, "looks at data to judge by: give eval_data="),
        (("save_every", "keep"), kept, "is for checkpoints, and there is no folder for them: give out="),
    ):
        given = [n for n in names if options.get(n) is not None]
        if given and not there:
            raise AddendaError(f"{given[0]}= {wants}.")


def _built(method: Any) -> Any:
    """Return the method of a text form or an entry of the catalogue; another one, or {target: method}, as it is."""
    if isinstance(method, Mapping):
        return {target: _built(m) for target, m in method.items()}
    return build(method) if isinstance(method, str) else method.build() if isinstance(method, Info) else method


def starting_rate(method: Any) -> float:
    """Return where the catalogue starts a search for this method's learning rate; 1e-3 for several methods together."""
    known = [i.rate for i in catalogue() if isinstance(method, Method) and i.name == method.name]
    return known[0] if known else 1e-3


def calibration(model: nn.Module, train: Encoded, batch: int, seed: int, count: int = 8):
    """Yield the batches that methods with a calibrated start see: the run's first, made only when asked for."""
    device = device_of(model)
    for rows in batches(train.lengths, batch, count, seed, train.ragged):
        yield {k: t.to(device) for k, t in train.batch(rows).items()}


def _described(chosen) -> Any:
    if isinstance(chosen, tuple):
        return [_described(m) for m in chosen]
    if isinstance(chosen, Mapping):
        return {str(target): _described(m) for target, m in chosen.items()}
    return chosen if isinstance(chosen, str) else {"name": chosen.name, "options": chosen.options(defaults=True)}


def _judge(model: nn.Module, tested: Encoded | None) -> dict | None:
    if tested is None:
        return None
    made = evaluate(model, examples=tested)
    return {"loss": made.loss, "accuracy": made.accuracy, "items": "".join(map(str, made.items))}
