"""The data of a run, as its task reads it."""

from __future__ import annotations

from siliang.config import RunConfig
from siliang.data.prepared import PreparedData
from siliang.tasks import task_of


def prepare_data(config: RunConfig) -> PreparedData:
    """The data that check, plan and training take; nothing is read before it is asked for.

    Raises:
        ConfigError: The task cannot follow a setting of training.
    """
    task = task_of(config)
    task.check_settings(config.train)
    spec, seed = task.data, config.train.seed
    return PreparedData(config.data, spec, model=config.model, revision=config.revision, seed=seed)
