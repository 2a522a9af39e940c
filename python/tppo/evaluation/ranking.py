"""An answer as a ranked list of queries, held against the queries that truly came next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tppo.evaluation.judge import FORMAT, formats, sessions_of
from tppo.labels.queries import parse_answer, query_key

if TYPE_CHECKING:
    from tppo.rewards import Answers

NEXT_QUERY = "next-query"  # the name of the judge
CUTOFFS = (1, 3, 10)


class NextQueryJudge:
    """Whether the true next queries stand in the answer, and how early: see `rank_figures`."""

    name = NEXT_QUERY

    def __call__(self, answers: Answers) -> dict[str, list[float]]:
        """Errors: DataError where the answers have no column of sessions."""
        targets = [s.targets for s in sessions_of(answers, self.name)]
        return rank_figures(targets, answers.texts) | {FORMAT: formats(answers, targets)}


def rank_figures(
    targets: Sequence[Sequence[str]], texts: Sequence[str]
) -> dict[str, list[float]]:
    """Figures of ranked lists, one answer a list of true queries.

    The list is the answer's queries in their order, the first at rank 1.  A query is relevant where
    it has the words of a true next query, both folded, in any order (`query_key`), and no earlier
    query of the answer has them; an irrelevant or repeated one keeps its rank.  With g_r = 1 where
    rank r is relevant, else 0, and n true queries that differ:

        mrr          1 / the first r with g_r = 1; 0 without one
        recall_at_k  sum_{r <= k} g_r / n
        ndcg         sum_r g_r / log2(r + 1)  /  sum_{r <= n} 1 / log2(r + 1)
                     (Jarvelin and Kekalainen, 2002, with gains 0 and 1)
    """
    figures: dict[str, list[float]] = {"mrr": [], "ndcg": []}
    figures |= {f"recall_at_{k}": [] for k in CUTOFFS}
    for queries, text in zip(targets, texts, strict=True):
        true = {key for query in queries if (key := query_key(query))}
        ranks, left = [], set(true)
        for rank, query in enumerate(parse_answer(text), start=1):
            if (key := query_key(query)) in left:
                left.discard(key)
                ranks.append(rank)
        ideal = sum(_discount(rank) for rank in range(1, len(true) + 1))
        figures["mrr"].append(1 / ranks[0] if ranks else 0.0)
        figures["ndcg"].append(sum(map(_discount, ranks)) / ideal if true else 0.0)
        for k in CUTOFFS:
            hits = sum(rank <= k for rank in ranks)
            figures[f"recall_at_{k}"].append(hits / len(true) if true else 0.0)
    return figures


def _discount(rank: int) -> float:
    return 1 / math.log2(rank + 1)
