"""`compress`: a folder with a transformers model in, a smaller one out; the source is only read.

    text ─ windows ─┐
    model ──────────┴─ block by block: moments ─ solve ─ work folder ─ ranks ─ low-rank layers ─ judged ─ folder, report

Killed at any moment, the same call goes on where it was, and so does one that asks for other ranks. Memory above the
model: the statistics and one layer's factorisation of one block, the outputs of one block for all windows, and at the
end the chosen factors.
"""

import dataclasses
import hashlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from addenda.compressing import measure
from addenda.compressing.folder import METHOD, LowRankConfig
from addenda.compressing.gradients import fisher, weights_of
from addenda.compressing.humaneval import pass_at_1, problems
from addenda.compressing.layers import FORMS
from addenda.compressing.report import Report, rows_of, write_report
from addenda.compressing.settings import CompressionSettings
from addenda.compressing.texts import Windows, windows
from addenda.compressing.work import Work
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.threads import side_by_side
from addenda.core.disk.access import path_of, writing
from addenda.core.modules.put import put
from addenda.core.site.site import site_at
from addenda.core.site.targets import Target, grouped
from addenda.models.kinds import task_in, task_of
from addenda.models.load import Loaded, config_of, load_model
from addenda.models.machine import Peak, hardware, resident, versions
from addenda.models.pretrained import quiet
from addenda.reducing import ranks
from addenda.reducing.choose import choose
from addenda.reducing.moments import Moments
from addenda.reducing.ranks import Layer, Ranks
from addenda.reducing.solve import LowRank, solve
from addenda.reducing.walk import Piece, Walk
from addenda.train.unfinished import check_apart, identity_of

Say = Callable[[str], None]
_WEIGHED = 16  # windows whose gradients weigh the layers against each other
UNSEEN = ("svd", "fwsvd")  # routes that do not ask what the inputs are


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
    s, say, started = settings or CompressionSettings(), say or (lambda _: None), time.perf_counter()
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
    s = s.settled(causal)
    if not causal and (wants := s.wants_loss()):
        raise AddendaError(f"{wants} wants the loss of the next token, and a {type(loaded.model).__name__} has none.")
    problems = _problems(loaded.model, humaneval)
    shapes, dense = choose(loaded.model, targets, exclude, s.storage)
    calibrate, judge = windows(loaded.tokenizer, calibration, s.samples, s.length, judge=s.judge, seed=s.seed)
    _fits(loaded.model, calibrate, judge)
    notes = _enough(calibrate, shapes, s)
    notes += ["code of the model's folder was run (--trust-remote-code)"] if trust_remote_code else []
    for line in notes:
        say(line)
    with Work(out, s.of_pieces() | {
        "model": identity_of(source), "dtype": loaded.note, "layers": sorted(shapes), "text": _digest(calibrate.rows),
    }) as work:  # fmt: skip
        if work.resumed:
            say(f"going on with {work.folder}")
        job = _Job(s, loaded, work, shapes, calibrate, judge, say, notes, problems)
        before = job.judged_before()
        base = resident(job.device) or 0
        with Peak(job.device) as peak:
            job.calibrate()
            layers = job.layers()
            chosen_ranks = job.allocate(layers)
            if s.sequential:
                job.solve_again(chosen_ranks)
            low = job.build(chosen_ranks)
        sizes = {"dense": _numbers(loaded.model)}
        harms = job.alone(low) if by_type else {}
        speeds = job.speeds(low) if latency else {}
        _put_all(loaded.model, low)
        sizes["compressed"] = _numbers(loaded.model)
        report = Report(
            source=str(source), settings=dataclasses.asdict(s), dtype=loaded.note, calibration=calibrate.source,
            tokens=calibrate.tokens, judged=judge.tokens, before=before, after=job.judged(), sizes=sizes, alone=harms,
            speeds=speeds, layers=rows_of(layers, chosen_ranks, job.errors, job.uses), dense=dense, notes=notes,
            versions=versions(), hardware=hardware(), seconds=time.perf_counter() - started, stages=job.seconds,
            memory=None if peak.bytes is None else max(peak.bytes - base, 0),
        )  # fmt: skip
        _save(loaded, low, s, work, report, leave)
    return report


