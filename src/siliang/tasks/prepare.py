"""The data of a run, as its task reads it."""

from __future__ import annotations

from siliang.config import RunConfig
from siliang.data.prepared import PreparedData
from siliang.data.stream import check_streams
from siliang.language import Bilingual, local
from siliang.tasks import task_of


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
