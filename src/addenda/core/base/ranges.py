"""The range of every number that a call or a command is given: one table, read by all of them.

An option has one name and one meaning everywhere (`batch`, `rate`, `seed`, …), so its range is declared once, by that
name. `problems` is asked before anything is loaded or touched: by the functions under `core.base.arguments.checked`, by
the settings of a run, and by every command before it starts.
"""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MANY = 10**9  # more steps, tokens, examples or evaluations than anybody runs


@dataclass(frozen=True)
class Range:
    """An interval from `least` to `most`, both included unless `above` or `below` says so. whole: no fractions."""

    least: float
    most: float
    whole: bool = False
    above: bool = False
    below: bool = False

    def refusal(self, name: str, value: Any) -> str | None:
        """Return why an option of this name cannot have this value, or None where it can."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return f"{name} must be {'a whole number' if self.whole else 'a number'}, got {value!r}"
        number: Any = value  # compared as it is: a whole number above 1e308 is no float
        low = number > self.least if self.above else number >= self.least
        high = number < self.most if self.below else number <= self.most
        return None if low and high else f"{name} must be {self}, got {value!r}"

    def __str__(self) -> str:
        if self.most < 1000 and not (self.above or self.below):
            return f"from {_short(self.least)} to {_short(self.most)}"
        most = f"{'below' if self.below else 'at most'} {_short(self.most)}"
        if self.above and self.least == 0:
            return f"a positive number, {most}"
        return f"{'above' if self.above else 'at least'} {_short(self.least)}, {most}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:g}"


def _whole(least: int, most: int = MANY) -> Range:
    return Range(least, most, whole=True)


_COUNT, _WEIGHT, _SHARE = _whole(1), Range(0, 1e6), Range(0, 1)

RANGES: dict[str, Range] = {
    # training
    "steps": _COUNT,
    "epochs": Range(0, 1e6, above=True),
    "batch": _whole(1, 10**7),
    "accumulate": _whole(1, 10**7),
    "rate": Range(0, 1e6, above=True),
    "warmup": Range(0, MANY),
    "weight_decay": _WEIGHT,
    "clip": _WEIGHT,
    "consistency": _WEIGHT,
    "consistency_add": _WEIGHT,
    "seed": _whole(0, 2**32 - 1),
    "eval_every": _COUNT,
    "early_stop": _COUNT,
    "save_every": _COUNT,
    "keep": _COUNT,
    "memory_floor": _whole(0, 2**62),
    "head_bits": _whole(1, 8),
    "head_steps": _whole(0),
    "base_rows": _whole(1, 2**40),
    "noise": Range(0, 1e6),
    # data and models
    "max_length": _COUNT,
    "image_size": _whole(1, 10**5),
    "grid": _whole(1, 10**4),
    "max_new_tokens": _COUNT,
    "top_p": Range(0, 1, above=True),
    "labels": _whole(1, 10**7),
    # comparing
    "seeds": _whole(1, 10**4),
    "rates": _whole(1, 100),
    "search_steps": _COUNT,
    "workers": _whole(1, 256),
    "within": Range(0, MANY, above=True),
    "max_minutes": Range(0, MANY, above=True),
    "margin": Range(0, 100, above=True),
    "items": _whole(0),
    "validation": _COUNT,
    # ranking
    "top_k": _COUNT,
    "top": _COUNT,
    "limit": _COUNT,
    "held_share": Range(0, 1, above=True, below=True),
    "least_score": Range(-1e30, 1e30),
    "regression_weight": _WEIGHT,
    "pairs_weight": _WEIGHT,
    "zero_weight": _WEIGHT,
    "ranknet_weight": _WEIGHT,
    "adapter_width": _whole(1, 1 << 14),
    "queries": _COUNT,
    "depth": _COUNT,
    "stride": _whole(0),
    "negatives": _whole(1, 10**4),
    "lottery": _COUNT,
    "temperature": Range(0, 1e6, above=True),
    # transferring
    "tries": _COUNT,
    "threshold": Range(-1e6, 1e6),
    "sample_batch": _whole(1, 10**7),
    "max_tokens": _COUNT,
    "same_order": _COUNT,
    "lines": _whole(1, 10**4),
    # planning
    "length": _COUNT,
    "labelled": Range(0, 1, above=True),
    # compressing
    "ratio": Range(0, 1, above=True, below=True),
    "remove": Range(0, 1, above=True, below=True),
    "samples": _COUNT,
    "floor": _SHARE,
    "share": Range(0, 1, above=True),
    "rise": Range(0, 1e6),
    "multiple": _whole(1, 10**6),
    "judge": _COUNT,
    "humaneval": _whole(0, 10**4),
    "bits": _whole(1, 8),
    # other forms of a change
    "rank": _COUNT,
    "energy": Range(0, 1, above=True),
    "density": Range(0, 1, above=True),
    "window": _SHARE,
    "scale": Range(-1e6, 1e6),
    "max_lora_rank": _whole(1, 512),
    "count": _COUNT,
    # merging, and what a layer's rank may do
    "allow_loss": Range(0, 1e6),
}


WORDS: dict[str, tuple[str, ...]] = {
    "overflow": ("error", "drop", "truncate", "truncate_second"),
    "label_kind": ("class", "number"),
    "until": ("decided",),
}


def problems(given: Mapping[str, Any], ranges: Mapping[str, Range] | None = None) -> list[str]:
    """Return what is wrong with the numbers and words among these options; None and other types are never wrong.

    ranges: others for some of the names.
    """
    table = RANGES | dict(ranges or {})
    numbered = {k: v for k, v in given.items() if k in table and isinstance(v, numbers.Number | str)}
    worded = {k: v for k, v in given.items() if k in WORDS and v is not None and v not in WORDS[k]}
    refusals = [problem for name, value in numbered.items() if (problem := table[name].refusal(name, value))]
    return refusals + [f"{k} must be {' or '.join(map(repr, WORDS[k]))}, got {v!r}" for k, v in worded.items()]
