"""Trained Rank Pruning: a network is trained so that it can be cut to a low rank without loss (arXiv:1812.02402).

Every m-th step (`period`), before the forward, each layer's matrix is replaced in place by its truncated singular value
decomposition, M ← U_r S_r V_rᵀ, r by a rule of `compressing.criteria`. The gradient is taken at the cut weights, and
the optimizer's update is of full rank, so the rank grows again until the next cut. With `nuclear` = λ, the loss is
L + λ Σ ‖M‖_*, whose sub-gradient U_r V_rᵀ is added at those same steps only, as λ U_r V_rᵀ without a factor of m: over
time its mean pull is λ/m a step, as in the authors' code. After training, `factorise` is the last cut.

    trp = ad.TrainedRankPruning(model, scheme="channel", energy=0.98, period=20, nuclear=3e-4)
    for x, y in batches:
        trp.before_forward()
        loss(model(x), y).backward()
        trp.before_step()                 # gradients unscaled and clipped by then
        optimizer.step()
        optimizer.zero_grad()
    made = trp.factorise(example=x, batches=some)

The authors' release counts the steps to the next cut anew in every epoch, so that each begins with one; here they run
on, and `trp.start_epoch()` at the top of an epoch does as the release. Its default is a cut at every step, 5 for
`decoupled`, which there keeps as many ranks for every output channel as the one that needs most.

Cost: a decomposition of every layer in m steps; of a ResNet-18's it takes 1.4 s of a core by channel and 13 s
spatially, where more steps between cuts pay. Momentum and weight decay are left alone: they bring cut directions back,
so the rank between two cuts is higher than r. Running statistics of batch norms lag behind a cut; recalibrate them.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from addenda.compressing.candidates import candidates
from addenda.compressing.criteria import RULES, Rule, Spectrum
from addenda.compressing.factorise import Factorised, calls_of, factorise, spectrum_of
from addenda.compressing.schemes import Place, spectrum
from addenda.core.base.arguments import checked
from addenda.core.base.errors import AddendaError
from addenda.core.base.ranges import MANY, Range
from addenda.core.site.targets import Target, listed


class TrainedRankPruning:
    """Cuts a model's layers while it trains. The model's classes, keys and optimizer stay as they are.

    energy, value, relative, keep: one of them, see `compressing.criteria`. period: steps of the optimizer from one cut
    to the next, the first before the first step. nuclear: λ, 0 for none. targets, exclude: see
    `compressing.candidates`; layers that are not trained are left out. example: one batch as the model is called with:
    keep counts multiplications, not parameters, and layers that are not called with it are left out.

    Raises AddendaError for bad options and a model without such layers.
    """

    @checked(special=RULES | {"period": Range(1, MANY, whole=True), "nuclear": Range(0, 1e6)})
    def __init__(
        self,
        model: nn.Module,
        scheme: str = "channel",
        *,
        energy: float | None = None,
        value: float | None = None,
        relative: float | None = None,
        keep: float | None = None,
        period: int = 20,
        nuclear: float = 0.0,
        targets: Target | Iterable[Target] = "conv",
        exclude: Iterable[Target] = (),
        example: Any = None,
    ):
        self.rule = Rule(energy, value, relative, keep)
        self.model, self.scheme, self.period, self.nuclear = model, scheme, period, nuclear
        self.targets, self.exclude = listed(targets), listed(exclude)
        self.places, self.dense = candidates(model, self.targets, self.exclude, scheme)
        self._out: dict[str, str] = {}  # candidates that are left out, and why
        frozen = [p for p, x in self.places.items() if not x.site.weight.requires_grad]
        self._leave_out(frozen, "not trained: its weight requires no gradient")
        if not self.places:
            raise AddendaError(f"No layer that could be cut is trained: {', '.join(frozen[:8])} require no gradient.")
        self.example = example
        self._calls = None if example is None else calls_of(model, example)
        if self._calls is not None:
            idle = [p for p in self.places if not self._calls[p]]
            self._leave_out(idle, "never called with this example")
            if not self.places:
                raise AddendaError(
                    f"No layer that could be cut is called with this example: {', '.join(idle[:8])}. Give another one, "
                    "as the model is called with in evaluation."
                )
        self.step = 0  # of the optimizer
        self.begun = 0  # the step that the period counts from
        self.ranks: dict[str, int] = {}  # at the last cut; a layer that a budget leaves dense has its full rank
        self._pull: dict[str, Tensor] = {}  # U_r V_rᵀ until the step is taken
        self._versions: dict[str, int] | None = None  # of the weights, after the first forward of a step

    def _leave_out(self, paths: list[str], why: str) -> None:
        self._out |= dict.fromkeys(paths, why)
        self.dense |= dict.fromkeys(paths, why)
        self.places = {p: x for p, x in self.places.items() if p not in self._out}

    def start_epoch(self) -> None:
        """Begin the period anew: the next step cuts. As the release at every epoch; never called, it runs on.

        Raises AddendaError between `before_forward` and `before_step`.
        """
        if self._versions is not None:
            raise AddendaError(f"Step {self.step} is under way. Call start_epoch() before its before_forward().")
        self.begun = self.step

    def before_forward(self) -> bool:
        """Cut the layers when it is time. Call it before each forward of training; True where it cut.

        Several forwards of one step cut once.

        Raises AddendaError, with no layer changed, for weights that are not finite, and where the optimizer was stepped
        without `before_step`.
        """
        versions = {p: x.site.weight._version for p, x in self.places.items()}
        if self._versions is not None:
            moved = [p for p, v in versions.items() if v != self._versions[p]]
            if moved:
                raise AddendaError(
                    f"{moved[0]} changed since the last before_forward() of step {self.step}, and before_step() was "
                    "not called between. Call before_forward() before the forward, and before_step() between "
                    "backward() and optimizer.step()."
                )
            return False
        due = (self.step - self.begun) % self.period == 0
        if due:
            self._cut()
        self._versions = {p: x.site.weight._version for p, x in self.places.items()}
        return due

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the nuclear norm's gradient, and count. Call it between backward and the optimizer's step.

        Raises AddendaError without a `before_forward` in this step, or where no layer has a gradient.
        """
        if self._versions is None:
            raise AddendaError(f"before_step() of step {self.step} came without before_forward(). Call that first.")
        grads = {p: x.site.weight.grad for p, x in self.places.items()}
        if self._pull and all(g is None for g in grads.values()):
            raise AddendaError(
                "No layer has a gradient in before_step(). Call it behind backward() and before zero_grad()."
            )
        for path, pull in self._pull.items():
            if (grad := grads[path]) is not None:  # a layer that took no part does not move
                grad.add_(pull.to(grad.dtype), alpha=self.nuclear)
        self._pull, self._versions = {}, None
        self.step += 1

    @torch.no_grad()
    def _cut(self) -> None:
        paths = [p for p, x in self.places.items() if not bool(torch.isfinite(x.site.weight).all())]
        if paths:
            raise AddendaError(
                f"At step {self.step} the weights of {', '.join(paths[:8])} are not finite; nothing was cut. Training "
                "diverged: go back to an earlier checkpoint, or lower the rate."
            )
        joint_ranks = None if self.rule.alone else self.rule.over([self._spectrum(x) for x in self.places.values()])
        cut: dict[str, Tensor] = {}
        pull: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for path, place in self.places.items():
            U, S, Vt = place.decomposed()
            rank = (self.rule.rank(spectrum(S)) if joint_ranks is None else joint_ranks[path]) or S.shape[1]
            ranks[path] = rank
            if rank < S.shape[1]:  # nothing else is rewritten, so that no bit moves without need
                cut[path] = place.stored((U[..., :rank] * S[:, None, :rank]) @ Vt[:, :rank])
            if self.nuclear:
                pull[path] = place.stored(U[..., :rank] @ Vt[:, :rank])
        for path, weight in cut.items():
            self.places[path].site.weight.copy_(weight)
        self.ranks, self._pull = ranks, pull

    def _spectrum(self, place: Place) -> Spectrum:
        return spectrum_of(place, None if self._calls is None else self._calls[place.path])

    # -- what a resumed run needs --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the step and what must be the same when it goes on; plain numbers and text. Take it after a step.

        Raises AddendaError between `before_forward` and `before_step`: that gradient is in no checkpoint.
        """
        if self._versions is not None:
            raise AddendaError(
                f"Step {self.step} is under way, and its gradient is in no checkpoint. Save after optimizer.step()."
            )
        return {"step": self.step, "begun": self.begun, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. Raises AddendaError where the settings are not the same."""
        settings = self._settings()
        problems = [f"{k} was {state.get(k)!r} and is {v!r}" for k, v in settings.items() if state.get(k) != v]
        step, period_start = state.get("step"), state.get("begun", 0)  # before start_epoch, every run counted from 0
        if problems or not isinstance(step, int) or not isinstance(period_start, int) or not 0 <= period_start <= step:
            raise AddendaError(f"This state is of another run: {'; '.join(problems) or 'it has no step'}.")
        self.step, self.begun, self._pull, self._versions = step, period_start, {}, None

    def _settings(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme, "rule": str(self.rule), "period": self.period, "nuclear": self.nuclear,
            "layers": sorted(self.places),
        }  # fmt: skip

    # -- the end -------------------------------------------------------------------------------------------------------

    def factorise(self, **options: Any) -> Factorised:
        """Call `factorise` with the same layers, scheme and rule; options add to these or replace the rule."""
        rule = {k: getattr(self.rule, k) for k in ("energy", "value", "relative", "keep")}
        if any(options.get(k) is not None for k in (*rule, "ranks")):
            rule = {}
        if self.rule.keep is not None and rule and self.example is None:
            options = {"of": "parameters", **options}
        left_out = [*self.exclude, *([lambda path, _: path in self._out] if self._out else [])]
        defaults = {"targets": self.targets, "exclude": left_out, "example": self.example}
        result = factorise(self.model, self.scheme, **rule, **{**defaults, **options})
        return replace(result, dense=result.dense | {p: why for p, why in self._out.items() if p in result.dense})

    def callback(self, each_epoch: bool = False):
        """Return a callback for a Hugging Face Trainer: `Trainer(…, callbacks=[trp.callback()])`.

        each_epoch: call `start_epoch` too.
        """
        from addenda.compressing.trp_callback import TrainedRankPruningCallback

        return TrainedRankPruningCallback(self, each_epoch=each_epoch)
