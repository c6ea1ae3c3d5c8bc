"""What a method is: a frozen dataclass of hyperparameters and a few pure functions.

A *weight method* says what ΔW is; a *hidden method* (`core.method.hidden`) what happens to the activations that a
module returns. Everything else (kinds of layer, dtypes, several adapters, merging, saving, switching, the command line)
is the core's. The tensors of a site are a plain dict, and their kind is said by where they come from, never by their
name:

| from                                   | kind      | saved | gradient | example                          |
| -------------------------------------- | --------- | ----- | -------- | -------------------------------- |
| `init`, as `nn.Parameter`              | trainable | yes   | yes      | two thin factors                 |
| `init`, as a plain tensor              | frozen    | yes   | no       | positions chosen from data       |
| `pool`                                 | pooled    | once  | yes      | vectors that all sites mix       |
| `derive`                               | derived   | no    | no       | singular vectors of W            |
| `shared`                               | shared    | no    | no       | projections drawn from a seed    |

Matrices are m × n = out × in, as torch keeps a Linear's weight. Convolutions are seen as out × (in/groups · kernel),
embeddings as rows × width, transformers' `Conv1D` transposed, stacked expert weights one matrix at a time.
"""

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.random import Stream
from addenda.core.method.hooks import check_names, hooks_of, no_hook
from addenda.core.method.options import misfit, parse_value, said

FEW_BITS = 0.05  # how far a change in few bits may start from the base, relative to W or to what is changed

Params = dict[str, Tensor]
Shape = tuple[int, ...] | torch.Size


@dataclass(frozen=True)
class Start:
    """How far the adapted model is from the base before the first step: 0 (bit for bit), or a relative bound."""

    bound: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Base:
    """The unchanged layer, as `apply` sees it: call it for x Wᵀ + bias."""

    product: Callable[[Tensor], Tensor]
    weight: Tensor  # m × n, frozen, in the base's dtype
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)


class Factors(NamedTuple):
    """The thin matrices of ΔW = diag(rows) B M A, exactly: what the fused low-rank path works with.

    B: m × r; A: s × n; M: r × s, which is the identity where middle is None, diag(middle) where middle is a vector of
    r numbers, and zero except for the values `middle` (K) at the flat positions `index` (K). rows: m numbers, or None.
    Only what requires a gradient gets one, and only what that takes is kept for backward. sums: A is [I I … I], s × s
    identities side by side, the last one cut at n columns, and not trained: x Aᵀ is then summed instead of multiplied.
    """

    B: Tensor
    A: Tensor
    middle: Tensor | None = None
    index: Tensor | None = None
    rows: Tensor | None = None
    sums: bool = False

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return (m × s, s × n): two matrices whose product is ΔW."""
        B = self.B if self.rows is None else self.rows[:, None] * self.B
        if self.middle is None:
            return B, self.A
        if self.index is None:
            return B * self.middle, self.A
        return B @ spread(self.middle, self.index, B.shape[1], len(self.A)).to(B.dtype), self.A


class FactorPair(NamedTuple):
    """The two factors of a method as an optimizer sees them: W + ΔW = scale · B A + a part that does not train.

    B: m × r; A: r × n, with the values that act now. left, right: the names of the tensors that B and A move with.
    """

    B: Tensor
    A: Tensor
    scale: float
    left: str = "B"
    right: str = "A"


def spread(values: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix (rows × columns) that is zero except for the values (K) at the flat positions (K)."""
    return values.new_zeros(rows * columns).index_put((index,), values).view(rows, columns)


