"""How good an order of documents is, by query: AP, nDCG@10, RR@10, R@k, as trec_eval has them (by `ir-measures`).

    AP        mean of the precisions at each answer; answers that are not in the run count 0
    nDCG@k    Σ grade / log2(rank + 1) over the first k, by the same of the best order
    RR@k      1 / rank of the first answer, 0 where it is not among the first k
    R@k       share of the answers that are among the first k

Every query that is judged counts, 0 where the run has no answer for it; queries of the run that are not judged do not.
Documents that are not judged are no answers. Of equal scores trec_eval takes the largest id first, RR@k (MS MARCO's)
the smallest: give runs through `trec.strict`, and all measures see one order.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from addenda.core.base.errors import AddendaError
from addenda.ranking.collection import Qrels, Run, check_finite
from addenda.ranking.lines import quoted

MEASURES = ("AP", "nDCG@10", "RR@10", "R@100")
_KNOWN = re.compile(r"AP|(AP|nDCG|RR|R|P)@[1-9]\d{0,5}|nDCG|RR")


def by_query(qrels: Qrels, run: Run, measures: Sequence[str] = MEASURES) -> dict[str, dict[str, float]]:
    """Return {measure: {query: value}}, values from 0 to 1, for each query of the judgements.

    Raises AddendaError for an unknown measure, judgements without an answer, scores that are not finite, a run of other
    queries, and where `ir-measures` is not installed.
    """
    unknown = [m for m in measures if not _KNOWN.fullmatch(m)]
    if unknown or not measures:
        got = quoted(unknown[0]) if unknown else "none"
        raise AddendaError(f"Expected measures such as {', '.join(MEASURES)}, P@5, nDCG or RR, got {got}.")
    _check(qrels, run)
    library = _library()
    parsed = {library.parse_measure(name): name for name in measures}
    judged = {q: {d: max(int(g), 0) for d, g in graded.items()} for q, graded in qrels.items()}
    answered = {q: dict(scores) for q, scores in run.items() if scores and q in judged}
    found: dict[str, dict[str, float]] = {name: dict.fromkeys(qrels, 0.0) for name in measures}
    for metric in library.iter_calc(list(parsed), judged, answered):
        found[parsed[metric.measure]][metric.query_id] = float(metric.value)
    return found


def means(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return each measure's mean over queries."""
    return {name: math.fsum(of.values()) / len(of) for name, of in values.items()}


def _check(qrels: Qrels, run: Run) -> None:
    if not qrels:
        raise AddendaError("There are no judgements to measure by. Give a split with some: collection.split('test').")
    empty = [q for q, graded in qrels.items() if not any(g > 0 for g in graded.values())]
    if empty:
        raise AddendaError(
            f"{len(empty)} of {len(qrels)} judged queries have no answer, query {quoted(empty[0])} for one, and every "
            "order is as good for them. Leave them out."
        )
    if run and not set(run) & set(qrels):
        raise AddendaError(
            f"The run answers {len(run)} queries, {quoted(next(iter(run)))} for one, and none of the {len(qrels)} that "
            "are judged: it is of another collection or split. Give the run of these queries."
        )
    check_finite(run)


def _library() -> Any:
    try:
        import ir_measures
    except ImportError as error:
        raise AddendaError(
            f'Rankings are measured by ir-measures: {error}. Run `pip install "addenda[ranking]"`.'
        ) from None
    return ir_measures
