"""What the records say: means and spreads over seeds, which methods no other beats, and the answer in two sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import mean, stdev

from siliang.records import Record, Verdict
from siliang.report.gather import Group, Material
from siliang.tasks import TASKS, Metric

SAME_COST = 1.02  # costs that differ by less are the same: so much two runs of one method differ by
GOOD_ENOUGH = 0.95  # of the best quality, for a method that is recommended because it is small


@dataclass(frozen=True)
class Mean:
    """A metric over seeds.

    Attributes:
        spread: The sample's standard deviation; None of one run.
        n: Runs.
    """

    value: float
    spread: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean | None:
        """Of the finite values; None without any."""
        found = [v for v in values if math.isfinite(v)]
        return cls(mean(found), stdev(found) if len(found) > 1 else None, len(found)) if found else None


@dataclass(frozen=True)
class Line:
    """A method's line in the table; metrics are means over its finished runs, None where there is none.

    Attributes:
        above: Peak memory in bytes above what was in use before the first step.
        train_speed: Tokens a second of the steps, without evaluations and checkpoints.
        eval_speed: Rows a second.
        score: The metric that the task is judged by.
        verdicts: Why runs have learned nothing, one for each that has not.
        errors: Why runs failed, with their seed.
        on_front: No other method is both better and leaner in memory.
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
    on_front: bool = False

    @property
    def learned(self) -> bool:
        """It has metrics, and at least half of its runs learned something."""
        return self.score is not None and len(self.verdicts) * 2 <= self.score.n

    @property
    def share(self) -> float:
        """Of the parameters, trained ones."""
        return self.trained / self.total if self.total else 0.0


@dataclass(frozen=True)
class Answer:
    """The answer to "which method?".

    Attributes:
        best: None where no method learned anything.
        tied: Methods that the seeds cannot tell from it.
        small: A much smaller method that is nearly as good.
        share: Of the best method's quality, that of `small`.
        fewer: How many times fewer parameters `small` trains.
    """

    best: Line | None
    tied: list[Line]
    small: Line | None = None
    share: float = 0.0
    fewer: float = 0.0


def lines(material: Material) -> list[Line]:
    """The table, a line a method, in the order of the comparison."""
    quality = TASKS[material.task].quality
    found = [_line(group, quality) for group in material.groups]
    front = {line.label for line in pareto(found, quality, lambda line: line.peak)} if len(found) > 1 else set()
    return [replace(line, on_front=line.label in front) for line in found]


def pareto(found: list[Line], quality: Metric, cost: Callable[[Line], Mean | None]) -> list[Line]:
    """The methods that learned something, and that no other beats in quality at the same cost or less."""
    usable = [(line, line.score.value, c.value) for line in found if line.learned and line.score and (c := cost(line))]
    return [
        line
        for line, score, c in usable
        if not any(
            (quality.better(s, score) and k <= c * SAME_COST) or (not quality.better(score, s) and k * SAME_COST < c)
            for _, s, k in usable
        )
    ]


def answer(found: list[Line], material: Material) -> Answer:
    """The best method, those as good, and the smallest that is nearly as good."""
    quality = TASKS[material.task].quality
    usable = [line for line in found if line.learned]
    if not usable:
        return Answer(None, [])
    best = max(usable, key=lambda line: _value(line) * (1 if quality.higher else -1))
    tied = [line for line in usable if line is not best and _cannot_tell(line, best)]
    smaller = [
        (line, share)
        for line in usable
        if line is not best
        and line.trained * 2 <= best.trained
        and (share := _share(line, best, material, quality)) >= GOOD_ENOUGH
    ]
    if not smaller:
        return Answer(best, tied)
    small, share = min(smaller, key=lambda pair: pair[0].trained)
    return Answer(best, tied, small, share, best.trained / max(small.trained, 1))


def _share(line: Line, best: Line, material: Material, quality: Metric) -> float:
    """Of the best's quality; of a loss, of what the best took off the base's."""
    if quality.higher:
        return _value(line) / _value(best) if _value(best) else 0.0
    base = material.base.get("eval_loss")
    if base is None or base <= _value(best):
        return 0.0
    return (base - _value(line)) / (base - _value(best))


def _value(line: Line) -> float:
    assert line.score is not None
    return line.score.value


def _cannot_tell(a: Line, b: Line) -> bool:
    """The difference of the means is within the spread of the seeds."""
    assert a.score is not None and b.score is not None
    if a.score.spread is None or b.score.spread is None:
        return a.score.value == b.score.value
    return abs(a.score.value - b.score.value) <= math.hypot(a.score.spread, b.score.spread)


def _line(group: Group, quality: Metric) -> Line:
    records = [run.record for run in group.finished if run.record is not None]
    first = records[0] if records else None

    def over(value: Callable[[Record], float]) -> Mean | None:
        return Mean.of(value(record) for record in records)

    names = {name for record in records for name in record.final} - {"eval_loss", "train_loss", quality.name}
    others = {name: m for name in sorted(names) if (m := Mean.of(r.final[name] for r in records if name in r.final))}
    written = [run.answers.metrics for run in group.finished if run.answers is not None]
    for name in sorted({key for metrics in written for key in metrics}):
        if m := Mean.of(metrics[name] for metrics in written if name in metrics):
            others[name] = m
    return Line(
        label=group.label,
        total=first.parameters.total if first else 0,
        trained=first.parameters.trained if first else 0,
        saved_bytes=first.parameters.adapter_bytes if first else 0,
        learning_rate=first.learning_rate if first else 0.0,
        peak=over(lambda r: r.memory.peak_bytes),
        above=over(lambda r: r.memory.above_bytes),
        train_speed=over(lambda r: r.tokens_trained / r.seconds.steps if r.seconds.steps else math.nan),
        eval_speed=over(lambda r: r.rows.eval / r.seconds.eval if r.seconds.eval else math.nan),
        minutes=over(lambda r: r.seconds.train / 60),
        loss=over(lambda r: r.final.get("eval_loss", math.nan)),
        score=over(lambda r: r.final.get(quality.name, math.nan)),
        others=others,
        verdicts=[run.verdict for run in group.finished if run.verdict is not None],
        errors=[(run.seed, run.error) for run in group.runs if run.error is not None],
        runs=len(group.runs),
    )
