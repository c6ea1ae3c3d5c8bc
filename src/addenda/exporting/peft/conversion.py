"""What a conversion between a method of PEFT and ours is: one object for each of PEFT's names, in a file of its own.

Reading: the tensors of a site and the config give a method and its tensors. Writing: all sites of an adapter that one
conversion takes give a config and tensors by key. PEFT has one config for a folder, with patterns for ranks and alphas
in a few methods; sites that would need two configs are refused with the options that differ.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor, nn

from addenda.core.base.errors import AddendaError
from addenda.core.forward.tensors import SiteTensors
from addenda.core.method.contract import Method, Params
from addenda.core.site.site import Site, owners_of, site_at
from addenda.exporting.install import Forms
from addenda.exporting.routes import Route

Config = dict[str, Any]

_PLAIN = frozenset({  # of every config: what changes nothing about how the saved tensors act
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_weights", "megatron_core",
    "runtime_config", "ensure_weight_tying", "modules_to_save",
})  # fmt: skip
_PATTERNS = 4000  # keys of a rank_pattern: more than a model has modules
_WAYS = 20  # the binary logarithm of how many ways to match an expression may have
_NEUTRAL = (None, False, 0, 0.0, "", "none")


@dataclass(frozen=True)
class Saved:
    """One site of a folder: its tensors by their names there, "lora_A.weight".

    name: what PEFT calls it, where that is not its path. raw: PEFT names the parameter itself (target_parameters) and
    sees it as it is stored, not as its layer does.
    """

    site: Site
    tensors: Mapping[str, Tensor]
    name: str = ""
    raw: bool = False

    @property
    def known_as(self) -> str:
        """The path by which patterns of a config name it."""
        return self.name or self.site.path

    @property
    def path(self) -> str:
        return self.site.path


@dataclass(frozen=True)
class Place:
    """Where PEFT puts a change of a weight: a module that it wraps, or a parameter that it names itself (raw)."""

    path: str
    module: nn.Module  # the weight's owner
    raw: bool = False


@dataclass(frozen=True)
class Live:
    """One site of an adapter that is to be written. places: where PEFT puts it; tied weights have more than one."""

    site: Site
    tensors: SiteTensors
    places: tuple[Place, ...] = ()

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def method(self) -> Any:
        return self.tensors.method

    def values(self) -> Params:
        """Return the tensors by name as the method's functions take them, detached, on the CPU, outside training."""
        return {k: t.detach().cpu() for k, t in self.tensors.tensors().items()}


@dataclass
class Written:
    """A folder in the making. tensors: by module path and PEFT's name there, "layers.0.q_proj.lora_A.weight"."""

    config: Config
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)  # those that stand under "base_model."
    modules: list[str] | str | None = None  # what target_modules names; None: the paths of all sites


