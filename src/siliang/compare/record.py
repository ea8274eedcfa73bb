"""The schema of comparison.json, and of answers.json, which each of its runs keeps beside run.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from siliang.record import File, Part, Saved

COMPARISON_NAME = "comparison.json"
ANSWERS_NAME = "answers.json"
SCHEMA_VERSION = 1


class Trial(Part):
    """One run of the comparison: a method, its settings, a seed."""

    method: str
    """The method's label."""
    seed: int
    purpose: Literal["search", "test"]
    """search: to choose settings, on the validation rows. test: for the table, on the held-out rows."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What the search gives or gave: learning_rate, or fields of the method's config."""
    folder: str
    """The run's folder, seen from the comparison's."""
    status: Literal["waiting", "running", "completed", "failed"] = "waiting"
    error: str | None = None
    attempts: int = 0
    """How often it was begun: more than once where the comparison was interrupted."""


class Comparison(Saved):
    """comparison.json."""

    schema_version: int = SCHEMA_VERSION
    status: Literal["running", "completed"] = "running"
    started_at: str
    """UTC, ISO 8601."""
    config: dict[str, Any]
    """The resolved compare.yaml."""
    given: dict[str, Any]
    """The same without what is at its default."""
    model_files: dict[str, str] = Field(default_factory=dict)
    """The SHA-256 of each file of the base model."""
    data_files: list[File] = Field(default_factory=list)
    """The same for each source of the data."""
    base: dict[str, float] = Field(default_factory=dict)
    """What the untuned base model reaches on the held-out rows; empty where it has no head for the task."""
    steps: dict[str, int] = Field(default_factory=dict)
    """With a budget in minutes: the steps of each method that fit into it."""
    chosen: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """The settings that the search found best for each method."""
    trials: list[Trial] = Field(default_factory=list)


class Answer(Part):
    """What a model says to one text."""

    where: str = ""
    """The held-out row, as file and line; empty for a prompt of the settings."""
    asked: str
    right: str | None = None
    """What the data says; None for a prompt of the settings."""
    given: str
    correct: bool | None = None
    """Whether `given` counts as `right`; None where nothing judges it: a written text, a prompt of the settings."""
    probability: float | None = None
    """Of the class; None for text and tags."""


class Answers(Saved):
    """answers.json: what a run's model says, for whoever wants to see more than figures."""

    prompts: list[Answer] = Field(default_factory=list)
    """The same questions for every run of a comparison."""
    rows: list[Answer] = Field(default_factory=list)
    """Some of the held-out rows, the same for every run."""
    majority: float | None = None
    """Share of the most frequent class among all held-out rows."""
    classes: int | None = None
    """How many classes the data has."""
    figures: dict[str, float] = Field(default_factory=dict)
    """Metrics on the held-out rows that take writing: rouge_l."""
