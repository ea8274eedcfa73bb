"""Metrics of texts that are ranked for queries: recall, nDCG and the reciprocal rank of trec_eval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from siliang.tasks.task import Metric

DEPTH = 10  # ranks that count
NDCG, MRR = Metric("ndcg_at_10"), Metric("mrr_at_10")
RECALL_1, RECALL_10 = Metric("recall_at_1"), Metric("recall_at_10")
RANKING = (NDCG, RECALL_1, RECALL_10, MRR)
NAMES = {"ndcg_cut_10": NDCG, "recall_1": RECALL_1, "recall_10": RECALL_10, "recip_rank": MRR}

# Of the candidates of a query, by number. Equal scores are ranked by number: it must come from the candidate's content,
# and not from its place in the data, where positives come first.
Scores = Mapping[int, float]


def ranking(relevant: Sequence[Iterable[int]], scores: Iterable[Scores]) -> dict[str, float]:
    """The means over the queries.

    Args:
        relevant: The right candidates of each query, by number.
        scores: Of each query; the best DEPTH, and those with the score of the last of these, are enough.
    """
    from pytrec_eval import RelevanceEvaluator

    right = {str(q): {str(c): 1 for c in found} for q, found in enumerate(relevant)}
    evaluator = RelevanceEvaluator(right, {"ndcg_cut.10", "recall.1,10", "recip_rank"})
    runs = {str(q): _ranked(own) for q, own in enumerate(scores)}
    found = list(evaluator.evaluate(runs).values())
    return {metric.name: sum(one[name] for one in found) / len(found) for name, metric in NAMES.items()}


def in_order(scores: Scores) -> list[int]:
    """The candidates from the best to the worst."""
    return sorted(sorted(scores), key=lambda c: -scores[c])  # NaN changes no order


def _ranked(scores: Scores) -> dict[str, float]:
    """The first ranks as scores without ties, which trec_eval would rank by name."""
    return {str(c): float(-rank) for rank, c in enumerate(in_order(scores)[:DEPTH])}
