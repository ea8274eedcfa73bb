"""What `siliang eval --harness` has measured of a run, by the task of lm-eval."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from siliang.records.saved import Count, Date, Name, Number, Part


class HarnessTask(Part):
    """The last measurement of a task."""

    metrics: Annotated[dict[Name, Number], Field(max_length=1000)]
    """By lm-eval's names: acc, and acc_stderr for its standard error."""
    less_is_better: Annotated[list[Name], Field(max_length=1000)] = Field(default_factory=list)
    """Those of the metrics of which less is better."""
    rows: Count | None = None
    """null: of a group of tasks."""
    version: Name = ""
    """Of the task."""
    lm_eval: Name
    """lm-eval's own version."""
    few_shot: Count | None = None
    """Examples in front of each question; null: the task's own number."""
    chat: bool = False
    """The questions were asked in the run's template."""
    measured_at: Date
    """UTC, ISO 8601."""
