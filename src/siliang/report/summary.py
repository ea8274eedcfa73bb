"""Means and standard deviations over seeds, the Pareto front, and the recommended method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import mean, stdev

from siliang.records import Record, Verdict
from siliang.report.gather import Group, ReportData
from siliang.tasks import Metric

SAME_COST = 1.02  # two runs of one method differ by up to this factor: a smaller difference in cost does not count
GOOD_ENOUGH = 0.95  # share of the best quality that a small method must reach to be recommended


@dataclass(frozen=True)
class Mean:
    """A metric over seeds.

    Attributes:
        std: The standard deviation of the sample; None for one seed.
        n: The number of seeds.
    """

    value: float
    std: float | None
    n: int

    @classmethod
    def from_values(cls, values: Iterable[float]) -> Mean | None:
        """The mean of the finite values; None if there are none."""
        finite = [v for v in values if math.isfinite(v)]
        return cls(mean(finite), stdev(finite) if len(finite) > 1 else None, len(finite)) if finite else None

    @classmethod
    def over_seeds(cls, values: Iterable[tuple[int, float]]) -> Mean | None:
        """The same of (seed, value): several runs with one seed count as one, with their mean."""
        by_seed: dict[int, list[float]] = {}
        for seed, value in values:
            if math.isfinite(value):
                by_seed.setdefault(seed, []).append(value)
        return cls.from_values(mean(same) for same in by_seed.values())


@dataclass(frozen=True)
class MethodSummary:
    """One method of the report. Metrics are means over its finished runs; None if no run has the metric.

    Attributes:
        above: Peak memory in bytes, minus the memory in use before the first step.
        train_speed: Tokens per second of the steps, without evaluations and checkpoints.
        eval_speed: Rows per second.
        score: The main metric of the task.
        verdicts: One verdict for each run that learned nothing.
        errors: (seed, error) of each failed run.
        seeds: The number of different seeds of its finished runs.
        on_front: No other method is better with as little memory.
    """

    label: str
    total: int
    trained: int
    saved_bytes: int
    learning_rate: float
    peak: Mean | None
    above: Mean | None
    train_speed: Mean | None
    eval_speed: Mean | None
    minutes: Mean | None
    loss: Mean | None
    score: Mean | None
    others: dict[str, Mean]
    verdicts: list[Verdict]
    errors: list[tuple[int, str]]
    runs: int
    seeds: int
    on_front: bool = False

    @property
    def learned(self) -> bool:
        """The method has metrics, and at least half of its runs learned something."""
        return self.score is not None and len(self.verdicts) * 2 <= self.score.n

    @property
    def share(self) -> float:
        """The trained share of the parameters."""
        return self.trained / self.total if self.total else 0.0


@dataclass(frozen=True)
class Recommendation:
    """The recommended method.

    Attributes:
        best: The best method; None if no method learned anything.
        tied: Methods whose difference from the best is within the standard deviations.
        small: A much smaller method that is nearly as good.
        share: The quality of `small`, as a share of the best method's.
        fewer: How many times fewer parameters `small` trains.
    """

    best: MethodSummary | None
    tied: list[MethodSummary]
    small: MethodSummary | None = None
    share: float = 0.0
    fewer: float = 0.0


def summarize(data: ReportData) -> list[MethodSummary]:
    """One summary per method, in the order of the comparison."""
    quality = data.task_row.quality
    methods = [_summarize(group, quality) for group in data.groups]
    best = pareto(methods, quality, lambda method: method.peak) if len(methods) > 1 else []
    front = {method.label for method in best}
    return [replace(method, on_front=method.label in front) for method in methods]


def pareto(
    methods: list[MethodSummary], quality: Metric, cost: Callable[[MethodSummary], Mean | None]
) -> list[MethodSummary]:
    """The Pareto front: methods that learned something, where no other method is better at the same or lower cost."""
    usable = [
        (method, method.score.value, c.value)
        for method in methods
        if method.learned and method.score and (c := cost(method))
    ]
    return [
        method
        for method, score, c in usable
        if not any(
            (quality.better(s, score) and k <= c * SAME_COST) or (not quality.better(score, s) and k * SAME_COST < c)
            for _, s, k in usable
        )
    ]


def recommend(methods: list[MethodSummary], data: ReportData) -> Recommendation:
    """The best method, the methods tied with it, and the smallest method that is nearly as good."""
    quality = data.task_row.quality
    usable = [method for method in methods if method.learned]
    if not usable:
        return Recommendation(None, [])
    best = max(usable, key=lambda method: _value(method) * (1 if quality.higher else -1))
    tied = [method for method in usable if method is not best and _are_tied(method, best)]
    smaller = [
        (method, share)
        for method in usable
        if method is not best
        and method.trained * 2 <= best.trained
        and (share := _share(method, best, data, quality)) >= GOOD_ENOUGH
    ]
    if not smaller:
        return Recommendation(best, tied)
    small, share = min(smaller, key=lambda pair: pair[0].trained)
    return Recommendation(best, tied, small, share, best.trained / max(small.trained, 1))


def _share(method: MethodSummary, best: MethodSummary, data: ReportData, quality: Metric) -> float:
    """The method's quality as a share of the best one's; for a loss, the reductions of the base model's loss."""
    if quality.higher:
        return _value(method) / _value(best) if _value(best) else 0.0
    base = data.base.get("eval_loss")
    if base is None or base <= _value(best):
        return 0.0
    return (base - _value(method)) / (base - _value(best))


