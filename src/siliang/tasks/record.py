"""The record of a run, read as its task needs it."""

from __future__ import annotations

from pathlib import Path

from siliang.config import RunConfig
from siliang.language import Bilingual
from siliang.records import Record
from siliang.records.run import RECORD_NAME
from siliang.tasks import Task, task_of
from siliang.types import RecordError


def task_in(record: Record) -> Task:
    """The task of a run, with what its record says of it."""
    return task_of(RunConfig.recorded(record.config), record.layout, record.classification)


def read_record(folder: Path) -> Record:
    """Reads run.json.

    Raises:
        ConfigError: It is missing.
        RecordError: It is damaged, or lacks what its task needs.
    """
    record = Record.read(folder)
    task = task_in(record)
    if task.data.named is not None and not record.labels:
        path = folder / RECORD_NAME
        raise RecordError(
            Bilingual(
                f"{path} is damaged: labels must be a list of names: its task is {task.title}.",
                f"{path} 已损坏：labels 应为名称的列表：任务是 {task.title}。",
            )
        )
    return record
