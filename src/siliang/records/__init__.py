"""The schemas of all records: runs, comparisons, answers, plans and verdicts. Reports read nothing else."""

from siliang.records.answers import ANSWERS_NAME, Answer, Answers
from siliang.records.classes import Classification, ClassMetrics, ClassReport, Mistake
from siliang.records.comparison import COMPARISON_NAME, Comparison, Trial, metrics_of
from siliang.records.harness import HarnessTask
from siliang.records.kept_weights import KeptWeights
from siliang.records.metrics import Metrics
from siliang.records.plan import CATEGORIES, Category, Change, Fit, MethodPlan, PlanRecord
from siliang.records.run import (
    RECORD_NAME,
    Counts,
    Device,
    File,
    Learned,
    Memory,
    Predicted,
    Record,
    Rows,
    Seconds,
    StepMetrics,
)
from siliang.records.saved import MAX_BYTES, Part, Saved, explained, plain
from siliang.records.verdict import Verdict

__all__ = [
    "ANSWERS_NAME",
    "CATEGORIES",
    "COMPARISON_NAME",
    "MAX_BYTES",
    "RECORD_NAME",
    "Answer",
    "Answers",
    "Category",
    "Change",
    "ClassMetrics",
    "ClassReport",
    "Classification",
    "Comparison",
    "Counts",
    "Device",
    "File",
    "Fit",
    "HarnessTask",
    "KeptWeights",
    "Learned",
    "Memory",
    "MethodPlan",
    "Metrics",
    "Mistake",
    "Part",
    "PlanRecord",
    "Predicted",
    "Record",
    "Rows",
    "Saved",
    "Seconds",
    "StepMetrics",
    "Trial",
    "Verdict",
    "explained",
    "metrics_of",
    "plain",
]
