"""A separate run for each test of the plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from siliang.config import RunConfig


@pytest.fixture
def reviews(model_folders: dict[str, Path], review_file: Path, tmp_path: Path) -> RunConfig:
    model = tmp_path / "model"
    shutil.copytree(model_folders["bert"], model)
    values = json.loads((model / "config.json").read_text())  # dropout draws otherwise where batches are others
    values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(values))
    return RunConfig.build(
        {
            "model": str(model),
            "task": "seq_cls",
            "method": {"name": "lora", "lora_dropout": 0.0},
            "data": {"train": str(review_file), "max_length": 32},
            "train": {"batch_size": 16, "epochs": 2, "log_every": 1, "precision": "fp32"},
            "output": str(tmp_path / "run"),
        }
    )