class Conversion:
    """Base class: how one type of PEFT is read and written. Subclasses are stateless; one instance each."""

    type: ClassVar[str]  # "LORA"
    suffixes: ClassVar[tuple[str, ...]]  # names of a site's tensors in a folder
    shared: ClassVar[tuple[str, ...]] = ()  # names of tensors under "base_model.", that all sites share
    reads: ClassVar[frozenset[str]] = frozenset()  # keys of the config that `read` looks at
    ignores: ClassVar[frozenset[str]] = frozenset()  # keys that act in training only

    def place(
        self, model: nn.Module, config: Config, sites: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[list[Saved], list[str], list[str]]:
        """Return the sites that keys name, with their tensors, the paths that the model lacks, and other problems."""
        saved, missing, owners = [], [], owners_of(model)
        for path, tensors in sites.items():
            try:
                saved.append(Saved(site_at(model, path, owners), tensors))
            except AddendaError:
                missing.append(path)
        return saved, missing, []

    def read(self, config: Config, saved: Sequence[Saved], shared: Mapping[str, Tensor], forms: Forms) -> None:
        """Put the methods and tensors of all sites into `forms`. Raises AddendaError for what has no form here."""
        raise NotImplementedError

    def route(self, method: Method, site: Site) -> Route | None:
        """Return how a method is written at a site; None where this conversion is not for it."""
        raise NotImplementedError

    def write(self, live: Sequence[Live]) -> Written:
        """Return the config and tensors of these sites, each of which `route` has said is not refused."""
        raise NotImplementedError

    def check(self, config: Config) -> None:
        """Raise AddendaError for keys of the config that are set and that nothing here reads: they may change much."""
        unread = {
            k: v
            for k, v in config.items()
            if k not in self.reads | self.ignores | _PLAIN and v not in _NEUTRAL and v != {} and v != []
        }
        if unread:
            listed = ", ".join(f"{k}={str(v)[:60]!r}" for k, v in list(unread.items())[:6])
            raise AddendaError(
                f"This {self.type} adapter of PEFT was made with {listed}, which addenda does not read. Merge it in "
                "PEFT (merge_and_unload, then save_pretrained) and extract the change: addenda extract."
            )


def one(live: Sequence[Live], *options: str) -> dict[str, Any]:
    """Return the options that all sites must share, by name. Raises AddendaError with two sites that differ."""
    first = live[0]
    for option in options:
        for other in live[1:]:
            mine, its = getattr(first.method, option), getattr(other.method, option)
            if mine != its:
                raise AddendaError(
                    f"PEFT has one {option} for a whole adapter: {first.path} has {mine!r} and {other.path} {its!r}. "
                    "Export to 'merged', or give rank= or energy= for a LoRA, which may differ from site to site."
                )
    return {option: getattr(first.method, option) for option in options}


def pattern_value(patterns: object, path: str, default: Any, what: str) -> Any:
    """Return what a rank_pattern or alpha_pattern says of a path: of the first key that matches its end, or `default`.

    Keys are regular expressions in PEFT; those that could take for ever are refused.
    """
    if patterns in (None, {}):
        return default
    if not isinstance(patterns, dict):
        raise AddendaError(f"{what} of a PEFT config is a dict by path, got {str(patterns)[:80]}.")
    if len(patterns) > _PATTERNS:
        raise AddendaError(
            f"{what} of a PEFT config has {len(patterns):,} keys, and no more than {_PATTERNS:,} are read."
        )
    for key, value in patterns.items():
        if key == path:
            return value
        if not is_quick(key):
            raise AddendaError(f"{what} has the key {key[:80]!r}, which is no path and could take for ever to match.")
        if matches(rf"(.*\.)?({key})$", path, what):
            return value
    return default


@lru_cache(_PATTERNS)
def is_quick(expression: str, longest: int = 1000) -> bool:
    """Return whether a regular expression is short and has few ways to match a path: at most some million.

    It has no repetition inside of one, and each repetition, optional part and choice in parentheses multiplies them.
    """
    if len(expression) > longest or re.search(r"[+*?}]\s*\)?\s*[+*{]|\)\s*[+*{]|\(\?[a-zA-Z-]*x", expression):
        return False
    repeated = len(re.findall(r"[+*]|\{\d*,\d*\}", expression))
    optional = len(re.findall(r"(?<![(+*?}])\?", expression))  # but what is lazy, and (?:
    return repeated <= 4 and 4 * repeated + optional + _choices(expression) <= _WAYS


def _choices(expression: str) -> float:
    """Return the binary logarithm of the product of how many alternatives each pair of parentheses has."""
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", expression, flags=re.DOTALL)
    counts, at = [1], [0]  # of every pair, the first for what is in none; and of those that are open
    for sign in re.findall(r"[(|)]", plain):
        if sign == "(":
            at.append(len(counts))
            counts.append(1)
        elif sign == "|":
            counts[at[-1]] += 1
        elif len(at) > 1:
            at.pop()
    return sum(math.log2(n) for n in counts[1:])


@lru_cache(_PATTERNS)
def _compiled(expression: str) -> re.Pattern[str]:
    """Return an expression, compiled once: it is asked of every path."""
    return re.compile(expression)


def matches(expression: str, path: str, what: str) -> bool:
    """Return whether a path matches an expression from its beginning. Raises AddendaError where it is none."""
    try:
        return _compiled(expression).match(path) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise AddendaError(f"{what} has {expression[:80]!r}, which is no path or expression: {error}.") from None


def number(config: Config, key: str, kind: type[int] | type[float], default: Any = None) -> Any:
    """Return a finite number of a config. Raises AddendaError where it is none."""
    value = config.get(key, default)
    ok = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not ok or (kind is float and abs(value) > 1e30) or value != value:
        raise AddendaError(f"The config of this PEFT adapter has {key}={str(value)[:60]!r}, where a number is wanted.")
    return value


def expect(saved: Saved, shapes: Mapping[str, Sequence[int]], optional: Iterable[str] = ()) -> list[str]:
    """Return what is wrong with a site's tensors: names that lack or are too many, and shapes other than expected."""
    problems = [f"{saved.path} lacks {n}" for n in shapes if n not in saved.tensors and n not in set(optional)]
    problems += [f"{saved.path} has {n}, which was not expected" for n in saved.tensors if n not in shapes]
    problems += [
        f"{saved.path}: {n} is {list(saved.tensors[n].shape)}, and the config and the model say {list(shape)}"
        for n, shape in shapes.items()
        if n in saved.tensors and list(saved.tensors[n].shape) != list(shape)
    ]
    return problems


def refuse(problems: Sequence[str], what: str) -> None:
    """Raise AddendaError where there are problems."""
    if problems:
        more = f" … and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise AddendaError(f"{what}: {'; '.join(problems[:12])}{more}. Nothing was attached.")
