"""The settings of a run: the schema, how one is set by its name, and the messages for wrong ones.

Settings are parsed once, strictly. After parsing, a number is a number, a size is in bytes and a time in seconds.
"""

from siliang.config.classification import ClassificationConfig, Problem
from siliang.config.data import Columns, DataConfig
from siliang.config.describing import Setting, describe
from siliang.config.distributed import DistributedConfig
from siliang.config.embedding import EmbeddingConfig, EmbeddingLoss, RerankerConfig
from siliang.config.evaluation import BleuTokenizer, EvaluationConfig, MeasureName
from siliang.config.names import OWN_FIELDS, assign, differences, name_hint
from siliang.config.preference import LossName, PreferenceConfig
from siliang.config.quantization import QuantizationConfig
from siliang.config.run import MethodConfig, RunConfig
from siliang.config.section import Section, Seed, Settings
from siliang.config.sources import LAYOUT_NAMES, LayoutName, Source
from siliang.config.train import Bytes, Seconds, TrainConfig

__all__ = [
    "LAYOUT_NAMES",
    "OWN_FIELDS",
    "BleuTokenizer",
    "Bytes",
    "ClassificationConfig",
    "Columns",
    "DataConfig",
    "DistributedConfig",
    "EmbeddingConfig",
    "EmbeddingLoss",
    "EvaluationConfig",
    "LayoutName",
    "LossName",
    "MeasureName",
    "MethodConfig",
    "PreferenceConfig",
    "Problem",
    "QuantizationConfig",
    "RerankerConfig",
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
    "name_hint",
]