@dataclass(frozen=True)
class Method:
    """Base class of every method. Subclasses are frozen dataclasses of hyperparameters.

    What a method may define is declared here and in the base class of its kind: the public functions and properties,
    which are the hooks, and the class variables, which are settings. Its annotated fields are its options. Any other
    public name is refused when the class is defined (`core.method.hooks`).

    `init`, `derive`, `trainable` and `check` are given the site as its kind of method sees it: a matrix W and its
    shape (m, n), or the width of an activation.

    bits: every method is given its trained matrices in this many bits (1 to 8; None: as they are), vectors as they
    are; ste: the gradient behind that, see `core.packed.few_bits`. A method's functions need not know of either.
    """

    bits: int | None = field(default=None, kw_only=True, repr=False)
    ste: Literal["paper", "plain"] = field(default="paper", kw_only=True, repr=False)
    name: ClassVar[str] = ""
    dropout = 0.0  # a field in methods with an additive path; no annotation: no field here
    starts: ClassVar[Start] = Start()  # in full precision; see `start`
    sized_by: ClassVar[str | None] = None  # the option that makes it larger: a comparison at equal parameters sets it
    targets: ClassVar[str | tuple[str, ...]] = "linear"  # where it goes if nobody says
    formerly: ClassVar[dict[str, Any]] = {}  # defaults that held when files stored only what differed from them
    drawn_apart: ClassVar[bool] = False  # whether `on_step` is asked for every site, or once for all
    helpers: ClassVar[tuple[str, ...]] = ()  # public names of this class that are none of these: others use them
    _kind: ClassVar[type]  # the base class of its kind, and the names of the hooks that stand there
    _hooks: ClassVar[frozenset[str]]

    def __init_subclass__(cls, kind: bool = False, **more: Any) -> None:
        """Check the public names of a new method. kind: it is the base class of a kind, and its names are hooks."""
        super().__init_subclass__(**more)
        if kind:
            cls._kind, cls._hooks = cls, hooks_of(cls)
        else:
            check_names(cls, cls._kind)

    def init(self, site: Any, rng: Stream, p: Params) -> Params:
        """Return trainable (`nn.Parameter`) and frozen (plain) tensors of a site; p: those of `derive` and `shared`."""
        raise NotImplementedError

    def trainable(self, *shape: int) -> int:
        """Return how many numbers are trained at one site of this shape: a formula, tested against the real tensors."""
        raise NotImplementedError

    def check(self, *shape: int) -> str | None:
        """Return why a site of this shape cannot be adapted with these options, or None."""
        return None

    # -- optional --------------------------------------------------------------------------------------------------

    def shared(self, shapes: list[Shape], rng: Stream) -> Params:
        """Return tensors that all sites share, drawn once for the shapes of all sites; never saved."""
        return {}

    def derive(self, site: Any, rng: Stream) -> Params:
        """Return tensors computed from the site (W: m × n float32) or the stream alone: made at load, never saved."""
        return {}

    def pool(self, shapes: list[Shape], rng: Stream) -> Params:
        """Return tensors (`nn.Parameter`) that all sites train together, drawn once for the shapes of all sites.

        Each is one tensor, held by every site: its gradient is the sum of theirs, and it is saved and counted once.
        """
        return {}

    def pooled(self, shapes: list[Shape]) -> int:
        """Return how many numbers `pool` holds for these sites: a formula, tested against the real tensors."""
        return 0

    def beside(self, path: str) -> tuple[str, ...]:
        """Return names of modules beside the one at `path` that `derive` must see too; () where W is enough."""
        return ()

    def derive_beside(self, W: Tensor, rng: Stream, others: Params) -> Params:
        """Do what `derive` does where `beside` names modules. others: their weights, by name, seen like W."""
        raise NotImplementedError

    @property
    def calibration(self) -> Literal["gradient", "input"] | None:
        """What `calibrate` is given before training, gradients or inputs; None where the method needs no data."""
        return None

    def calibrate(self, W: Tensor, what: Tensor, seen: Tensor | None) -> Tensor:
        """Accumulate one batch's ∂loss/∂W (m × n) or layer inputs (tokens × n, padding left out): the new `seen`.

        The last result reaches `init` as p["calibration"].
        """
        raise NotImplementedError

    def check_values(self, p: Params) -> str | None:
        """Return why saved tensors, of the right names and shapes, cannot be the method's own, or None where they can.

        Asked of what a file brings. That numbers are finite, and positions in the weight, the core sees.
        """
        return None

    def allot(self, shapes: list[Shape], seen: list[Tensor]) -> "list[Method | None]":
        """Return the method of each site, given what `calibrate` saw of all of them; None leaves a site out.

        seen: empty where no calibration is wanted.
        """
        return [self for _ in shapes]

    def on_step(self, step: int, rng: Stream) -> Params:
        """Return values that replace frozen or derived tensors of the same names while training, at step 0, 1, …

        Asked once for all sites, or with `drawn_apart` for every site, rng then being the site's own.
        """
        return {}

    def dealt(self, p: Params) -> Params:
        """Return, for optimizers, the part (1, 2, …) of each entry of a trained tensor, by name; a part moves whole."""
        return {}

    @property
    def trained_by(self) -> str:
        """The optimizer that trains the method as its paper does, as a name with options that `addenda.optim` knows."""
        return "adamw"

    def pair(self, p: Params) -> "FactorPair | None":
        """Return the two thin factors that its trainable tensors move, for optimizers that know about factors."""
        return None

    # -- what the core asks ----------------------------------------------------------------------------------------

    @property
    def start(self) -> Start:
        """How far from the base it starts. In few bits no matrix is zero, so that no start is exact."""
        if self.bits is None:
            return self.starts
        bound = max(self.starts.bound, FEW_BITS * max(1.0, abs(getattr(self, "scale", 1.0))))
        return Start(bound, f"in {said(self.bits)} a matrix cannot be zero; it starts from numbers up to 0.002")

    def has(self, hook: str) -> bool:
        """Return whether the method offers an optional hook of its kind: "factors", "sparse", "shared", "on_step", …

        Raises AddendaError for a name that is no hook of its kind.
        """
        if hook not in self._hooks:
            raise no_hook(self._kind, hook)
        return getattr(type(self), hook) is not getattr(self._kind, hook)

    def options(self, defaults: bool = False) -> dict:
        """Return hyperparameters by name; only those that differ from the defaults unless asked for all."""
        fields = sorted(dataclasses.fields(self), key=lambda f: bool(f.kw_only))  # its own first
        return {f.name: getattr(self, f.name) for f in fields if defaults or getattr(self, f.name) != f.default}

    def __new__(cls, *args: Any, **options: Any):
        if cls.name:
            known_options(cls, options)  # Python's own error of a name that it does not know names no other
        return super().__new__(cls)

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        fields = dataclasses.fields(self)
        problems = [p for f in fields if (p := misfit(f.name, getattr(self, f.name), hints[f.name]))]
        if not problems and self.bits is not None and not 1 <= self.bits <= 8:
            problems.append(f"bits must be from 1 to 8, or None for full precision, got {self.bits}")
        if not problems:
            problems = list(self.validate())
        if problems:
            raise AddendaError(f"{type(self).__name__}: {'; '.join(problems)}.")

    def __str__(self) -> str:
        precision = "" if self.bits is None else f" in {said(self.bits)}" + ", plain" * (self.ste == "plain")
        return repr(self) + precision

    def validate(self) -> typing.Iterable[str]:
        """Yield what is wrong with the options together: one sentence for each problem, naming the option."""
        return ()


