"""The settings of a run: the schema, setting one by its name, and what is said of wrong ones.

Each is parsed once, strictly: a number is a number behind it, a size is in bytes, a time in seconds.
"""

from siliang.config.data import LAYOUTS, Columns, DataConfig, LayoutName, Source
from siliang.config.describing import Setting, describe
from siliang.config.distributed import DistributedConfig
from siliang.config.names import OWN_FIELDS, assign, differences, name_here
from siliang.config.run import METHOD_FOLDERS, MethodConfig, QuantizationConfig, RunConfig
from siliang.config.section import Section, Seed, Settings
from siliang.config.train import Bytes, Seconds, TrainConfig

__all__ = [
    "LAYOUTS",
    "METHOD_FOLDERS",
    "OWN_FIELDS",
    "Bytes",
    "Columns",
    "DataConfig",
    "DistributedConfig",
    "LayoutName",
    "MethodConfig",
    "QuantizationConfig",
    "RunConfig",
    "Seconds",
    "Section",
    "Seed",
    "Setting",
    "Settings",
    "Source",
    "TrainConfig",
    "assign",
    "describe",
    "differences",
    "name_here",
]
