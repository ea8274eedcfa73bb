"""The data of a run, as its task reads it."""

from __future__ import annotations

from siliang.config import RunConfig
from siliang.data.prepared import PreparedData
from siliang.data.stream import check_streams
from siliang.tasks import task_of


def prepare_data(config: RunConfig) -> PreparedData:
    """The data that check, plan and training take; nothing is read before it is asked for.

    Raises:
        ConfigError: The task cannot follow a setting of training, or its rows cannot be streamed.
    """
    task = task_of(config)
    task.check_settings(config.train)
    spec, seed = task.data, config.train.seed
    if config.data.streaming:
        check_streams(config.data, spec, whole_steps=task.step_loss is not None, max_steps=config.train.max_steps)
    return PreparedData(config.data, spec, model=config.model, revision=config.revision, seed=seed)