def _value(method: MethodSummary) -> float:
    assert method.score is not None
    return method.score.value


def _are_tied(a: MethodSummary, b: MethodSummary) -> bool:
    """Whether the difference of the means is within the standard deviations over seeds."""
    assert a.score is not None and b.score is not None
    if a.score.std is None or b.score.std is None:
        return a.score.value == b.score.value
    return abs(a.score.value - b.score.value) <= math.hypot(a.score.std, b.score.std)


def _summarize(group: Group, quality: Metric) -> MethodSummary:
    records = [run.record for run in group.finished if run.record is not None]
    first = records[0] if records else None

    def mean_of(value: Callable[[Record], float]) -> Mean | None:
        return Mean.over_seeds((record.seed, value(record)) for record in records)

    names = {name for record in records for name in record.final} - {"eval_loss", "train_loss", quality.name}
    others = {
        name: m
        for name in sorted(names)
        if (m := Mean.over_seeds((r.seed, r.final[name]) for r in records if name in r.final))
    }
    of_answers = [(run.seed, run.answers.metrics) for run in group.finished if run.answers is not None]
    for name in sorted({key for _, metrics in of_answers for key in metrics}):
        if m := Mean.over_seeds((seed, metrics[name]) for seed, metrics in of_answers if name in metrics):
            others[name] = m
    others |= _of_harness(records)
    return MethodSummary(
        label=group.label,
        total=first.parameters.total if first else 0,
        trained=first.parameters.trained if first else 0,
        saved_bytes=first.parameters.adapter_bytes if first else 0,
        learning_rate=first.learning_rate if first else 0.0,
        peak=mean_of(lambda r: r.memory.peak_bytes),
        above=mean_of(lambda r: r.memory.above_bytes),
        train_speed=mean_of(lambda r: r.tokens_trained / r.seconds.steps if r.seconds.steps else math.nan),
        eval_speed=mean_of(lambda r: r.rows.eval / r.seconds.eval if r.seconds.eval else math.nan),
        minutes=mean_of(lambda r: r.seconds.train / 60),
        loss=mean_of(lambda r: r.final.get("eval_loss", math.nan)),
        score=mean_of(lambda r: r.final.get(quality.name, math.nan)),
        others=others,
        verdicts=[run.verdict for run in group.finished if run.verdict is not None],
        errors=[(run.seed, run.error) for run in group.runs if run.error is not None],
        runs=len(group.runs),
        seeds=len({record.seed for record in records}),
    )


def _of_harness(records: list[Record]) -> dict[str, Mean]:
    """The metrics of lm-eval's tasks, by TASK/METRIC; not their standard errors, which are over rows and not seeds."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for task, measured in record.harness.items():
            for name, value in measured.metrics.items():
                if not name.partition(",")[0].endswith("_stderr"):
                    found.setdefault(f"{task}/{name}", []).append((record.seed, value))
    return {name: m for name, values in sorted(found.items()) if (m := Mean.over_seeds(values))}
