"""How much is left for a reranker: Debian's collections by language, and what BM25 and e5 find in pools of them.

A pool is good for a comparison where the first stage has most answers among its first hundred (R@100 ≥ 0.75), so that
they can be ordered, and orders them neither at random nor perfectly (AP from 0.3 to 0.8). The texts are fetched by apt
where they lack; e5 is the embedded bi-encoder (`addenda setup-demo --encoder e5`). --arms "de|fi": those languages,
others stay.
"""

from typing import Any

from addenda.ranking.apt import fetch
from addenda.ranking.bi_encoder import BiEncoder
from addenda.ranking.debian import LANGUAGES, collection, usable
from addenda.ranking.first_stage import first_stage
from addenda.ranking.measures import by_query, means
from addenda.ranking.trec import strict

POOL = 600  # documents
LEAST, RANGE = 0.75, (0.3, 0.8)  # R@100, AP
MEASURES = ("AP", "nDCG@10", "R@100")


def run(given: Any) -> tuple[list[dict], str]:
    folder, encoder = fetch(LANGUAGES, progress=print), BiEncoder.load("e5", device="cpu")
    asked = set(given.arms.split("|")) if given.arms else {"en", *LANGUAGES}
    rows = [row for row in given.earlier or () if row["language"] not in asked]
    for language in (code for code in ("en", *LANGUAGES) if code in asked):
        pool = collection(language, limit=POOL, folder=folder)
        judged = pool.split("test")
        row: dict[str, Any] = {
            "language": language,
            "usable": sum(1 for _ in usable(folder, language, "en")),
            "documents": len(pool.documents),
            "queries": len(judged),
            "near": len(pool.near),
            "digest": pool.digest(),
        }
        for name, by in (("bm25", "bm25"), ("e5", encoder)):
            found = strict(first_stage(pool, by, queries=judged, k=100))  # pyright: ignore[reportArgumentType]
            row[name] = means(by_query(judged, found, MEASURES))
        row["fit"] = row["e5"]["R@100"] >= LEAST and RANGE[0] <= row["e5"]["AP"] <= RANGE[1]
        rows.append(row)
        print(_line(row), flush=True)
    head = "| documents in | usable | pool | queries | digest | BM25: AP | R@100 | e5: AP | nDCG@10 | R@100 | fit |"
    return rows, "\n".join([head, "| --- |" + " ---: |" * 3 + " --- |" + " ---: |" * 5 + " --- |", *map(_line, rows)])


def _line(row: dict) -> str:
    bm25, e5 = row["bm25"], row["e5"]
    cells = [row["language"], f"{row['usable']:,}", row["documents"], row["queries"], row["digest"]]
    cells += [f"{v:.2f}" for v in (bm25["AP"], bm25["R@100"], e5["AP"], e5["nDCG@10"], e5["R@100"])]
    return f"| {' | '.join(map(str, cells))} | {'yes' if row['fit'] else 'no'} |"
