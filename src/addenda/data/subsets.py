"""Small training sets out of large ones, by hash: the same examples on every machine.

    "8/class"    8 examples of every class to learn from, and 8 others of each to choose by (few-shot)
    "vtab"       800 to learn from and 200 to choose by, as VTAB-1k's thousand are split (arXiv:1910.04867)
    "8/class@3"  another draw

VTAB's protocol chooses hyperparameters by the 200 and then learns once more from all 1,000; here nothing is learned
from what was chosen by, so that both halves of a comparison see the same 800. The test set chooses nothing.
"""

import re
from dataclasses import dataclass, replace

from addenda.core.base.errors import AddendaError
from addenda.data.examples import Data, share

VTAB = (800, 200)


@dataclass(frozen=True)
class Subset:
    """A small training set. per_class: examples of each class, None: VTAB's thousand; draw: which of all such sets."""

    per_class: int | None
    draw: int = 0

    @classmethod
    def parse(cls, text: str) -> "Subset":
        """Parse "N/class" and "vtab", with or without "@DRAW". Raises AddendaError for anything else."""
        match = re.fullmatch(r"(?:([1-9]\d*)/class|vtab)(?:@(\d+))?", text.strip())
        if not match:
            raise AddendaError(f"Expected a subset such as 8/class, vtab or 8/class@1 (another draw), got {text!r}.")
        return cls(int(match[1]) if match[1] else None, int(match[2] or 0))

    def of(self, data: Data) -> tuple[Data, Data]:
        """Return (to learn from, to choose by), ordered by hash; no example is in both, nor twice in one.

        Raises AddendaError where there are too few different examples, or no classes.
        """
        by_key = {e.key: e for e in data.examples}
        order = sorted(by_key.values(), key=lambda e: (share(e.key, self.draw), e.key))
        if self.per_class is None:
            (n, m), examples = VTAB, order
            if len(order) < n + m:
                raise AddendaError(f"vtab takes {n} + {m} different examples, {data.source} has {len(order)}.")
            return replace(data, examples=tuple(examples[:n])), replace(data, examples=tuple(examples[n : n + m]))
        if not data.labels:
            raise AddendaError(f"{self.per_class}/class wants examples with classes, {data.source} has none.")
        return self._by_class(data, order, self.per_class)

    def _by_class(self, data: Data, order: list, n: int) -> tuple[Data, Data]:
        counts: dict[int, int] = dict.fromkeys(range(len(data.labels or ())), 0)
        learn, choose = [], []
        for example in order:
            i = counts[example.label]
            counts[example.label] += 1
            if i < 2 * n:
                (learn if i < n else choose).append(example)
        shortages = [f"{(data.labels or ())[c]} ({k})" for c, k in counts.items() if k < 2 * n]
        if shortages:
            raise AddendaError(
                f"{n}/class takes {2 * n} different examples of every class: {n} to learn from and {n} to choose by. "
                f"{data.source} has fewer of {', '.join(shortages[:8])}. Choose a smaller number, or give more."
            )
        return replace(data, examples=tuple(learn)), replace(data, examples=tuple(choose))
