"""Metrics of texts that are ranked for queries: recall, nDCG and the reciprocal rank of trec_eval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from siliang.tasks.task import Metric

DEPTH = 10  # ranks that count
NDCG, MRR = Metric("ndcg_at_10"), Metric("mrr_at_10")
RECALL_1, RECALL_10 = Metric("recall_at_1"), Metric("recall_at_10")
RANKING = (NDCG, RECALL_1, RECALL_10, MRR)
NAMES = {"ndcg_cut_10": NDCG, "recall_1": RECALL_1, "recall_10": RECALL_10, "recip_rank": MRR}

Scores = Mapping[int, float]  # of the candidates of a query, by number; the best DEPTH of them are enough


def ranking(relevant: Sequence[Iterable[int]], scores: Iterable[Scores]) -> dict[str, float]:
    """The means over the queries.

    Args:
        relevant: The right candidates of each query, by number.
        scores: Of each query.
    """
    from pytrec_eval import RelevanceEvaluator

    right = {str(q): {str(c): 1 for c in found} for q, found in enumerate(relevant)}
    evaluator = RelevanceEvaluator(right, {"ndcg_cut.10", "recall.1,10", "recip_rank"})
    runs = {str(q): _best(own) for q, own in enumerate(scores)}
    found = list(evaluator.evaluate(runs).values())
    return {metric.name: sum(one[name] for one in found) / len(found) for name, metric in NAMES.items()}


def spearman(scores: Sequence[float], expected: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one of both is always the same."""
    from scipy.stats import spearmanr

    if len(set(scores)) < 2 or len(set(expected)) < 2:
        return 0.0
    found: Any = spearmanr(scores, expected)
    return float(found.statistic)


def _best(scores: Scores) -> dict[str, float]:
    best = sorted(scores, key=lambda c: -scores[c])[:DEPTH]
    return {str(c): float(scores[c]) for c in best}
