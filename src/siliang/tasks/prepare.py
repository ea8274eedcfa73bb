"""The data of a run, as its task reads it."""

from __future__ import annotations

from siliang.config import RunConfig
from siliang.data.design_effect import harmful_effect
from siliang.data.prepared import PreparedData
from siliang.data.row_beginnings import row_beginnings
from siliang.data.stream import check_streams
from siliang.language import Bilingual, local
from siliang.tasks import Task, task_of
from siliang.types import ConfigError

WORTH_SAYING = 0.1  # of what training computes
MOST_ROWS = 200_000  # of which it is known within a second or two


def prepare_data(config: RunConfig, why: str = "") -> PreparedData:
    """The data that check, plan and training take; nothing is read before it is asked for.

    Args:
        config: Settled, so that it says what labels are.
        why: They were taken for that.

    Raises:
        ConfigError: The task cannot follow a setting of training, or its rows cannot be streamed.
    """
    task = task_of(config)
    task.check_settings(config.train)
    if config.train.group_by_beginnings and _compares(task):
        raise ConfigError(
            Bilingual(
                f"train.group_by_beginnings = true: {task.title} compares the rows of a step with each other, and "
                "would compare only those that begin alike; leave it out.",
                f"train.group_by_beginnings = true：{task.title} 要把同一步的样本相互比较，"
                "这样就只比较开头相同的样本；请去掉。",
            )
        )
    spec, seed = task.data, config.train.seed
    if config.data.streaming:
        check_streams(config.data, spec, whole_steps=task.step_loss is not None, max_steps=config.train.max_steps)
    note = ""
    if why and config.classification is not None:
        problem = config.classification.problem
        note = Bilingual(
            f"classification.problem is {problem}: {why}", f"classification.problem 为 {problem}：{local(why, 'zh')}"
        )
    return PreparedData(config.data, spec, model=config.model, revision=config.revision, seed=seed, note=note)


def beginnings_note(config: RunConfig, data: PreparedData) -> Bilingual | None:
    """What `train.group_by_beginnings` would save, where shared beginnings are computed once; None where that is little
    or unknown, or where the settings do not allow it."""
    t = config.train
    if t.group_by_beginnings or not t.share_beginnings or config.data.streaming or len(data.train) > MOST_ROWS:
        return None
    if _compares(task_of(config)):
        return None
    found = row_beginnings(data.train)
    if harmful_effect(data.train, t.rows_per_step, found.order) is not None:  # less would be learned
        return None
    if not found.worth or (gain := found.gain(t.rows_per_step, t.batch_size)) < WORTH_SAYING:
        return None
    share, less = f"{100 * found.share:.0f}%", f"{100 * gain:.0f}%"
    return Bilingual(
        f"{share} of the tokens are beginnings that several rows have: with train.group_by_beginnings=true, which "
        f"changes the order of the rows, training computes about {less} fewer",
        f"{share} 的词元属于多条样本共有的开头：设 train.group_by_beginnings=true（样本的顺序会改变），"
        f"训练计算的词元约减少 {less}",
    )


def _compares(task: Task) -> bool:
    """Whether the loss compares the rows of a step with each other."""
    return task.step_loss is not None and task.step_loss.compares
