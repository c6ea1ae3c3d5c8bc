"""The stages of a compression: statistics and factors block by block, ranks, low-rank layers, judging before and after.

What is solved stands in the work folder (`compressing.work`) at once, by block, so that a run that was killed goes on.
"""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from addenda.compressing import measure
from addenda.compressing.gradients import fisher, weights_of
from addenda.compressing.humaneval import pass_at_1
from addenda.compressing.layers import FORMS
from addenda.compressing.settings import CompressionSettings
from addenda.compressing.texts import Windows
from addenda.compressing.work import Work
from addenda.core.base.errors import AddendaError
from addenda.core.base.threads import side_by_side
from addenda.core.modules.put import put
from addenda.core.site.site import site_at
from addenda.core.site.targets import grouped
from addenda.models.load import Loaded
from addenda.reducing import ranks
from addenda.reducing.moments import Moments
from addenda.reducing.ranks import Layer, Ranks
from addenda.reducing.solve import LowRank, solve
from addenda.reducing.walk import Piece, Walk

Say = Callable[[str], None]
_WEIGHED = 16  # windows whose gradients weigh the layers against each other
UNSEEN = ("svd", "fwsvd")  # routes that do not ask what the inputs are


@dataclass
class Stages:
    """The stages of one run, over one model. chosen: (m, n) of every layer that is solved, by path; text: to solve on.

    problems: of HumanEval, to try beside the loss. notes: what the report says besides, which `layers` adds to.
    """

    settings: CompressionSettings
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
        """Return what the model, as it is now, says to the text to judge by, and which problems it solves."""
        verdict = measure.judged(self.model, self.judge.batches(self.settings.batch))
        if self.problems:
            self.say(f"HumanEval: {len(self.problems)} functions; what the model writes is executed, with limits")
            verdict["passed"] = pass_at_1(self.model, self.loaded.tokenizer, self.problems, say=self.say)
        return verdict

    def alone(self, low: dict[str, nn.Module]) -> dict[str, float]:
        """Return {type of layer: `measure.harm` of its low-rank layers, all others dense}, on half of the windows."""
        self.say("judging each type of layer alone")
        rows = self.judge.rows[: max(len(self.judge.rows) // 2, 1)]
        batches = dataclasses.replace(self.judge, rows=rows).batches(self.settings.batch)
        before, harms = measure.judged(self.model, batches), {}
        for pattern, paths in grouped(low).items():
            dense = {p: self.model.get_submodule(p) for p in paths}
            put_all(self.model, {p: low[p] for p in paths})
            harms[pattern] = measure.harm(before, measure.judged(self.model, batches))
            put_all(self.model, dense)
        return harms

    def judged_before(self) -> dict[str, Any]:
        """Return what the dense model says, remembered for a run that goes on."""
        notes, text = self.work.notes() or {}, digest(self.judge.rows)
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
        forms = {"compressed": lambda: put_all(self.model, low), "dense": lambda: put_all(self.model, dense)}
        return measure.speeds(self.model, torch.tensor(self.judge.rows[:1]), forms)

    def walk(self) -> Walk:
        """Return a walk over the model on the calibration text."""
        return Walk(self.model, self.text.batches(self.settings.batch), list(self.chosen))

    # -- solve, block by block -----------------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Solve every layer at all ranks at once, on the dense model's own inputs."""
        walk = self.walk()
        names = [f"piece-{i:03}" for i in range(len(walk.pieces))]
        for name, piece in zip(names, walk.pieces, strict=True):
            self.where |= dict.fromkeys(piece.paths, name)
        todo = [i for i, p in enumerate(walk.pieces) if p.paths and not self.work.has(names[i])]
        weighs = self._fisher() if self.settings.how == "fwsvd" and todo else {}
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
        limit = rank or ranks.break_even(m, n, self.settings.storage)
        low = solve(W, moments, self.settings.how, rank=limit, center=self.settings.center, fisher=weighs)
        if moments.count >= n or self.settings.how in UNSEEN:
            return low
        warning = f"only {moments.count} rows for its {n} inputs; what these do not span is fitted to nothing"
        return dataclasses.replace(low, note="; ".join(filter(None, (low.note, warning))))

    def _fisher(self) -> dict[str, torch.Tensor]:
        self.say("Fisher information: one backward pass over the text")
        weights = {p: cast(nn.Parameter, site_at(self.model, p).weight) for p in self.chosen}
        return fisher(self.model, self.text.batches(self.settings.batch), weights)

    def solve_again(self, given: Ranks) -> None:
        """Solve the given ranks again, each block on what the compressed ones before it put out.

        Its files are named by the ranks (and the split, which rounds otherwise), so that others do not take them over.
        """
        walk, weighs = self.walk(), self._fisher() if self.settings.how == "fwsvd" else {}
        dense: dict[str, nn.Module] = {}
        mark = digest((sorted(given.items()), self.settings.split))[:12]
        for i, piece in enumerate(walk.pieces):
            name = f"sequential-{mark}-{i:03}"
            paths = [p for p in piece.paths if given[p] is not None]
            if not self.work.has(name) and paths:
                moments, uses = self._moments(walk, piece, go_on=False)
                solved = self._solve_all(paths, moments, weighs, given)
                self.work.write(name, solved, uses)
                self.say(f"{piece.name}: solved again on compressed inputs")
            self.where |= dict.fromkeys(paths, name)
            dense |= {p: self.model.get_submodule(p) for p in paths}
            put_all(self.model, {p: self.layer(p, cast(int, given[p])) for p in paths})
            walk.pass_by(piece)
        put_all(self.model, dense)  # dense again: `build` takes the factors from the files

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def layers(self) -> list[Layer]:
        """Return every candidate with its error curve."""
        by_loss = self.settings.allocate == "waterfill" and self.settings.weigh == "loss"
        layers, weights = {}, self.weights() if by_loss else {}
        for name in dict.fromkeys(self.where.values()):
            for path, about in self.work.about(name).items():
                self.uses[path] = about["uses"]
                uses = about["uses"] if self.settings.of == "flops" else 1.0
                m, n = self.chosen[path]
                layers[path] = Layer(path, m, n, about["errors"], uses, weights.get(path, 1.0), self.settings.storage)
                if about["note"]:
                    self.notes.append(f"{path}: {about['note']}")
        return [layers[p] for p in self.chosen]

    def weights(self) -> dict[str, float]:
        """Return what an error of each layer does to the loss, remembered for a run that goes on."""
        weights = (self.work.notes() or {}).get("weights")
        if weights is None:
            sample = dataclasses.replace(self.text, rows=self.text.rows[:_WEIGHED])
            self.say(f"what each layer's error does to the loss: one backward pass over {sample.tokens:,} tokens")
            weights = weights_of(self.model, sample.batches(self.settings.batch), self.chosen)
            self.work.note(weights=weights)
        return weights

    def allocate(self, layers: Sequence[Layer]) -> Ranks:
        """Return the rank of every layer, None for one that stays dense, as the settings share out what is kept."""
        s, keep = self.settings, 1 - self.settings.remove
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
                put_all(self.model, {p: self.layer(p, r) for p, r in given.items() if r is not None})
                return measure.loss_of(self.model, batches)
            finally:
                put_all(self.model, dense)

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
        low = low.split(self.settings.split)
        return FORMS[self.settings.storage].of(low.B, low.A, bias, site.weight.dtype, site.weight.device).eval()

    def build(self, given: Ranks) -> dict[str, nn.Module]:
        """Return the low-rank layers by path, where a rank is given."""
        return {p: self.layer(p, r) for p, r in given.items() if r is not None}


def digest(what: Any) -> str:
    """Return a hash of a value's text, by which what was made of it is known again."""
    return hashlib.sha256(repr(what).encode()).hexdigest()


def put_all(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Put modules in the place of others, by path."""
    for path, module in modules.items():
        put(model, path, module)
