"""What is learned: one file a task, and the table of them.

A task's row says all that the other packages ask: the rows and tokens that it learns from, the model, the loss, the
metrics, the verdict, what the plan and the display of tokens take, and how a trained run is used.
"""

from siliang.config import RunConfig
from siliang.records import Classification
from siliang.tasks.causal_lm import CAUSAL_LM
from siliang.tasks.embedding import EMBEDDING
from siliang.tasks.preference import PREFERENCE
from siliang.tasks.question_ans import QUESTION_ANS
from siliang.tasks.reranker import RERANKER
from siliang.tasks.reward import REWARD
from siliang.tasks.seq_2_seq_lm import SEQ_2_SEQ_LM
from siliang.tasks.seq_cls import SEQ_CLS
from siliang.tasks.task import (
    EntryValues,
    HeldOutAnswers,
    LabelHooks,
    Metric,
    Prediction,
    Reader,
    Reply,
    Shown,
    StepLoss,
    Task,
    Trained,
)
from siliang.tasks.token_cls import TOKEN_CLS
from siliang.types import TaskType

TASKS: dict[TaskType, Task] = {
    task.name: task
    for task in (
        CAUSAL_LM,
        PREFERENCE,
        REWARD,
        SEQ_CLS,
        TOKEN_CLS,
        SEQ_2_SEQ_LM,
        QUESTION_ANS,
        EMBEDDING,
        RERANKER,
    )
}


def task_of(config: RunConfig, layout: str = "", learned: Classification | None = None) -> Task:
    """The task of a run, with what its settings choose.

    Args:
        layout: Of its rows, where they are known.
        learned: What the run's record says of its labels, if there is one.

    Raises:
        ConfigError: The settings do not fit the model or the rows.
    """
    task = TASKS[config.task]
    task = task if task.with_settings is None else task.with_settings(task, config, learned)
    return task.on(layout) if layout else task


def settled(config: RunConfig, *, with_data: bool = True) -> tuple[RunConfig, str]:
    """The settings with what they leave to the data or to the base model, and why it was chosen; empty where they say
    it.

    Args:
        with_data: There is data. Without, what is left to the data stays open.

    Raises:
        DataError: The data cannot be read.
        ConfigError: A setting does not go together with what is in the data.
    """
    task = TASKS[config.task]
    if task.settle is None or (task.settled_by == "data" and not with_data):
        return config, ""
    return task.settle(task, config)


__all__ = [
    "CAUSAL_LM",
    "EMBEDDING",
    "PREFERENCE",
    "QUESTION_ANS",
    "RERANKER",
    "REWARD",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TASKS",
    "TOKEN_CLS",
    "EntryValues",
    "HeldOutAnswers",
    "LabelHooks",
    "Metric",
    "Prediction",
    "Reader",
    "Reply",
    "Shown",
    "StepLoss",
    "Task",
    "Trained",
    "settled",
    "task_of",
]
