"""What is learned: one file a task, and the table of them.

A task's row says all that the other rooms ask: the rows and tokens that it learns from, the model, the loss, the
figures, the verdict, what the plan and the display of tokens take, and how a trained run is used.
"""

from siliang.tasks.causal_lm import CAUSAL_LM
from siliang.tasks.question_ans import QUESTION_ANS
from siliang.tasks.seq_2_seq_lm import SEQ_2_SEQ_LM
from siliang.tasks.seq_cls import SEQ_CLS
from siliang.tasks.task import (
    EVAL_LOSS,
    LOSS,
    EntryValues,
    Figure,
    Prediction,
    Reader,
    Reply,
    Said,
    Shown,
    StepLoss,
    Task,
    Trained,
)
from siliang.tasks.token_cls import TOKEN_CLS
from siliang.types import TaskType

TASKS: dict[TaskType, Task] = {task.name: task for task in (CAUSAL_LM, SEQ_CLS, TOKEN_CLS, SEQ_2_SEQ_LM, QUESTION_ANS)}
FIGURES: dict[str, Figure] = {
    figure.name: figure for figure in (LOSS, EVAL_LOSS, *(figure for task in TASKS.values() for figure in task.figures))
}


def find_figure(name: str) -> Figure:
    """The figure of that name; of one that no task chooses by, more is better."""
    return FIGURES.get(name, Figure(name))


__all__ = [
    "CAUSAL_LM",
    "FIGURES",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TASKS",
    "TOKEN_CLS",
    "EntryValues",
    "Figure",
    "Prediction",
    "Reader",
    "Reply",
    "Said",
    "Shown",
    "StepLoss",
    "Task",
    "Trained",
    "find_figure",
]