@dataclass
class _Job:
    """The stages of one run, over one model."""

    s: CompressionSettings
    loaded: Loaded
    work: Work
    chosen: dict[str, tuple[int, int]]
    text: Windows
    judge: Windows
    say: Say
    notes: list[str]
    problems: list[dict[str, str]]

    def __post_init__(self):
        self.model = cast(Any, self.loaded.model)
        self.device = next(self.model.parameters()).device
        self.errors: dict[str, float] = {}  # relative output error of each layer as it is built
        self.uses: dict[str, float] = {}  # rows that each layer sees for a token
        self.where: dict[str, str] = {}  # path -> file of its piece
        self.seconds = {"statistics": 0.0, "solving": 0.0}

    def judged(self) -> dict[str, Any]:
        verdict = measure.judged(self.model, self.judge.batches(self.s.batch))
        if self.problems:
            self.say(f"HumanEval: {len(self.problems)} functions; what the model writes is executed, with limits")
            verdict["passed"] = pass_at_1(self.model, self.loaded.tokenizer, self.problems, say=self.say)
        return verdict

    def alone(self, low: dict[str, nn.Module]) -> dict[str, float]:
        """Return {type of layer: `measure.harm` of its low-rank layers, all others dense}, on half of the windows."""
        self.say("judging each type of layer alone")
        rows = self.judge.rows[: max(len(self.judge.rows) // 2, 1)]
        batches = dataclasses.replace(self.judge, rows=rows).batches(self.s.batch)
        before, harms = measure.judged(self.model, batches), {}
        for pattern, paths in grouped(low).items():
            dense = {p: self.model.get_submodule(p) for p in paths}
            _put_all(self.model, {p: low[p] for p in paths})
            harms[pattern] = measure.harm(before, measure.judged(self.model, batches))
            _put_all(self.model, dense)
        return harms

    def judged_before(self) -> dict[str, Any]:
        """Return what the dense model says, remembered for a run that goes on."""
        notes, text = self.work.notes() or {}, _digest(self.judge.rows)
        quality = notes.get("before") if notes.get("judged") == text else None
        if quality is None or len(quality.get("passed", ())) != len(self.problems):
            self.say(f"judging the dense model on {self.judge.tokens:,} tokens")
            quality = self.judged()
            self.work.note(before=quality, judged=text)
        return quality

    def speeds(self, low: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
        """Return tokens a second of both forms; the dense one stands at the end."""
        self.say("measuring tokens a second, dense and compressed in turns")
        dense = {p: self.model.get_submodule(p) for p in low}
        forms = {"compressed": lambda: _put_all(self.model, low), "dense": lambda: _put_all(self.model, dense)}
        return measure.speeds(self.model, torch.tensor(self.judge.rows[:1]), forms)

    def walk(self) -> Walk:
        return Walk(self.model, self.text.batches(self.s.batch), list(self.chosen))

    # -- solve, block by block -----------------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Solve every layer at all ranks at once, on the dense model's own inputs."""
        walk = self.walk()
        names = [f"piece-{i:03}" for i in range(len(walk.pieces))]
        for name, piece in zip(names, walk.pieces, strict=True):
            self.where |= dict.fromkeys(piece.paths, name)
        todo = [i for i, p in enumerate(walk.pieces) if p.paths and not self.work.has(names[i])]
        weighs = self._fisher() if self.s.how == "fwsvd" and todo else {}
        started = time.perf_counter()
        for i, piece in enumerate(walk.pieces):
            if not todo or i > todo[-1]:
                break
            if i not in todo:
                walk.pass_by(piece)
                continue
            moments, uses = self._moments(walk, piece)
            at = time.perf_counter()
            solved = self._solve_all(piece.paths, moments, weighs)
            self.seconds["solving"] += time.perf_counter() - at
            self.work.write(names[i], solved, uses)
            rest = (time.perf_counter() - started) / (todo.index(i) + 1) * (len(todo) - todo.index(i) - 1)
            self.say(f"{piece.name}: {len(piece.paths)} layers solved, about {rest:.0f} s left")

    def _moments(self, walk: Walk, piece: Piece, go_on: bool = True) -> tuple[dict[str, Moments], dict[str, float]]:
        at = time.perf_counter()
        moments, uses = walk.moments(piece, go_on=go_on)
        self.seconds["statistics"] += time.perf_counter() - at
        paths = [p for p in piece.paths if p not in moments or not moments[p].count]
        if paths:
            raise AddendaError(
                f"{len(paths)} layers were never called with this text: {', '.join(paths[:8])}. Leave them out with "
                "--exclude, or give more text."
            )
        return moments, uses

    def _solve_all(
        self, paths: Sequence[str], moments: dict[str, Moments], weighs: dict[str, Any], given: Ranks | None = None
    ) -> dict[str, LowRank]:
        """Solve layers of one input one after the other, so that its root is found once; others beside them."""
        groups: dict[int, list[str]] = {}
        for p in paths:
            groups.setdefault(id(moments[p]), []).append(p)

        def of(group: list[str]) -> list[tuple[str, LowRank]]:
            return [(p, self._solve(p, moments[p], weighs.get(p), None if given is None else given[p])) for p in group]

        with side_by_side(len(groups) if self.device.type == "cpu" else 1) as apply:
            solved = dict(itertools.chain.from_iterable(apply(of, list(groups.values()))))
        return {p: solved[p] for p in paths}

    def _solve(self, path: str, moments: Moments, weighs: Any = None, rank: int | None = None) -> LowRank:
        m, n = self.chosen[path]
        W = site_at(self.model, path).matrix
        if not bool(torch.isfinite(W).all()):
            raise AddendaError(f"{path} has weights that are not finite; the model's file is damaged.")
        limit = rank or ranks.break_even(m, n, self.s.storage)
        low = solve(W, moments, self.s.how, rank=limit, center=self.s.center, fisher=weighs)
        if moments.count >= n or self.s.how in UNSEEN:
            return low
        warning = f"only {moments.count} rows for its {n} inputs; what these do not span is fitted to nothing"
        return dataclasses.replace(low, note="; ".join(filter(None, (low.note, warning))))

    def _fisher(self) -> dict[str, torch.Tensor]:
        self.say("Fisher information: one backward pass over the text")
        weights = {p: cast(nn.Parameter, site_at(self.model, p).weight) for p in self.chosen}
        return fisher(self.model, self.text.batches(self.s.batch), weights)

    def solve_again(self, given: Ranks) -> None:
        """Solve the given ranks again, each block on what the compressed ones before it put out.

        Its files are named by the ranks (and the split, which rounds otherwise), so that others do not take them over.
        """
        walk, weighs = self.walk(), self._fisher() if self.s.how == "fwsvd" else {}
        dense: dict[str, nn.Module] = {}
        digest = _digest((sorted(given.items()), self.s.split))[:12]
        for i, piece in enumerate(walk.pieces):
            name = f"sequential-{digest}-{i:03}"
            paths = [p for p in piece.paths if given[p] is not None]
            if not self.work.has(name) and paths:
                moments, uses = self._moments(walk, piece, go_on=False)
                solved = self._solve_all(paths, moments, weighs, given)
                self.work.write(name, solved, uses)
                self.say(f"{piece.name}: solved again on compressed inputs")
            self.where |= dict.fromkeys(paths, name)
            dense |= {p: self.model.get_submodule(p) for p in paths}
            _put_all(self.model, {p: self.layer(p, cast(int, given[p])) for p in paths})
            walk.pass_by(piece)
        _put_all(self.model, dense)  # dense again: `build` takes the factors from the files

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def layers(self) -> list[Layer]:
        """Return every candidate with its error curve."""
        by_loss = self.s.allocate == "waterfill" and self.s.weigh == "loss"
        layers, weights = {}, self.weights() if by_loss else {}
        for name in dict.fromkeys(self.where.values()):
            for path, about in self.work.about(name).items():
                self.uses[path] = about["uses"]
                uses = about["uses"] if self.s.of == "flops" else 1.0
                m, n = self.chosen[path]
                layers[path] = Layer(path, m, n, about["errors"], uses, weights.get(path, 1.0), self.s.storage)
                if about["note"]:
                    self.notes.append(f"{path}: {about['note']}")
        return [layers[p] for p in self.chosen]

    def weights(self) -> dict[str, float]:
        """Return what an error of each layer does to the loss, remembered for a run that goes on."""
        weights = (self.work.notes() or {}).get("weights")
        if weights is None:
            sample = dataclasses.replace(self.text, rows=self.text.rows[:_WEIGHED])
            self.say(f"what each layer's error does to the loss: one backward pass over {sample.tokens:,} tokens")
            weights = weights_of(self.model, sample.batches(self.s.batch), self.chosen)
            self.work.note(weights=weights)
        return weights

    def allocate(self, layers: Sequence[Layer]) -> Ranks:
        s, keep = self.s, 1 - self.s.remove
        if s.allocate == "uniform":
            return ranks.uniform(layers, keep, s.multiple)
        if s.allocate == "energy":
            return ranks.energy(layers, s.share, s.multiple)
        if s.allocate == "waterfill":
            return ranks.waterfill(layers, keep, s.multiple, s.floor)
        batches = dataclasses.replace(self.text, rows=self.text.rows[:8]).batches(s.batch)  # not what is judged by

        def judge(given: Ranks) -> float:
            dense = {p: self.model.get_submodule(p) for p in given}
            try:
                _put_all(self.model, {p: self.layer(p, r) for p, r in given.items() if r is not None})
                return measure.loss_of(self.model, batches)
            finally:
                _put_all(self.model, dense)

        groups = list(grouped(self.chosen).values()) if s.allocate == "sensitivity" else None
        count = (len(groups) if groups else len(layers)) * len(ranks.SHARES)
        self.say(f"trying {count} cuts, each by the perplexity of {len(batches) * s.batch} windows")
        table = ranks.trials(layers, judge, groups=groups, multiple=s.multiple)
        if s.allocate == "asvd":
            return ranks.asvd_search(layers, table, keep)
        return ranks.sensitivity(layers, table, measure.loss_of(self.model, batches), s.rise)

    # -- layers --------------------------------------------------------------------------------------------------------

    def layer(self, path: str, rank: int) -> nn.Module:
        """Return the low-rank layer of this rank, in the model's dtype and on its device."""
        site, low = site_at(self.model, path), self.work.read(self.where[path], path, rank)
        bias = getattr(site.module, "bias", None)
        bias = low.bias(site.matrix.cpu(), None if bias is None else bias.detach().cpu())
        self.errors[path] = float(low.errors[rank])
        low = low.split(self.s.split)
        return FORMS[self.s.storage].of(low.B, low.A, bias, site.weight.dtype, site.weight.device).eval()

    def build(self, given: Ranks) -> dict[str, nn.Module]:
        return {p: self.layer(p, r) for p, r in given.items() if r is not None}


def _put_all(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        put(model, path, module)


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


def _digest(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()


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
