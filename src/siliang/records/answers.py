"""The schema of answers.json. Each run of a comparison has one next to its run.json."""

from __future__ import annotations

from pydantic import Field

from siliang.records.metrics import Metrics
from siliang.records.saved import Count, Part, Saved, Share

ANSWERS_NAME = "answers.json"


class Answer(Part):
    """The output of a model for one text."""

    where: str = ""
    """The held-out row, as file and line; empty for a prompt of the settings."""
    input: str
    expected: str | None = None
    """The reference from the data; None for a prompt of the settings."""
    predicted: str
    correct: bool | None = None
    """Whether `predicted` counts as right. None for a written text and for a prompt of the settings."""
    probability: Share | None = None
    """Of the class; None for text and tags."""


class Answers(Saved):
    """answers.json: a model's outputs for some of the held-out rows and for the prompts."""

    prompts: list[Answer] = Field(default_factory=list)
    """The same questions for every run of a comparison."""
    rows: list[Answer] = Field(default_factory=list)
    """Some of the held-out rows, the same for every run."""
    majority: Share | None = None
    """Share of the most frequent class among all held-out rows."""
    classes: Count | None = None
    """How many classes the data has."""
    metrics: Metrics = Field(default_factory=dict)
    """Metrics on the held-out rows for which the model must generate text: rouge_l."""