Method._kind, Method._hooks = Method, hooks_of(Method)


@dataclass(frozen=True)
class WeightMethod(Method, kind=True):
    """Base class of every method that changes a weight: it says what ΔW is."""

    elementwise: ClassVar[bool] = False  # `apply` takes tensors with leading dimensions too, one set for each example
    any_shape: ClassVar[bool] = False  # True: takes vectors too, and the tensors are seen as they are stored

    # -- the mathematics ---------------------------------------------------------------------------------------

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        """Return trainable (`nn.Parameter`) and frozen (plain) tensors of a site. W: m × n float32; p: other kinds."""
        raise NotImplementedError

    def delta(self, W: Tensor, p: Params) -> Tensor:
        """Return ΔW, m × n: a pure, differentiable function of W and the tensors p, all in one floating dtype.

        Without one of its own, a method's ΔW is the product of its factors.
        """
        B, A = self.factors(p, W.shape).pair()
        return B @ A

    def effective(self, W: Tensor, p: Params) -> Tensor:
        """Return W + ΔW. Override only where ΔW is not what is stored."""
        return W + self.delta(W, p)

    def trainable(self, m: int, n: int) -> int:
        """Return how many numbers are trained at a site of m × n: a formula, tested against the real tensors."""
        raise NotImplementedError

    def check(self, m: int, n: int) -> str | None:
        """Return why this shape cannot be adapted with these options, or None."""
        return None

    def placed(self, count: int) -> "WeightMethod":
        """Return the method of a site at which `attach` was given positions, `count` of them.

        `init` then finds them as p["positions"]: flat in W, int64, rising, each once.
        """
        raise NotImplementedError

    # -- optional: faster forms ------------------------------------------------------------------------------------

    def factors(self, p: Params, shape: Shape) -> Factors:
        """Return ΔW as a product of thin matrices (see `Factors`), every scale included."""
        raise NotImplementedError

    def magnitude(self, W: Tensor, p: Params) -> Tensor:
        """Return c (m), where W + ΔW = diag(c) (W + product of the factors); W is in the base's dtype."""
        raise NotImplementedError

    def sparse(self, p: Params, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return (index: K sorted flat positions in the m × n matrix, values: K) with ΔW zero elsewhere."""
        raise NotImplementedError

    def blocks(self, p: Params, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """Return ΔW as K blocks (rows: K, columns: K, values: K × b × b), each with its corner at b · (row, column)."""
        raise NotImplementedError

    def apply(self, x: Tensor, base: Base, p: Params) -> Tensor:
        """Return the layer's output (…, m) from x (…, n) without forming ΔW. Tensors in p keep their own dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class Replace(WeightMethod):
    """A trained copy of W in its place, W_eff = value: heads named in `also_train`, and full fine-tuning."""

    any_shape: ClassVar[bool] = True

    @property
    def start(self) -> Start:
        """How far from the base it starts: 0, but in few bits it is W itself that is rounded."""
        if self.bits is None:
            return Start()
        return Start(1.25, f"a copy of W in {said(self.bits)}: ‖Ŵ − W‖ is at most 1.25 ‖W‖, near 0.6 ‖W‖ for 1 bit")

    def init(self, W: Tensor, rng: Stream, p: Params) -> Params:
        return {"value": nn.Parameter(W.clone())}

    def delta(self, W: Tensor, p: Params) -> Tensor:
        return p["value"] - W

    def effective(self, W: Tensor, p: Params) -> Tensor:
        return p["value"]

    def trainable(self, m: int, n: int) -> int:
        return m * n


def parse_options(cls: type[Method], given: dict[str, object]) -> Method:
    """Build a method from options by name, strings converted by the fields' types.

    Raises AddendaError for an unknown option (with the nearest names) and for values of the wrong type.
    """
    known_options(cls, given)
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {k: parse_value(v, hints[k]) if isinstance(v, str) else v for k, v in given.items()}
    return cls(**values)


def known_options(cls: type[Method], given: typing.Iterable[str]) -> None:
    """Raise AddendaError for names that are no options of this method, with the nearest ones."""
    fields = {f.name: f for f in sorted(dataclasses.fields(cls), key=lambda f: bool(f.kw_only))}
    unknown = [k for k in given if k not in fields]
    if unknown:
        listed = ", ".join(f"{f.name}={f.default!r}" for f in fields.values()) or "none"
        raise AddendaError(
            f"{cls.name or cls.__name__} has no option {', '.join(map(repr, unknown))}."
            f"{nearest(unknown[0], fields)} Its options: {listed}."
        )


def too_high(rank: int, m: int, n: int) -> str | None:
    """Return why an m × n matrix cannot have this rank, or None: a `check` of low-rank methods."""
    return f"rank {rank} is above min({m}, {n})" if rank > min(m, n) else None


def to_float(p: Params, dtype: torch.dtype = torch.float32) -> Params:
    """Return the same dict with floating tensors in one dtype; integer tensors as they are."""
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in p.items()}
