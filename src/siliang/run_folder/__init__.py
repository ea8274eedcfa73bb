"""A run's folder: its layout, changes of its base model and data since, and how it is opened. Later commands need only
the folder."""

from siliang.run_folder.changes import changed_base, changed_data, hashes, sources_of, what_changed
from siliang.run_folder.kept_format import kept_format, kept_weights, stored_format
from siliang.run_folder.layout import check_empty, create_output, read_config, write_config
from siliang.run_folder.model_alone import find_run_or_model
from siliang.run_folder.opened import (
    OpenedRun,
    TrainedRun,
    autocast,
    find_run,
    load_base,
    load_run_tokenizer,
    open_run,
    open_trained,
    weight_dtype,
)
from siliang.run_folder.served import served_tokenizer
from siliang.run_place import ADAPTER, CHECKPOINTS, CONFIG_NAME, MODEL, PREFIX, TRACKERS, checkpoints

__all__ = [
    "ADAPTER",
    "CHECKPOINTS",
    "CONFIG_NAME",
    "MODEL",
    "PREFIX",
    "TRACKERS",
    "OpenedRun",
    "TrainedRun",
    "autocast",
    "changed_base",
    "changed_data",
    "check_empty",
    "checkpoints",
    "create_output",
    "find_run",
    "find_run_or_model",
    "hashes",
    "kept_format",
    "kept_weights",
    "load_base",
    "load_run_tokenizer",
    "open_run",
    "open_trained",
    "read_config",
    "served_tokenizer",
    "sources_of",
    "stored_format",
    "weight_dtype",
    "what_changed",
    "write_config",
]
